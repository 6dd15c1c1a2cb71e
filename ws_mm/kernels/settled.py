"""The move of running values, one operation where a compiler runs.

A compiler may compute values again in the backward from what its graph read:
in activation checkpoints, and where that costs little. Running statistics
have moved meanwhile. Computed again from them, they would move twice, and
gradients would be wrong without an error.
"""

from typing import Any

import torch
from torch import Tensor

from .. import compat


def settle(running: Tensor, new: Tensor) -> Tensor:
    """Set running values to new ones; return what the forward shall use.

    Where a compiler runs, a backward moves nothing: a recomputation gets
    what its forward has moved them to.

    Args:
        running: running values, updated in place.
        new: what they become.
    """
    if compat.is_compiling() and not compat.is_exporting():
        settled: Tensor = _settle(running, new)
        return settled
    running.copy_(new)
    return new


def _in_a_compiled_graph(running: Tensor, new: Tensor) -> Tensor:
    if not compat.is_backward():
        running.copy_(new)
    return running.clone()


_settle: Any = _in_a_compiled_graph
# A compiler that can be told from exporters has it, see compat.
if hasattr(torch.library, 'custom_op'):
    _settle = torch.library.custom_op(
        'ws_mm::settle', _in_a_compiled_graph, mutates_args=('running',)
    )
    _settle.register_fake(lambda running, new: torch.empty_like(running))
