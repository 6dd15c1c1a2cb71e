"""Statistics over ranks: real gloo processes against one process."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from comparison import TOLERANCE, disagreements
from mmengine.registry import HOOKS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ws_mm import BCN, SyncEstimatesHook

CHANNELS, GROUPS = 8, 4


def run_ranks(function: Callable[..., None], world: int, *args) -> None:
    """Call function(rank, *args) in gloo processes; raise what they raise."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    mp.spawn(_start, (function, world, port, args), nprocs=world)


def _start(rank, function, world, port, args) -> None:
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=world)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def make_layer(mode: str) -> BCN:
    torch.manual_seed(1)
    layer = BCN(CHANNELS, GROUPS, momentum=0.3, mode=mode, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(mean=0.5)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.2, 3)
    return layer


def make_batch(samples: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    x = torch.randn(samples, CHANNELS, 3, 5, dtype=torch.float64)
    x = x * torch.linspace(0.2, 3, samples).view(-1, 1, 1, 1) + 1
    return x, torch.randn_like(x)


def step(layer: BCN, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    output = layer(leaf)
    output.backward(cotangent)
    return {
        'output': output.detach(),
        'dx': leaf.grad,
        **{f'd{k}': p.grad for k, p in layer.named_parameters()},
        **{k: v.clone() for k, v in layer.named_buffers()},
    }


def sync_batch_rank(rank: int, sizes: list[int], folder: Path) -> None:
    x, cotangent = (t.split(sizes)[rank] for t in make_batch(sum(sizes)))
    result = step(make_layer('sync_batch'), x, cotangent)
    torch.save(result, folder / f'{rank}.pt')


@pytest.mark.parametrize(
    'sizes', [[2, 2], [1, 3], [4, 0], [1, 0, 2, 1]], ids=str
)
def test_sync_batch_equals_one_process_on_all_images(sizes, tmp_path):
    run_ranks(sync_batch_rank, len(sizes), sizes, tmp_path)
    ranks = [torch.load(tmp_path / f'{r}.pt') for r in range(len(sizes))]
    expected = step(make_layer('batch'), *make_batch(sum(sizes)))
    actual = {}
    for name in expected:
        values = [rank[name] for rank in ranks]
        if name in ('output', 'dx'):
            actual[name] = torch.cat(values)
        elif name.startswith('running'):
            assert all(torch.equal(v, values[0]) for v in values)
            actual[name] = values[0]
        else:
            actual[name] = sum(values)
    assert not disagreements(actual, expected, TOLERANCE[torch.float64])


class Net(nn.Module):
    """Two BCN layers that estimate, one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = make_layer('estimate')
        self.second = make_layer('estimate')
        self.batch = make_layer('batch')

    def forward(self, x: Tensor) -> Tensor:
        return self.batch(self.second(self.first(x)))


class Runner:
    def __init__(self, model: nn.Module) -> None:
        self.model = model


def hook_rank(rank: int, world: int, folder: Path) -> None:
    model = DistributedDataParallel(Net(), broadcast_buffers=False)
    hook = HOOKS.build(dict(type='ws_mm.SyncEstimatesHook'))
    hook.before_train(Runner(model))
    calls = []
    reduce = dist.all_reduce
    dist.all_reduce = lambda *args: calls.append(1) or reduce(*args)
    x, _ = make_batch(2 * world)
    model(x[2 * rank : 2 * rank + 2])
    assert not calls
    hook.after_train_iter(Runner(model), 0)
    assert len(calls) == 1
    dist.all_reduce = reduce
    torch.save(dict(model.module.named_buffers()), folder / f'{rank}.pt')


@pytest.mark.parametrize('world', [2, 4])
def test_hook_averages_estimates_in_one_collective(world, tmp_path):
    run_ranks(hook_rank, world, world, tmp_path)
    ranks = [torch.load(tmp_path / f'{r}.pt') for r in range(world)]
    for name in ranks[0]:
        same = all(torch.equal(r[name], ranks[0][name]) for r in ranks)
        assert same == (not name.startswith('batch')), name
    # The first layer sees the same inputs as one process would.
    layer = make_layer('estimate')
    layer(make_batch(2 * world)[0])
    assert not disagreements(
        {k: ranks[0][f'first.{k}'] for k, _ in layer.named_buffers()},
        dict(layer.named_buffers()),
        TOLERANCE[torch.float64],
    )


def test_hook_is_silent_in_one_process():
    model = Net()
    model(make_batch(2)[0])
    before = {k: v.clone() for k, v in model.named_buffers()}
    hook = SyncEstimatesHook()
    hook.before_train(Runner(model))
    hook.after_train_iter(Runner(model), 0)
    for name, values in model.named_buffers():
        assert torch.equal(values, before[name])
