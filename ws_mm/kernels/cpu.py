"""WS and BCN on a CPU: closed-form gradients on ATen's vectorized kernels.

On a CPU the price of a normalization is the number of passes over memory
and, above all, of new tensors of the size of the activations. Both functions
need one reduction and one affine pass each way, and allocate their result
only. The reductions are entry points of ATen that were made for something
else; what they return here is written beside each.
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import plain

aten = torch.ops.aten


def standardize_weight(
    weight: Tensor, eps: float, inside: bool, dtype: torch.dtype
) -> Tensor:
    """Standardize filters in at least float32, into dtype."""
    if weight.dtype in (torch.half, torch.bfloat16):
        weight = weight.float()
    standardized: Tensor = StandardizeWeight.apply(weight, eps, inside)
    return standardized.to(dtype)


class StandardizeWeight(torch.autograd.Function):
    """``standardize_weight`` of float32 or float64 filters.

    Formula, per filter of K entries with D = std + eps or sqrt(var + eps):
        output = (weight - mean) / D
        dweight = (g - mean(g) - output sum(g output) D' / (K - 1)) / D
    with D' = D / std for eps outside the root, 1 inside it.

    Saves the output, which the convolution keeps for its own backward.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, eps: float, inside: bool) -> Tensor:
        fan_in = weight.shape[1:].numel()
        rows = _in_memory_order(weight, weight)
        shape = rows.shape
        rows = rows.reshape(-1, fan_in)
        # eps only keeps 0 * inf out of constant filters.
        output, _, rstd = torch.native_layer_norm(
            rows, [fan_in], None, None, 1e-30
        )
        std = math.sqrt(fan_in / (fan_in - 1)) / rstd
        if inside:
            denominator = (std.square() + eps).sqrt()
            ratio = torch.ones_like(std)
        else:
            denominator = std + eps
            ratio = denominator / std
        output.mul_(1 / (rstd * denominator))
        ctx.save_for_backward(weight, output, denominator, ratio)
        ctx.settings = eps, inside
        output = _reshape(output, shape)
        return _in_memory_order(output, weight, back=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        weight, output, denominator, ratio = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone differentiates twice
            eps, inside = ctx.settings
            mode = 'inside' if inside else 'outside'
            (again,) = plain.gradients(
                lambda weight: plain.standardize_weight(weight, eps, mode),
                [weight],
                [True],
                grad,
            )
            return again, None, None
        fan_in = output.shape[1]
        permuted = _in_memory_order(grad, weight)
        # The gradient of a layer norm of mean m and reciprocal std a is
        # a (g - mean(g)) - a^3 (x - m) mean(g (x - m)). At x = output, m = 0
        # and this a it is ours, up to one factor per filter.
        a = (ratio * (fan_in / (fan_in - 1))).sqrt()
        gradient = aten.native_layer_norm_backward(
            permuted.reshape(output.shape),
            output,
            [fan_in],
            torch.zeros_like(a),
            a,
            None,
            None,
            [True, False, False],
        )[0]
        gradient.mul_(1 / (denominator * a))
        gradient = gradient.view(permuted.shape)
        return _in_memory_order(gradient, weight, back=True), None, None


def _in_memory_order(
    values: Tensor, weight: Tensor, back: bool = False
) -> Tensor:
    """Move the channels last where the weight's memory has them there.

    The order within a filter does not matter, copies do.
    """
    if weight.dim() != 4 or weight.is_contiguous():
        return values
    return values.permute(0, 3, 1, 2) if back else values.permute(0, 2, 3, 1)


def _reshape(output: Tensor, shape: torch.Size) -> Tensor:
    """Like view, but to autograd a new tensor.

    A view that leaves a function could not be changed in place, as the ReLU
    after a normalization does.
    """
    reshaped: Tensor = aten._unsafe_view(output, shape)
    return reshaped


def takes_rows(input: Tensor) -> bool:
    """Whether :func:`as_rows` can view the input."""
    return input.is_contiguous() or (
        input.shape[0] == 1
        and input.dim() == 4
        and input.is_contiguous(memory_format=torch.channels_last)
    )


def as_rows(input: Tensor) -> Tensor:
    """View (N, C, *) as one sample of N * C channels."""
    if not input.is_contiguous():
        return input  # one sample in channels_last is one already
    return input.view(1, input.shape[0] * input.shape[1], -1)


# Temporaries of this many bytes stay in a core's cache.
CHUNK = 1 << 20


def instance_moments(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each (sample, channel), both (N, C).

    In two passes, the second around the mean of the first: sums of squares
    would cancel where the mean is large.
    """
    rows = as_rows(input)
    spatial = tuple(range(2, rows.dim()))
    size = input.shape[2:].numel()
    mean = rows.sum(spatial, keepdim=True).div_(size)
    squares = torch.zeros_like(mean)
    # Chunks of whole rows, or of lines of pixels where channels come last.
    dim = 1 if input.is_contiguous() else 2
    length = rows.shape[dim]
    step = max(1, CHUNK * length // (rows.numel() * rows.element_size()))
    for start in range(0, length, step):
        part = rows.narrow(dim, start, min(step, length - start))
        if dim == 1:
            here = slice(start, start + step)
            deviation = part - mean[:, here]
            squares[:, here] = deviation.square_().sum(spatial, keepdim=True)
        else:
            deviation = part - mean
            squares += deviation.square_().sum(spatial, keepdim=True)
    shape = input.shape[:2]
    return mean.view(shape), squares.div_(size).view(shape)


def _sums(grad: Tensor, rows: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Per row, sum(grad * (rows - mean)) and sum(grad), in one pass.

    They are what batch norm's backward returns as the gradients of its
    scale and shift when the reciprocal standard deviation is 1.
    """
    _, product, total = aten.native_batch_norm_backward(
        grad,
        rows,
        None,
        None,
        None,
        mean,
        torch.ones_like(mean),
        True,
        0.0,
        [False, True, True],
    )
    return product, total


def _affine(
    rows: Tensor, mean: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    """Per row, (rows - mean) * scale + shift, in one pass."""
    return torch.batch_norm(
        rows,
        scale.flatten(),
        shift.flatten(),
        mean.flatten(),
        torch.ones_like(mean).flatten(),
        False,
        0.0,
        0.0,
        False,
    )


class BatchChannelNorm(torch.autograd.Function):
    """``batch_channel_norm`` from given moments of every (sample, channel).

    Formula, with i = n * C + c running over samples and channels, m_i and
    v_i the moments of input_i, G(i) the group of i, L the values of a
    channel and S those of a group:
        a_c = bn_weight_c / sqrt(var_c + eps)
        u_i = a_c (m_i - mean_c) + bn_bias_c             mean of y_i
        U_G = mean over G of u_i
        r_G = 1 / sqrt(mean over G of (a_c^2 v_i + (u_i - U_G)^2) + eps)
        output_i = r a weight (input_i - m_i) + r weight (u_i - U) + bias
    Backward, with s_i = sum(g_i) and t_i = sum(g_i (input_i - m_i)):
        A_G = sum over G of weight s_i
        B_G = sum over G of weight r (a t_i + (u_i - U) s_i)
        dy_i = r (weight g_i - A / S - r (a (input_i - m_i) + u_i - U) B / S)
        dinput_i = a dy_i                                mean, var constant
    and if mean and var are those of the batch, less the part of a dy_i along
    1 and along input - mean, whose sums follow from s, t, m and v.

    ``input`` is saved and ``x``, the same in float32 or float64, is read. All
    else is one number per sample and channel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        x: Tensor,
        moments: tuple[Tensor, Tensor],
        mean: Tensor,
        var: Tensor,
        num_groups: int,
        eps: float,
        of_batch: bool,
    ) -> Tensor:
        ctx.save_for_backward(
            input, bn_weight, bn_bias, weight, bias, *moments, mean, var
        )
        ctx.settings = num_groups, eps, of_batch
        m, _ = moments
        _, a, u, r = _levels(moments, mean, var, bn_weight, bn_bias, ctx)
        w = _per_channel(weight, m)
        b = _per_channel(bias, m)
        shift = r * u if w is None else r * u * w
        scale = r * a if w is None else r * a * w
        if b is not None:
            shift = shift + b
        output = _affine(as_rows(x), m, scale, shift)
        return _reshape(output, input.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, bn_weight, bn_bias, weight, bias, m, v, mean, var = (
            ctx.saved_tensors
        )
        num_groups, _, of_batch = ctx.settings
        if torch.is_grad_enabled():  # someone differentiates twice
            gradients = plain.gradients(
                lambda x, a, b, c, d: plain.batch_channel_norm(
                    x.to(mean.dtype),
                    *(a, b, c, d),
                    *(mean, var),
                    *ctx.settings,
                ),
                [input, bn_weight, bn_bias, weight, bias],
                ctx.needs_input_grad[:5],
                grad,
            )
            return *gradients, *[None] * 7
        rows = as_rows(input.to(mean.dtype))
        if input.is_contiguous():
            grad_rows = as_rows(grad.contiguous())
        else:
            grad_rows = grad.contiguous(memory_format=torch.channels_last)
        inverse, a, u, r = _levels((m, v), mean, var, bn_weight, bn_bias, ctx)
        w = _per_channel(weight, m)
        t, s = (x.view(m.shape) for x in _sums(grad_rows, rows, m.flatten()))
        size = input.shape[2:].numel()
        group = size * m.shape[1] // num_groups

        direction = r * (a * t + u * s)  # sum(g * normalized), per i
        sums = torch.stack([s, direction])
        if w is not None:
            sums = sums * w
        along_1, along_y = _over_groups(sums, num_groups, 'sum') / group
        # dy = p g + q (input - m) + z
        p = r if w is None else r * w
        q = -r * r * a * along_y
        z = -r * (along_1 + r * u * along_y)

        sum_dy = p * s + z * size
        offset = m - mean
        sum_dy_x = p * (t + offset * s) + (q * v + z * offset) * size
        dbn_bias = sum_dy.sum(0)
        dbn_weight = inverse * sum_dy_x.sum(0)
        if of_batch:
            count = m.shape[0] * size
            slope = inverse.square() * sum_dy_x.sum(0) / count
            q = q - slope
            z = z - dbn_bias / count - slope * offset
        dinput = None
        if ctx.needs_input_grad[0]:
            dinput = _affine(rows, m, a * q, a * z)
            like = [1, -1] + [1] * (rows.dim() - 2)
            dinput.addcmul_(grad_rows, (a * p).view(like))
            dinput = dinput.view(input.shape).to(input.dtype)
        return (
            dinput,
            None if bn_weight is None else dbn_weight,
            None if bn_bias is None else dbn_bias,
            _fold(direction.sum(0), weight),
            _fold(s.sum(0), bias),
            *[None] * 7,
        )


def _levels(
    moments: tuple[Tensor, Tensor],
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    ctx: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1 / sqrt(var + eps), a, u - U and r of the class docstring."""
    num_groups, eps, _ = ctx.settings
    m, v = moments
    inverse = torch.rsqrt(var + eps)
    a = inverse if bn_weight is None else inverse * bn_weight
    u = a * (m - mean)
    if bn_bias is not None:
        u = u + bn_bias
    u = u - _over_groups(u, num_groups, 'mean')
    r = a.square() * v + u.square()
    r = torch.rsqrt(_over_groups(r, num_groups, 'mean') + eps)
    return inverse, a, u, r


def _over_groups(values: Tensor, num_groups: int, how: str) -> Tensor:
    """Sum or mean of (..., C) over each group, back at every channel."""
    grouped = values.unflatten(-1, (num_groups, -1))
    reduced: Tensor = getattr(grouped, how)(-1, keepdim=True)
    return reduced.expand(grouped.shape).reshape(values.shape)


def _per_channel(affine: Tensor | None, m: Tensor) -> Tensor | None:
    if affine is None or affine.numel() == m.shape[1]:
        return affine
    return affine.repeat_interleave(m.shape[1] // affine.numel())


def _fold(gradient: Tensor, affine: Tensor | None) -> Tensor | None:
    """Gradient per channel to one per entry of the affine."""
    if affine is None:
        return None
    return gradient.view(affine.numel(), -1).sum(-1)
