"""Backends behind :mod:`ws_mm.functional`, and which of them runs.

:mod:`.plain`, :mod:`.compiled`, :mod:`.cpu` and :mod:`.cuda` have the same
two functions, ``standardize_weight`` and ``batch_channel_norm``, with one
signature each, documented in :mod:`.plain`. They compute the same within
rounding. What a fused backend does not take, it hands to :mod:`.plain`.

``WS_MM_KERNELS`` in the environment forces one: 'plain' the eager operations;
'fused' what is fused for the device, where 'auto' takes it only if it is
faster; 'triton' the Triton kernels, which then raise where they cannot run;
'check' compares every result of theirs with eager operations in float64, see
:mod:`.self_check`.
"""

import logging
import math
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import TypeVar

import torch
from mmengine.dist import get_rank
from mmengine.logging import print_log
from torch import Tensor

from .. import compat
from . import compiled, cpu, plain

VARIABLE = 'WS_MM_KERNELS'
CHOICES = ('auto', 'plain', 'fused', 'triton', 'check')

Result = TypeVar('Result')


def for_weight(weight: Tensor) -> ModuleType:
    """The backend that standardizes these filters."""
    # Of two entries, the gradient is what cancellation leaves: no closed form.
    return choose(weight) if math.prod(weight.shape[1:]) > 2 else plain


def for_activations(input: Tensor) -> ModuleType:
    """The backend that normalizes this input."""
    return choose(input, cpu.is_faster)


def choose(
    input: Tensor, is_faster: Callable[[Tensor], bool] = lambda _: True
) -> ModuleType:
    """The backend for a tensor: compiled, cpu, cuda or plain.

    Compilers get operations in the form that they fuse best. Exporters get
    the norms of torch, which other runtimes know. So do the transforms of
    ``torch.func``, forward derivatives, and devices other than a CPU or a
    GPU.

    Args:
        input: weight or activations.
        is_faster: whether the CPU's closed form is faster than plain.

    Raises:
        ValueError: the environment variable has no legal value, or asks for
            Triton kernels on a CPU without Triton's interpreter.
    """
    if not compat.is_eager():
        # First: a compiler cannot read the environment.
        compiles = compat.is_compiling() and not compat.is_exporting()
        return compiled if compiles else plain
    choice = compat.environment_variable(VARIABLE, 'auto')
    if choice not in CHOICES:
        raise ValueError(
            f'{VARIABLE}={choice!r} in the environment is not one of '
            f'{", ".join(map(repr, CHOICES))}'
        )
    if (
        choice == 'plain'
        or input.numel() == 0
        or type(input) not in (Tensor, torch.nn.Parameter)
        or not (input.is_cuda or input.is_cpu)
    ):
        return plain
    if input.is_cpu:
        if choice not in ('triton', 'check'):
            return cpu if choice == 'fused' or is_faster(input) else plain
        if os.environ.get('TRITON_INTERPRET') != '1':
            raise ValueError(
                f'{VARIABLE}={choice!r} needs a GPU. Set TRITON_INTERPRET=1 '
                'before Python starts to interpret the kernels on a CPU '
                f'(slow), or {VARIABLE}=auto'
            )
    return attempt(_cuda) or plain


class CannotLaunch(Exception):
    """A kernel did not start: its name, if it has one, and the cause.

    Those before it in a direction have run.
    """


@cache
def _cuda() -> ModuleType:
    try:
        compat.check_triton()
        from . import cuda
    except ImportError as error:
        raise CannotLaunch from error
    return cuda


_failed: list[BaseException] = []


def _forced() -> bool:
    return os.environ.get(VARIABLE) == 'triton'


def attempt(function: Callable[..., Result], *args: object) -> Result | None:
    """Call a function that launches kernels; None if one cannot be launched.

    Errors of the device, of the caller's tensors and of hooks that run inside
    the function are not caught. After the first failure no kernel is launched
    any more, and one warning names the process.
    """
    if _failed and not _forced():
        return None
    try:
        return function(*args)
    except CannotLaunch as failure:
        cause = failure.__cause__ or failure
        if _forced():
            raise cause from None
        _failed.append(cause)
        print_log(
            f'The Triton kernels of ws_mm cannot run on rank {get_rank()}; '
            'its WS and BCN run on eager operations instead: same '
            'results, slower. Other ranks of the same machine and packages '
            'do the same. Install what is missing, or set '
            f'{VARIABLE}=plain to drop this message; {VARIABLE}=triton shows '
            f'the whole error. It begins: {type(cause).__name__}: '
            f'{cause!s:.300}',
            logger='current',
            level=logging.WARNING,
        )
        return None
