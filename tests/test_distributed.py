"""Statistics over ranks: real gloo processes against one process."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from comparison import TOLERANCE, disagreements
from mmengine.registry import HOOKS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ws_mm import BCN, SyncEstimatesHook, norm

CHANNELS, GROUPS = 8, 4


def failing_rank(rank: int) -> None:
    if rank == 1:
        raise KeyError('seen')
    dist.barrier()


def test_a_failing_rank_is_named_and_replaced(world):
    with pytest.raises(AssertionError, match='rank 1 of 2:(?s:.*)KeyError'):
        world(2).run(failing_rank)
    assert world(2).run(add_up, 3) == [3, 4]


def add_up(rank: int, number: int) -> int:
    return rank + number


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


def sync_batch_rank(rank: int, sizes: list[int]) -> dict[str, Tensor]:
    x, cotangent = (t.split(sizes)[rank] for t in make_batch(sum(sizes)))
    return step(make_layer('sync_batch'), x, cotangent)


@pytest.mark.parametrize(
    'sizes', [[2, 2], [1, 3], [4, 0], [1, 0, 2, 1]], ids=str
)
def test_sync_batch_equals_one_process_on_all_images(sizes, world):
    ranks = world(len(sizes)).run(sync_batch_rank, sizes)
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


def hook_rank(rank: int, sizes: tuple[int, ...]) -> dict[str, Tensor]:
    model = DistributedDataParallel(Net(), broadcast_buffers=False)
    hook = HOOKS.build(dict(type='ws_mm.SyncEstimatesHook'))
    hook.before_train(Runner(model))
    x, dy = make_batch(sum(sizes))
    with mock.patch.object(dist, 'all_reduce', wraps=dist.all_reduce) as calls:
        for step in range(2):
            model(share(x, sizes, rank)).backward(share(dy, sizes, rank))
            assert not calls.called
            hook.after_train_iter(Runner(model), step)
            assert calls.call_count == 1
            calls.reset_mock()
    return dict(model.module.named_buffers())


@pytest.mark.parametrize('sizes', [(3, 1), (4, 0, 1, 3)])
def test_hook_averages_estimates_in_one_collective(sizes, world):
    ranks = world(len(sizes)).run(hook_rank, sizes)
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


def idle_rank(rank: int) -> None:
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


def test_hook_without_values_and_with_recomputation(world):
    world(2).run(idle_rank)


def unsynchronized_rank(rank: int, compiled: bool) -> None:
    said = []
    norm._reported.clear()
    layer = make_layer('estimate')
    x, _ = make_batch(2)
    # As a logger, it is nothing that a compiler could trace.
    log = torch.compiler.disable(lambda message, **_: said.append(message))
    with mock.patch.object(norm, 'print_log', log):
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
def test_missing_hook_is_named_once(compiled, world):
    world(2).run(unsynchronized_rank, compiled)


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


def test_counting_compiles_once(world):
    world(2).run(compiled_rank)
