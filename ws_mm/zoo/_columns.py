"""Maps as a matrix, a row per channel, for norms that mix channels."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..compat import autocast_dtype


def columns(x: Tensor) -> Tensor:
    """The values of x, (N, C, *), as a matrix (C, values per channel)."""
    return x.transpose(0, 1).flatten(1)


def maps_of(matrix: Tensor, x: Tensor) -> Tensor:
    """Undo :func:`columns`, for an input of the shape of x."""
    shape = x.shape[1], x.shape[0], *x.shape[2:]
    return matrix.view(shape).transpose(0, 1)


def exact_products(x: Tensor) -> AbstractContextManager[Any]:
    """Products of matrices in the dtype of x, also under autocast."""
    if autocast_dtype(x.device.type) is None:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
