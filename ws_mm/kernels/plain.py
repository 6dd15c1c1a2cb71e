"""WS and BCN in eager operations: what exporters get."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import compat
from ..distributed import all_reduced, pooled_moments, synchronized_moments
from .settled import settle

# Values of a group, and of a channel in mode 'batch', below which closed-form
# gradients have fewer digits than those of composed operations.
FEW_IN_GROUP, FEW_IN_CHANNEL = 8, 16

# bn_weight, bn_bias, weight, bias
Affines = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
# Mean and biased variance per channel, around a given mean or their own.
Moments = Callable[[Tensor | None], tuple[Tensor, Tensor]]


def standardize_weight(
    weight: Tensor, eps: float, inside: bool, dtype: torch.dtype
) -> Tensor:
    """See :func:`~ws_mm.functional.standardize_weight`.

    Args:
        weight: raw filters.
        eps: added to the standard deviation or the variance.
        inside: whether to add eps inside the square root.
        dtype: output dtype.
    """
    weight = at_least_float32(weight)
    dims = tuple(range(1, weight.dim()))
    # As numbers: torch.jit.trace would round their quotient to float32.
    fan_in = math.prod([int(size) for size in weight.shape[1:]])
    # Written as sums and products: the gradients of a mean, a difference and
    # a quotient each pass over all filters once more.
    centered = weight + weight.sum(dims, keepdim=True) * (-1 / fan_in)
    # vector_norm has a zero gradient at zero, where sqrt has an infinite one.
    norm = torch.linalg.vector_norm(centered, dim=dims, keepdim=True)
    if inside:
        denominator = (norm.square() / (fan_in - 1) + eps).sqrt()
    else:
        denominator = norm / math.sqrt(fan_in - 1) + eps
    standardized: Tensor = centered * denominator.reciprocal()
    return standardized.to(dtype)


def batch_channel_norm(
    input: Tensor,
    num_groups: int,
    running: tuple[Tensor, Tensor],
    affines: Affines,
    momentum: float,
    eps: float,
    source: str,
    update: bool,
) -> Tensor:
    """See :func:`~ws_mm.functional.batch_channel_norm`.

    Args:
        input: activations.
        num_groups: groups of the second step.
        running: means and variances, updated in place.
        affines: bn_weight, bn_bias, weight and bias.
        momentum: share of the newest batch.
        eps: added to both variances.
        source: statistics of the first step: 'running', 'batch', or 'ranks'
            for those of the batches of all ranks.
        update: whether to move the running values; of source 'running',
            before they are used.
    """
    x = at_least_float32(input)
    affines = widened(affines, x.dtype)
    if source == 'ranks':
        return _synchronized_norm(
            x, num_groups, running, affines, momentum, eps, update
        ).to(input.dtype)

    of_batch = source == 'batch'
    if of_batch and compat.is_eager():
        y = _batch_norm(x, running, *affines[:2], momentum, eps, update)
        return channel_norm(y, num_groups, *affines[2:], eps).to(input.dtype)

    def moments(around: Tensor | None) -> tuple[Tensor, Tensor]:
        return batch_moments(x.detach(), around)

    used = statistics(x, running, momentum, of_batch, update, moments)
    mean, var = used[0].to(x.dtype), used[1].to(x.dtype)
    output = normalize(x, *affines, mean, var, num_groups, eps, of_batch)
    return output.to(input.dtype)


def _batch_norm(
    x: Tensor,
    running: tuple[Tensor, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    update: bool,
) -> Tensor:
    """The first step by the batch, which computes its moments only once."""
    # With momentum 1, the running values that it moves are its moments.
    mean, var = x.new_zeros(2, x.shape[1])
    y = F.batch_norm(
        x, mean, var, weight, bias, training=True, momentum=1.0, eps=eps
    )
    if update:
        _settled(running, (mean, var), momentum)
    return y


def normalize(
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
    """Both steps of ``batch_channel_norm``, with given statistics.

    Args:
        input: activations.
        bn_weight: inner scale.
        bn_bias: inner shift.
        weight: outer scale.
        bias: outer shift.
        mean: constants of the first step, unless of_batch.
        var: constants of the first step, unless of_batch.
        num_groups: groups of the second step.
        eps: added to both variances.
        of_batch: whether the statistics of the first step are those of
            input, and gradients flow through them.
    """
    if (
        not of_batch
        and _is_eager_on_cpu(input)
        and has_few_values(input.shape, num_groups, 'running')
    ):
        # The kernel multiplies before it subtracts, and the second step may
        # divide by the difference of two values.
        input, mean = input - _per_channel(mean, input), torch.zeros_like(mean)
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


def has_few_values(shape: Sequence[int], num_groups: int, source: str) -> bool:
    """Return whether closed-form gradients lose digits.

    They are differences of sums. Over few values nearly all of a sum cancels,
    as the gradient of two values is 0 but for eps.
    """
    size = math.prod(shape[2:])
    return size * shape[1] // num_groups < FEW_IN_GROUP or (
        source != 'running' and size * shape[0] < FEW_IN_CHANNEL
    )


def channel_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """``F.group_norm`` with an affine per channel or per group.

    Args:
        input: result of the first step, which this may change.
        num_groups: groups of channels.
        weight: scale.
        bias: shift.
        eps: added to the variance.
    """
    num_channels = input.shape[1]
    group_size = num_channels // num_groups
    if _is_eager_on_cpu(input):
        outer = [x for x in (weight, bias) if x is not None]
        per_group = all(x.numel() == num_groups for x in outer)
        if per_group and input.numel() == len(input) * num_channels:
            return _norm_of_values(input, num_groups, weight, bias, eps)
        input = _centered(input, num_groups)
    if weight is not None and weight.numel() != num_channels:
        weight = weight.repeat_interleave(group_size)
    if bias is not None and bias.numel() != num_channels:
        bias = bias.repeat_interleave(group_size)
    return F.group_norm(input, num_groups, weight, bias, eps)


def _is_eager_on_cpu(x: Tensor) -> bool:
    return (
        x.device.type == 'cpu' and x.numel() > 0 and not compat.is_recording()
    )


def _centered(input: Tensor, num_groups: int) -> Tensor:
    """Subtract a constant from each group, in place.

    That changes no result of a group norm. But the CPU's kernel subtracts
    squares in channels_last, and products in its backward, which cancel
    where a mean is large.
    """
    with torch.no_grad():
        spatial = tuple(range(2, input.dim()))
        means = input.mean(spatial, keepdim=True) if spatial else input.clone()
        rows = means.view(len(input), num_groups, -1)
        rows.copy_(rows.mean(2, keepdim=True))
    return input.sub_(means)


def _norm_of_values(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Group norm of one value per channel, with affines per group.

    Batch norm of all groups of all samples: few operations, which is what
    such a map costs, and no digits lost.
    """
    samples = len(input)
    output = torch.batch_norm(
        input.reshape(1, samples * num_groups, -1),
        _of_samples(weight, samples),
        _of_samples(bias, samples),
        *(None, None, True, 0.0, eps, False),
    )
    return reshaped(output, input.shape)


def _of_samples(values: Tensor | None, samples: int) -> Tensor | None:
    """Values per group, for the groups of each sample."""
    if values is None or samples == 1:
        return values
    # Two or three are joined in half the time, forward and backward.
    if samples < 4:
        return torch.cat([values] * samples)
    return values.repeat(samples)


def reshaped(output: Tensor, shape: torch.Size) -> Tensor:
    """View as a shape, as a new tensor to autograd.

    The ReLU after a normalization may change it in place, which autograd
    forbids for a view that a function returns.
    """
    result: Tensor = torch.ops.aten._unsafe_view(output, shape)
    return result


@torch.no_grad()
def statistics(
    x: Tensor,
    running: tuple[Tensor, Tensor],
    momentum: float,
    of_batch: bool,
    update: bool,
    moments: Moments,
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the first step; moves the running values.

    Args:
        x: activations.
        running: means and variances, updated in place.
        momentum: share of the newest batch.
        of_batch: whether the statistics are those of this batch.
        update: whether to move the running values.
        moments: function that returns the moments of x.
    """
    if of_batch:
        mean, var = moments(None)
        if update:
            _move(running, mean, var, x.numel() / x.shape[1], momentum)
    elif update and x.numel():
        mean, var = _settled(running, moments(running[0]), momentum)
    else:
        # The buffers change in later calls; what backward keeps must not.
        mean, var = running[0].clone(), running[1].clone()
    return mean, var


def batch_moments(x: Tensor, around: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean per channel and biased variance around a given mean or its own."""
    dims = (0, *range(2, x.dim()))
    if around is None:
        mean, var = mean_and_variance(x, dims)
        return mean.flatten(), var.flatten()
    deviation = x - _per_channel(around, x)
    if x.numel() == x.shape[1]:  # their means are themselves
        return x.flatten(), deviation.square_().flatten()
    return x.mean(dims), deviation.square_().mean(dims)


def mean_and_variance(
    x: Tensor, dims: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over dimensions, which are kept."""
    if x.is_cpu and compat.is_eager():
        # In two passes, of which each is many times as fast as var_mean.
        mean = x.mean(dims, keepdim=True)
        return mean, (x - mean).square().mean(dims, keepdim=True)
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return mean, var


def of_channels(
    means: Tensor, variances: Tensor, around: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Moments of each channel from those of each (sample, channel)."""
    one = len(means) == 1  # its mean is itself, in fewer operations
    mean = means[0] if one else means.mean(0)
    if one and around is None:
        return mean, variances[0]
    deviation = means - (mean if around is None else around)
    squares = torch.addcmul(variances, deviation, deviation)
    return mean, squares[0] if one else squares.mean(0)


def moved(
    running: Sequence[Tensor], batch: Sequence[Tensor], momentum: float
) -> list[Tensor]:
    """Running values after a batch, in channels where that is finite.

    Formula:
        (1 - momentum) * running + momentum * batch
    """
    # By number: the compiler of torch 2.1 knows no strict zip.
    numbers = range(len(running))
    new = [
        torch.lerp(running[i], batch[i].to(running[i].dtype), momentum)
        for i in numbers
    ]
    sums = [v if v.dim() == 1 else v.flatten(1).sum(1) for v in new]
    total = sums[0]
    for values in sums[1:]:
        total = total + values
    finite = total.abs() < math.inf
    return [
        torch.where(
            finite if v.dim() == 1 else finite.view(-1, *[1] * (v.dim() - 1)),
            v,
            running[i],
        )
        for i, v in enumerate(new)
    ]


def _settled(
    running: tuple[Tensor, Tensor],
    batch: tuple[Tensor, Tensor],
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """Move running values in place; return them for the forward."""
    mean, var = moved(running, batch, momentum)
    return settle(running[0], mean), settle(running[1], var)


def _move(
    running: tuple[Tensor, Tensor],
    mean: Tensor,
    var: Tensor,
    count: Any,
    momentum: float,
) -> None:
    """Move running values as ``nn.BatchNorm2d`` does: variance unbiased.

    Args:
        running: means and variances, updated in place.
        mean: that of the batch.
        var: its biased variance.
        count: its number of values, above 1; or a tensor of any number, of
            which 0 and 1 move nothing.
        momentum: share of the batch.
    """
    if isinstance(count, Tensor):
        unbiased = var * (count / (count - 1).clamp(min=0))  # inf or NaN
    else:
        unbiased = var * (count / (count - 1))
    _settled(running, (mean, unbiased), momentum)


def _synchronized_norm(
    x: Tensor,
    num_groups: int,
    running: tuple[Tensor, Tensor],
    affines: Affines,
    momentum: float,
    eps: float,
    update: bool,
) -> Tensor:
    if not compat.is_eager():
        y, *found = _composed_synchronized(x, *affines[:2], eps)
        if update:
            with torch.no_grad():
                # Without tangents, too, which no_grad leaves.
                mean, var, total = (values.detach() for values in found)
                _move(running, mean, var, total, momentum)
        return channel_norm(y, num_groups, *affines[2:], eps)
    with torch.no_grad():
        if x.numel():
            own = batch_moments(x, None)
        else:
            own = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
        used = statistics_of_ranks(
            own, x.numel() // x.shape[1], running, momentum, update
        )
    return normalize_by_ranks(x, *affines, *used, num_groups, eps)


def normalize_by_ranks(
    input: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    total: Tensor,
    num_groups: int,
    eps: float,
) -> Tensor:
    """Both steps, as :func:`normalize`, with the statistics of all ranks.

    Args:
        input: activations.
        bn_weight: inner scale.
        bn_bias: inner shift.
        weight: outer scale.
        bias: outer shift.
        mean: result of :func:`statistics_of_ranks`, as the next two.
        var: of the first step.
        total: number of values per channel.
        num_groups: groups of the second step.
        eps: added to both variances.
    """
    y: Tensor = SynchronizedBatchNorm.apply(
        input, bn_weight, bn_bias, mean, var, total, eps
    )
    return channel_norm(y, num_groups, weight, bias, eps)


@torch.no_grad()
def statistics_of_ranks(
    own: tuple[Tensor, Tensor],
    count: int,
    running: tuple[Tensor, Tensor],
    momentum: float,
    update: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and number of the values of all ranks.

    Args:
        own: mean and biased variance of this rank.
        count: number of values per channel of this rank.
        running: means and variances, updated in place.
        momentum: share of the newest batch.
        update: whether to move the running values.
    """
    mean, var, total = pooled_moments(*own, count)
    if update:
        _move(running, mean, var, total, momentum)
    return mean, var, total


class SynchronizedBatchNorm(torch.autograd.Function):
    """The first step of BCN from the moments of all ranks.

    Formula, with n values per channel on all ranks and
    z = (x - mean) / sqrt(var + eps):
        y = z weight + bias
        dweight = sum(g z), dbias = sum(g)
        dx = weight / sqrt(var + eps) (g - (sum(g z) z + sum(g)) / n)
    where the sums in dx are those of all ranks: one collective of those two,
    in this order, as in every backend. Gradients of the affine are those of
    this rank; what wraps the model adds them.

    Saves x and a few numbers per channel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        total: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, mean, var, total)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, var, total = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            found = gradients(
                lambda x, a, b: _composed_synchronized(x, a, b, ctx.eps)[0],
                [x, weight, bias],
                ctx.needs_input_grad[:3],
                grad,
            )
            return *found, *[None] * 4
        dims = (0, *range(2, x.dim()))
        inverse = torch.rsqrt(var + ctx.eps)
        d = x - _per_channel(mean, x)
        sum_gz, sum_g = (grad * d).sum(dims) * inverse, grad.sum(dims)
        dx = None
        if ctx.needs_input_grad[0]:
            scale = inverse if weight is None else inverse * weight
            sums = all_reduced(torch.cat([sum_gz, sum_g])).view(2, -1)
            along, constant = sums * (-scale / total)
            dx = d.mul_(_per_channel(along * inverse, x))
            dx.add_(_per_channel(constant, x))
            dx.addcmul_(grad, _per_channel(scale, x))
        return (
            dx,
            None if weight is None else sum_gz,
            None if bias is None else sum_g,
            *[None] * 4,
        )


def _composed_synchronized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in operations that have all derivatives, and the moments."""
    mean, var, total = synchronized_moments(x)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    y = (x - _per_channel(mean, x)) * _per_channel(scale, x)
    if bias is not None:
        y = y + _per_channel(bias, x)
    return y, mean, var, total


def gradients(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Gradients of an eager function, in a fused function's backward.

    They are differentiable if the backward is.

    Args:
        function: function of all inputs.
        inputs: saved ones; None where there are none.
        needed: which gradients to compute, None for the others.
        grad: gradient of the output.
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


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision, in which nothing is accumulated."""
    return x.float() if x.dtype in (torch.half, torch.bfloat16) else x


def widened(affines: Affines, dtype: torch.dtype) -> Affines:
    """Affines in the dtype of the computation."""
    a, b, c, d = [
        x if x is None or x.dtype == dtype else x.to(dtype) for x in affines
    ]
    return a, b, c, d


def one_value_message(x: Tensor, mode: str) -> str:
    """The error of a batch mode with a single value per channel."""
    return (
        f'mode={mode!r} needs more than one value per channel in training, '
        f'got an input of shape {tuple(x.shape)}. Use '
        "norm_cfg=dict(mode='estimate'), which has no such limit"
    )


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).view(-1, *[1] * (x.dim() - 2))
