"""Fused implementations behind :mod:`ws_mm.functional`, and when they run.

The functions decide, callers never do. Everything here computes what the
plain implementation computes, within rounding; ``WS_MM_KERNELS=plain`` in the
environment forces the plain one.
"""

import os

import torch
from torch import Tensor

VARIABLE = 'WS_MM_KERNELS'
CHOICES = ('auto', 'plain')


def fused_runs(input: Tensor) -> bool:
    """Whether the fused implementation takes this tensor.

    Compilers and exporters get the plain operations: they fuse those
    themselves, and cannot look into an autograd function. So do the
    transforms of ``torch.func``, and devices other than a CPU.

    Raises:
        ValueError: the environment variable has no legal value.
    """
    choice = os.environ.get(VARIABLE, 'auto')
    if choice not in CHOICES:
        raise ValueError(
            f'{VARIABLE}={choice!r} in the environment is not one of '
            f'{", ".join(map(repr, CHOICES))}'
        )
    return (
        choice == 'auto'
        and input.device.type == 'cpu'
        and input.numel() > 0
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and type(input) in (Tensor, torch.nn.Parameter)
    )
