"""How far the fused implementation is from the plain one, where it is timed.

The tolerance is that of the tests against float64 oracles, twice: each of the
two may be off by one.
"""

import os
from collections.abc import Callable

import torch
from race import VARIABLE, Row
from torch import Tensor

TOLERANCE = {
    torch.float32: 2 * 1e-5,
    torch.bfloat16: 2 * 2e-2,
    torch.float16: 2 * 2e-3,
}


def agreement(
    results: Callable[[], dict[str, Tensor]], dtype: torch.dtype
) -> Row:
    """Differences over the largest value of the plain implementation.

    Args:
        results: computes outputs, gradients and statistics from scratch.
        dtype: of the case, whose tolerance it is.
    """
    own = os.environ.get(VARIABLE, 'auto')
    found = []
    for choice in ('fused', 'plain'):
        os.environ[VARIABLE] = choice
        found.append(results())
    os.environ[VARIABLE] = own
    fused, plain = found
    return {
        'tolerance': TOLERANCE[dtype],
        'differences': {
            name: difference(fused[name], plain[name]) for name in plain
        },
    }


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference over the largest magnitude of the other."""
    one, other = one.detach(), other.detach()
    largest = other.abs().max().double().clamp_min(1e-30)
    return float((one.double() - other.double()).abs().max() / largest)
