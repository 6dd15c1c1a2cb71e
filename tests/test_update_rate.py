"""The momentum of BCN follows the schedules of the experiments."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn

import ws_mm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tools'))
from experiments.update_rate import (
    UpdateRateHook,
    learning_rate_share,
)


def pretended(model: nn.Module, group: dict[str, float]) -> Any:
    return SimpleNamespace(
        model=model, optim_wrapper=SimpleNamespace(param_groups=[group])
    )


@pytest.mark.parametrize(
    ('schedule', 'expected'),
    [
        # of momentum 0.1 and 0.4, at (t, lr / initial_lr)
        ('debiased', [(1, 1), (0.25, 0.4), (0.1, 0.4), (0.1, 0.4)]),
        ('learning rate', [(0.05, 0.2), (0.1, 0.4), (0.1, 0.4), (0, 0)]),
        ('both', [(1, 1), (0.25, 0.4), (0.1, 0.4), (0.01, 0.01)]),
    ],
)
def test_rates_of_every_schedule(schedule, expected):
    model = nn.Sequential(ws_mm.BCN(4), nn.Conv2d(4, 4, 1), ws_mm.BCN(4))
    model[0].momentum, model[2].momentum = 0.1, 0.4
    group = {'initial_lr': 0.2}
    runner = pretended(model, group)
    hook = UpdateRateHook(schedule)
    hook.before_train(runner)
    places = [(0, 0.1), (3, 0.2), (20, 0.7), (99, 0.0)]
    for (runner.iter, group['lr']), rates in zip(
        places, expected, strict=True
    ):
        hook.before_train_iter(runner, 0)
        found = [model[0].momentum, model[2].momentum]
        assert found == pytest.approx(list(rates))
    hook.after_train(runner)
    assert [model[0].momentum, model[2].momentum] == [0.1, 0.4]


def test_the_highest_learning_rate_share_counts():
    slow, fast = {'lr': 1.0, 'initial_lr': 4.0}, {'lr': 1.0, 'initial_lr': 2.0}
    frozen, plain = {'lr': 0.0, 'initial_lr': 0.0}, {'lr': 0.3}
    assert learning_rate_share([slow, fast]) == 0.5
    assert learning_rate_share([frozen, slow]) == 0.25
    assert learning_rate_share({'a': [slow], 'b': [fast]}) == 0.5
    assert learning_rate_share([plain]) == 1
    assert learning_rate_share([{'lr': 3.0, 'initial_lr': 1.0}]) == 1


def test_an_unknown_schedule_is_rejected():
    with pytest.raises(
        ValueError, match="schedule='lr' is not one of 'debiased'"
    ):
        UpdateRateHook('lr')


class Trained(BaseModel):
    """One convolution and its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = (
            nn.Conv2d(3, 4, 3),
            ws_mm.BCN(4, 2, momentum=0.1),
        )

    def forward(self, inputs: Tensor, mode: str = 'tensor') -> Any:
        return {'loss': (self.norm(self.conv(inputs)) - inputs.mean()).std()}


class Watch(Hook):
    """The rate at the end of every iteration."""

    def __init__(self, seen: list[float]) -> None:
        self.seen = seen

    def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        self.seen.append(runner.model.norm.momentum)


def train(folder: Any, steps: int = 8, resume: bool = False) -> Any:
    torch.manual_seed(0)
    seen: list[float] = []
    runner = Runner(
        model=Trained(),
        work_dir=str(folder),
        train_dataloader=dict(
            dataset=[(image,) for image in torch.randn(8, 3, 6, 6)],
            batch_size=1,
            sampler=dict(type='InfiniteSampler', shuffle=False),
            collate_fn=lambda batch: [torch.stack([b[0] for b in batch])],
        ),
        train_cfg=dict(by_epoch=False, max_iters=steps),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        param_scheduler=dict(
            type='PolyLR', power=1.0, begin=0, end=8, by_epoch=False
        ),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=4)
        ),
        custom_hooks=[
            dict(type=UpdateRateHook, schedule='both'),
            Watch(seen),
        ],
        resume=resume,
        log_level='ERROR',
        experiment_name=f'{folder}-{resume}'.replace('/', '-'),
    )
    runner.train()
    assert runner.model.norm.momentum == 0.1
    return seen, runner.model.state_dict()


def test_a_training_resumed_at_its_middle_has_the_same_rates(tmp_path):
    seen, expected = train(tmp_path / 'whole')
    shares = [1 - t / 8 for t in range(8)]
    assert seen == pytest.approx(
        [max(0.1 * s, 1 / (t + 1)) for t, s in enumerate(shares)]
    )
    first, _ = train(tmp_path / 'halves', steps=4)
    second, found = train(tmp_path / 'halves', resume=True)
    assert first + second == pytest.approx(seen)
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)
