"""Sums over the ranks of a process group, with their gradients."""

import torch
import torch.distributed as dist
from torch import Tensor


class _AllReduceSum(torch.autograd.Function):
    """A sum over ranks whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def synchronized_moments(input: Tensor) -> tuple[Tensor, Tensor, float]:
    """Per-channel moments of the concatenated inputs of all ranks.

    Convention: biased variance. Each rank contributes its count, mean and
        variance, combined as mean = sum(n_r mean_r) / n and
        var = sum(n_r (var_r + (mean_r - mean)^2)) / n, which does not
        cancel where E[x^2] - E[x]^2 would. One collective forward, one
        backward.
    Shape:
        input: (N, C, *). N may be 0 on some ranks.
        returns: mean (C,), var (C,), number of values per channel.
    """
    channels = input.shape[1]
    count = input.numel() // channels
    if count:
        dims = (0, *range(2, input.dim()))
        var, mean = torch.var_mean(input, dims, correction=0)
    else:
        # Zero, but a function of input: backward must join its collective.
        mean = var = input.flatten(1).sum() + input.new_zeros(channels)
    if not (dist.is_available() and dist.is_initialized()):
        return mean, var, count
    world = dist.get_world_size()
    own = torch.cat([input.new_tensor([count]), mean, var])
    # Each rank fills its own row, so that one sum gathers all of them.
    rows = torch.zeros(world, own.numel()).to(own)
    rows[dist.get_rank()] = own
    rows = _AllReduceSum.apply(rows)
    counts = rows[:, 0].detach()
    total = float(counts.sum())
    if not total:
        return mean, var, 0
    share = (counts / total)[:, None]
    means, variances = rows[:, 1:].split(channels, dim=1)
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    return mean, var, total
