"""The functions against float64 oracles, and the oracles against mistakes."""

from functools import partial
from typing import Any

import pytest
import reference
import torch
from comparison import TOLERANCE, disagreements, values_and_gradients
from torch import Tensor

from ws_mm import batch_channel_norm, standardize_weight
from ws_mm.functional import updated_estimates

pytestmark = pytest.mark.usefixtures('kernels')

# Filters have a closed form on every CPU: also the composed operations.
WITH_PLAIN = pytest.mark.parametrize(
    'kernels', ['auto', 'plain'], indirect=True
)
WEIGHT_SHAPES = {
    '1d': (6, 4, 5),
    '2d': (6, 4, 3, 3),
    '2d-depthwise': (8, 1, 3, 3),
    '2d-pointwise': (5, 7, 1, 1),
    '2d-fan-in-2': (4, 2, 1, 1),
    '3d': (4, 3, 2, 3, 3),
}
DTYPES = (torch.float64, torch.float32)
GROUPS = 4
CHANNELS = 12


def weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Filters of different means, and scales where eps counts."""
    out = shape[0]
    scale = torch.logspace(-3.5, 1, out).view(-1, *[1] * (len(shape) - 1))
    return ((torch.randn(shape) + 0.3) * scale).to(dtype)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('eps_mode', ['outside', 'inside'])
@pytest.mark.parametrize('shape', WEIGHT_SHAPES.values(), ids=WEIGHT_SHAPES)
def test_standardize_weight_equals_formula(shape, eps_mode, dtype):
    weight = {'weight': weights(shape, dtype)}
    ours = partial(standardize_weight, eps_mode=eps_mode)
    oracle = partial(reference.standardize_weight, eps_mode=eps_mode)
    actual = values_and_gradients(ours, weight, 'weight')
    double = {'weight': weight['weight'].double()}
    expected = values_and_gradients(oracle, double, 'weight')
    assert not disagreements(actual, expected, TOLERANCE[dtype])


WRONG_WEIGHTS = {
    'biased': dict(unbiased=False),
    'eps inside': dict(eps_mode='inside'),
    'not centered': dict(centered=False),
    'per input channel': dict(axis=1),
}


@pytest.mark.parametrize('wrong', WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_weight_oracle_rejects_wrong_variants(wrong: dict[str, Any]):
    weight = {'weight': weights((6, 4, 3, 3), torch.float64)}
    actual = values_and_gradients(standardize_weight, weight, 'weight')
    mistaken = partial(reference.standardize_weight, **wrong)
    expected = values_and_gradients(mistaken, weight, 'weight')
    errors = disagreements(actual, expected, TOLERANCE[torch.float32])
    assert errors.keys() == {'output', 'dweight'}


@pytest.mark.parametrize('eps_mode', ['outside', 'inside'])
def test_standardize_weight_gradcheck(eps_mode):
    function = partial(standardize_weight, eps_mode=eps_mode)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, weight)
    assert torch.autograd.gradgradcheck(function, weight)


@WITH_PLAIN
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_standardize_weight_half_is_computed_in_float32(dtype):
    # A mean of 30 standard deviations: in half precision nothing is left.
    weight = (torch.randn(4, 64, 3, 3) * 0.03 + 1).to(dtype)
    expected = reference.standardize_weight(weight)
    actual = standardize_weight(weight)
    assert actual.dtype == dtype
    assert not disagreements(
        {'output': actual}, {'output': expected}, TOLERANCE[dtype]
    )


def test_standardize_weight_keeps_channels_last():
    weight = torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)
    actual = standardize_weight(weight)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, standardize_weight(weight.contiguous()))


@WITH_PLAIN
def test_standardize_weight_of_constant_filter_is_finite():
    weight = torch.full((2, 3, 3, 3), 0.5, requires_grad=True)
    output = standardize_weight(weight)
    (gradient,) = torch.autograd.grad(output, weight, torch.randn(2, 3, 3, 3))
    assert torch.equal(output, torch.zeros_like(output))
    assert gradient.isfinite().all()


def test_standardize_weight_rejects_wrong_arguments():
    with pytest.raises(ValueError, match=r"'median'.*'outside', 'inside'"):
        standardize_weight(torch.randn(2, 2, 1, 1), eps_mode='median')
    with pytest.raises(ValueError, match='1 entry .*conv_cfg=None'):
        standardize_weight(torch.randn(8, 1, 1, 1))


def make_state(dtype: torch.dtype, outer: str) -> dict[str, Tensor]:
    """Affines and estimates that are far from their defaults."""
    size = GROUPS if outer == 'group' else CHANNELS
    state = {
        'bn_weight': torch.randn(CHANNELS) + 0.5,
        'bn_bias': torch.randn(CHANNELS),
        'weight': torch.randn(size) + 0.5,
        'bias': torch.randn(size),
        'running_mean': torch.randn(CHANNELS) * 2,
        'running_var': torch.rand(CHANNELS) * 4 + 0.2,
    }
    return {name: values.to(dtype) for name, values in state.items()}


def make_input(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Channels of different means and scales."""
    channels = torch.arange(shape[1]).view(1, -1, 1, 1)
    return (torch.randn(shape) * (0.3 + channels) + channels - 4).to(dtype)


def run_ours(
    x: Tensor, state: dict[str, Tensor], **kwargs: Any
) -> dict[str, Tensor]:
    """Output, gradients and new estimates of ``batch_channel_norm``."""
    running = {
        name: state[name].clone() for name in ('running_mean', 'running_var')
    }
    affine = {k: v for k, v in state.items() if k not in running}

    def function(x, **affine):
        return batch_channel_norm(x, GROUPS, **running, **affine, **kwargs)

    inputs = {'x': x, **affine}
    return {**values_and_gradients(function, inputs, 'bcn'), **running}


def run_oracle(
    x: Tensor, state: dict[str, Tensor], **kwargs: Any
) -> dict[str, Tensor]:
    """The same of the oracle, in float64."""
    running = {name: state[name] for name in ('running_mean', 'running_var')}
    affine = {k: v for k, v in state.items() if k not in running}
    new: dict[str, Tensor] = {}

    def function(x, **affine):
        output, stats = reference.batch_channel_norm(
            x, {**affine, **running}, GROUPS, **kwargs
        )
        new.update(stats)
        return output

    inputs = {k: v.double() for k, v in {'x': x, **affine}.items()}
    return {**values_and_gradients(function, inputs, 'bcn'), **new}


INPUT_SHAPES = [
    *((3, CHANNELS, 5, 7), (1, CHANNELS, 6, 6)),
    *((samples, CHANNELS, 1, 1) for samples in (1, 3, 6)),
]


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('outer', ['group', 'channel'])
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('mode', ['estimate', 'batch'])
@pytest.mark.parametrize('shape', INPUT_SHAPES, ids=str)
def test_batch_channel_norm_equals_formula(
    shape, mode, training, outer, dtype
):
    if mode == 'batch' and training and shape == (1, CHANNELS, 1, 1):
        pytest.skip('one value per channel has no batch variance')
    x, state = make_input(shape, dtype), make_state(dtype, outer)
    arguments = dict(training=training, momentum=0.2, mode=mode)
    actual = run_ours(x, state, **arguments)
    expected = run_oracle(x, state, **arguments)
    assert not disagreements(actual, expected, TOLERANCE[dtype])


WRONG_NORMS = {
    'variance around the batch mean': dict(around='batch'),
    'updated after use': dict(order='normalize-update'),
    'gradient through the estimates': dict(constant=False),
    'interleaved outer affine': dict(outer='interleaved'),
    'unbiased group variance': dict(group_unbiased=True),
    'batch statistics': dict(mode='batch'),
    'momentum reversed': dict(momentum=0.8),
    'eps of 1e-3': dict(eps=1e-3),
    'eval': dict(training=False),
}


@pytest.mark.parametrize('wrong', WRONG_NORMS.values(), ids=WRONG_NORMS)
def test_norm_oracle_rejects_wrong_variants(wrong: dict[str, Any]):
    x = make_input((3, CHANNELS, 5, 7), torch.float64)
    state = make_state(torch.float64, 'group')
    arguments = dict(training=True, momentum=0.2, mode='estimate')
    actual = run_ours(x, state, **arguments)
    expected = run_oracle(x, state, **{**arguments, **wrong})
    assert disagreements(actual, expected, TOLERANCE[torch.float32])


def test_norm_oracle_rejects_per_channel_outer_affine():
    x = make_input((3, CHANNELS, 5, 7), torch.float64)
    state = make_state(torch.float64, 'group')
    arguments = dict(training=True, momentum=0.2, mode='estimate')
    actual = run_ours(x, state, **arguments)
    per_channel = make_state(torch.float64, 'channel')
    outer = {name: per_channel[name] for name in ('weight', 'bias')}
    expected = run_oracle(x, {**state, **outer}, **arguments)
    for name in ('dweight', 'dbias'):
        assert actual.pop(name).shape != expected.pop(name).shape
    assert disagreements(actual, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize('mode', ['estimate', 'batch', 'sync_batch'])
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_batch_channel_norm_gradcheck(mode, training):
    state = make_state(torch.float64, 'group')
    mean, var = state.pop('running_mean'), state.pop('running_var')

    def function(x, *affine):
        return batch_channel_norm(
            x,
            GROUPS,
            mean.clone(),
            var.clone(),
            *affine,
            training=training,
            mode=mode,
        )

    x = make_input((2, CHANNELS, 2, 2), torch.float64).requires_grad_()
    affine = [
        state[name].requires_grad_()
        for name in ('bn_weight', 'bn_bias', 'weight', 'bias')
    ]
    if mode == 'estimate' and training:
        # The estimates move with x, but count as constants: the oracle and
        # not finite differences says what the gradient is.
        x = x.detach()
    assert torch.autograd.gradcheck(function, (x, *affine))


def test_sync_batch_in_one_process_is_batch():
    x = make_input((3, CHANNELS, 5, 7), torch.float64)
    state = make_state(torch.float64, 'group')
    batch, sync = (
        run_ours(x, state, training=True, momentum=0.2, mode=mode)
        for mode in ('batch', 'sync_batch')
    )
    assert not disagreements(sync, batch, TOLERANCE[torch.float64])


def test_estimates_find_the_total_variance_at_one_image():
    # Images whose channel means spread by 0.5 around 3, pixels by 1.
    mean, var = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    for _ in range(4000):
        offset = 3 + 0.5 * torch.randn(1, CHANNELS, 1, 1)
        image = offset + torch.randn(1, CHANNELS, 8, 8)
        batch_channel_norm(
            image, GROUPS, mean, var, training=True, momentum=0.01
        )
    assert mean.mean() == pytest.approx(3, abs=0.05)
    assert var.mean() == pytest.approx(1.25, abs=0.05)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_estimates_of_half_precision_are_moved_in_float32(
    dtype: torch.dtype,
) -> None:
    x = (torch.randn(2, 3, 50, 60) * 3 + 1).to(dtype)
    mean, var = torch.randn(3), torch.rand(3)
    found = updated_estimates(x, mean, var, 0.5)
    wide, mean, var = x.double(), mean.double(), var.double()
    around = (wide - mean.view(-1, 1, 1)).square().mean((0, 2, 3))
    expected = (mean + wide.mean((0, 2, 3))) / 2, (var + around) / 2
    close = dict(rtol=1e-5, atol=1e-6)
    for values, oracle in zip(found, expected, strict=True):
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.double(), oracle, **close)


def test_empty_batch_changes_nothing_and_has_gradients():
    for mode in ('estimate', 'batch', 'sync_batch'):
        state = make_state(torch.float32, 'group')
        x = torch.zeros(0, CHANNELS, 4, 4)
        result = run_ours(x, state, training=True, momentum=0.5, mode=mode)
        assert torch.equal(result['running_mean'], state['running_mean'])
        assert torch.equal(result['running_var'], state['running_var'])
        for name in ('dweight', 'dbias', 'dbn_weight', 'dbn_bias'):
            assert torch.equal(result[name], torch.zeros_like(result[name]))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_normalized_in_float32(dtype):
    # A spread of 1 around 100. Between the two steps it is one of 0.6 around
    # 58, which half precision would round to a few dozen values.
    x = (torch.randn(2, CHANNELS, 16, 16) + 100).to(dtype)
    state = make_state(torch.float32, 'group')
    state['bn_weight'].fill_(1)
    state['bn_bias'].zero_()
    state['running_mean'].zero_()
    state['running_var'].fill_(3)
    for training in (False, True):
        arguments = dict(training=training, momentum=1e-3, mode='estimate')
        actual = run_ours(x, state, **arguments)
        expected = run_oracle(x, state, **arguments)
        assert actual['output'].dtype == dtype
        for name in ('running_mean', 'running_var'):
            assert actual[name].dtype == torch.float32
        names = ('output', 'running_mean', 'running_var')
        assert not disagreements(
            {name: actual[name] for name in names},
            {name: expected[name] for name in names},
            TOLERANCE[dtype],
        )


def test_batch_channel_norm_rejects_wrong_arguments():
    state = make_state(torch.float32, 'group')
    x = torch.randn(1, CHANNELS, 1, 1)
    with pytest.raises(ValueError, match=r"'ghost'.*'estimate', 'batch'"):
        batch_channel_norm(x, GROUPS, **state, mode='ghost')
    with pytest.raises(ValueError, match='num_groups=5 does not divide.* 12'):
        batch_channel_norm(x, 5, **state)
    for mode in ('batch', 'sync_batch'):
        with pytest.raises(ValueError, match=r"\(1, 12, 1, 1\).*'estimate'"):
            batch_channel_norm(x, GROUPS, **state, training=True, mode=mode)
    state['weight'] = state['bias'] = None
    for training in (True, False):
        with pytest.raises(ValueError, match='num_groups=12 leaves one'):
            batch_channel_norm(x, CHANNELS, **state, training=training)
