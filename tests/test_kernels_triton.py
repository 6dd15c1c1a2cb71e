"""The Triton kernels, on a GPU where there is one, interpreted elsewhere.

The interpreter takes about half a second for a forward and backward of BCN,
so shapes are small, and tiles with them: splits, loops and edges all occur.
What it cannot see, whether the kernels compile, the last tests see to.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import reference
import torch
import torch.distributed as dist
from comparison import (
    TOLERANCE,
    disagreements,
    relative_error,
    values_and_gradients,
)
from test_distributed import (
    count,
    make_batch,
    make_layer,
    of_one_process,
    second_derivatives,
    step,
)
from test_kernels import in_layout, input_of, saved_bytes, state_of
from test_self_check import FAULTS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ws_mm.kernels
from ws_mm import BCN, WSConv2d, batch_channel_norm, standardize_weight
from ws_mm.kernels import choose, plain

pytest.importorskip('triton', '3.0', reason='no Triton 3 on this platform')
from ws_mm.kernels import cuda, plans, self_check, triton_kernels

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cpu' if INTERPRETED else 'cuda'
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
ROOT = Path(__file__).resolve().parent.parent
HALF = pytest.mark.parametrize(
    'dtype', [torch.float16, torch.bfloat16], ids=str
)


def forget() -> None:
    """Drop all plans: they hold tilings, and what was launched."""
    plans.filter_plan.cache_clear()
    plans.norm_plan.cache_clear()


@pytest.fixture(autouse=True)
def forced(monkeypatch) -> Iterator[None]:
    """No silent fallback: a kernel that cannot run fails its test."""
    monkeypatch.setenv('WS_MM_KERNELS', 'triton')
    forget()
    yield
    forget()


SMALL = {
    **dict(TILE=32, COLUMNS=32, PROGRAMS=8, GROUP_TILE=16, FEW_SAMPLES=2),
    **dict(FILTERS=32, WIDEST=16, FEW=3),
}


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(plans, name, value)


def launches(monkeypatch) -> list[str]:
    """Record the kernels that run."""
    seen: list[str] = []
    for name in KERNELS:
        kernel = getattr(triton_kernels, name)

        class Recorded:
            def __init__(self, name, kernel):
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid):
                seen.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(triton_kernels, name, Recorded(name, kernel))
    return seen


KERNELS = (
    'standardize',
    'standardize_backward',
    'moments',
    'coefficients',
    'affine',
    'sums',
    'slopes',
    'affine_backward',
)


def on_device(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(DEVICE) for name, x in values.items()}


def on_cpu(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.cpu() for name, x in values.items()}


# Weight Standardization


def compare_weights(
    weight: Tensor,
    eps_mode: str = 'outside',
    layout: str = 'NCHW',
    tolerance: float = TOLERANCE[torch.float32],
) -> None:
    def ours(weight):
        output = standardize_weight(
            in_layout(weight.to(DEVICE), layout), eps_mode=eps_mode
        )
        return output.cpu().contiguous()

    actual = values_and_gradients(ours, {'weight': weight}, 'ws')
    expected = values_and_gradients(
        partial(reference.standardize_weight, eps_mode=eps_mode),
        {'weight': weight.double()},
        'ws',
    )
    assert not disagreements(actual, expected, tolerance)


@pytest.mark.parametrize('eps_mode', ['outside', 'inside'])
@pytest.mark.parametrize(
    'shape',
    [
        (1, 3, 1),
        (3, 1, 3, 3),
        (5, 33, 1, 1),
        (2, 1025, 1, 1),
        (4, 3, 2, 2, 2),
    ],
    ids=str,
)
def test_standardize_weight_equals_formula(shape, eps_mode):
    scale = torch.logspace(-3, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
    compare_weights((torch.randn(shape) + 0.3) * scale, eps_mode)


@pytest.mark.parametrize('eps_mode', ['outside', 'inside'])
@pytest.mark.parametrize(
    ('shape', 'layout'),
    [
        ((2, 33, 1), 'NCHW'),  # wider than a block, last block of one
        ((2, 4, 2, 2), 'NCHW'),  # one whole block
        ((13, 3, 1), 'NCHW'),  # several filters to a program, last ones cut
        ((3, 2, 3, 2), 'channels_last'),
        ((5, 3, 1, 1), 'channels_last'),
    ],
    ids=str,
)
def test_filters_in_blocks_equal_formula(small_tiles, shape, layout, eps_mode):
    compare_weights(torch.randn(shape) * 0.1 + 0.2, eps_mode, layout)


@pytest.mark.parametrize('fan_in', [16, 33], ids=['whole', 'blocks'])
def test_filters_far_from_zero(small_tiles, fan_in):
    # The mean alone, in float32, is off by 1e-4 standard deviations.
    compare_weights(torch.randn(2, fan_in, 1, 1) * 0.01 + 10)


@pytest.mark.parametrize('eps_mode', ['outside', 'inside'])
@pytest.mark.parametrize('fan_in', [16, 33], ids=['whole', 'blocks'])
def test_constant_filters_stay_finite(small_tiles, fan_in, eps_mode):
    # 0.3 has rounding, 0 and 0.5 have none.
    weight = torch.tensor([0, 0.3, 0.5]).view(3, 1, 1).repeat(1, fan_in, 1)
    weight = weight.to(DEVICE).requires_grad_()
    output = standardize_weight(weight, eps_mode=eps_mode)
    assert output.abs().max() < 1e-3
    grad = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, weight, grad)
    eps = 1e-5 if eps_mode == 'outside' else 1e-5**0.5
    expected = (grad - grad.mean(1, keepdim=True)) / eps
    assert relative_error(gradient[[0, 2]], expected[[0, 2]]) < 1e-5
    assert gradient.isfinite().all()


@HALF
def test_filters_in_the_dtype_of_autocast(dtype):
    conv = WSConv2d(5, 3, 3).to(DEVICE)
    with torch.autocast(DEVICE, dtype):
        assert conv(torch.randn(1, 5, 4, 4, device=DEVICE)).dtype == dtype
    low = standardize_weight(conv.weight, dtype=dtype)
    assert cuda.standardize_weight(conv.weight, 1, False, dtype).dtype == dtype
    high = standardize_weight(conv.weight)
    assert low.dtype == dtype
    if INTERPRETED and dtype == torch.bfloat16:
        # The interpreter cuts digits off where a GPU rounds.
        torch.testing.assert_close(low, high.to(dtype), rtol=2**-7, atol=0)
    else:
        assert torch.equal(low, high.to(dtype))
    # Backward computes in float32 from the raw filters, not from the output.
    grad = torch.randn(low.shape).to(dtype).to(DEVICE)
    (gradient,) = torch.autograd.grad(low, conv.weight, grad)
    (expected,) = torch.autograd.grad(high, conv.weight, grad.float())
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, expected)


def test_autocast_standardizes_and_casts_in_one(monkeypatch):
    conv = WSConv2d(5, 3, 3).to(DEVICE)
    seen = []
    forward = torch.nn.functional.conv2d

    def conv2d(input, weight, *args):
        seen.append(weight.dtype)
        return forward(input, weight, *args)

    monkeypatch.setattr(torch.nn.functional, 'conv2d', conv2d)
    x = torch.randn(1, 5, 4, 4, device=DEVICE)
    conv(x)
    with torch.autocast(DEVICE, torch.bfloat16):
        conv(x)
        with torch.autocast(DEVICE, enabled=False):
            conv(x)
    low = torch.bfloat16
    assert seen == [torch.float32, low, torch.float32]


@HALF
def test_half_precision_filters(dtype):
    weight = (torch.randn(3, 5, 3, 3) + 1).to(dtype)
    actual = values_and_gradients(
        lambda weight: standardize_weight(weight.to(DEVICE)).cpu(),
        {'weight': weight},
        'ws',
    )
    assert actual['output'].dtype == dtype
    expected = values_and_gradients(
        reference.standardize_weight, {'weight': weight.double()}, 'ws'
    )
    assert not disagreements(actual, expected, TOLERANCE[dtype])


def test_strided_filters_and_cotangents(small_tiles):
    base = torch.randn(3, 8, 3, 2, device=DEVICE)
    strided = base[:, ::2].detach().requires_grad_()
    dense = strided.detach().clone().contiguous().requires_grad_()
    grad = torch.randn(3, 1, 3, 2, device=DEVICE).expand(3, 4, 3, 2)
    results = []
    for weight in (strided, dense):
        output = standardize_weight(weight)
        results.append(torch.autograd.grad(output, weight, grad)[0])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


# Batch-Channel Normalization, in 3 groups. Shape, layout, mode, phase, outer
# affine and tiles: every pair of values is in some case.
CASES = [
    ((2, 6, 3, 5), 'NCHW', 'estimate', 'train', 'group', 'small'),
    ((2, 6, 3, 5), 'channels_last', 'batch', 'train', 'channel', 'small'),
    ((2, 6, 3, 5), 'NCHW', 'batch', 'eval', 'channel', 'real'),
    ((2, 6, 3, 5), 'channels_last', 'estimate', 'eval', 'group', 'real'),
    # 5 blocks to a row, 2 to a program: the last program has one
    ((1, 3, 130), 'NCHW', 'batch', 'train', 'channel', 'small'),
    ((1, 3, 130), 'NCHW', 'estimate', 'eval', 'channel', 'small'),
    ((1, 6, 5, 13), 'channels_last', 'estimate', 'train', 'channel', 'small'),
    ((3, 12, 1, 1), 'NCHW', 'estimate', 'train', 'channel', 'small'),
    ((3, 12, 1, 1), 'channels_last', 'batch', 'train', 'group', 'real'),
    ((5, 12), 'NCHW', 'batch', 'train', 'channel', 'small'),
    ((1, 12, 1, 1), 'NCHW', 'estimate', 'train', 'group', 'real'),
    ((2, 6, 2, 3, 2), 'NCHW', 'estimate', 'eval', 'group', 'small'),
    ((2, 6, 2, 3, 2), 'channels_last', 'batch', 'train', 'group', 'small'),
    ((1, 6, 41, 25), 'NCHW', 'estimate', 'train', 'channel', 'real'),
    ((1, 6, 41, 25), 'channels_last', 'batch', 'train', 'group', 'real'),
    ((33, 6, 2), 'NCHW', 'batch', 'train', 'group', 'small'),
    ((33, 6, 2), 'NCHW', 'estimate', 'train', 'channel', 'real'),
]
# With one channel to a group, the second step undoes the inner affine.
UNDONE = 'dbn_weight', 'dbn_bias'


def to_layout(x: Tensor, layout: str) -> Tensor:
    if layout == 'NCHW':
        return x.contiguous()
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()])


def compare_norms(
    shape: tuple[int, ...],
    layout: str,
    mode: str,
    phase: str,
    outer: int,
    groups: int = 3,
    without: tuple[str, ...] = (),
) -> None:
    state = state_of(shape[1], torch.float32, outer)
    names = 'running_mean', 'running_var'
    running = {name: state.pop(name) for name in names}
    full = dict(state)
    for name in without:
        del state[name]
        full[name] = torch.full_like(full[name], name.endswith('weight'))
    settings = dict(training=phase == 'train', momentum=0.2, mode=mode)
    new: dict[str, Tensor] = {}

    def ours(x, **affine):
        new.update(on_device({k: v.clone() for k, v in running.items()}))
        x = to_layout(x.to(DEVICE), layout)
        output = batch_channel_norm(
            x, groups, **new, **on_device(affine), **settings
        )
        assert output.stride() == x.stride()
        return output.cpu().contiguous()

    expected_new = {}

    def oracle(x, **affine):
        output, statistics = reference.batch_channel_norm(
            x.reshape(*shape[:2], -1, 1),
            {**full, **affine, **running},
            groups,
            **settings,
        )
        expected_new.update(statistics)
        return output.view(shape)

    inputs = {'x': input_of(shape, torch.float32), **state}
    actual = values_and_gradients(ours, inputs, 'bcn')
    double = {k: v.double() for k, v in inputs.items()}
    expected = values_and_gradients(oracle, double, 'bcn')
    expected.update(expected_new)
    actual.update(on_cpu(new))
    if groups == shape[1]:
        for name in UNDONE:
            del actual[name], expected[name]
    assert not disagreements(actual, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize('case', CASES, ids=lambda c: '-'.join(map(str, c)))
def test_batch_channel_norm_equals_formula(request, case):
    *case, outer, tiles = case
    if tiles == 'small':
        request.getfixturevalue('small_tiles')
    compare_norms(*case, 3 if outer == 'group' else case[0][1])


@pytest.mark.parametrize(
    ('channels', 'groups', 'outer'), [(9, 3, 9), (6, 1, 1), (5, 5, 5)]
)
def test_groups_of_any_size(small_tiles, channels, groups, outer):
    compare_norms((1, channels, 7), 'NCHW', 'batch', 'train', outer, groups)


@pytest.mark.parametrize(
    'without',
    [
        ('bn_weight', 'bn_bias', 'weight', 'bias'),
        ('bn_weight', 'bias'),
        ('bn_bias', 'weight'),
    ],
    ids='-'.join,
)
@pytest.mark.parametrize('outer', [3, 6], ids=['group', 'channel'])
def test_missing_affines_are_one_and_zero(without, outer):
    compare_norms(
        (2, 6, 3, 5), 'NCHW', 'estimate', 'train', outer, without=without
    )


@HALF
@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_half_precision_is_normalized_in_float32(mode, dtype):
    layer = BCN(12, 3, momentum=0.1, mode=mode)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, mean=0.5)
    # Squares of these overflow in float16.
    x = (input_of((2, 12, 5, 5), torch.float32) * 300).to(dtype)
    state = {k: v.double() for k, v in layer.state_dict().items()}
    x.requires_grad_()
    expected, running = reference.batch_channel_norm(
        x, state, 3, training=True, momentum=0.1, mode=mode
    )
    output = layer.to(DEVICE)(x.to(DEVICE)).cpu()
    assert output.dtype == dtype
    cotangent = torch.randn(output.shape).to(dtype)
    (gradient,) = torch.autograd.grad(output, x, cotangent)
    assert gradient.dtype == dtype
    (expected_gradient,) = torch.autograd.grad(expected, x, cotangent.double())
    assert not disagreements(
        on_cpu(
            {'output': output, 'dx': gradient, 'var': layer.running_var},
        ),
        {
            'output': expected,
            'dx': expected_gradient,
            'var': running['running_var'],
        },
        TOLERANCE[dtype],
    )


@HALF
def test_half_precision_parameters(dtype):
    layer = BCN(12, 3, dtype=dtype).to(DEVICE)
    x = torch.randn(1, 12, 3, 3, device=DEVICE, dtype=dtype)
    layer(x).backward(torch.randn_like(x))
    for parameter in layer.parameters():
        assert parameter.grad.dtype == dtype
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize('layout', ['NCHW', 'channels_last'])
@pytest.mark.parametrize('size', [(9, 5), (3, 3)], ids=['blocks', 'part'])
def test_statistics_of_inputs_far_from_zero(
    small_tiles: None, size: tuple[int, int], layout: str
) -> None:
    # mean / std = 1000, and a first value off the others, as in a corner.
    x = torch.randn(2, 6, *size) * 0.01 + 10
    x[..., 0, 0] = 9.9
    layer = BCN(6, 3, momentum=1.0).to(DEVICE)
    layer.running_mean.fill_(10)
    layer(to_layout(x.to(DEVICE), layout))
    expected = (x.double() - 10).square().mean((0, 2, 3))
    torch.testing.assert_close(
        layer.running_var.cpu().double(), expected, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_constant_inputs_stay_finite(mode):
    layer = BCN(6, 3, mode=mode).to(DEVICE)
    x = torch.full((2, 6, 3, 3), 0.3, device=DEVICE, requires_grad=True)
    output = layer(x)
    output.backward(torch.randn_like(output))
    assert output.isfinite().all()
    assert x.grad.isfinite().all()
    assert layer.running_var.isfinite().all()


def test_padding_of_a_tile_does_not_count_without_eps():
    # A sample beyond the last has no variance: 1 / 0, were it not left out.
    layer = BCN(6, 3, mode='batch').to(DEVICE)
    layer.eps = 0.0
    x = torch.randn(3, 6, 3, 3, device=DEVICE, requires_grad=True)
    layer(x).backward(torch.randn_like(x))
    for values in (x, *layer.parameters()):
        assert values.grad.isfinite().all()


@pytest.mark.parametrize('value', [float('inf'), float('nan')])
@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_estimates_stay_finite(mode, value):
    x = torch.randn(1, 6, 4, 4)
    x[0, 1, 2, 2] = value
    layer = BCN(6, 3, mode=mode).to(DEVICE)
    output = layer(x.to(DEVICE))
    assert not output[:, :2].isfinite().any()
    assert output[:, 2:].isfinite().all()
    assert layer.running_mean[1] == 0
    assert layer.running_var[1] == 1
    assert layer.running_mean[0] != 0
    assert layer.running_var.isfinite().all()


def test_equal_inputs_give_equal_bits(small_tiles):
    x = torch.randn(2, 6, 4, 5).to(DEVICE)
    state = on_device(state_of(6, torch.float32, 3))
    running = {k: state.pop(k) for k in ('running_mean', 'running_var')}

    def run():
        new = {k: v.clone() for k, v in running.items()}
        found = values_and_gradients(
            lambda x, **affine: batch_channel_norm(
                x, 3, **new, **affine, training=True, mode='batch'
            ).cpu(),
            {'x': x, **state},
            'bits',
        )
        weight = {'weight': x.flatten(1)}
        for name, values in values_and_gradients(
            lambda weight: standardize_weight(weight).cpu(), weight, 'bits'
        ).items():
            found[f'ws {name}'] = values
        return {**found, **new}

    one, other = run(), run()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_empty_batch_moves_nothing():
    layer = BCN(6, 3).to(DEVICE)
    x = torch.randn(0, 6, 3, 3, device=DEVICE, requires_grad=True)
    output = layer(x)
    output.backward(torch.randn_like(output))
    assert output.shape == x.shape == x.grad.shape
    assert layer.running_mean.eq(0).all()
    assert layer.running_var.eq(1).all()


def test_one_value_per_channel_is_rejected_before_any_kernel(monkeypatch):
    seen = launches(monkeypatch)
    with pytest.raises(ValueError, match='more than one value per channel'):
        BCN(6, 3, mode='batch').to(DEVICE)(
            torch.randn(1, 6, 1, 1, device=DEVICE)
        )
    assert not seen


def test_strided_input_and_expanded_cotangent(small_tiles):
    base = torch.randn(1, 12, 4, 6, device=DEVICE)
    strided = base[:, ::2, :, ::2].detach().requires_grad_()
    dense = strided.detach().clone().contiguous().requires_grad_()
    cotangent = torch.randn(1, 6, 1, 1, device=DEVICE).expand(1, 6, 4, 3)
    layer = BCN(6, 3).to(DEVICE)
    results = []
    for x, grad in ((strided, cotangent), (dense, cotangent.contiguous())):
        layer.reset_running_stats()
        results.append(torch.autograd.grad(layer(x), x, grad)[0])
    torch.testing.assert_close(*results)


def test_strided_parameters():
    layer = BCN(6, 3, outer_affine='channel').to(DEVICE)
    x = torch.randn(2, 6, 3, 3, device=DEVICE)
    outputs = []
    wide = {name: torch.randn(12) for name, _ in layer.named_parameters()}
    for dense in (True, False):
        for name, values in wide.items():
            values = values.to(DEVICE)[::2]
            values = values.clone() if dense else values
            setattr(layer, name, torch.nn.Parameter(values))
        layer.reset_running_stats()
        outputs.append(layer(x))
    assert torch.equal(*outputs)


@pytest.mark.parametrize('frozen', ['input', 'affine', 'no affine'])
def test_only_required_gradients_are_computed(monkeypatch, frozen):
    layer = BCN(6, 3, affine=frozen != 'no affine').to(DEVICE)
    layer.requires_grad_(frozen != 'affine')
    x = torch.randn(2, 6, 2, 2, device=DEVICE)
    x.requires_grad_(frozen != 'input')
    seen = launches(monkeypatch)
    layer(x).backward(torch.randn_like(x))
    assert (x.grad is None) == (frozen == 'input')
    assert ('affine_backward' in seen) == (frozen != 'input')
    assert all(
        (p.grad is None) == (frozen == 'affine') for p in layer.parameters()
    )


def test_differentiates_twice():
    x = torch.randn(2, 6, 3, 3).to(DEVICE)
    direction, cotangent = torch.randn_like(x), torch.randn_like(x)
    layer, conv = BCN(6, 3, mode='batch').to(DEVICE), WSConv2d(6, 4, 2)
    weight = conv.weight.detach().to(DEVICE)
    along = torch.randn_like(weight)

    def second(function, leaf, direction, cotangent):
        leaf = leaf.clone().requires_grad_()
        (first,) = torch.autograd.grad(
            function(leaf), leaf, cotangent, create_graph=True
        )
        return torch.autograd.grad(first, leaf, direction)[0]

    def both():
        return (
            second(layer, x, direction, cotangent),
            second(standardize_weight, weight, along, along.flip(0)),
        )

    actual = both()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('WS_MM_KERNELS', 'plain')
        expected = both()
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_saves_what_group_norm_saves(dtype):
    x = torch.randn(1, 6, 60, 60, device=DEVICE).to(dtype).requires_grad_()
    ours = BCN(6, 3).to(DEVICE, dtype)
    theirs = torch.nn.GroupNorm(3, 6).to(DEVICE, dtype)
    # The difference is one number per channel and affine, not activations.
    assert saved_bytes(ours, x) - saved_bytes(theirs, x) < 0.01 * x.nbytes


def test_output_may_be_changed_in_place():
    conv, norm = WSConv2d(4, 6, 3).to(DEVICE), BCN(6, 3).to(DEVICE)
    x, cotangent = torch.randn(1, 4, 4, 5), torch.randn(1, 6, 2, 3)
    gradients = []
    for change in (torch.relu, torch.relu_):
        norm.reset_running_stats()
        conv.zero_grad()
        change(norm(conv(x.to(DEVICE)))).backward(cotangent.to(DEVICE))
        gradients.append(conv.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('broken', [None, 'affine'])
def test_updates_are_seen_by_autograd(monkeypatch, broken):
    layer = BCN(6, 3).to(DEVICE)
    x = torch.randn(1, 6, 2, 2, device=DEVICE, requires_grad=True)
    kept = (x.mean((0, 2, 3)) * layer.running_mean).sum()
    if broken:
        monkeypatch.setattr(triton_kernels, broken, Broken())
        with pytest.raises(RuntimeError, match='C compiler'):
            layer(x)
    else:
        layer(x)
    with pytest.raises(RuntimeError, match='modified by an inplace'):
        kept.backward()


# Over ranks


def broken(name: str, how: str) -> Any:
    """A kernel that cannot run, or one whose results are wrong.

    With 'constants' in how, only where statistics are not the batch's.
    """
    kernel = getattr(triton_kernels, name)

    class Broken:
        def __getitem__(self, grid):
            def run(*args, **kwargs):
                spared = 'constants' in how and kwargs['OF_BATCH']
                if 'raises' in how and not spared:
                    raise OSError('Failed to find C compiler')
                kernel[grid](*args, **kwargs)
                for _, number, start in (f for f in FAULTS if f[0] == name):
                    if not spared:
                        args[number].view(-1)[start:].mul_(1.5)

            return run

    return mock.patch.object(triton_kernels, name, Broken())


def sync_rank(
    rank: int,
    sizes: list[int],
    layout: str = 'NCHW',
    dtype: torch.dtype = torch.float32,
    fault: tuple[str, str] | None = None,
    derivatives: Callable[..., dict[str, Tensor]] = step,
    strided: bool = False,
    far: bool = False,
    **options: Any,
) -> tuple[dict[str, Tensor], list[str]]:
    """One step of a layer in mode 'sync_batch', and the kernels it ran.

    In place of these, a rank with a fault returns what it has said.
    """
    forget()
    self_check.check_of.cache_clear()
    ws_mm.kernels._failed.clear()
    batch = [
        in_layout(t.split(sizes)[rank].to(DEVICE, dtype), layout)
        for t in make_batch(sum(sizes))
    ]
    layer = make_layer('sync_batch', dtype=torch.float32, **options).to(DEVICE)
    if strided:
        layer.register_forward_pre_hook(
            lambda _, args: args[0].repeat_interleave(2, 3)[..., ::2]
        )
        for values in layer.parameters():
            values.data = values.data.repeat_interleave(2)[::2]
    if far:
        layer.bn_bias.data.fill_(100)
    mode = 'triton'
    if fault:
        mode = 'check' if 'differs' in fault[1] else 'fused'
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('WS_MM_KERNELS', mode)
        if mode == 'fused':
            # On a CPU, only a forced kernel is interpreted.
            patch.setattr(ws_mm.kernels, 'choose', lambda *_: cuda)
        for name, value in SMALL.items():
            patch.setattr(plans, name, value)
        if fault and rank == 1:
            said: list[str] = []
            patch.setattr(
                ws_mm.kernels, 'print_log', lambda text, **_: said.append(text)
            )
            with broken(*fault):
                return on_cpu(derivatives(layer, *batch)), said
        seen = launches(patch)
        return on_cpu(derivatives(layer, *batch)), seen


def formula(
    sizes: list[int],
    dtype: torch.dtype,
    function: Any = step,
    far: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """The same of one process in composed operations of float64."""
    layer = make_layer('batch', dtype=torch.float32, **options).double()
    if far:
        layer.bn_bias.data.fill_(100)
    rounded = [t.to(dtype).double() for t in make_batch(sum(sizes))]
    with mock.patch.dict(os.environ, WS_MM_KERNELS='plain'):
        return function(layer, *rounded)


@pytest.mark.parametrize(
    ('sizes', 'options'),
    [
        ([2, 2], {}),
        ([2, 3], dict(outer_affine='channel', layout='channels_last')),
        ([4, 0], dict(affine=False)),
        ([2, 0, 3, 1], dict(dtype=torch.half)),
        ([1, 0, 2, 2], dict(dtype=torch.bfloat16, layout='channels_last')),
        ([3, 2], dict(strided=True)),
    ],
    ids=str,
)
def test_sync_batch_equals_formula(sizes, options, world):
    results = world(len(sizes)).run(sync_rank, sizes, **options)
    dtype = options.pop('dtype', torch.float32)
    for name in ('layout', 'strided'):
        options.pop(name, None)
    expected = formula(sizes, dtype, **options)
    actual = of_one_process([found for found, _ in results])
    assert not disagreements(actual, expected, TOLERANCE[dtype])
    for size, (_, seen) in zip(sizes, results, strict=True):
        kernels = [
            *('moments', 'coefficients', 'coefficients', 'affine'),
            *('sums', 'slopes', 'affine_backward'),
        ]
        assert seen == (kernels if size > 1 else [])  # else few values


def exchanging_rank(rank: int, chosen: str) -> list[torch.Size]:
    """Shapes of what one step of a rank exchanges."""
    layer = make_layer('sync_batch', dtype=torch.float32)
    batch = [t.float() for t in make_batch(2)]
    shapes: list[torch.Size] = []
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(rows: list[Tensor], own: Tensor) -> None:
        shapes.append(own.shape)
        gather(rows, own)

    def all_reduce(values: Tensor) -> None:
        shapes.append(values.shape)
        reduce(values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('WS_MM_KERNELS', chosen)
        patch.setattr(dist, 'all_gather', all_gather)
        patch.setattr(dist, 'all_reduce', all_reduce)
        step(layer, *batch)
    return shapes


@pytest.mark.skipif(not INTERPRETED, reason='compares forms of a CPU')
def test_all_forms_exchange_equal_shapes(world):
    """Else TORCH_DISTRIBUTED_DEBUG=DETAIL ends a run whose ranks differ."""
    forms = [
        world(2).run(exchanging_rank, chosen)
        for chosen in ('plain', 'fused', 'triton')
    ]
    assert len(forms[0][0]) == 2
    assert forms[0] == forms[1] == forms[2]


def checkpointed(layer: BCN, x: Tensor, cotangent: Tensor) -> dict:
    forward = layer.forward
    layer.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    return step(layer, x, cotangent)


@pytest.mark.parametrize('fault', [None, ('sums', 'raises')], ids=str)
def test_sync_batch_in_a_checkpoint(fault, world):
    """One that is not reentrant lets a backward read what it saved once."""
    sizes = [2, 2]
    results = world(2).run(
        sync_rank, sizes, fault=fault, derivatives=checkpointed
    )
    expected = formula(sizes, torch.float32)
    actual = of_one_process([found for found, _ in results])
    assert not disagreements(actual, expected, TOLERANCE[torch.float32])


def test_second_derivatives_of_sync_batch_in_kernels(world):
    sizes = [3, 1]
    results = world(2).run(sync_rank, sizes, derivatives=second_derivatives)
    expected = formula(sizes, torch.float32, second_derivatives)
    actual = of_one_process([found for found, _ in results])
    assert not disagreements(actual, expected, 1e-4)


@HALF
def test_second_derivatives_of_sync_batch_in_half_precision(dtype, world):
    sizes = [3, 1]
    results = world(2).run(
        sync_rank,
        sizes,
        dtype=dtype,
        derivatives=second_derivatives,
        far=True,
    )
    expected = formula(sizes, dtype, second_derivatives, far=True)
    actual = of_one_process([found for found, _ in results])
    assert not disagreements(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ('name', 'how'),
    [
        *product(KERNELS[2:], ('raises', 'differs')),
        *product(
            ['coefficients'], ('raises, constants', 'differs, constants')
        ),
    ],
)
def test_a_kernel_that_fails_on_one_rank_spoils_nothing(name, how, world):
    sizes = [2, 2]
    results = world(2).run(sync_rank, sizes, fault=(name, how))
    expected = formula(sizes, torch.float32)
    actual = of_one_process([found for found, _ in results])
    assert not disagreements(actual, expected, TOLERANCE[torch.float32])
    (said,) = results[1][1]
    assert 'on rank 1;' in said


@HALF
@pytest.mark.parametrize('name', ['affine', 'affine_backward'])
def test_half_precision_where_a_kernel_fails_on_one_rank(name, dtype, world):
    # Between the two steps, half precision would leave little of a value.
    sizes = [2, 2]
    results = world(2).run(
        sync_rank, sizes, dtype=dtype, fault=(name, 'raises'), far=True
    )
    actual = of_one_process([found for found, _ in results])
    assert actual['output'].dtype == actual['dx'].dtype == dtype
    expected = formula(sizes, dtype, far=True)
    assert not disagreements(actual, expected, TOLERANCE[dtype])


def frozen_rank(rank: int, frozen: str) -> None:
    forget()
    x, cotangent = (
        t.split([3, 2])[rank].to(DEVICE, torch.float32) for t in make_batch(5)
    )
    layer = make_layer('sync_batch', dtype=torch.float32).to(DEVICE)
    layer.requires_grad_(frozen != 'affine')
    x.requires_grad_(frozen != 'input')
    leaves = [v for v in (x, *layer.parameters()) if v.requires_grad]

    def gradients(twice: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            layer(x), leaves, cotangent, create_graph=twice
        )

    found = []
    for kernels in ('triton', 'plain'):
        with mock.patch.dict(os.environ, WS_MM_KERNELS=kernels):
            collectives = count(lambda: gradients(False))
            assert collectives == (1 if frozen == 'input' else 2)
            found.append([*gradients(False), *gradients(True)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('frozen', ['input', 'affine'])
def test_only_required_gradients_are_computed_over_ranks(frozen, world):
    world(2).run(frozen_rank, frozen)


# Dispatch


def test_the_kernels_run(monkeypatch):
    seen = launches(monkeypatch)
    conv, norm = WSConv2d(6, 6, 1).to(DEVICE), BCN(6, 3).to(DEVICE)
    x = torch.randn(1, 6, 2, 2, device=DEVICE)
    norm(conv(x)).backward(torch.randn_like(x))
    assert seen == [
        *('standardize', 'moments', 'coefficients', 'affine'),
        *('sums', 'slopes', 'affine_backward', 'standardize_backward'),
    ]


@pytest.mark.parametrize(
    'change', ['float64', 'buffers', 'strided', 'outer sizes']
)
def test_unsupported_inputs_run_eager(monkeypatch, change):
    dtype = torch.float64 if change == 'float64' else torch.float32
    layer = BCN(6, 3, outer_affine='channel').to(DEVICE)
    if change == 'strided':
        layer.running_var = torch.ones(12, device=DEVICE)[::2]
    if change == 'buffers':
        layer.running_mean = layer.running_mean.double()
    if change == 'outer sizes':
        layer.bias = torch.nn.Parameter(layer.bias[:3].detach())
    seen = launches(monkeypatch)
    x = torch.randn(2, 6, 2, 2, dtype=dtype, device=DEVICE)
    assert layer(x).isfinite().all()
    if change == 'float64':
        standardize_weight(x)
    assert not seen


@pytest.mark.parametrize(
    ('shape', 'mode', 'runs'),
    [
        ((2, 12, 2, 1), 'estimate', True),
        ((2, 12, 2, 1), 'batch', False),
        ((2, 12, 4, 2), 'batch', True),
        ((2, 12, 1, 1), 'estimate', False),
    ],
)
def test_few_values_run_eager(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    mode: str,
    runs: bool,
) -> None:
    seen = launches(monkeypatch)
    BCN(12, 3, mode=mode).to(DEVICE)(torch.randn(shape, device=DEVICE))
    assert bool(seen) == runs


@pytest.mark.parametrize('shape', [(2, 6, 2, 2), (1, 6, 3, 4), (1, 6, 3, 3)])
def test_inputs_beyond_32_bits_run_eager(monkeypatch, shape):
    monkeypatch.setattr(plans, 'LONGEST', 12)
    seen = launches(monkeypatch)
    layer = BCN(6, 3).to(DEVICE)
    layer(torch.randn(shape, device=DEVICE))
    assert bool(seen) == (shape == (1, 6, 3, 3))
    seen.clear()
    standardize_weight(torch.randn(2, 6, device=DEVICE))
    assert not seen
    standardize_weight(torch.randn(2, 5, device=DEVICE))
    assert seen


def test_groups_that_do_not_divide_are_an_error(monkeypatch):
    seen = launches(monkeypatch)
    state = [x.to(DEVICE) for x in (torch.zeros(7), torch.ones(7))]
    with pytest.raises(ValueError, match='does not divide'):
        batch_channel_norm(torch.randn(1, 7, 5, device=DEVICE), 3, *state)
    assert not seen


@pytest.mark.parametrize('name', ['bn_weight', 'bias', 'running_mean'])
def test_tensors_on_another_device_are_an_error(monkeypatch, name):
    layer = BCN(6, 3).to(DEVICE)
    elsewhere = torch.zeros(6 if name != 'bias' else 3, device='meta')
    if name != 'running_mean':
        elsewhere = torch.nn.Parameter(elsewhere)
    setattr(layer, name, elsewhere)
    seen = launches(monkeypatch)
    with pytest.raises((RuntimeError, NotImplementedError)):
        layer(torch.randn(2, 6, 2, 2, device=DEVICE)).cpu()
    assert not seen


@pytest.mark.parametrize('name', ['weight', 'bn_bias', 'running_var'])
def test_wrong_sizes_are_an_error(monkeypatch, name):
    layer = BCN(6, 3).to(DEVICE)
    getattr(layer, name).data = torch.ones(4, device=DEVICE)
    seen = launches(monkeypatch)
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 6, 2, 2, device=DEVICE))
    assert not seen


class Broken:
    """A kernel that fails when it is launched."""

    error: type[Exception] = RuntimeError
    message = 'Failed to find C compiler'

    def __getitem__(self, grid):
        raise self.error(self.message)


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """Let the choice fall on the kernels as on a GPU; what is then said."""
    monkeypatch.setenv('WS_MM_KERNELS', 'auto')
    monkeypatch.setattr(ws_mm.kernels, 'choose', lambda *_: cuda)
    monkeypatch.setattr(ws_mm.kernels, '_failed', [])
    said: list[str] = []

    def print_log(message, logger, level):
        assert level == logging.WARNING
        said.append(message)

    monkeypatch.setattr(ws_mm.kernels, 'print_log', print_log)
    return said


@pytest.mark.parametrize('broken', KERNELS)
def test_failing_kernel_warns_once_and_falls_back(
    monkeypatch, small_tiles, log, broken
):
    conv, norm = WSConv2d(6, 6, 1), BCN(6, 3, mode='batch')
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, mean=1)
    model = torch.nn.Sequential(conv, norm).to(DEVICE)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x, cotangent = torch.randn(2, 1, 6, 5, 7).unbind()

    def step():
        model.load_state_dict(state)
        model.zero_grad()
        output = model(x.to(DEVICE))
        output.backward(cotangent.to(DEVICE))
        return [
            output,
            *(v.clone() for v in model.state_dict().values()),
            *(p.grad.clone() for p in model.parameters()),
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ws_mm.kernels, 'choose', lambda *_: plain)
        expected = step()
    monkeypatch.setattr(triton_kernels, broken, Broken())
    for _ in range(2):
        for one, other in zip(step(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert len(log) == 1
    assert 'WS_MM_KERNELS=plain' in log[0]
    assert 'Failed to find C compiler' in log[0]


@pytest.mark.parametrize('broken', KERNELS)
def test_failing_kernel_in_a_checkpoint(monkeypatch, log, broken):
    of_filters = broken.startswith('standardize')
    layer = WSConv2d(6, 6, 1) if of_filters else BCN(6, 3)
    layer = layer.to(DEVICE)
    values, cotangent = torch.randn(2, 1, 6, 5, 7, device=DEVICE).unbind()
    found = []
    for choice in (plain, cuda):
        x = values.clone().requires_grad_()
        layer.zero_grad()
        if not of_filters:
            layer.reset_running_stats()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ws_mm.kernels, 'choose', lambda *_, a=choice: a)
            patch.setattr(triton_kernels, broken, Broken())
            output = checkpoint(layer, x, use_reentrant=False)
            output.backward(cotangent)
        found.append([output, x.grad, *(p.grad for p in layer.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert len(log) == 1


@HALF
def test_half_precision_where_a_kernel_fails(monkeypatch, log, dtype):
    # Means of 30 and 100 standard deviations: in half precision, and in
    # between the two steps, little would be left of the values.
    weight = (torch.randn(8, 2, 2, 1) * 0.1 + 3).to(dtype)
    x = (torch.randn(2, 6, 5, 7) + 100).to(dtype)
    cotangents = torch.randn_like(weight), torch.randn_like(x)

    def step(low):
        half = dtype if low == dtype else None
        layer = BCN(6, 3, dtype=half).to(DEVICE)
        with torch.no_grad():
            for values in layer.parameters():
                values.fill_(0.7)
        leaves = [v.to(DEVICE).requires_grad_() for v in (weight, x)]
        outputs = [
            standardize_weight(leaves[0], dtype=low),
            layer(leaves[1]),
        ]
        inputs = *leaves, *layer.parameters()
        grads = [
            grad.to(DEVICE, output.dtype)
            for grad, output in zip(cotangents, outputs, strict=True)
        ]
        return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]

    for low in (dtype, torch.float32):
        expected = step(low)
        for broken in ('standardize_backward', 'affine', 'sums'):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(triton_kernels, broken, Broken())
                patch.setattr(ws_mm.kernels, '_failed', [])
                actual = step(low)
            for one, other in zip(actual, expected, strict=True):
                assert one.dtype == other.dtype
                assert relative_error(one, other) < TOLERANCE[dtype]


def test_missing_triton_warns_once(monkeypatch, log):
    ws_mm.kernels._cuda.cache_clear()
    monkeypatch.setitem(sys.modules, 'ws_mm.kernels.cuda', None)
    monkeypatch.delattr(ws_mm.kernels, 'cuda')
    for _ in range(2):
        assert ws_mm.kernels.attempt(ws_mm.kernels._cuda) is None
    assert len(log) == 1
    assert 'ws_mm.kernels.cuda' in log[0]


def test_an_old_triton_warns_once(monkeypatch, log):
    monkeypatch.setenv('WS_MM_KERNELS', 'check')  # not of a CPU, either
    ws_mm.kernels._cuda.cache_clear()
    monkeypatch.setattr('triton.__version__', '2.3.1')
    for _ in range(2):
        assert choose(torch.randn(2, device=DEVICE)) is plain
    assert len(log) == 1
    assert 'triton>=3.0' in log[0]


def test_forced_kernels_show_their_error(monkeypatch):
    earlier = [RuntimeError('one that was not forced')]
    monkeypatch.setattr(ws_mm.kernels, '_failed', earlier)
    monkeypatch.setattr(triton_kernels, 'affine', Broken())
    with pytest.raises(RuntimeError, match='C compiler'):
        BCN(6, 3).to(DEVICE)(torch.randn(1, 6, 2, 2, device=DEVICE))


def test_out_of_memory_does_not_fall_back(monkeypatch, log):
    broken = Broken()
    broken.error = torch.cuda.OutOfMemoryError
    monkeypatch.setattr(triton_kernels, 'affine', broken)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        BCN(6, 3).to(DEVICE)(torch.randn(1, 6, 2, 2, device=DEVICE))
    assert not log


def test_an_error_of_the_device_is_not_caught(monkeypatch, log):
    broken = Broken()
    broken.message = 'Triton Error [CUDA]: an illegal memory access'
    monkeypatch.setattr(triton_kernels, 'affine', broken)
    with pytest.raises(RuntimeError, match='illegal memory access'):
        BCN(6, 3).to(DEVICE)(torch.randn(1, 6, 2, 2, device=DEVICE))
    assert not log
    assert not ws_mm.kernels._failed


@pytest.mark.parametrize('error', [OSError, ImportError, RuntimeError])
def test_an_error_of_the_caller_is_not_caught(log, error):
    def pack(tensor):
        raise error('disk full')  # such as an offloading hook

    x = torch.randn(1, 6, 2, 2, device=DEVICE, requires_grad=True)
    for layer in (BCN(6, 3), WSConv2d(6, 6, 1)):
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
            pytest.raises(error, match='disk full'),
        ):
            layer.to(DEVICE)(x)
    assert not log
    assert not ws_mm.kernels._failed


def test_a_checkpointed_region_may_end_in_the_layer(log):
    # The recomputation ends early, by an exception inside the last function.
    model = torch.nn.Sequential(WSConv2d(6, 6, 1), BCN(6, 3)).to(DEVICE)
    x = torch.randn(1, 6, 5, 5, device=DEVICE)
    cotangent = torch.randn_like(x)
    gradients = []
    for use in (False, True):
        model[1].reset_running_stats()
        model.zero_grad()
        output = checkpoint(model, x, use_reentrant=False) if use else model(x)
        output.backward(cotangent)
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert not log


def test_forced_kernels_without_gpu_name_the_interpreter(monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    with pytest.raises(ValueError, match='TRITON_INTERPRET=1'):
        choose(torch.randn(2))


def test_choice_by_device(monkeypatch):
    x = torch.randn(2, device=DEVICE)
    assert choose(x) is cuda
    monkeypatch.setenv('WS_MM_KERNELS', 'plain')
    assert choose(x) is plain
    monkeypatch.setenv('WS_MM_KERNELS', 'auto')
    assert choose(x.cpu()) is ws_mm.kernels.cpu
    assert choose(x.cpu(), lambda _: False) is plain
    assert choose(x.to('meta')) is plain


def test_only_a_variant_for_aligned_tensors_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That of any others would run for all later calls, and be slower."""
    ran: list[str] = []

    class Compiled(SimpleNamespace):
        def __del__(self) -> None:  # as of Triton 3.9, which unloads it
            ran.append('unloaded')

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **meta: Any) -> SimpleNamespace:
                ran.append('jit')
                return Compiled(
                    function=0,
                    packed_metadata=0,
                    run=lambda *args: ran.append('compiled'),
                    src=SimpleNamespace(signature=dict.fromkeys(args, 'i32')),
                )

            return launch

    monkeypatch.setattr(triton_kernels, 'affine', Kernel())
    launch = plans.Launch(
        'affine',
        ('input', 'kept', 'output'),
        programs=1,
        warps=4,
        **dict(rows=1, units=2, channels=3, splits=4, UNIT=1, ROWS=1),
        **dict(BLOCK=4, CHANNELS_LAST=False),
    )
    x, y, z = torch.randn(3, 16, device=DEVICE)
    for given in (x[1:], x, x, x[1:], x):
        plans.launch([launch], (given, y, z))
    assert ran == [
        *('jit', 'unloaded', 'jit', 'compiled'),
        *('jit', 'unloaded', 'compiled'),
    ]


# What the interpreter cannot see


# On a stand-in for the GPU's driver, in a process without the interpreter.
LAUNCHES = """
import stand_in, torch, ws_mm
from triton.runtime import JITFunction

stand_in.install()
through_jit, run = [], JITFunction.run

def recorded(self, *args, **kwargs):
    through_jit.append(self.fn.__name__)
    return run(self, *args, **kwargs)

JITFunction.run = recorded
dropped = stand_in.Launcher.launches = []
layer, conv = ws_mm.BCN(16, 4), ws_mm.WSConv2d(16, 16, 3)
base = torch.randn(2 * 16 * 6 * 6 + 1)

def step(x, momentum=0.1):
    layer.momentum = momentum
    through_jit.clear()
    dropped.clear()
    layer(x.requires_grad_()).backward(torch.empty_like(x))
    conv.standardized_weight().backward(torch.empty(16, 16, 3, 3))
    assert [len(args) for _, _, args in dropped] == sizes, dropped
    print(len(through_jit), len(dropped))

aligned = base[:-1].view(2, 16, 6, 6)
sizes = []
try:
    step(aligned)
except AssertionError:
    sizes = [len(args) for _, _, args in dropped]
step(aligned)
assert any(0.25 in args for _, _, args in dropped) is False
step(aligned, momentum=0.25)
assert any(0.25 in args for _, _, args in dropped)
step(base[1:].view(2, 16, 6, 6))
step(aligned)
"""


def test_what_was_compiled_is_launched_without_the_jit(tmp_path):
    environment = {**os.environ, 'TRITON_CACHE_DIR': str(tmp_path)}
    environment.pop('TRITON_INTERPRET', None)
    paths = ROOT, ROOT / 'tools/benchmark'
    environment['PYTHONPATH'] = os.pathsep.join(map(str, paths))
    done = subprocess.run(
        [sys.executable, '-c', LAUNCHES],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The unaligned input goes through the JIT, which compiles for it.
    assert done.stdout.split('\n')[:-1] == ['0 8', '0 8', '6 8', '0 8']


@pytest.mark.parametrize('architecture', [80, 90])
def test_all_kernels_compile_for_a_gpu(tmp_path, architecture):
    environment = {**os.environ, 'TRITON_CACHE_DIR': str(tmp_path)}
    environment.pop('TRITON_INTERPRET', None)
    environment['PYTHONPATH'] = str(ROOT)
    script = ROOT / 'tests/compile_kernels.py'
    done = subprocess.run(
        [sys.executable, script, str(architecture)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    # It names the bars of registers, vectors and variants that are missed.
    assert done.returncode == 0, done.stderr
    seen = {line.split()[0] for line in done.stdout.splitlines()}
    assert seen == {*KERNELS, 'variants'}


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason='needs a GPU of 16 GB')
@pytest.mark.parametrize('layout', ['NCHW', 'channels_last'])
def test_offsets_beyond_32_bits(layout):
    x = torch.zeros(2, 64, 4100, 4100, dtype=torch.half, device=DEVICE)
    x = to_layout(x, layout)
    x[1, 63, -1] = torch.randn(4100, device=DEVICE).half()
    assert x.numel() > 2**31
    layer = BCN(64).to(DEVICE)
    output = layer(x)[1, 62:, -2:]
    layer.reset_running_stats()
    part = x[1:, 62:].contiguous()
    alone = BCN(2, 1).to(DEVICE)
    # The second sample's statistics are half those of a batch of its own.
    with torch.no_grad():
        alone.running_mean.zero_()
        alone.running_var.fill_(1)
        layer(x)
        alone.running_mean.copy_(layer.running_mean[62:])
        alone.running_var.copy_(layer.running_var[62:])
    expected = alone.eval()(part)[0, :, -2:]
    assert relative_error(output, expected) < TOLERANCE[torch.half]
