"""Digits that each backend keeps where the input is ill-conditioned.

The yardstick is the authors' composed code on the same input, in float32: no
result of ours may have an error more than FACTOR times as large. Nor is more
asked for than the rounding of a result, and of an input: where the mean is 300
deviations, float32 keeps 300 * 2^-24 of a deviation.
"""

import math
from collections.abc import Callable

import pytest
import reference
import torch
from proofs.peers.authors import BCNorm
from torch import Tensor

import ws_mm
from ws_mm import kernels
from ws_mm.kernels import compiled

FACTOR = 10
# Smaller errors are the rounding of a result, whoever computes it.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
LAYOUTS = {'NCHW': torch.contiguous_format, 'NHWC': torch.channels_last}
GROUPS, FEW_GROUPS = 32, 4
# Names of the authors, and ours.
NAMES = {
    'bn.weight': 'bn_weight',
    'bn.bias': 'bn_bias',
    'weight': 'weight',
    'bias': 'bias',
    'bn.running_mean': 'running_mean',
    'bn.running_var': 'running_var',
}
SHAPES = [
    (1, 64, 28, 28),
    (2, 64, 24, 48),
    (2, 128, 25, 21),
    (64, 64, 7, 7),
    (2, 64, 3, 3),
    (3, 64, 1, 1),
    (16, 512, 1, 1),
]


def results(
    norm: Callable[[Tensor], Tensor],
    state: dict[str, Tensor],
    x: Tensor,
    cotangent: Tensor,
) -> dict[str, Tensor]:
    """Output, gradients and the state afterwards, by our names."""
    x = x.detach().requires_grad_()
    output = norm(x)
    learned = {k: v for k, v in state.items() if v.requires_grad}
    gradients = torch.autograd.grad(
        output, [x, *learned.values()], cotangent.to(output.dtype)
    )
    return {
        'output': output.detach(),
        **dict(zip(['dx', *learned], gradients, strict=True)),
        **{k: v for k, v in state.items() if not v.requires_grad},
    }


def errors(
    actual: dict[str, Tensor], exact: dict[str, Tensor]
) -> dict[str, float]:
    """Relative errors in the Euclidean norm."""
    return {
        name: float(
            (actual[name].double().flatten() - values.flatten()).norm()
            / values.norm().clamp_min(1e-300)
        )
        for name, values in exact.items()
    }


def losses(
    shape: tuple[int, ...],
    groups: int,
    layout: str,
    mode: str,
    deviations: int,
    fresh: bool,
    dtype: torch.dtype,
) -> dict[str, tuple[float, float]]:
    """Errors of ours that are too large, with those of the authors."""
    channels = shape[1]
    x = (torch.randn(shape) + deviations).to(dtype)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    cotangent = torch.randn(shape).to(dtype)
    training, own_mode = mode != 'eval', 'estimate'
    if mode == 'batch':
        own_mode = mode
    layers = {
        'theirs': BCNorm(channels, groups, estimate=mode != 'batch', rate=0.1),
        'ours': ws_mm.BCN(channels, groups, momentum=0.1, mode=own_mode),
    }
    values = dict(
        bn_weight=torch.rand(channels) + 0.5,
        bn_bias=torch.randn(channels),
        weight=torch.rand(groups) + 0.5,
        bias=torch.randn(groups),
        running_mean=torch.zeros(channels),
        running_var=torch.ones(channels),
    )
    if not fresh:
        values['running_mean'] = deviations + 0.1 * torch.randn(channels)
        values['running_var'] = torch.rand(channels) + 0.5
    found = {}
    states = {}
    for whose, layer in layers.items():
        tensors = layer.train(training).state_dict(keep_vars=True)
        states[whose] = {NAMES.get(k, k): v for k, v in tensors.items()}
        for name, start in values.items():
            own = states[whose][name].detach()
            own.copy_(start.view(own.shape))
        given = x.float() if whose == 'theirs' else x
        found[whose] = results(layer, states[whose], given, cotangent)

    exact = {
        name: start.double().requires_grad_(not name.startswith('running'))
        for name, start in values.items()
    }
    moved: dict[str, Tensor] = {}

    def oracle(x: Tensor) -> Tensor:
        output, new = reference.batch_channel_norm(
            x, exact, groups, training=training, momentum=0.1, mode=own_mode
        )
        moved.update(new)
        return output

    expected = results(oracle, exact, x.double(), cotangent) | moved
    yardstick = errors(found['theirs'], expected)
    lost = {}
    for name, error in errors(found['ours'], expected).items():
        least = max(ROUNDING[dtype], deviations * 2**-24)
        if not error <= FACTOR * max(yardstick[name], least):
            lost[name] = error, yardstick[name]
    return lost


@pytest.mark.parametrize('dtype', ROUNDING, ids=str)
@pytest.mark.parametrize('fresh', [False, True], ids=['settled', 'fresh'])
@pytest.mark.parametrize('deviations', [0, 3, 30, 300])
@pytest.mark.parametrize('mode', ['estimate', 'batch', 'eval'])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('backend', ['plain', 'fused', 'triton', 'compiled'])
def test_digits_are_those_of_the_authors(
    backend, layout, mode, deviations, fresh, dtype, monkeypatch
):
    """Means of so many deviations; estimates at them, or as built."""
    shapes, groups = SHAPES, GROUPS
    if backend == 'triton':
        pytest.importorskip('triton', '3.0')
        # Interpreted, which is slow: one program for each group.
        groups = FEW_GROUPS
        shapes = [(2, 16, 3, 4), (16, 32, 1, 1), (3, 8, 1, 1)]
    if backend == 'compiled':  # as it is, without a compiler
        monkeypatch.setattr(kernels, 'choose', lambda *_: compiled)
    else:
        monkeypatch.setenv('WS_MM_KERNELS', backend)
    lost = {
        shape: losses(shape, groups, layout, mode, deviations, fresh, dtype)
        for shape in shapes
        # At such a mean the difference of two values has no digits left.
        if deviations < 300 or math.prod(shape[1:]) > 2 * groups
    }
    assert not any(lost.values()), lost
