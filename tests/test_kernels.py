"""The fused implementations: same numbers as the formula, and who gets them.

The oracles of test_functional.py run on whatever implementation is chosen;
here are both of them by name, and what only the fused one can get wrong.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import reference
import torch
import torch.nn.functional as F
from comparison import (
    TOLERANCE,
    disagreements,
    relative_error,
    values_and_gradients,
)
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import ws_mm
from ws_mm import BCN, WSConv2d, batch_channel_norm, standardize_weight
from ws_mm.compat import has_half_batch_norm
from ws_mm.kernels import choose, compiled, cpu, plain

LAYOUTS = {
    'NCHW': torch.contiguous_format,
    'channels_last': torch.channels_last,
}
MODES = ('estimate', 'batch')
# Scaled-down relatives of what detectors and segmentors put in.
SHAPES = {
    'stem': (1, 64, 50, 84),
    'stage': (2, 32, 13, 21),
    'rois': (33, 32, 7, 7),
    'pooled': (1, 64, 1, 1),
    # Two samples would be ill-conditioned: their outputs are +-1 anyhow.
    'pooled-3': (3, 64, 1, 1),
    'long': (2, 32, 131),
    'volume': (1, 32, 3, 5, 4),
}


@pytest.fixture(autouse=True)
def closed_forms(monkeypatch):
    """Run the closed forms, which are compared here, at any size."""
    monkeypatch.setenv('WS_MM_KERNELS', 'fused')


@pytest.fixture(params=['fused', 'plain', 'compiled'])
def kernels(request, monkeypatch) -> str:
    if request.param == 'compiled':  # as it is, without a compiler
        monkeypatch.setattr(ws_mm.kernels, 'choose', lambda *_: compiled)
    else:
        monkeypatch.setenv('WS_MM_KERNELS', request.param)
    return request.param


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(cpu, 'CHUNK', 1 << 8)


def calls(monkeypatch, function: type[torch.autograd.Function]) -> list[str]:
    """Record the calls of a fused function."""
    seen: list[str] = []
    apply = function.apply

    def recorded(*args):
        seen.append(function.__name__)
        return apply(*args)

    monkeypatch.setattr(function, 'apply', recorded)
    return seen


def in_layout(x: Tensor, layout: str) -> Tensor:
    if x.dim() == 4:
        return x.to(memory_format=LAYOUTS[layout])
    return x


def state_of(channels: int, dtype: torch.dtype, outer: int) -> dict:
    sizes = dict(
        bn_weight=channels, bn_bias=channels, weight=outer, bias=outer
    )
    state = {k: torch.randn(n).to(dtype) for k, n in sizes.items()}
    state['running_mean'] = torch.randn(channels).to(dtype)
    state['running_var'] = (torch.rand(channels) * 3 + 0.3).to(dtype)
    return state


def input_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    per_channel = torch.linspace(0.3, 3, shape[1]).view(
        -1, *[1] * (len(shape) - 2)
    )
    return (torch.randn(shape) * per_channel + 4 - 3 * per_channel).to(dtype)


# One value per channel has no batch variance; channels_last is 4-D only.
CASES = [
    case
    for case in product(
        SHAPES, LAYOUTS, ('group', 'channel'), ('train', 'eval'), MODES
    )
    if (case[0], *case[3:]) != ('pooled', 'train', 'batch')
    and (case[1] == 'NCHW' or len(SHAPES[case[0]]) == 4)
]


@pytest.mark.parametrize('case', CASES, ids='-'.join)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
def test_batch_channel_norm_equals_formula(kernels, dtype, case):
    shape_name, layout, outer, phase, mode = case
    shape, training = SHAPES[shape_name], phase == 'train'
    channels, groups = shape[1], 8
    state = state_of(channels, dtype, groups if outer == 'group' else channels)
    names = 'running_mean', 'running_var'
    running = {name: state.pop(name) for name in names}
    x = in_layout(input_of(shape, dtype), layout)
    settings = dict(training=training, momentum=0.2, mode=mode)
    new: dict[str, Tensor] = {}

    def ours(x, **affine):
        new.update({k: v.clone() for k, v in running.items()})
        output = batch_channel_norm(
            in_layout(x, layout), groups, **new, **affine, **settings
        )
        return output.contiguous()

    expected_new = {}

    def oracle(x, **affine):
        output, statistics = reference.batch_channel_norm(
            x.flatten(2).unsqueeze(3),
            {**affine, **running},
            groups,
            **settings,
        )
        expected_new.update(statistics)
        return output.view(shape)

    actual = values_and_gradients(ours, {'x': x, **state}, 'bcn')
    double = {k: v.double() for k, v in {'x': x, **state}.items()}
    expected = values_and_gradients(oracle, double, 'bcn')
    expected.update(expected_new)
    assert not disagreements({**actual, **new}, expected, TOLERANCE[dtype])


@pytest.mark.parametrize('eps_mode', ['outside', 'inside'])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(
    'shape', [(8, 4, 3, 3), (6, 32, 1, 1), (8, 1, 5, 5), (4, 3, 3)], ids=str
)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
def test_standardize_weight_equals_formula(
    kernels, dtype, shape, layout, eps_mode
):
    scale = torch.logspace(-3, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
    weight = in_layout(((torch.randn(shape) + 0.3) * scale).to(dtype), layout)

    def ours(weight):
        return standardize_weight(
            in_layout(weight, layout), eps_mode=eps_mode
        ).contiguous()

    actual = values_and_gradients(ours, {'weight': weight}, 'ws')
    expected = values_and_gradients(
        partial(reference.standardize_weight, eps_mode=eps_mode),
        {'weight': weight.double()},
        'ws',
    )
    assert not disagreements(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('mode', MODES)
def test_half_precision_is_normalized_in_float32(kernels, mode, dtype):
    layer = BCN(32, 8, momentum=0.1, mode=mode)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, mean=0.5)
    # Squares of these overflow in float16.
    x = (input_of((2, 32, 9, 9), torch.float32) * 300).to(dtype)
    x.requires_grad_()
    state = {k: v.double() for k, v in layer.state_dict().items()}
    expected, running = reference.batch_channel_norm(
        x, state, 8, training=True, momentum=0.1, mode=mode
    )
    output = layer(x)
    assert output.dtype == dtype
    cotangent = torch.randn(output.shape).to(dtype)
    (gradient,) = torch.autograd.grad(output, x, cotangent)
    assert gradient.dtype == dtype
    (expected_gradient,) = torch.autograd.grad(expected, x, cotangent.double())
    assert not disagreements(
        {'output': output, 'dx': gradient, 'var': layer.running_var},
        {
            'output': expected,
            'dx': expected_gradient,
            'var': running['running_var'],
        },
        TOLERANCE[dtype],
    )


def test_autocast_changes_nothing_inside(kernels):
    layer, conv = BCN(32, 8), WSConv2d(32, 32, 3)
    x = input_of((1, 32, 9, 9), torch.float32).requires_grad_()
    plain = layer(x), standardize_weight(conv.weight)
    layer.reset_running_stats()
    with torch.autocast('cpu', torch.bfloat16):
        cast = layer(x), standardize_weight(conv.weight)
        cotangents = [torch.randn_like(y) for y in cast]
        low = torch.autograd.grad(cast, (x, conv.weight), cotangents)
        assert conv(x).dtype == torch.bfloat16
    high = torch.autograd.grad(plain, (x, conv.weight), cotangents)
    for one, other in zip((*plain, *high), (*cast, *low), strict=True):
        assert torch.equal(one, other)


def test_statistics_of_inputs_far_from_zero(kernels):
    # mean / std = 1000: E[x^2] - E[x]^2 would keep no digit of the variance.
    x = torch.randn(2, 16, 20, 20) * 0.01 + 10
    layer = BCN(16, 4, momentum=1.0)
    layer.running_mean.fill_(10)
    layer(x)
    expected = (x.double() - 10).square().mean((0, 2, 3))
    torch.testing.assert_close(
        layer.running_var.double(), expected, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize('mode', MODES)
def test_estimates_stay_where_only_the_variance_overflows(
    kernels: str, mode: str
) -> None:
    x = torch.randn(2, 16, 5, 5)
    x[:, 3] *= 1e25
    layer = BCN(16, 4, mode=mode)
    layer(x)
    assert layer.running_mean[3] == 0
    assert layer.running_var[3] == 1
    assert (layer.running_mean != 0).sum() == 15
    assert (layer.running_var != 1).sum() == 15


@pytest.mark.parametrize('outer', [8, 64], ids=['group', 'channel'])
@pytest.mark.parametrize('mode', MODES)
def test_input_without_positions_equals_formula(
    kernels: str, mode: str, outer: int
) -> None:
    shape = 17, 64
    state = state_of(64, torch.float64, outer)
    names = 'running_mean', 'running_var'
    running = {name: state.pop(name) for name in names}

    def ours(x: Tensor, **affine: Tensor) -> Tensor:
        new = {k: v.clone() for k, v in running.items()}
        return batch_channel_norm(
            x, 8, **new, **affine, training=True, momentum=0.2, mode=mode
        )

    def oracle(x: Tensor, **affine: Tensor) -> Tensor:
        output, _ = reference.batch_channel_norm(
            x.view(*shape, 1, 1),
            {**affine, **running},
            8,
            training=True,
            momentum=0.2,
            mode=mode,
        )
        return output.view(shape)

    inputs = {'x': input_of(shape, torch.float64), **state}
    actual = values_and_gradients(ours, inputs, 'bcn')
    expected = values_and_gradients(oracle, inputs, 'bcn')
    assert not disagreements(actual, expected, TOLERANCE[torch.float64])


def test_few_values_far_from_zero_keep_their_digits(kernels: str) -> None:
    # Four values to a group, at a mean of 1000 deviations.
    state = state_of(64, torch.float32, 16)
    x = torch.randn(2, 64, 1, 1) + 1000
    running = {
        'running_mean': 1000 + 0.1 * torch.randn(64),
        'running_var': state.pop('running_var'),
    }
    del state['running_mean']

    def ours(x: Tensor, **affine: Tensor) -> Tensor:
        return batch_channel_norm(x, 16, **running, **affine)

    def oracle(x: Tensor, **affine: Tensor) -> Tensor:
        return reference.batch_channel_norm(
            x, {**affine, **running}, 16, training=False, momentum=0.2
        )[0]

    inputs = {'x': x, **state}
    actual = values_and_gradients(ours, inputs, 'bcn')
    double = {k: v.double() for k, v in inputs.items()}
    expected = values_and_gradients(oracle, double, 'bcn')
    assert not disagreements(actual, expected, 5e-6)


@pytest.mark.parametrize(
    ('shape', 'groups', 'mode', 'times'),
    [
        ((2, 64, 1, 1), 8, 'estimate', 1),
        ((2, 64, 1, 1), 8, 'batch', 0),
        ((15, 64, 1, 1), 8, 'batch', 0),
        ((16, 64, 1, 1), 8, 'batch', 1),
        ((2, 64, 3, 3), 8, 'batch', 1),
        ((16, 64, 1, 1), 16, 'estimate', 0),
    ],
)
def test_few_values_run_composed(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    groups: int,
    mode: str,
    times: int,
) -> None:
    norm = calls(monkeypatch, cpu.BatchChannelNorm)
    BCN(64, groups, mode=mode)(torch.randn(shape))
    assert len(norm) == times


def test_an_empty_batch_moves_nothing(kernels: str) -> None:
    layer, shape = BCN(16, 4), (0, 16, 5, 5)
    x = torch.randn(shape, requires_grad=True)
    output = layer(x)
    output.backward(torch.randn(shape))
    assert output.shape == x.grad.shape == shape
    assert layer.running_mean.eq(0).all()
    assert layer.running_var.eq(1).all()


@pytest.mark.parametrize(('fan_in', 'times'), [(2, 0), (3, 1)])
def test_filters_of_two_entries_run_composed(
    monkeypatch: pytest.MonkeyPatch, fan_in: int, times: int
) -> None:
    weight = calls(monkeypatch, cpu.StandardizeWeight)
    WSConv2d(fan_in, 8, 1)(torch.randn(1, fan_in, 5, 5))
    assert len(weight) == times


@pytest.mark.parametrize('mode', MODES)
def test_differentiates_twice(kernels, mode):
    state = state_of(6, torch.float64, 3)
    running = {k: state.pop(k) for k in ('running_mean', 'running_var')}
    x = torch.randn(2, 6, 3, 2, dtype=torch.float64)
    leaves = [v.requires_grad_() for v in (x, *state.values())]

    def function(x, *affine):
        return batch_channel_norm(
            x,
            3,
            *(v.clone() for v in running.values()),
            *affine,
            training=True,
            mode=mode,
            update=False,
        )

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize('mode', MODES)
def test_state_in_float64_takes_an_input_in_float32(
    kernels: str, mode: str
) -> None:
    layer = BCN(32, 8, mode=mode, momentum=0.1, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, mean=0.5)
    x = input_of((2, 32, 5, 7), torch.float32).requires_grad_()
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    expected, running = reference.batch_channel_norm(
        x, state, 8, training=True, momentum=0.1, mode=mode
    )
    output = layer(x)
    assert output.dtype == torch.float32
    cotangent = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, x, cotangent)
    (expected_gradient,) = torch.autograd.grad(expected, x, cotangent.double())
    assert layer.running_var.dtype == torch.float64
    assert not disagreements(
        {'output': output, 'dx': gradient, 'var': layer.running_var},
        {
            'output': expected,
            'dx': expected_gradient,
            'var': running['running_var'],
        },
        TOLERANCE[torch.float32],
    )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_second_derivatives_of_half_precision(
    kernels: str, dtype: torch.dtype
) -> None:
    # At a mean of 100, half precision between the steps leaves no digit.
    state = state_of(16, torch.float32, 4)
    state |= {
        'bn_weight': torch.full((16,), 0.7),
        'running_mean': torch.zeros(16),
        'running_var': torch.ones(16),
    }
    x = (torch.randn(2, 16, 5, 5) + 100).to(dtype)
    cotangent = torch.randn(x.shape).to(dtype)
    direction = torch.randn(x.shape, dtype=torch.float64)

    def second(function: Callable[..., Tensor], leaf: Tensor) -> Tensor:
        leaf.requires_grad_()
        (first,) = torch.autograd.grad(
            function(leaf), leaf, cotangent.to(leaf.dtype), create_graph=True
        )
        (found,) = torch.autograd.grad((first * direction).sum(), leaf)
        return found

    def ours(x: Tensor) -> Tensor:
        return batch_channel_norm(x, 4, **state)

    def oracle(x: Tensor) -> Tensor:
        return reference.batch_channel_norm(
            x, state, 4, training=False, momentum=0.1
        )[0]

    actual = second(ours, x.clone())
    assert actual.dtype == dtype
    expected = second(oracle, x.double())
    assert relative_error(actual, expected) < TOLERANCE[dtype]


def test_the_compiled_form_subtracts_a_large_mean_first() -> None:
    x = torch.randn(2, 16, 9, 9) + 1000
    outputs = [
        compiled.batch_channel_norm(
            x.to(dtype),
            4,
            (torch.full((16,), 1000.0), torch.ones(16)),
            (None,) * 4,
            *(0.1, 1e-5, 'running', False),
        )
        for dtype in (torch.float32, torch.float64)
    ]
    assert relative_error(*outputs) < 1e-5


@pytest.mark.parametrize('frozen', ['input', 'affine', 'no affine'])
def test_only_required_gradients_are_computed(kernels, frozen):
    layer = BCN(12, 4, affine=frozen != 'no affine')
    layer.requires_grad_(frozen != 'affine')
    x = torch.randn(2, 12, 4, 4, requires_grad=frozen != 'input')
    layer(x).backward(torch.randn(2, 12, 4, 4))
    assert (x.grad is None) == (frozen == 'input')
    assert all(
        (p.grad is None) == (frozen == 'affine') for p in layer.parameters()
    )


def test_expanded_cotangent_and_strided_input(kernels):
    base = torch.randn(2, 24, 8, 8, dtype=torch.float64)
    strided = base[:, ::2, :, ::2].detach().requires_grad_()
    dense = strided.detach().clone().contiguous().requires_grad_()
    layer = BCN(12, 4, dtype=torch.float64)
    cotangent = torch.randn(2, 12, 1, 1).double().expand(2, 12, 8, 4)
    gradients = []
    for x in (strided, dense):
        layer.reset_running_stats()
        gradients.append(torch.autograd.grad(layer(x), x, cotangent)[0])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('samples', [1, 2])
def test_output_may_be_changed_in_place(kernels, samples, layout):
    conv, norm = WSConv2d(8, 8, 3), BCN(8, 4)
    x = in_layout(torch.randn(samples, 8, 9, 9), layout)
    cotangent = torch.randn(samples, 8, 7, 7)
    gradients = []
    for change in (F.relu, torch.relu_):
        norm.reset_running_stats()
        conv.zero_grad()
        change(norm(conv(x))).backward(cotangent)
        gradients.append(conv.weight.grad)
    torch.testing.assert_close(*gradients)
    if layout == 'NCHW':
        standardize_weight(conv.weight).mul_(2).backward(conv.weight.detach())


def saved_bytes(function, x: Tensor) -> int:
    """Bytes that autograd keeps alive, each storage once."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = function(x)
    assert output.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_saves_what_group_norm_saves(dtype):
    x = torch.randn(1, 64, 60, 60).to(dtype).requires_grad_()
    group_norm = torch.nn.GroupNorm(32, 64).to(dtype)
    ours = saved_bytes(BCN(64).to(dtype), x)
    theirs = saved_bytes(group_norm, x)
    # The difference is one number per channel and affine, not activations.
    assert ours - theirs < 0.01 * x.nbytes


def test_fused_kernels_run(monkeypatch):
    norm = calls(monkeypatch, cpu.BatchChannelNorm)
    weight = calls(monkeypatch, cpu.StandardizeWeight)
    conv, bcn = WSConv2d(8, 8, 3), BCN(8, 4)
    x = torch.randn(1, 8, 6, 6)
    for training, layout in product((True, False), LAYOUTS):
        bcn.train(training)
        bcn(conv(in_layout(x, layout)))
    assert (len(weight), len(norm)) == (4, 4)
    monkeypatch.setenv('WS_MM_KERNELS', 'plain')
    bcn(conv(x))
    assert (len(weight), len(norm)) == (4, 4)
    assert choose(x) is plain


def test_composed_batch_norm_computes_its_moments_once(monkeypatch):
    monkeypatch.setenv('WS_MM_KERNELS', 'plain')
    monkeypatch.delattr(plain, 'batch_moments')
    bcn = BCN(8, 4, mode='batch')
    x = torch.randn(2, 8, 6, 6) + 3
    bcn(x)
    var, mean = torch.var_mean(x, (0, 2, 3))
    part = bcn.momentum
    torch.testing.assert_close(bcn.running_mean, part * mean)
    torch.testing.assert_close(bcn.running_var, 1 - part + part * var)


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_moments_by_sums(dtype):
    if dtype == torch.half and not has_half_batch_norm():
        pytest.skip('such an input goes to the composed operations')
    # 1260 values are two pieces, 1261 one, 187 too few for two, 35 short.
    # In one piece, 268800 would lose digits.
    for size in ((400, 672), (30, 42), (13, 97), (11, 17), (5, 7)):
        x = torch.randn(2, 5, *size, dtype=torch.float64)
        # Rows whose squares would lose all digits, and no others.
        x[0, 1] += 300
        x[1, 2:4] = torch.tensor([3.0, 0.0]).view(2, 1, 1)
        x[1, 4] -= 3
        x[0, 3, 0, 0] = torch.nan
        x = x.to(dtype)
        mean, var, _ = cpu.instance_moments(x)
        exact = x.double().flatten(2)
        good = torch.ones(2, 5, dtype=torch.bool)
        good[0, 3] = False
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        for found, expected in (
            (mean, exact.mean(2)),
            (var, exact.var(2, correction=0)),
        ):
            assert found.isnan().equal(~good)
            torch.testing.assert_close(
                found.double()[good],
                expected[good],
                rtol=tolerance,
                atol=tolerance,
            )


def test_small_activations_run_eager_by_default(monkeypatch):
    norm = calls(monkeypatch, cpu.BatchChannelNorm)
    weight = calls(monkeypatch, cpu.StandardizeWeight)
    monkeypatch.setattr(cpu, 'MIN_NUMEL', 288)
    monkeypatch.delenv('WS_MM_KERNELS')
    conv, bcn = WSConv2d(8, 8, 3), BCN(8, 4)
    for size, times in ((5, 0), (6, 1)):
        bcn(torch.randn(1, 8, size, size))
        conv(torch.randn(1, 8, size, size))
        assert len(norm) == times
    assert len(weight) == 2  # filters are standardized fused at any size
    with torch.no_grad():  # and activations with and without a backward
        bcn(torch.randn(1, 8, 6, 6))
    assert len(norm) == 2


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_fused_equals_plain(monkeypatch, dtype, mode, layout):
    x = in_layout(input_of((1, 32, 38, 29), dtype), layout)
    cotangent = torch.randn(x.shape).to(dtype)
    results = []
    for choice in ('fused', 'plain'):
        monkeypatch.setenv('WS_MM_KERNELS', choice)
        torch.manual_seed(1)
        double = dtype == torch.float64
        layer = BCN(32, 8, mode=mode, dtype=dtype if double else None)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, mean=0.5)
        leaf = x.clone().requires_grad_()
        output = layer(leaf)
        output.backward(cotangent)
        results.append(
            {
                'output': output,
                'dx': leaf.grad,
                **{k: p.grad for k, p in layer.named_parameters()},
                **dict(layer.named_buffers()),
            }
        )
    assert not disagreements(*results, TOLERANCE[dtype])


def test_subclasses_of_a_tensor_see_plain_operations() -> None:
    class Marked(Tensor):
        """Whoever made it wants to see the operations."""

    x = torch.randn(2, 8, 3, 3)
    assert choose(x) is choose(torch.nn.Parameter(x)) is cpu
    marked = x.as_subclass(Marked)
    assert choose(marked) is plain
    torch.testing.assert_close(
        standardize_weight(marked).as_subclass(Tensor), standardize_weight(x)
    )


def test_unknown_kernel_choice_is_rejected(monkeypatch):
    monkeypatch.setenv('WS_MM_KERNELS', 'fast')
    with pytest.raises(ValueError, match="WS_MM_KERNELS='fast'.*'plain'"):
        standardize_weight(torch.randn(2, 2, 3, 3))


def test_functional_transforms_see_plain_operations():
    weight = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    direction = torch.randn_like(weight)

    def loss(weight):
        return (standardize_weight(weight) * direction).sum()

    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(weight), expected)
    batched = torch.vmap(standardize_weight)(weight.expand(2, *weight.shape))
    torch.testing.assert_close(batched[1], standardize_weight(weight))


def test_compiled_equals_eager():
    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = WSConv2d(8, 16, 3, bias=False)
            self.norm = BCN(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(self.conv(x)))

    pair = Pair()
    x, cotangent = torch.randn(2, 8, 9, 9), torch.randn(2, 16, 7, 7)
    results = []
    for run in (
        pair,
        torch.compile(pair, backend='aot_eager', fullgraph=True),
    ):
        pair.zero_grad()
        pair.norm.reset_running_stats()
        output = run(x)
        output.backward(cotangent)
        results.append(
            [output.detach(), pair.norm.running_var.clone()]
            + [p.grad.clone() for p in pair.parameters()]
        )
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


RECORDERS = {
    'export': lambda pair, x: torch.export.export(pair, (x,)),
    'trace': lambda pair, x: torch.jit.trace(pair, x),
    'make_fx': lambda pair, x: make_fx(pair)(x),
}


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('recorder', RECORDERS)
def test_recorded_equals_eager(recorder, training):
    if training and recorder != 'export':
        pytest.skip('the recorded graph has no no_grad around the estimates')
    if training and not hasattr(torch.export, 'Dim'):
        pytest.skip('torch.export of torch 2.1 refuses layers that update')
    pair = torch.nn.Sequential(WSConv2d(8, 16, 3), BCN(16, 4)).train(training)
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    expected = pair(x)
    cotangent = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(expected, x, cotangent)
    pair[1].reset_running_stats()
    other = RECORDERS[recorder](pair, x)
    if hasattr(other, 'module'):  # an ExportedProgram is callable in 2.1
        other = other.module()
    pair[1].reset_running_stats()
    output = other(x)
    torch.testing.assert_close(output, expected)
    (found,) = torch.autograd.grad(output, x, cotangent)
    torch.testing.assert_close(found, gradient)


def test_inference_mode_equals_eager():
    pair = torch.nn.Sequential(WSConv2d(8, 16, 3), BCN(16, 4)).eval()
    x = torch.randn(2, 8, 9, 9)
    expected = pair(x)
    with torch.inference_mode():
        torch.testing.assert_close(pair(x), expected)
