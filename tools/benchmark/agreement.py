"""Compare the fused with the eager implementation on the timed inputs.

The tolerance is that of the tests against float64 oracles, twice: each of the
two may be off by one.
"""

from collections.abc import Callable

import torch
from benchmark.race import Row, choosing, forced
from support.tensors import relative_error
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

    On a GPU a kernel that cannot run is an error: composed operations would
    agree with themselves.

    Args:
        results: computes outputs, gradients and statistics from scratch.
        dtype: Dtype of the case; it sets the tolerance.
    """
    found = []
    for choice in (forced(torch.cuda.is_available()), 'plain'):
        with choosing(choice):
            found.append(results())
    fused, plain = found
    return {
        'tolerance': TOLERANCE[dtype],
        'differences': {
            name: relative_error(fused[name], plain[name]) for name in plain
        },
    }
