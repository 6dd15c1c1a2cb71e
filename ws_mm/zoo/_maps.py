"""Passes over activations of norms that are an affine of each map.

What such a norm computes from the moments of its maps are a few numbers per
image and channel, which autograd differentiates. Only these passes touch
activations, and they save the input alone.
"""

from typing import Any

import torch
from torch import Tensor

from .. import compat
from ..kernels import cpu, for_activations, plain


def shape_per_map(x: Tensor) -> tuple[int, ...]:
    """The shape (N, C, 1, ...) of one number per map."""
    return *x.shape[:2], *[1] * (x.dim() - 2)


def moments_of_maps(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each map, of shape (N, C, 1, ...)."""
    if x.dim() == 2:
        return x, torch.zeros_like(x)
    if _is_composed(x):
        return plain.mean_and_variance(x, tuple(range(2, x.dim())))
    moments: tuple[Tensor, Tensor] = _Moments.apply(x)
    return moments


def joined_moments(
    mean: Tensor, var: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Those of the maps along one dimension together; nothing cancels."""
    joined, spread = plain.mean_and_variance(mean, (dim,))
    return joined, var.mean(dim, keepdim=True) + spread


def affine_of_maps(
    x: Tensor, center: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    """(x - center) * scale + shift, for each map.

    Args:
        x: the input, (N, C, *).
        center: broadcasts to (N, C, 1, ...), as the next two.
        scale: factors.
        shift: what is added.
    """
    if _is_composed(x):
        return (x - center) * scale + shift
    shape = shape_per_map(x)
    numbers = (values.expand(shape) for values in (center, scale, shift))
    output: Tensor = _Affine.apply(x, *numbers)
    return output


def sums_of_maps(
    grad: Tensor, x: Tensor, center: Tensor
) -> tuple[Tensor, Tensor]:
    """sum(grad * (x - center)) and sum(grad) of each map, (N, C, 1, ...).

    Args:
        grad: gradient, like x.
        x: the input, (N, C, *).
        center: (N, C, 1, ...).
    """
    if _has_rows(x) and not torch.is_grad_enabled():
        layout = torch.contiguous_format
        if not x.is_contiguous():
            layout = torch.channels_last
        rows = cpu.as_rows(grad.contiguous(memory_format=layout))
        sums = cpu.row_sums(rows, cpu.as_rows(x), center.flatten())
        return sums[0].view(center.shape), sums[1].view(center.shape)
    product = grad * (x - center)
    if x.dim() == 2:
        return product, grad
    dims = tuple(range(2, x.dim()))
    return product.sum(dims, keepdim=True), grad.sum(dims, keepdim=True)


class _Moments(torch.autograd.Function):
    """Backward: dx = (dmean + 2 (x - mean) dvar) / L, L values per map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = shape_per_map(x)
        if _has_rows(x):
            mean, var, _ = cpu.instance_moments(x)
        else:
            dims = tuple(range(2, x.dim()))
            mean, var = plain.mean_and_variance(x, dims)
        mean, var = mean.view(shape), var.view(shape)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        size = x.shape[2:].numel()
        return _affine(x, mean, dvar * (2 / size), dmean / size)


class _Affine(torch.autograd.Function):
    """Backward: dx = g scale, dscale = sum(g (x - center)), dshift = sum(g).

    And dcenter = -scale sum(g), with sums over each map.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, center: Tensor, scale: Tensor, shift: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, center, scale)
        return _affine(x, center, scale, shift)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, center, scale = ctx.saved_tensors
        dx = grad * scale if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return dx, None, None, None
        product, total = sums_of_maps(grad, x, center)
        return dx, -scale * total, product, total


def _affine(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x - center) * scale + shift, in one pass."""
    if _has_rows(x) and x.dtype == scale.dtype and not torch.is_grad_enabled():
        numbers = (values.flatten() for values in (center, scale, shift))
        return cpu.affine(cpu.as_rows(x), *numbers).view(x.shape)
    level = torch.addcmul(shift, center, scale, value=-1)
    return torch.addcmul(level, x, scale)


def _is_composed(x: Tensor) -> bool:
    """Return whether eager operations run, for compilers or small maps."""
    return compat.is_recording() or for_activations(x) is plain


def _has_rows(x: Tensor) -> bool:
    """Return whether the reductions of a CPU's BCN take the maps."""
    if compat.is_compiling() or x.device.type != 'cpu' or x.dim() == 2:
        return False
    return cpu.is_supported(x)
