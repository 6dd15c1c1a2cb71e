"""Fused implementations behind :mod:`ws_mm.functional`, and when they run.

The functions decide, callers never do. Everything here computes what the
plain implementation computes, within rounding. ``WS_MM_KERNELS`` in the
environment forces one: 'plain' the composed operations; 'fused' what is fused
for the device, where 'auto' takes it only if it pays; 'triton' the Triton
kernels, which then raise where they cannot run.
"""

import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch
from mmengine.logging import print_log
from torch import Tensor

from . import cpu

VARIABLE = 'WS_MM_KERNELS'
CHOICES = ('auto', 'plain', 'fused', 'triton')

Result = TypeVar('Result')


def fused(input: Tensor, pays: bool = True) -> ModuleType | None:
    """The fused implementation for this tensor: cpu, cuda or none.

    Compilers and exporters get the plain operations: they fuse those
    themselves, and cannot look into an autograd function. So do the
    transforms of ``torch.func``, and devices other than a CPU or a GPU.

    Args:
        input: the weight or the activations.
        pays: whether the CPU's form is faster than the plain one.

    Raises:
        ValueError: the environment variable has no legal value, or asks for
            Triton kernels on a CPU without Triton's interpreter.
    """
    choice = os.environ.get(VARIABLE, 'auto')
    if choice not in CHOICES:
        raise ValueError(
            f'{VARIABLE}={choice!r} in the environment is not one of '
            f'{", ".join(map(repr, CHOICES))}'
        )
    if (
        choice == 'plain'
        or input.numel() == 0
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or type(input) not in (Tensor, torch.nn.Parameter)
    ):
        return None
    device = input.device.type
    if device == 'cuda':
        return attempt(_cuda)
    if device != 'cpu':
        return None
    if choice != 'triton':
        return cpu if pays or choice == 'fused' else None
    if os.environ.get('TRITON_INTERPRET') != '1':
        raise ValueError(
            f"{VARIABLE}='triton' needs a GPU. Set TRITON_INTERPRET=1 before "
            'Python starts to interpret the kernels on a CPU (slow), or '
            f'{VARIABLE}=auto'
        )
    return _cuda()


def _cuda() -> ModuleType:
    from . import cuda  # needs Triton, which not every torch brings along

    return cuda


_failed: list[Exception] = []


def attempt(function: Callable[..., Result], *args: object) -> Result | None:
    """Call what may not run here; None if it does not, which is said once.

    After the first failure nothing is attempted any more.
    """
    forced = os.environ.get(VARIABLE) == 'triton'
    if _failed and not forced:
        return None
    try:
        return function(*args)
    except torch.cuda.OutOfMemoryError:
        raise  # of the caller's tensors, and the plain one needs more
    except Exception as error:
        if forced:
            raise
        _failed.append(error)
        print_log(
            'The Triton kernels of ws_mm cannot run here; WS and BCN run on '
            'composed operations instead: same results, slower. Install '
            f'what is missing, or set {VARIABLE}=plain to drop this message; '
            f'{VARIABLE}=triton shows the whole error. It begins: '
            f'{type(error).__name__}: {error!s:.300}',
            logger='current',
            level=logging.WARNING,
        )
        return None
