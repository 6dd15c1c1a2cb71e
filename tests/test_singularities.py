"""Measurements before each ReLU, against plain statistics."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.runner.priority import get_priority
from torch import Tensor, nn

import ws_mm
from ws_mm.singularities import FILE, Moments, SingularitiesHook, measure


def test_report_against_the_definitions():
    torch.manual_seed(0)
    scale = torch.tensor([1.0, 0.5, 2.0, 1e-3])
    shift = torch.tensor([0.0, 2.0, -5.5, -1.0])
    x = torch.randn(6, 4, 40, 50) * scale.view(1, -1, 1, 1)
    x = x + shift.view(1, -1, 1, 1)
    # Rarely negative, unlike the Gaussian of its moments.
    x[:, 1] = torch.rand(6, 40, 50) - 0.002
    report = (Moments.of(x[:2]) + Moments.of(x[2:])).report()
    rows = x.double().transpose(0, 1).flatten(1)
    mean, std = rows.mean(1), rows.std(1, correction=0)
    normal = torch.distributions.Normal(0.0, 1.0)
    firing = normal.cdf(mean / std)
    rare = torch.minimum(firing, 1 - firing)
    share = (rows > 0).double().mean(1)
    rare_share = torch.minimum(share, 1 - share)
    for threshold, text in ((1e-2, '0.01'), (1e-3, '0.001')):
        expected = (rare < threshold).double().mean().item()
        assert report[f'gaussian_below_{text}'] == expected
        expected = (rare_share < threshold).double().mean().item()
        assert report[f'empirical_below_{text}'] == expected
    gaussians = torch.distributions.Normal(mean, std)
    kl = torch.distributions.kl_divergence(
        gaussians, torch.distributions.Normal(0.0, 1.0)
    )
    assert report['kl'] == pytest.approx(kl.mean().item(), rel=1e-6)
    # None of these can stand for another.
    assert report['gaussian_below_0.01'] == 0.5
    assert report['gaussian_below_0.001'] == 0.25
    assert report['empirical_below_0.01'] == 0.75


def test_constant_channels_are_eliminated():
    x = torch.tensor([0.0, 3.0, -2.0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    report = Moments.of(x).report()
    assert {v for k, v in report.items() if k != 'kl'} == {1.0}
    squares = 0.0, 9.0, 4.0
    kls = [(square - 1 - math.log(1e-12)) / 2 for square in squares]
    assert report['kl'] == pytest.approx(sum(kls) / 3)
    # Zero is not positive: half of these fire.
    half = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    assert Moments.of(half).report()['empirical_below_0.01'] == 0


class Net(nn.Module):
    """One ReLU for all; the second norm's output is added to first."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm1 = ws_mm.BCN(8, 4)
        self.norm2 = nn.BatchNorm2d(8)
        self.norm3 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        seen = self.norm1(x)
        self.seen1 = seen.clone()
        y = self.relu(seen)
        y = self.relu(self.norm2(y) + y)
        out = self.norm3(y)
        self.seen3 = out.clone()
        return self.relu(out)


def test_only_relus_that_directly_follow_a_norm_and_nothing_changes():
    torch.manual_seed(0)
    net = Net().train()
    net.norm2.eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    images = torch.randn(4, 3, 9, 9)
    seen = []

    def run(model):
        assert not torch.is_grad_enabled()
        for image in images.split(2):
            model(image)
            seen.append((model.seen1, model.seen3))

    found = measure(net, run)
    assert list(found) == ['norm1', 'norm3']
    for index, name in enumerate(found):
        parts = [Moments.of(pair[index]) for pair in seen]
        assert found[name] == (parts[0] + parts[1]).report()
    assert net.training
    assert net.norm1.training
    assert not net.norm2.training
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert not net.relu._forward_pre_hooks
    assert measure(net, lambda model: model(images[:0])) == {}


class Trained(BaseModel):
    def __init__(self, relu: bool = True):
        super().__init__()
        self.net = Net() if relu else nn.Conv2d(3, 2, 3)

    def forward(self, inputs, mode='tensor'):
        y = self.net(inputs)
        return {'loss': (y - 1).square().mean()} if mode == 'loss' else [y]


class Nothing(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return {'nothing': 0.0}


def runner(
    tmp_path, *hooks, validate=True, relu=True, name='run', val_interval=100
) -> Runner:
    torch.manual_seed(0)
    images = [(image,) for image in torch.randn(6, 3, 9, 9)]
    loader = dict(
        dataset=images,
        batch_size=2,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=lambda batch: [torch.stack([b[0] for b in batch])],
    )
    validation = dict(
        val_dataloader=loader, val_cfg=dict(), val_evaluator=[Nothing()]
    )
    return Runner(
        model=Trained(relu),
        work_dir=str(tmp_path / name),
        train_dataloader={
            **loader,
            'sampler': dict(type='InfiniteSampler', shuffle=True),
        },
        train_cfg=dict(by_epoch=False, max_iters=5, val_interval=val_interval),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        custom_hooks=[*hooks],
        randomness=dict(seed=1),
        log_level='ERROR',
        experiment_name=f'{tmp_path.name}_{name}',
        visualizer=dict(
            type='Visualizer',
            vis_backends=[dict(type='LocalVisBackend')],
            name=f'{tmp_path.name}_{name}',
        ),
        **(validation if validate else {}),
    )


def test_hook_measures_start_interval_and_end(tmp_path):
    hook = dict(type='ws_mm.SingularitiesHook', interval=2, num_batches=2)
    run = runner(tmp_path, hook)
    run.train()
    lines = (tmp_path / 'run' / FILE).read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    assert [line['iteration'] for line in lines] == [0, 2, 4, 5]
    assert list(lines[0]['layers']) == ['net.norm1', 'net.norm3']
    # Of the fixed images, the first four, with the weights of the end.
    model = run.model

    def again(model):
        for batch in list(run.val_dataloader)[:2]:
            model.val_step(batch)

    assert measure(model, again) == lines[-1]['layers']
    assert lines[0]['layers'] != lines[-1]['layers']
    (scalars,) = (tmp_path / 'run').glob('*/vis_data/scalars.json')
    kls = [
        json.loads(line)['singularities/kl']
        for line in scalars.read_text().splitlines()
        if 'singularities' in line
    ]
    assert kls[-1] == pytest.approx(
        sum(layer['kl'] for layer in lines[-1]['layers'].values()) / 2
    )


def test_the_end_of_a_training_that_stops_early_is_measured(tmp_path):
    stop = dict(
        type='EarlyStoppingHook', monitor='nothing', rule='less', patience=1
    )
    hook = SingularitiesHook(interval=3, num_batches=1)
    runner(tmp_path, hook, stop, val_interval=1).train()
    lines = (tmp_path / 'run' / FILE).read_text().splitlines()
    assert [json.loads(line)['iteration'] for line in lines] == [0, 2]


def test_training_is_the_same_with_the_hook(tmp_path):
    states = []
    hooks = SingularitiesHook(interval=1), SingularitiesHook(interval=99)
    for index, hook in enumerate(hooks):
        run = runner(tmp_path, hook, name=f'same{index}')
        run.train()
        states.append(run.model.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_wrong_arguments_and_configs_are_rejected(tmp_path):
    with pytest.raises(ValueError, match='interval=0 must be.*at least 1'):
        SingularitiesHook(interval=0)
    with pytest.raises(ValueError, match="num_batches='a' must be"):
        SingularitiesHook(num_batches='a')
    with pytest.raises(ValueError, match='set val_dataloader'):
        runner(tmp_path, SingularitiesHook(), validate=False, name='a').train()
    with pytest.raises(ValueError, match='no ReLU module'):
        runner(tmp_path, SingularitiesHook(), relu=False, name='b').train()


def test_shares_at_the_threshold_are_not_below_it() -> None:
    # One positive value of a hundred.
    x = torch.full((1, 1, 10, 10), -1.0)
    x[..., 0, 0] = 1
    report = Moments.of(x).report()
    assert report['empirical_below_0.01'] == 0
    assert Moments.of(x[..., 1:]).report()['empirical_below_0.01'] == 1


@pytest.mark.parametrize(
    'norm',
    [
        nn.BatchNorm2d(8),
        nn.SyncBatchNorm(8),
        nn.GroupNorm(4, 8),
        ws_mm.BCN(8, 4),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_relus_after_each_kind_of_norm_are_measured(norm: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU())
    found = measure(net, lambda model: model(torch.randn(2, 3, 9, 9)))
    assert list(found) == ['1']


class Branches(nn.Module):
    """A ReLU that runs twice in place, and late behind the first norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(3)
        self.norm2 = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        first = self.norm1(x)
        second = self.norm2(first)
        y = self.relu(self.relu(second))
        return y + self.relu(first)


def test_what_a_norm_gave_counts_once_and_until_the_next() -> None:
    x = torch.randn(2, 3, 9, 9)
    net = Branches()
    found = measure(net, lambda model: model(x))
    assert list(found) == ['norm2']
    with torch.no_grad():
        net.eval()
        seen = net.norm2(net.norm1(x))
    assert found['norm2'] == Moments.of(seen).report()


class ByKeyword(nn.Sequential):
    """Layers that take their input by its name."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(input=x)
        return x


def test_a_relu_that_takes_its_input_by_keyword_is_measured() -> None:
    x = torch.randn(2, 3, 9, 9)
    layers = nn.BatchNorm2d(3), nn.ReLU()
    found = measure(ByKeyword(*layers), lambda model: model(x))
    assert found
    assert found == measure(nn.Sequential(*layers), lambda model: model(x))


def test_it_measures_with_the_estimates_that_a_checkpoint_has() -> None:
    averages = get_priority(ws_mm.SyncEstimatesHook.priority)
    measures = get_priority(SingularitiesHook.priority)
    saves = get_priority(CheckpointHook.priority)
    assert averages < measures < saves


def test_only_the_first_rank_writes_what_all_measure(tmp_path: Path) -> None:
    runner = SimpleNamespace(
        rank=1,
        iter=7,
        model=nn.DataParallel(Trained()),
        val_loop=object(),
        val_dataloader=[[torch.randn(2, 3, 9, 9)]],
        work_dir=str(tmp_path),
        visualizer=mock.Mock(),
    )
    hook = SingularitiesHook()
    hook.before_train(runner)
    assert not list(tmp_path.iterdir())
    assert not runner.visualizer.mock_calls
    runner.rank = 0
    hook.before_train(runner)
    line = json.loads((tmp_path / FILE).read_text())
    # Where the run goes on, and by names without those of a wrapper.
    assert line['iteration'] == 7
    assert list(line['layers']) == ['net.norm1', 'net.norm3']
    assert runner.visualizer.add_scalars.call_args.kwargs == dict(step=7)
