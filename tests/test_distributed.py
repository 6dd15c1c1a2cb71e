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
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ws_mm import BCN, SyncEstimatesHook, norm

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


def share(x: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
    return x.split(sizes)[rank]


def hook_rank(rank: int, sizes: tuple[int, ...], folder: Path) -> None:
    model = DistributedDataParallel(Net(), broadcast_buffers=False)
    hook = HOOKS.build(dict(type='ws_mm.SyncEstimatesHook'))
    hook.before_train(Runner(model))
    calls = []
    reduce = dist.all_reduce
    dist.all_reduce = lambda *args: calls.append(1) or reduce(*args)
    x, dy = make_batch(sum(sizes))
    for step in range(2):
        model(share(x, sizes, rank)).backward(share(dy, sizes, rank))
        assert not calls
        hook.after_train_iter(Runner(model), step)
        assert len(calls) == 1
        calls.clear()
    dist.all_reduce = reduce
    torch.save(dict(model.module.named_buffers()), folder / f'{rank}.pt')


@pytest.mark.parametrize('sizes', [(3, 1), (4, 0, 1, 3)])
def test_hook_averages_estimates_in_one_collective(sizes, tmp_path):
    world = len(sizes)
    run_ranks(hook_rank, world, sizes, tmp_path)
    ranks = [torch.load(tmp_path / f'{r}.pt') for r in range(world)]
    for name in ranks[0]:
        same = all(torch.equal(r[name], ranks[0][name]) for r in ranks)
        assert same == (not name.startswith('batch')), name
    # The first layer sees the same inputs as one process would.
    layer = make_layer('estimate')
    for _ in range(2):
        layer(make_batch(sum(sizes))[0])
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


def idle_rank(rank: int, folder: Path) -> None:
    model = Net()
    hook = SyncEstimatesHook()
    hook.before_train(Runner(model))
    before = {k: v.clone() for k, v in model.named_buffers()}
    hook.after_train_iter(Runner(model), 0)
    for name, values in model.named_buffers():
        assert torch.equal(values, before[name])
    # Recomputation counts no values a second time.
    layer = model.first
    x, dy = make_batch(2)
    checkpoint(layer, x.requires_grad_(), use_reentrant=False).backward(dy)
    assert layer.values_seen.item() == x.numel() / CHANNELS
    assert 'values_seen' not in layer.state_dict()


def test_hook_without_values_and_with_recomputation(tmp_path):
    run_ranks(idle_rank, 2, tmp_path)


def unsynchronized_rank(rank: int, folder: Path, compiled: bool) -> None:
    said = []
    # As a logger, it is nothing that a compiler could trace.
    norm.print_log = torch.compiler.disable(
        lambda message, **kwargs: said.append(message)
    )
    layer = make_layer('estimate')
    x, _ = make_batch(2)
    layer.eval()(x)
    assert not said
    layer.train()
    run = layer
    if compiled:
        run = torch.compile(layer, backend='aot_eager', fullgraph=True)
    for _ in range(2):
        run(x)
        make_layer('estimate')(x)
    assert len(said) == (rank == 0)
    assert all("type='ws_mm.SyncEstimatesHook'" in line for line in said)


@pytest.mark.parametrize('compiled', [False, True])
def test_missing_hook_is_named_once(compiled, tmp_path):
    run_ranks(unsynchronized_rank, 2, tmp_path, compiled)


def compiled_rank(rank: int) -> None:
    layer, expected = make_layer('estimate'), make_layer('estimate')
    for module in (layer, expected):
        SyncEstimatesHook().before_train(Runner(module))
    counter = CompileCounterWithBackend('aot_eager')
    run = torch.compile(layer, backend=counter, fullgraph=True)
    for seed in range(3):
        x = make_batch(2)[0] + seed
        actual = dict(output=run(x), seen=layer.values_seen)
        wanted = dict(output=expected(x), seen=expected.values_seen)
        assert not disagreements(actual, wanted, TOLERANCE[torch.float64])
    assert counter.frame_count == 1


def test_counting_compiles_once(tmp_path):
    run_ranks(compiled_rank, 2)
