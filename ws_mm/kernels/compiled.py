"""BCN for ``torch.compile``: moments of each (sample, channel), one affine.

A compiler fuses elementwise operations into each other and into a reduction
that reads the same tensor. Here the forward reads the input twice: for its
moments, and for an affine that takes in a ReLU or a sum after it.
"""

import torch
from torch import Tensor

from . import plain
from .plain import standardize_weight

__all__ = ['batch_channel_norm', 'standardize_weight']


def batch_channel_norm(
    input: Tensor,
    num_groups: int,
    running: tuple[Tensor, Tensor],
    affines: plain.Affines,
    momentum: float,
    eps: float,
    source: str,
    update: bool,
) -> Tensor:
    """See :func:`.plain.batch_channel_norm`.

    Formula: that of :class:`.cpu.BatchChannelNorm`, with pivot_i the value of
    m_i, constant to autograd:
        output_i = r a weight (input_i - pivot_i) + shift_i
        shift_i = r weight (a (pivot_i - mean) + bn_bias - U) + bias
    Backward then needs sum(g) and sum(g (input - pivot)), and no other sum
    over activations. Differences are taken before products: a large mean of
    the input does not cancel.
    """
    if (
        source == 'ranks'
        or input.numel() == 0
        or input.dim() < 3
        or plain.has_few_values(input.shape, num_groups, source)
    ):
        return plain.batch_channel_norm(
            *(input, num_groups, running, affines),
            *(momentum, eps, source, update),
        )
    x = plain.at_least_float32(input)
    bn_weight, bn_bias, weight, bias = plain.widened(affines, x.dtype)
    # In one pass, by Welford's method.
    v, m = torch.var_mean(x, tuple(range(2, x.dim())), correction=0)
    pivot = m.detach()

    def moments(around: Tensor | None) -> tuple[Tensor, Tensor]:
        return plain.of_channels(pivot, v.detach(), around)

    of_batch = source == 'batch'
    used = plain.statistics(x, running, momentum, of_batch, update, moments)
    if of_batch:  # the same values, with gradients
        mean, var = plain.of_channels(m, v, None)
    else:
        mean, var = used[0].to(x.dtype), used[1].to(x.dtype)
    a = torch.rsqrt(var + eps)
    if bn_weight is not None:
        a = a * bn_weight
    shape = len(m), num_groups, -1
    u, level = a * (m - mean), a * (pivot - mean)
    if bn_bias is not None:
        u, level = u + bn_bias, level + bn_bias
    u, level = u.view(shape), level.view(shape)
    middle = u.mean(2, keepdim=True)
    spread = (a.square() * v).view(shape) + (u - middle).square()
    r = torch.rsqrt(spread.mean(2, keepdim=True) + eps)
    if weight is not None:
        r = r * weight.view(num_groups, -1)
    shift = r * (level - middle)
    if bias is not None:
        shift = shift + bias.view(num_groups, -1)
    scale = r * a.view(num_groups, -1)
    per_row = *m.shape, *[1] * (x.dim() - 2)
    output = (x - pivot.view(per_row)) * scale.view(per_row)
    return (output + shift.view(per_row)).to(input.dtype)
