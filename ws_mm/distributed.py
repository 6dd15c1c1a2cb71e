"""Moments over the ranks of a process group, with their gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size()


def all_reduced(values: Tensor) -> Tensor:
    """The sum over ranks, in a new tensor."""
    values = values.clone()
    dist.all_reduce(values)
    return values


def pooled_moments(
    mean: Tensor, var: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of the values of all ranks, in one collective.

    Formula, over the ranks r, which hold n_r values per channel:
        n = sum(n_r)
        mean = sum(n_r mean_r) / n
        var = sum(n_r (var_r + (mean_r - mean)^2)) / n

    Convention: biased variances. Nothing cancels here, where
        E[x^2] - E[x]^2 would. No rank waits for its device. Where no rank
        has a value, all results are 0.
    Shape:
        mean, var: (C,), 0 where count is.
        returns: (C,), (C,) and (1,), without gradient.

    Args:
        mean: that of this rank.
        var: likewise.
        count: number of values per channel of this rank.
    """
    own = torch.cat([mean.new_full((1,), count), mean, var]).detach()
    rows = own.new_empty(world_size(), len(own))
    if own.is_cpu or dist.get_backend() == 'gloo':
        dist.all_gather(list(rows), own)  # all that gloo has in torch 2.1
    else:
        dist.all_gather_into_tensor(rows, own)
    counts, means, variances = rows.split([1, len(mean), len(mean)], dim=1)
    total = counts.sum(0)
    share = counts / total.clamp(min=1)
    mean = (share * means).sum(0)
    spread = variances + (means - mean).square()
    return mean, (share * spread).sum(0), total


class _AllReduceSum(torch.autograd.Function):
    """A sum over ranks whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return all_reduced(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        summed: Tensor = _AllReduceSum.apply(grad)
        return summed


class _PooledMoments(torch.autograd.Function):
    """``pooled_moments`` with a gradient: one collective each way."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, var: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        pooled, pooled_var, total = pooled_moments(mean, var, count)
        ctx.save_for_backward(mean, pooled, count / total.clamp(min=1))
        ctx.mark_non_differentiable(total)
        return pooled, pooled_var, total

    @staticmethod
    def backward(
        ctx: Any, grad_mean: Tensor, grad_var: Tensor, _: Any
    ) -> tuple[Tensor, Tensor, None]:
        mean, pooled, share = ctx.saved_tensors
        grads = _AllReduceSum.apply(torch.cat([grad_mean, grad_var]))
        grad_mean, grad_var = grads.chunk(2)
        along = grad_mean + 2 * grad_var * (mean - pooled)
        return share * along, share * grad_var, None


def synchronized_moments(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-channel moments of the concatenated inputs of all ranks.

    See :func:`pooled_moments`; these have gradients. One collective forward,
    one backward.

    Shape:
        input: (N, C, *). N may be 0 on some ranks.
        returns: mean (C,), biased var (C,), number of values per channel
            (1,).
    """
    count = input.shape[0] * input.shape[2:].numel()
    if count:
        dims = (0, *range(2, input.dim()))
        var, mean = torch.var_mean(input, dims, correction=0)
    else:
        # Zero, but a function of input: backward must join its collective.
        mean = var = input.flatten(1).sum() + input.new_zeros(input.shape[1])
    if world_size() == 1:
        return mean, var, mean.new_full((1,), count)
    pooled: tuple[Tensor, Tensor, Tensor] = _PooledMoments.apply(
        mean, var, count
    )
    return pooled
