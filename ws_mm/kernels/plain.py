"""WS and BCN in composed operations: what compilers and exporters get."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(input: Tensor) -> torch.dtype:
    """Of sums over a tensor, and of what is computed from them."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def standardize_weight(weight: Tensor, eps: float, eps_mode: str) -> Tensor:
    """See :func:`~ws_mm.functional.standardize_weight`."""
    dims = tuple(range(1, weight.dim()))
    fan_in = weight.shape[1:].numel()
    # Written as sums and products: the gradients of a mean, a difference and
    # a quotient each pass over all filters once more.
    centered = weight + weight.sum(dims, keepdim=True) * (-1 / fan_in)
    # vector_norm has a zero gradient at zero, where sqrt has an infinite one.
    norm = torch.linalg.vector_norm(centered, dim=dims, keepdim=True)
    if eps_mode == 'outside':
        denominator = norm / math.sqrt(fan_in - 1) + eps
    else:
        denominator = (norm.square() / (fan_in - 1) + eps).sqrt()
    standardized: Tensor = centered * denominator.reciprocal()
    return standardized


def channel_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """``F.group_norm`` with an affine per channel or per group."""
    num_channels = input.shape[1]
    group_size = num_channels // num_groups
    if weight is not None and weight.numel() != num_channels:
        weight = weight.repeat_interleave(group_size)
    if bias is not None and bias.numel() != num_channels:
        bias = bias.repeat_interleave(group_size)
    return F.group_norm(input, num_groups, weight, bias, eps)


def batch_channel_norm(
    input: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    num_groups: int,
    eps: float,
    of_batch: bool,
) -> Tensor:
    """See :func:`~ws_mm.functional.batch_channel_norm`.

    Args:
        input: the activations.
        bn_weight: inner scale.
        bn_bias: inner shift.
        weight: outer scale.
        bias: outer shift.
        mean: constants of the first step, unless of_batch.
        var: constants of the first step, unless of_batch.
        num_groups: of the second step.
        eps: of both.
        of_batch: whether the statistics of the first step are those of
            input, and gradients flow through them.
    """
    y = F.batch_norm(
        input,
        None if of_batch else mean,
        None if of_batch else var,
        bn_weight,
        bn_bias,
        training=of_batch,
        eps=eps,
    )
    return channel_norm(y, num_groups, weight, bias, eps)


def gradients(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Gradients of a composed function, in a fused function's backward.

    They are differentiable if the backward is.

    Args:
        function: of all inputs.
        inputs: saved ones; None where there are none.
        needed: which gradients to compute, None for the others.
        grad: the gradient of the output.
    """
    twice = torch.is_grad_enabled()
    wanted = [
        x
        for x, need in zip(inputs, needed, strict=True)
        if need and x is not None
    ]
    with torch.enable_grad():
        output = function(*inputs)
        found = iter(
            torch.autograd.grad(output, wanted, grad, create_graph=twice)
        )
    return [next(found) if need else None for need in needed]
