"""Adaptive Weight Standardization."""

import torch
from torch import Tensor

from . import Case, State

EPS = 0.5  # one that shows where it stands


def adaptive_ws(
    weight: Tensor,
    state: State,
    biased: bool = False,
    eps_outside: bool = False,
    own: bool = False,
    swapped: bool = False,
) -> Tensor:
    """Standardized filters with the scale and mean that they are given.

    Args:
        weight: filters, (out_channels, ...).
        state: ``weight_gamma``, ``weight_beta``.
        biased: True is wrong (variance).
        eps_outside: True is wrong.
        own: True is wrong (scale and mean of the weight itself).
        swapped: True is wrong (the mean is scaled, too).
    """
    filters = []
    gains, means = state['weight_gamma'], state['weight_beta']
    for one, gain, offset in zip(
        weight, gains.flatten(), means.flatten(), strict=True
    ):
        mean = one.sum() / one.numel()
        var = ((one - mean) ** 2).sum() / (one.numel() - (not biased))
        root = var**0.5 + EPS if eps_outside else (var + EPS) ** 0.5
        if own:
            gain, offset = root, mean
        scaled = (one - mean) / root
        filters.append(
            gain * (scaled + offset) if swapped else gain * scaled + offset
        )
    return torch.stack(filters)


CASES = [
    Case(
        'AdaptiveWSConv2d',
        adaptive_ws,
        wrong=(
            dict(biased=True),
            dict(eps_outside=True),
            dict(own=True),
            dict(swapped=True),
        ),
        options=dict(eps=EPS),
        is_conv=True,
    ),
]
