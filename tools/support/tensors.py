"""Relative error of tensors, and how many of them a forward keeps."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected magnitude."""
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = expected.abs().max().clamp_min(1e-30)
    return float((actual - expected).abs().max() / scale)


def saved_bytes(run: Callable[[], Any], own: Iterable[Tensor] = ()) -> int:
    """Bytes that a forward keeps for its backward, each storage once.

    Args:
        run: the forward; returns what the backward begins with.
        own: tensors that are there anyway; parameters need not be listed.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, Tensor] = {}  # held: an address is reused once it is free

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run()
    return sum(
        tensor.untyped_storage().nbytes()
        for place, tensor in kept.items()
        if place not in there
    )
