"""Trainings of mmengine's Runner in two gloo processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.dist import get_rank
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner
from torch import Tensor, nn

from ws_mm import BCN, WSConv2d, running_statistics

HOOK = dict(type='ws_mm.SyncEstimatesHook')
# As mmdet's and mmyolo's configs have it: before hooks of priority NORMAL.
EMA = dict(type='EMAHook', momentum=0.1, priority=49)


class Small(BaseModel):
    """A segmentor of two classes that notes what it validates with."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            WSConv2d(3, 8, 3, bias=False),
            BCN(8, 4),
            nn.ReLU(),
            WSConv2d(8, 8, 3, bias=False),
            BCN(8, 4),
            nn.ReLU(),
            nn.Conv2d(8, 2, 1),
        )
        self.validated: list[dict[str, Tensor]] = []

    def forward(self, inputs: Tensor, target: Tensor, mode: str) -> Any:
        logits = self.body(inputs)
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(logits, target))
        self.validated.append(
            {k: v.clone() for k, v in self.named_buffers() if v.numel() > 1}
        )
        return [dict(score=logits.mean().item())]


class Score(BaseMetric):
    def process(self, data_batch: Any, data_samples: list[Any]) -> None:
        self.results += data_samples

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        return dict(score=sum(r['score'] for r in results))


def make_data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        dict(
            inputs=torch.randn(3, 9, 9, generator=generator) * (1 + i) + i,
            target=torch.randint(2, (5, 5), generator=generator),
        )
        for i in range(8)
    ]


def train(
    rank: int,
    folder: Path,
    by_epoch: bool,
    hooks: list[dict[str, Any]],
    steps: int = 4,
    resume: bool = False,
    broadcast_buffers: bool = False,
) -> list[dict[str, Tensor]]:
    """Train; the buffers of each validation of this rank."""
    torch.manual_seed(1)
    running_statistics._reported.clear()  # of earlier tests in this process
    loader = dict(
        batch_size=1,
        num_workers=0,
        dataset=make_data(),
        collate_fn=dict(type='default_collate'),
    )
    # As long as two iterations of two processes, or else for ever.
    train_set = make_data()[:4] if by_epoch else make_data()
    sampler = 'DefaultSampler' if by_epoch else 'InfiniteSampler'
    if by_epoch:
        loop = dict(by_epoch=True, max_epochs=steps // 2, val_interval=1)
    else:
        loop = dict(by_epoch=False, max_iters=steps, val_interval=2)
    model = Small()
    runner = Runner(
        # On a CPU the Runner's own wrapper wants a config for it.
        model=MMDistributedDataParallel(
            model, broadcast_buffers=broadcast_buffers
        ),
        work_dir=str(folder),
        train_dataloader=dict(
            **{**loader, 'dataset': train_set}, sampler=dict(type=sampler)
        ),
        val_dataloader=dict(
            **loader, sampler=dict(type='DefaultSampler', shuffle=False)
        ),
        train_cfg=loop,
        val_cfg=dict(),
        # Without a folder mmengine leaves one where it was called from.
        val_evaluator=Evaluator(Score(collect_dir=str(folder / 'collect'))),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05)),
        default_hooks=dict(
            logger=None,
            checkpoint=dict(
                type='CheckpointHook',
                by_epoch=by_epoch,
                interval=1 if by_epoch else 2,
            ),
        ),
        custom_hooks=hooks,
        launcher='pytorch',
        resume=resume,
        randomness=dict(seed=3),
        log_level='WARNING',
        experiment_name=f'{folder}-{resume}'.replace('/', '-'),
    )
    runner.train()
    assert get_rank() == rank
    return model.validated[:: len(make_data()) // 2]


def saved(folder: Path) -> list[dict[str, Tensor]]:
    """The estimates in each checkpoint, in their order."""
    found = [
        {
            name: values
            for name, values in torch.load(path, weights_only=False)[
                'state_dict'
            ].items()
            if 'running' in name
        }
        for path in sorted(folder.glob('*_[0-9].pth'))
    ]
    assert len(found) == 2
    return found


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    assert left.keys() == right.keys()
    assert len(left) == 4
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize('by_epoch', [True, False])
@pytest.mark.parametrize(
    'others', [[], [EMA], [{**EMA, 'update_buffers': True}]], ids=str
)
def test_what_is_saved_was_validated(by_epoch, others, world, tmp_path):
    ranks = world(2).run(train, tmp_path, by_epoch, [*others, HOOK])
    checkpoints = saved(tmp_path)
    assert len(ranks[0]) == len(ranks[1]) == 2
    for i, checkpoint in enumerate(checkpoints):
        assert same(ranks[0][i], ranks[1][i])
        assert same(ranks[0][i], checkpoint)
    assert not same(*checkpoints)


def test_a_resumed_training_ends_as_the_uninterrupted(world, tmp_path):
    whole, halves = tmp_path / 'whole', tmp_path / 'halves'
    world(2).run(train, whole, False, [HOOK])
    world(2).run(train, halves, False, [HOOK], steps=2)
    world(2).run(train, halves, False, [HOOK], resume=True)
    for left, right in zip(saved(whole), saved(halves), strict=True):
        assert same(left, right)


@pytest.mark.parametrize(
    ('others', 'broadcast'),
    [([HOOK], False), ([dict(type='SyncBuffersHook')], False), ([], True)],
    ids=str,
)
def test_the_hook_twice_or_beside_what_the_host_has_changes_nothing(
    others, broadcast, world, tmp_path
):
    plain, beside = tmp_path / 'plain', tmp_path / 'beside'
    world(2).run(train, plain, False, [HOOK])
    world(2).run(
        train, beside, False, [*others, HOOK], broadcast_buffers=broadcast
    )
    for left, right in zip(saved(plain), saved(beside), strict=True):
        for name, values in left.items():
            torch.testing.assert_close(values, right[name])


@pytest.mark.parametrize('hooks', [[], [HOOK]], ids=['without', 'with'])
def test_the_log_names_the_missing_hook_once(hooks, world, tmp_path):
    world(2).run(train, tmp_path, False, hooks, steps=2)
    logs = ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    assert 'has no metainfo' in logs  # another warning: the log is read
    assert logs.count("dict(type='ws_mm.SyncEstimatesHook')") == (not hooks)
