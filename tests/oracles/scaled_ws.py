"""Scaled Weight Standardization."""

import torch
from torch import Tensor

from . import Case, State

GAMMA, EPS = 1.7139588594, 0.5  # an eps that shows where it stands


def scaled_ws(
    weight: Tensor,
    state: State,
    unbiased: bool = False,
    unscaled: bool = False,
    eps_outside: bool = False,
    gamma: float = GAMMA,
) -> Tensor:
    """Filters of mean 0 and a variance of gain^2 gamma^2 / fan_in.

    Args:
        weight: filters, (out_channels, ...).
        state: ``gain``.
        unbiased: True is wrong, if only by little.
        unscaled: True is wrong (WS, of variance 1).
        eps_outside: True is wrong.
        gamma: another one is wrong.
    """
    filters = []
    for one, gain in zip(weight, state['gain'].flatten(), strict=True):
        fan_in = one.numel()
        centered = one - one.sum() / fan_in
        var = (centered**2).sum() / (fan_in - unbiased)
        root = var**0.5 + EPS if eps_outside else (var + EPS) ** 0.5
        if not unscaled:
            root = root * fan_in**0.5
        filters.append(gain * gamma * centered / root)
    return torch.stack(filters)


CASES = [
    Case(
        'ScaledWSConv2d',
        scaled_ws,
        wrong=(
            dict(unbiased=True),
            dict(unscaled=True),
            dict(eps_outside=True),
            dict(gamma=1.0),
        ),
        options=dict(gamma=GAMMA, eps=EPS),
        is_conv=True,
    ),
]
