"""Statistics over ranks: real gloo processes against one process."""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from comparison import TOLERANCE, disagreements
from mmengine.registry import HOOKS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ws_mm import (
    BCN,
    SyncEstimatesHook,
    distributed,
    running_statistics,
    sync_estimates,
)
from ws_mm.functional import batch_channel_norm
from ws_mm.hooks import average_estimates

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


def make_layer(mode: str, **options: Any) -> BCN:
    torch.manual_seed(1)
    options = dict(momentum=0.3, mode=mode, dtype=torch.float64) | options
    layer = BCN(CHANNELS, GROUPS, **options)
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


def of_one_process(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Results of all ranks: images in their order, gradients added."""
    found = {}
    for name in ranks[0]:
        values = [rank[name] for rank in ranks]
        if name in ('output', 'dx', 'ddx'):
            found[name] = torch.cat(values)
        elif name.startswith('running'):
            assert all(torch.equal(v, values[0]) for v in values)
            found[name] = values[0]
        else:
            found[name] = sum(values)
    return found


def sync_batch_rank(
    rank: int,
    sizes: list[int],
    kernels: Sequence[str] = ('auto',),
    input_dtype: torch.dtype = torch.float64,
    derivatives: Callable[..., dict[str, Tensor]] = step,
    **options: Any,
) -> dict[str, Tensor]:
    """Results of one layer, with kernels that the ranks have in turn."""
    batch = [t.to(input_dtype) for t in make_batch(sum(sizes))]
    chosen = kernels[rank % len(kernels)]
    with mock.patch.dict(os.environ, WS_MM_KERNELS=chosen):
        return derivatives(
            make_layer('sync_batch', **options),
            *(t.split(sizes)[rank] for t in batch),
        )


KERNELS = pytest.mark.parametrize(
    'kernels', [['auto'], ['fused'], ['auto', 'fused']], ids='-'.join
)


@KERNELS
@pytest.mark.parametrize('options', [{}, {'affine': False}], ids=str)
@pytest.mark.parametrize(
    'sizes', [[2, 2], [1, 3], [4, 0], [1, 0, 2, 1]], ids=str
)
def test_sync_batch_equals_one_process_on_all_images(
    sizes, options, kernels, world
):
    ranks = world(len(sizes)).run(sync_batch_rank, sizes, kernels, **options)
    layer = make_layer('batch', **options)
    expected = step(layer, *make_batch(sum(sizes)))
    actual = of_one_process(ranks)
    assert not disagreements(actual, expected, TOLERANCE[torch.float64])


@KERNELS
@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16], ids=str)
def test_sync_batch_in_half_precision(dtype, kernels, world):
    sizes = [1, 0, 2, 1]
    options = dict(outer_affine='channel', dtype=torch.float32)
    ranks = world(4).run(
        sync_batch_rank, sizes, kernels, input_dtype=dtype, **options
    )
    assert ranks[0]['output'].dtype == ranks[0]['dx'].dtype == dtype
    rounded = [t.to(dtype).double() for t in make_batch(4)]
    layer = make_layer('batch', outer_affine='channel')
    layer.load_state_dict(make_layer('batch', **options).double().state_dict())
    expected = step(layer, *rounded)
    actual = of_one_process(ranks)
    assert not disagreements(actual, expected, TOLERANCE[dtype])


def second_derivatives(
    layer: BCN, x: Tensor, cotangent: Tensor
) -> dict[str, Tensor]:
    """Those of the sum over all images of a square of the gradient."""
    leaf = x.clone().requires_grad_()
    output = layer(leaf)
    (dx,) = torch.autograd.grad(output, leaf, cotangent, create_graph=True)
    (dx * dx * cotangent).sum().backward()
    return {
        'dx': dx.detach(),
        'ddx': leaf.grad,
        **{
            f'dd{name}': parameter.grad
            for name, parameter in layer.named_parameters()
            if parameter.grad is not None
        },
    }


@KERNELS
@pytest.mark.parametrize('sizes', [[3, 1], [2, 0, 1, 2]], ids=str)
def test_second_derivatives_of_sync_batch(sizes, kernels, world):
    ranks = world(len(sizes)).run(
        sync_batch_rank, sizes, kernels, derivatives=second_derivatives
    )
    batch = make_batch(sum(sizes))
    expected = second_derivatives(make_layer('batch'), *batch)
    # Digits that a first derivative does not lose.
    assert not disagreements(of_one_process(ranks), expected, 1e-11)


def compiled_sync_rank(rank: int) -> dict[str, Tensor]:
    layer = make_layer('sync_batch')
    x, cotangent = (t.split([3, 1])[rank] for t in make_batch(4))
    layer.compile(backend='aot_eager')
    return step(layer, x, cotangent)


def test_compiled_sync_batch_equals_one_process(world):
    if not hasattr(nn.Module, 'compile'):
        pytest.skip('modules compile themselves since torch 2.2')
    ranks = world(2).run(compiled_sync_rank)
    expected = step(make_layer('batch'), *make_batch(4))
    actual = of_one_process(ranks)
    assert not disagreements(actual, expected, TOLERANCE[torch.float64])


def saved_bytes(layer: BCN, x: Tensor) -> int:
    """Bytes that a forward keeps for its backward."""
    kept = {}

    def pack(values: Tensor) -> Tensor:
        kept[values.untyped_storage().data_ptr()] = values.nbytes
        return values

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
        layer(x.clone().requires_grad_())
    return sum(kept.values())


def exchange_rank(rank: int, kernels: str) -> dict[str, Any]:
    layer, batch = make_layer('sync_batch'), make_layer('batch')
    x, dy = make_batch(3)
    x.requires_grad_()
    sent = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            sent.append(args[-1].numel())
            return function(*args)

        return call

    def both(norm: BCN = layer) -> None:
        norm(x).backward(dy)

    def waits(norm: BCN) -> int:
        return count(lambda: both(norm), 'aten::_local_scalar_dense')

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('WS_MM_KERNELS', kernels)
        found = {
            'collectives': count(both),
            # The kernels of a CPU read one value of their own.
            'waits': waits(layer) - waits(batch),
            'saved': saved_bytes(layer, x) - saved_bytes(batch, x),
            'sent': sent,
        }
        for name in ('all_gather', 'all_reduce'):
            patch.setattr(dist, name, noted(getattr(dist, name)))
        both()
    return found


@pytest.mark.parametrize('kernels', ['auto', 'fused'])
def test_sync_batch_sends_little_waits_for_nothing_and_saves_little(
    kernels, world
):
    for found in world(2).run(exchange_rank, kernels):
        assert found['sent'] == [2 * CHANNELS + 1, 2 * CHANNELS]
        assert found['collectives'] == 2
        assert found['waits'] == 0
        assert found['saved'] <= 4 * CHANNELS * 8  # a few numbers per channel


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


class OwnLoop:
    """The hook's part in a loop without mmengine."""

    def before_train(self, runner: Runner) -> None:
        sync_estimates(runner.model)

    def after_train_iter(self, runner: Runner, step: int) -> None:
        sync_estimates(runner.model)


def hook_rank(
    rank: int, sizes: tuple[int, ...], own_loop: bool
) -> dict[str, Tensor]:
    model = DistributedDataParallel(Net(), broadcast_buffers=False)
    hook = HOOKS.build(dict(type='ws_mm.SyncEstimatesHook'))
    if own_loop:
        hook = OwnLoop()
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


@pytest.mark.parametrize(
    ('sizes', 'own_loop'),
    [((3, 1), False), ((4, 0, 1, 3), False), ((3, 1), True)],
)
def test_hook_averages_estimates_in_one_collective(sizes, own_loop, world):
    ranks = world(len(sizes)).run(hook_rank, sizes, own_loop)
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


@pytest.mark.parametrize('hook', [SyncEstimatesHook(), OwnLoop()])
def test_hook_is_silent_in_one_process(hook):
    model = Net()
    model(make_batch(2)[0])
    before = {k: v.clone() for k, v in model.named_buffers()}
    hook.before_train(Runner(model))
    hook.after_train_iter(Runner(model), 0)
    for name, values in model.named_buffers():
        assert torch.equal(values, before[name])
    assert model.first.values_seen is None  # nothing to count for


def count(function: Callable[[], Any], operators: str = 'c10d::') -> int:
    """Calls of collectives, those of DDP in C++ included, or of others."""
    with profile(activities=[ProfilerActivity.CPU]) as events:
        function()
    return sum(
        event.count
        for event in events.key_averages()
        if event.key.startswith(operators)
    )


def counting_rank(rank: int, mode: str) -> list[int]:
    net = nn.Sequential(*(make_layer(mode) for _ in range(3)))
    model = DistributedDataParallel(net, broadcast_buffers=False)
    hook = SyncEstimatesHook()
    hook.before_train(Runner(model))
    x, dy = make_batch(2)
    x.requires_grad_()  # as the output of a convolution
    for index in range(2):  # DDP arranges its buckets in the first two
        model(x).backward(dy)
        hook.after_train_iter(Runner(model), index)
    with torch.no_grad():
        forward = count(lambda: model(x))
    return [
        forward,
        count(lambda: model(x).backward(dy)),
        count(lambda: hook.after_train_iter(Runner(model), 2)),
    ]


def waiting_rank(rank: int) -> int:
    layer = make_layer('estimate')
    hook = SyncEstimatesHook()
    hook.before_train(Runner(layer))
    x, dy = make_batch(2)

    def iteration() -> None:
        layer(x).backward(dy)
        hook.after_train_iter(Runner(layer), 0)

    # The operator by which a GPU's number reaches Python.
    assert count(lambda: float(x.sum()), 'aten::_local_scalar_dense') == 1
    return count(iteration, 'aten::_local_scalar_dense')


def test_hook_does_not_synchronize_the_device(world):
    assert world(2).run(waiting_rank) == [0, 0]


# Forward; forward and backward, of which one is DDP's own; the hook.
@pytest.mark.parametrize(
    ('mode', 'counts'),
    [('estimate', [0, 1, 1]), ('sync_batch', [3, 7, 0]), ('batch', [0, 1, 0])],
)
def test_collectives_of_three_layers(mode, counts, world):
    assert world(2).run(counting_rank, mode) == [counts, counts]


def maps_rank(
    rank: int, maps: list[list[tuple[int, int]]], broadcast: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Train on maps of (images, width), each before one hook call or two."""
    layer = make_layer('estimate')
    model = DistributedDataParallel(layer, broadcast_buffers=broadcast)
    hook = SyncEstimatesHook()
    hook.before_train(Runner(model))
    torch.manual_seed(rank)
    inputs = [
        torch.randn(n, CHANNELS, 3, width, dtype=torch.float64) * (rank + 1)
        + 2 * rank
        for n, width in maps[rank]
    ]
    for x in inputs[:-1]:
        with model.no_sync():
            model(x).backward(torch.randn_like(x))
    model(inputs[-1]).backward(torch.randn_like(inputs[-1]))
    hook.after_train_iter(Runner(model), 0)
    return inputs, dict(layer.named_buffers())


def columns(x: Tensor) -> Tensor:
    """All values of a channel as one image."""
    return x.transpose(0, 1).reshape(1, CHANNELS, 1, -1)


@pytest.mark.parametrize('broadcast', [False, True])
@pytest.mark.parametrize(
    'maps',
    [
        [[(1, 7)], [(2, 2)]],
        [[(0, 5)], [(1, 4)]],
        [[(2, 1)], [(0, 3)], [(1, 8)], [(1, 2)]],
    ],
    ids=str,
)
def test_ranks_are_weighed_by_values(maps, broadcast, world):
    ranks = world(len(maps)).run(maps_rank, maps, broadcast)
    layer = make_layer('estimate')
    layer(torch.cat([columns(inputs[0]) for inputs, _ in ranks], dim=-1))
    for _, buffers in ranks:
        assert not disagreements(
            buffers, dict(layer.named_buffers()), TOLERANCE[torch.float64]
        )


def test_accumulated_batches_weigh_together(world):
    maps = [[(1, 7), (2, 3)], [(0, 4), (1, 2)]]
    ranks = world(2).run(maps_rank, maps, False)
    seen = [sum(n * 3 * width for n, width in of_rank) for of_rank in maps]
    alone = [make_layer('estimate'), make_layer('estimate')]
    for layer, (inputs, _) in zip(alone, ranks, strict=True):
        for x in inputs:
            layer(x)
    for name, values in alone[0].named_buffers():
        other = alone[1].get_buffer(name)
        wanted = {name: (seen[0] * values + seen[1] * other) / sum(seen)}
        for _, buffers in ranks:
            actual = {name: buffers[name]}
            assert not disagreements(actual, wanted, 1e-12)


def varying_rank(rank: int, steps: list[list[int]]) -> dict[str, Tensor]:
    layer = make_layer('estimate').float()
    hook = SyncEstimatesHook()
    hook.before_train(Runner(layer))
    for index, sizes in enumerate(steps):
        x, _ = make_batch(sum(sizes))
        layer(share(x.float() + index, sizes, rank))
        hook.after_train_iter(Runner(layer), index)
    return dict(layer.named_buffers())


def test_each_iteration_weighs_its_own_values(world):
    steps = [[1, 3], [3, 1], [0, 2]]
    layer = make_layer('estimate').float()
    for index, sizes in enumerate(steps):
        layer(make_batch(sum(sizes))[0].float() + index)
    for buffers in world(2).run(varying_rank, steps):
        assert not disagreements(buffers, dict(layer.named_buffers()), 1e-6)


def test_statistics_of_one_rank_arrive_bit_for_bit(world):
    steps = [[3, 0], [0, 1], [7, 0]]
    layer = make_layer('estimate').float()
    for index, sizes in enumerate(steps):
        layer(make_batch(sum(sizes))[0].float() + index)
    for buffers in world(2).run(varying_rank, steps):
        for name, values in layer.named_buffers():
            assert torch.equal(buffers[name], values)


def broken_rank(rank: int) -> dict[str, Tensor]:
    layer = make_layer('estimate')
    hook = SyncEstimatesHook()
    hook.before_train(Runner(layer))
    x = share(make_batch(4)[0], (3, 1), rank)
    if rank == 1:
        x[0, 2, 0, 0] = torch.nan
    layer(x)
    hook.after_train_iter(Runner(layer), 0)
    return dict(layer.named_buffers())


def test_a_channel_that_is_nan_on_one_rank_stays_finite_on_all(world):
    ranks = world(2).run(broken_rank)
    before, whole, alone = (make_layer('estimate') for _ in range(3))
    x, _ = make_batch(4)
    whole(x)
    alone(x[:3])
    expected = dict(whole.named_buffers())
    for name, values in expected.items():
        moved, kept = alone.get_buffer(name), before.get_buffer(name)
        values[2] = (3 * moved[2] + kept[2]) / 4
    for buffers in ranks:
        assert not disagreements(buffers, expected, TOLERANCE[torch.float64])


def test_values_are_counted_where_the_layer_is() -> None:
    layer = BCN(CHANNELS, device='meta')
    layer.count_values()
    assert layer.values_seen.compiled.device == layer.running_mean.device


class Skipping(Net):
    """A model whose second layer is not called on rank 1."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if dist.get_rank() == 0 else x


def skipping_rank(rank: int) -> dict[str, Tensor]:
    model = DistributedDataParallel(
        Skipping(), broadcast_buffers=False, find_unused_parameters=True
    )
    hook = SyncEstimatesHook()
    hook.before_train(Runner(model))
    x, dy = make_batch(3)
    for step in range(2):
        model(x).backward(dy)
        hook.after_train_iter(Runner(model), step)
    return dict(model.module.named_buffers())


def test_a_rank_that_skips_a_layer_takes_the_estimates_of_the_others(world):
    ranks = world(2).run(skipping_rank)
    first, second = make_layer('estimate'), make_layer('estimate')
    x, _ = make_batch(3)
    for _ in range(2):
        second(first(x))
    for buffers in ranks:
        actual = {k: buffers[f'second.{k}'] for k, _ in second.named_buffers()}
        assert not disagreements(actual, dict(second.named_buffers()), 1e-12)


class Checkpointed(Net):
    """Two layers whose activations are computed again in backward."""

    def __init__(self, mode: str, how: str) -> None:
        super().__init__()
        self.first, self.second = make_layer(mode), make_layer(mode)
        del self.batch
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == 'kept':
            return self.second(self.first(x))
        reentrant = self.how == 'reentrant'
        for layer in (self.first, self.second):
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return x


def checkpointed_rank(rank: int, mode: str, how: str) -> dict[str, Tensor]:
    net = Checkpointed(mode, how)
    model = DistributedDataParallel(net, broadcast_buffers=False)
    hook = SyncEstimatesHook()
    hook.before_train(Runner(model))
    x, dy = (share(t, (3, 1), rank) for t in make_batch(4))
    x = x.requires_grad_()
    for step in range(2):
        model(x).backward(dy)
        hook.after_train_iter(Runner(model), step)
    gradients = {f'd{k}': p.grad for k, p in net.named_parameters()}
    return {**gradients, **dict(net.named_buffers()), 'dx': x.grad}


@pytest.mark.parametrize('mode', ['estimate', 'sync_batch'])
@pytest.mark.parametrize('how', ['reentrant', 'not reentrant'])
def test_recomputed_activations_change_no_bit(mode, how, world):
    kept = world(2).run(checkpointed_rank, mode, 'kept')
    recomputed = world(2).run(checkpointed_rank, mode, how)
    for left, right in zip(kept, recomputed, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), name


def summing_rank(rank: int) -> list[Tensor]:
    x, dy = torch.randn(2, 3, generator=torch.Generator().manual_seed(rank))
    leaf, cotangent = x.clone().requires_grad_(), dy.clone()
    total = distributed._AllReduceSum.apply(leaf)
    total.backward(cotangent)
    assert torch.equal(leaf, x)
    assert torch.equal(cotangent, dy)
    # The gradient is a sum over ranks, too, and has the same gradient.
    grad = distributed._AllReduceSum.apply(cotangent.requires_grad_())
    (once,) = torch.autograd.grad(
        distributed._AllReduceSum.apply(leaf),
        leaf,
        cotangent,
        create_graph=True,
    )
    torch.testing.assert_close(once, grad)
    once.backward(x)
    torch.testing.assert_close(cotangent.grad, total)
    return [x, dy, total.detach(), leaf.grad]


def test_all_reduce_keeps_its_input(world):
    ranks = world(2).run(summing_rank)
    for _, _, total, grad in ranks:
        torch.testing.assert_close(total, sum(rank[0] for rank in ranks))
        torch.testing.assert_close(grad, sum(rank[1] for rank in ranks))


def empty_rank(rank: int) -> Tensor:
    layer = make_layer('sync_batch')
    before = {k: v.clone() for k, v in layer.named_buffers()}
    x, _ = make_batch(2)
    for images in (x[:0], x[: 1 - rank, :, :1, :1]):
        # Of no value, and of one on all ranks, which has no variance.
        layer.zero_grad()
        result = step(layer, images, torch.ones_like(images))
        assert all(values.isfinite().all() for values in result.values())
        for name, values in layer.named_buffers():
            assert torch.equal(values, before[name])
    return result['output']


def test_sync_batch_without_images_or_with_one_value(world):
    one, none = world(2).run(empty_rank)
    layer = make_layer('estimate').eval()
    layer.running_mean.copy_(x := make_batch(2)[0][0, :, 0, 0])
    expected = layer(x[None, :, None, None])
    assert not disagreements({'y': one}, {'y': expected.detach()}, 1e-12)
    assert not len(none)


def unmoved_rank(rank: int, eager: bool) -> list[float]:
    """Distances that values move without an update, and with one."""
    layer, (x, _) = make_layer('sync_batch'), make_batch(2)
    running = dict(layer.named_buffers())
    before = {name: values.clone() for name, values in running.items()}
    options: dict[str, Any] = dict(training=True, mode='sync_batch')
    found = []
    for update in (False, True):
        with contextlib.nullcontext() if eager else forward_ad.dual_level():
            batch_channel_norm(x, GROUPS, **running, **options, update=update)
        distances = [(running[k] - before[k]).abs().sum() for k in running]
        found.append(float(sum(distances)))
    return found


@pytest.mark.parametrize('eager', [True, False])
def test_sync_batch_moves_nothing_unless_it_should(eager, world):
    for unmoved, moved in world(2).run(unmoved_rank, eager):
        assert unmoved == 0 < moved


@pytest.mark.parametrize('mode', ['estimate', 'sync_batch'])
def test_a_torch_without_distributed_is_one_process(mode, monkeypatch):
    expected = step(make_layer(mode), *make_batch(2))
    # Such a build has the module, and little in it.
    monkeypatch.setattr(dist, 'is_available', lambda: False)
    for name in ('is_initialized', 'get_world_size', 'get_rank'):
        monkeypatch.delattr(dist, name)
    actual = step(make_layer(mode), *make_batch(2))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def plain_rank(rank: int, model: nn.Module) -> int:
    hook = SyncEstimatesHook()
    hook.before_train(Runner(model))
    return count(lambda: hook.after_train_iter(Runner(model), 0))


def test_model_without_running_statistics_needs_no_collective(world):
    assert world(2).run(plain_rank, nn.Conv2d(3, 4, 3)) == [0, 0]


class Operations(TorchDispatchMode):
    """Names of operations that compute or copy, in their order."""

    # Views, new memory, and a tensor made of Python's numbers on the host.
    FREE = (
        *('slice', 'split', 'split_with_sizes', 'detach'),
        *('empty', 'new_empty', 'empty_like', 'lift_fresh'),
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        # c10d's own operators do not count.
        if function.namespace == 'aten' and name not in self.FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def operations_rank(rank: int, number: int, mixed: bool) -> list[str]:
    model = nn.Sequential(*(BCN(8 + index % 3) for index in range(number)))
    if mixed:
        model[1].double()
    hook = SyncEstimatesHook()
    hook.before_train(Runner(model))
    for _ in range(2):
        for layer in model:
            x = torch.randn(1, layer.num_features, 2, 3)
            layer(x.to(layer.running_mean))
        with Operations() as seen:
            hook.after_train_iter(Runner(model), 0)
    return seen.names


@pytest.mark.parametrize('mixed', [False, True])
def test_hook_takes_as_many_operations_for_any_number_of_layers(mixed, world):
    (few, _), (many, _) = (
        world(2).run(operations_rank, number, mixed) for number in (3, 69)
    )
    assert few == many
    assert len(few) == 12, few


def precisions_rank(rank: int) -> list[Tensor]:
    model = nn.Sequential(make_layer('estimate'), make_layer('estimate'))
    model[1].float()
    hook = SyncEstimatesHook()
    hook.before_train(Runner(model))
    x, _ = make_batch(4)
    for layer in model:
        layer(share(x, (3, 1), rank).to(layer.running_mean))
    hook.after_train_iter(Runner(model), 0)
    return [*model.buffers()]


def test_hook_averages_layers_of_two_dtypes(world):
    x, _ = make_batch(4)
    for buffers in world(2).run(precisions_rank):
        for dtype in (torch.float64, torch.float32):
            found = [values for values in buffers if values.dtype == dtype]
            layer = make_layer('estimate').to(dtype)
            layer(x.to(dtype))
            expected = dict(layer.named_buffers())
            actual = dict(zip(expected, found, strict=True))
            assert not disagreements(actual, expected, TOLERANCE[dtype])


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
    assert layer.values_seen.on_host == x.numel() / CHANNELS
    assert 'values_seen' not in layer.state_dict()


def test_hook_without_values_and_with_recomputation(world):
    world(2).run(idle_rank)


def unsynchronized_rank(rank: int, compiled: bool) -> None:
    said = []
    running_statistics._reported.clear()
    layer = make_layer('estimate')
    x, _ = make_batch(2)
    # As a logger, it is nothing that a compiler could trace.
    log = torch.compiler.disable(lambda message, **_: said.append(message))
    with mock.patch.object(running_statistics, 'print_log', log):
        layer.eval()(x)
        assert not said
        layer.train()
        run = layer
        if compiled:
            run = torch.compile(layer, backend='aot_eager', fullgraph=True)
        for _ in range(2):
            run(x)
            make_layer('estimate')(x)
    assert len(said) == (rank == 0 and dist.get_world_size() > 1)
    assert all("type='ws_mm.SyncEstimatesHook'" in line for line in said)


@pytest.mark.parametrize('compiled', [False, True])
def test_missing_hook_warns_once(compiled, world):
    world(2).run(unsynchronized_rank, compiled)


def test_one_process_of_its_own_group_needs_no_hook(world):
    world(1).run(unsynchronized_rank, False)
    assert world(1).run(plain_rank, BCN(8)) == [0]


def counted() -> BCN:
    layer = make_layer('estimate')
    SyncEstimatesHook().before_train(Runner(layer))
    return layer


def compiled_rank(rank: int) -> None:
    layer, expected = counted(), counted()
    counter = CompileCounterWithBackend('aot_eager')
    run = torch.compile(layer, backend=counter, fullgraph=True)
    batch, _ = make_batch(5)
    for step in range(4):
        x = share(batch + step, (3, 2), rank)
        # A layer may be compiled in one call and not in another.
        actual, wanted = dict(output=run(x)), dict(output=expected(x))
        actual['again'], wanted['again'] = layer(x), expected(x)
        seen = x.numel() / CHANNELS
        assert layer.values_seen.on_host == layer.values_seen.compiled == seen
        assert expected.values_seen.on_host == 2 * seen
        average_estimates([layer])
        average_estimates([expected])
        actual |= dict(layer.named_buffers())
        wanted |= dict(expected.named_buffers())
        assert not disagreements(actual, wanted, TOLERANCE[torch.float64])
    assert counter.frame_count == 1


def test_counting_compiles_once(world):
    world(2).run(compiled_rank)


def accumulating_rank(rank: int) -> None:
    layer, expected = counted(), counted()
    run = torch.compile(layer, backend='aot_eager', fullgraph=True)
    batch, _ = make_batch(8)
    for step, sizes in enumerate([(5, 3), (1, 7)]):
        x = share(batch + step, sizes, rank)
        run(x), expected(x)
    assert layer.values_seen.compiled == expected.values_seen.on_host
    average_estimates([layer])
    average_estimates([expected])
    actual, wanted = (dict(m.named_buffers()) for m in (layer, expected))
    assert not disagreements(actual, wanted, TOLERANCE[torch.float64])


def test_a_compiled_layer_counts_accumulated_batches(world):
    world(2).run(accumulating_rank)
