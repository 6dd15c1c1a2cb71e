"""Rows of the host contract: ranks.

Each row starts two gloo processes on the CPU.
"""

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from mmdet.engine.hooks.sync_norm_hook import SyncNormHook, get_norm_states
from mmengine.hooks import SyncBuffersHook
from mmengine.model import MMDistributedDataParallel
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from proofs import small_run
from proofs.peers.authors import BCNorm
from proofs.peers.rows import main, observe
from support.ranks import in_ranks
from support.tensors import relative_error

NORMS = {
    'BN': nn.BatchNorm2d,
    "authors' BCN": partial(BCNorm, num_groups=4),
}
EMA = dict(type='EMAHook', momentum=0.1, priority=49)
SYNC = dict(type='SyncBuffersHook')
Buffers = dict[str, Tensor]


def distance(left: Buffers, right: Buffers) -> str:
    """Compare the running means of two models."""
    error = max(
        relative_error(right[name], left[name])
        for name in left
        if name.endswith('running_mean')
    )
    return 'equal' if error < 1e-6 else f'off by {error:.1g}'


def buffers_of(model: nn.Module) -> Buffers:
    """A copy of the running statistics."""
    return {
        name: values.clone()
        for name, values in model.named_buffers()
        if 'running' in name
    }


def train(
    rank: int, folder: str, norm: str, by_epoch: bool, hooks: list[Any]
) -> Buffers:
    """Train two iterations, save, validate: what this rank validated with."""
    torch.manual_seed(1)
    images = [
        dict(
            inputs=torch.randn(3, 9, 9) * (1 + i) + i,
            target=torch.randint(2, (7, 7)),
        )
        for i in range(4)
    ]
    norm_layer = NORMS[norm](8)
    model = small_run.Small(
        nn.Conv2d(3, 8, 3), norm_layer, nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    small_run.train(
        Path(folder),
        model,
        images,
        hooks,
        by_epoch=by_epoch,
        steps=2,
        shuffle=False,
        ranks=True,
    )
    return model.validated[0]


def run_of(norm: str, by_epoch: bool, hooks: list[Any]) -> str:
    """Compare the ranks with each other and with the saved file."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = in_ranks(train, folder, norm, by_epoch, hooks)
        (path,) = Path(folder).glob('*_[0-9].pth')
        state = torch.load(path, weights_only=False)['state_dict']
    return (
        f'rank 1 to rank 0 {distance(*ranks)}, '
        f'checkpoint to validation of rank 0 {distance(ranks[0], state)}'
    )


def of_norms(by_epoch: bool, hooks: list[Any]) -> str:
    """The same run with each layer."""
    return '; '.join(
        f'{norm}: {observe(partial(run_of, norm, by_epoch, hooks))}'
        for norm in NORMS
    )


def of_loops(hooks: list[Any]) -> str:
    """The same run in both loops."""
    return ' | '.join(
        f'{name} loop: {of_norms(by_epoch, hooks)}'
        for name, by_epoch in (('epoch', True), ('iter', False))
    )


def wrapped(norm: str, broadcast: bool = False) -> MMDistributedDataParallel:
    """A layer in mmengine's wrapper, in training."""
    return MMDistributedDataParallel(
        NORMS[norm](8), broadcast_buffers=broadcast
    ).train()


def on_one_process(norm: str, x: Tensor) -> Buffers:
    """The statistics after a step on all images."""
    layer = NORMS[norm](8)
    layer(x)
    return buffers_of(layer)


def weights_rank(rank: int, norm: str, x: Tensor) -> Buffers:
    """Three images on rank 0 and one on rank 1, then SyncBuffersHook."""
    model = wrapped(norm)
    model(x.split([3, 1])[rank])
    hook = SyncBuffersHook()
    hook.after_train_epoch(mock.Mock(model=model))
    return buffers_of(model.module)


def unequal() -> str:
    """SyncBuffersHook after batches of three images and one."""
    torch.manual_seed(0)
    x = torch.randn(4, 8, 5, 5) + torch.arange(4.0).view(4, 1, 1, 1)
    return '; '.join(
        f'{norm}: '
        + distance(on_one_process(norm, x), in_ranks(weights_rank, norm, x)[0])
        + ' from one process'
        for norm in NORMS
    )


def broadcast_rank(rank: int, norm: str) -> float:
    """Rank 1 sees other images than rank 0; how much of them rank 1 keeps."""
    model = wrapped(norm, broadcast=True)
    torch.manual_seed(0)
    x = torch.randn(1, 8, 5, 5) + 10 * rank
    for _ in range(20):
        model(x)
    state = buffers_of(model.module)
    name = next(name for name in state if name.endswith('running_mean'))
    return float(state[name].mean())


def broadcast() -> str:
    """broadcast_buffers=True of DDP: images of mean 0, and of mean 10."""
    lines = []
    for norm in NORMS:
        first, second = in_ranks(broadcast_rank, norm)
        lines.append(
            f'{norm}: images of mean 0 and 10, after 20 steps rank 0 holds '
            f'{first:.2f}, rank 1 {second:.2f}'
        )
    return '; '.join(lines)


def sync_norm() -> str:
    """List the buffers that mmdet's SyncNormHook synchronizes."""
    counts = {
        name: len(get_norm_states(norm(8))) for name, norm in NORMS.items()
    }
    names = [name for name in dir(SyncNormHook) if name.startswith('before_')]
    assert 'before_val_epoch' in names
    return ', '.join(f'{name}: {n} entries' for name, n in counts.items())


def sync_bn_rank(rank: int, layers: int) -> list[int]:
    """Count what torch.nn.SyncBatchNorm sends.

    It refuses the CPU; here its own autograd function runs with stand-ins for
    the four GPU kernels that it calls.
    """

    def gathered(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros(x.shape[1]), torch.ones(x.shape[1])

    def reduced(dy: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(x.shape[1]) for _ in range(4))

    modules = [nn.SyncBatchNorm(8) for _ in range(layers)]

    def forward(x: Tensor) -> Tensor:
        for m in modules:
            x = SyncBatchNorm.apply(
                x,
                m.weight,
                m.bias,
                m.running_mean,
                m.running_var,
                m.eps,
                m.momentum,
                dist.group.WORLD,
                2,
            )
        return x

    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    with mock.patch.multiple(
        torch,
        batch_norm_stats=gathered,
        batch_norm_gather_stats_with_counts=gathered,
        batch_norm_elemt=lambda x, *_: x.clone(),
        batch_norm_backward_reduce=reduced,
        batch_norm_backward_elemt=lambda dy, *_: dy.clone(),
    ):
        kept = []
        forwards = count(lambda: kept.append(forward(x)))
        return [forwards, count(lambda: kept[0].sum().backward())]


def count(function: Callable[[], Any]) -> int:
    """Calls of c10d operators, as the profiler sees them."""
    with profile(activities=[ProfilerActivity.CPU]) as events:
        function()
    return sum(
        event.count
        for event in events.key_averages()
        if event.key.startswith('c10d::')
    )


def sync_bn() -> str:
    """Collectives of SyncBatchNorm in one iteration."""
    (forward, backward), _ = in_ranks(sync_bn_rank, 3)
    return f'3 layers: {forward} collectives forward, {backward} backward'


def sync_bn_on_cpu_rank(rank: int) -> str:
    """One layer on the CPU, as users call it."""
    layer = nn.SyncBatchNorm(8)
    return observe(lambda: str(layer(torch.randn(2, 8, 5, 5)).shape))


def sync_bn_on_cpu() -> str:
    """SyncBatchNorm in gloo processes."""
    return in_ranks(sync_bn_on_cpu_rank)[0]


ROWS = {
    'alone': partial(of_loops, []),
    'sync_buffers': partial(of_loops, [SYNC]),
    'ema': partial(of_norms, True, [EMA, SYNC]),
    'unequal': unequal,
    'broadcast': broadcast,
    'sync_norm': sync_norm,
    'sync_bn': sync_bn,
    'sync_bn_on_cpu': sync_bn_on_cpu,
}

if __name__ == '__main__':
    main(ROWS)
