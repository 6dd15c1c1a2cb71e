"""Layers cast, under autocast and sharded, against float64."""

from contextlib import nullcontext

import pytest
import reference
import torch
import torch.nn.functional as F
from comparison import (
    HALF_ON_CPU,
    TOLERANCE,
    disagreements,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from trained_layer import (
    CHANNELS,
    EPS_MODES,
    GROUPS,
    MODES,
    buffers,
    make_input,
    make_layer,
)

from ws_mm import BCN, WSConv2d


def cast_parameters(layer: nn.Module, dtype: torch.dtype) -> None:
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(dtype)


def cast_all_data(layer: nn.Module, dtype: torch.dtype) -> None:
    """Past every method of the module, as FSDP with a buffer_dtype."""
    cast_parameters(layer, dtype)
    for values in layer.buffers():
        values.data = values.data.to(dtype)


HALVES = {'fp16': torch.float16, 'bf16': torch.bfloat16}


# How the host casts a layer, the dtype that it then feeds it, and the
# largest error accepted, relative to the largest value.
CASTS = {
    'double()': (nn.Module.double, torch.float64, 1e-12),
    'nothing': (lambda layer: None, torch.float32, 5e-5),
    'half()': (nn.Module.half, torch.float16, 1e-3),
    'bfloat16()': (nn.Module.bfloat16, torch.bfloat16, 1e-2),
}


for name, dtype in HALVES.items():
    tolerance = 1e-3 if name == 'fp16' else 1e-2
    CASTS |= {
        f'autocast {name}': (lambda layer: None, dtype, tolerance),
        f'parameters {name}': (
            lambda layer, dtype=dtype: cast_parameters(layer, dtype),
            dtype,
            tolerance,
        ),
        f'all data {name}': (
            lambda layer, dtype=dtype: cast_all_data(layer, dtype),
            dtype,
            tolerance,
        ),
    }


def skip_what_a_cpu_lacks(how: str, conv: bool = False) -> None:
    """Skip float16 where this torch has none on a CPU."""
    if HALF_ON_CPU or CASTS[how][1] != torch.float16:
        return
    if conv or how.startswith('autocast'):
        pytest.skip('this torch has no float16 convolution on a CPU')


def autocast(how: str):
    if not how.startswith('autocast'):
        return nullcontext()
    return torch.autocast('cpu', HALVES[how.split()[1]])


def norm_errors(how: str, mode: str) -> dict[str, float]:
    """Errors of outputs, gradients and estimates over three steps."""
    cast, dtype, tolerance = CASTS[how]
    layer = make_layer(mode=mode)
    cast(layer)
    state = {k: v.double().clone() for k, v in layer.state_dict().items()}
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    errors = {}
    for step in range(3):
        x = make_input(seed=step, dtype=dtype).requires_grad_()
        cotangent = make_input(seed=9, dtype=dtype)
        with autocast(how):
            output = layer(x)
        assert output.dtype == dtype
        leaves = [x, *layer.parameters()]
        gradients = torch.autograd.grad(output, leaves, cotangent)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            assert gradient.dtype == leaf.dtype
        actual = [output, *gradients]
        names = [k for k, _ in layer.named_parameters()]
        wide = x.detach().double().requires_grad_()
        affine = {k: state[k].requires_grad_() for k in names}
        output, running = reference.batch_channel_norm(
            wide,
            state,
            GROUPS,
            training=True,
            momentum=layer.momentum,
            mode='estimate' if mode == 'estimate' else 'batch',
        )
        gradients = torch.autograd.grad(
            output, [wide, *affine.values()], cotangent.double()
        )
        keys = ['output', 'dx', *(f'd{k}' for k in names)]
        wrong = disagreements(
            dict(zip(keys, actual, strict=True)),
            dict(zip(keys, [output, *gradients], strict=True)),
            tolerance,
        )
        # The inputs are what they are: statistics lose nothing to the dtype.
        for k, values in layer.named_buffers():
            assert values.dtype == exact, k
        wrong |= disagreements(buffers(layer), running, TOLERANCE[exact])
        errors |= {f'{k} of step {step}': e for k, e in wrong.items()}
        state = state | running
    return errors


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('how', CASTS)
def test_norm_in_every_dtype(kernels, how, mode):
    skip_what_a_cpu_lacks(how)
    assert not norm_errors(how, mode)


@pytest.mark.parametrize('eps_mode', EPS_MODES)
@pytest.mark.parametrize('how', CASTS)
def test_conv_in_every_dtype(kernels, how, eps_mode):
    skip_what_a_cpu_lacks(how, conv=True)
    cast, dtype, tolerance = CASTS[how]
    conv = WSConv2d(CHANNELS, 6, 3, eps_mode=eps_mode)
    with torch.no_grad():
        # Filters whose mean dwarfs their deviation, as nothing forbids.
        conv.weight.mul_(0.1).add_(
            torch.linspace(-0.3, 0.3, 6).view(-1, 1, 1, 1)
        )
    cast(conv)
    x = make_input(dtype=dtype).requires_grad_()
    with autocast(how):
        output = conv(x)
    assert output.dtype == dtype
    cotangent = torch.randn(output.shape).to(dtype)
    leaves = [x, *conv.parameters()]
    gradients = torch.autograd.grad(output, leaves, cotangent)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = F.conv2d(
        wide[0],
        reference.standardize_weight(wide[1], eps_mode=eps_mode),
        wide[2],
    )
    wanted = torch.autograd.grad(expected, wide, cotangent.double())
    names = ('output', 'dx', 'dweight', 'dbias')
    assert not disagreements(
        dict(zip(names, [output, *gradients], strict=True)),
        dict(zip(names, [expected, *wanted], strict=True)),
        tolerance,
    )


def test_built_under_a_default_dtype_of_half_precision():
    try:
        torch.set_default_dtype(torch.bfloat16)
        layer = BCN(CHANNELS, GROUPS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.weight.dtype == torch.bfloat16
    assert {v.dtype for v in layer.buffers()} == {torch.float32}


def sharded_rank(rank: int, version: int) -> None:
    model = nn.Sequential(WSConv2d(CHANNELS, CHANNELS, 3), make_layer())
    norm = model[1]
    if version == 1:
        precision = MixedPrecision(torch.bfloat16, buffer_dtype=torch.bfloat16)
        model = FullyShardedDataParallel(
            model, mixed_precision=precision, device_id=torch.device('cpu')
        )
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(torch.bfloat16)
        fully_shard(
            model, mesh=init_device_mesh('cpu', (2,)), mp_policy=policy
        )
    before = buffers(norm)
    for _ in range(3):
        output = model(make_input(seed=rank))
        assert output.dtype == torch.bfloat16
        output.backward(torch.randn(output.shape).to(output.dtype))
        for name, values in norm.named_buffers():
            assert values.dtype == torch.float32
            assert not torch.equal(values, before[name])
            # Below the resolution of bfloat16.
            assert not torch.equal(values, values.bfloat16().float())
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all()


@pytest.fixture(params=[1, 2])
def version(request: pytest.FixtureRequest) -> int:
    """Of FSDP: the wrapper, or ``fully_shard``."""
    if not HALF_ON_CPU:
        pytest.skip('FSDP of torch 2.1 needs a GPU')
    if request.param == 2 and not hasattr(
        torch.distributed.fsdp, 'fully_shard'
    ):
        pytest.skip('fully_shard is public since torch 2.6')
    return request.param


def test_sharded_with_mixed_precision(version, world):
    world(2).run(sharded_rank, version)


def deferred_rank(rank: int, version: int) -> dict[str, Tensor]:
    """Buffers of a model that was built without memory, after one step."""
    torch.use_deterministic_algorithms(True)  # empty memory holds NaN
    try:
        model = nn.Sequential(
            WSConv2d(CHANNELS, CHANNELS, 3, device='meta'),
            BCN(CHANNELS, GROUPS, device='meta'),
            nn.BatchNorm2d(CHANNELS, device='meta'),
        )
        if version == 1:
            model = FullyShardedDataParallel(
                model, device_id=torch.device('cpu')
            )
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(model, mesh=init_device_mesh('cpu', (2,)))
            model.to_empty(device='cpu')
            for module in model:
                module.reset_parameters()
        built = {k: v.clone() for k, v in model.named_buffers()}
        output = model(make_input(seed=rank))
        output.backward(torch.randn(output.shape))
    finally:
        torch.use_deterministic_algorithms(False)
    assert output.isfinite().all()
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all()
    for values in model.buffers():
        assert values.isfinite().all()
    return built


def test_sharded_after_being_built_without_memory(version, world):
    for built in world(2).run(deferred_rank, version):
        for name, values in built.items():
            expected = torch.full_like(values, float('var' in name))
            assert torch.equal(values, expected), name
