"""WS and BCN on a CPU: closed-form gradients on ATen's vectorized kernels.

On a CPU a normalization costs passes over memory and, above all, new tensors
of the size of the activations. Both functions need one reduction and one
affine pass each way, and allocate only their result. The reductions are entry
points of ATen for other purposes; a comment says what each returns here.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..compat import has_half_batch_norm
from ..distributed import all_reduced
from . import plain

aten = torch.ops.aten

# Only keeps 0 * inf out of what is constant.
TINY = 1e-30
# Values of a row from which batch norm is the fastest affine of rows.
WIDE = 16


def standardize_weight(
    weight: Tensor, eps: float, inside: bool, dtype: torch.dtype
) -> Tensor:
    """See :func:`.plain.standardize_weight`."""
    standardized: Tensor = StandardizeWeight.apply(
        plain.at_least_float32(weight), eps, inside
    )
    return standardized.to(dtype)


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
    """See :func:`.plain.batch_channel_norm`."""
    if not is_supported(input) or plain.has_few_values(
        input.shape, num_groups, source
    ):
        return plain.batch_channel_norm(
            *(input, num_groups, running, affines),
            *(momentum, eps, source, update),
        )
    moments = instance_moments(input.detach())
    means, variances, _ = moments

    def of_input(around: Tensor | None) -> tuple[Tensor, Tensor]:
        return plain.of_channels(means, variances, around)

    total = None
    if source == 'ranks':
        count = input.numel() // input.shape[1]
        mean, var, total = plain.statistics_of_ranks(
            of_input(None), count, running, momentum, update
        )
    else:
        mean, var = plain.statistics(
            input, running, momentum, source == 'batch', update, of_input
        )
    output: Tensor = BatchChannelNorm.apply(
        input,
        *plain.widened(affines, means.dtype),
        moments,
        mean.to(means.dtype),
        var.to(means.dtype),
        total,
        num_groups,
        eps,
        source != 'running',
    )
    return output


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
        output, _, rstd = torch.native_layer_norm(
            rows, [fan_in], None, None, TINY
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
        output = plain.reshaped(output, shape)
        return _in_memory_order(output, weight, back=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        weight, output, denominator, ratio = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            eps, inside = ctx.settings
            (again,) = plain.gradients(
                lambda weight: plain.standardize_weight(
                    weight, eps, inside, weight.dtype
                ),
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
    """Permute to the order of the weight's memory, which saves a copy.

    The statistics do not depend on the order within a filter.
    """
    if weight.dim() != 4 or weight.is_contiguous():
        return values
    return values.permute(0, 3, 1, 2) if back else values.permute(0, 2, 3, 1)


def is_supported(input: Tensor) -> bool:
    """Return whether ATen takes the input in a view of rows."""
    if input.dtype == torch.half and not has_half_batch_norm():
        return False
    return input.is_contiguous() or (
        input.shape[0] == 1
        and input.is_contiguous(memory_format=torch.channels_last)
    )


def as_rows(input: Tensor) -> Tensor:
    """View (N, C, *) as one sample of N * C channels."""
    if not input.is_contiguous():
        return input  # one sample in channels_last is one already
    return input.view(1, input.shape[0] * input.shape[1], -1)


# Below this size the eager form is faster: the closed form takes some 50
# operations on one number per channel, a third of a millisecond. It makes half
# as many new tensors of the size of the input, whose pages cost time only
# where they are large.
MIN_NUMEL = 1 << 19


def is_faster(input: Tensor) -> bool:
    """Return whether BCN's closed form is faster than the eager one."""
    return input.numel() >= MIN_NUMEL


# Values of a row up to which two reductions beat one pass of batch norm, and
# of a piece of a row: sums of fewer values have more digits.
SHORT, PIECE = 127, 512
# Deviations between 0 and a mean up to which these sums have the digits.
FAR = 4


# Bytes of temporaries per thread, which stay in the cache. Smaller ones make
# more parallel regions, each of which waits for the last thread: a long wait
# where other processes use the cores.
CHUNK = 1 << 22


def _chunks(
    rows: Tensor, temporaries: int = 1
) -> tuple[int, list[tuple[int, int]]]:
    """A dimension, and (start, length) along it of parts that fit the cache.

    Parts are whole rows, or lines of pixels in channels_last.
    """
    dim = 1 if rows.is_contiguous() else 2
    length = rows.shape[dim]
    values = CHUNK // (4 * temporaries) * torch.get_num_threads()
    step = max(1, values * length // rows.numel())
    return dim, [
        (start, min(step, length - start)) for start in range(0, length, step)
    ]


def instance_moments(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of each (sample, channel), and memory for the output.

    Returns mean and biased variance, both (N, C), in float32 or float64, and
    a dense tensor like input.
    """
    shape = input.shape[:2]
    dtype = torch.promote_types(input.dtype, torch.float32)
    if not input.is_contiguous():
        return *_moments_channels_last(input, dtype), torch.empty_like(input)
    # Reductions of ATen would copy half precision.
    if input.dtype == dtype or input.shape[2:].numel() > SHORT:
        mean, var = _moments_by_sums(as_rows(input), dtype)
        return mean.view(shape), var.view(shape), torch.empty_like(input)
    return _moments_of_rows(input, dtype)


def _moments_of_rows(
    input: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of each row, and a dense tensor like input."""
    shape = input.shape[:2]
    # Groups of one channel; scales in the dtype that the moments shall have.
    one = input.new_ones(shape[1], dtype=dtype)
    output, mean, rstd = aten.native_group_norm(
        input, one, one, *shape, input.shape[2:].numel(), shape[1], TINY
    )
    return mean, rstd.pow(-2), output


def _moments_by_sums(
    rows: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Mean and variance of each row, from its sum and that of its squares.

    This writes nothing like the rows. The squares lose digits where the mean
    is large: those variances are computed again.
    """
    count, size = rows.shape[1:]
    if size <= SHORT:
        square = torch.linalg.vector_norm(rows[0], dim=1).square_()
        sums = square, rows[0].sum(1)
    else:
        most = max(size // PIECE, 1)
        pieces = next(n for n in range(most, 0, -1) if size % n == 0)
        parts = rows.view(1, count * pieces, -1)
        zeros = rows.new_zeros(count * pieces, dtype=dtype)
        sums = row_sums(parts, parts, zeros)
    square, mean = (total.view(count, -1).sum(1).div_(size) for total in sums)
    var = square.addcmul_(mean, mean, value=-1)
    is_exact = mean.square() <= FAR**2 * var  # NaN is not
    if not is_exact.all():
        again = ~is_exact
        var[again] = _moments_of_rows(rows[:, again], dtype)[1].flatten()
    return mean, var


def _moments_channels_last(
    input: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of one sample, line by line.

    Group norm's kernel for this layout subtracts squares.
    """
    dim, chunks = _chunks(input)
    parts = [input.narrow(dim, *chunk) for chunk in chunks]
    size = input.shape[2:].numel()
    mean = input.new_zeros(1, input.shape[1], 1, 1, dtype=dtype)
    square = torch.zeros_like(mean)
    for part in parts:
        mean += part.to(dtype).sum((2, 3), keepdim=True)
    mean.div_(size)
    for part in parts:
        deviation = part.to(dtype) - mean
        square += deviation.square_().sum((2, 3), keepdim=True)
    return mean.view(1, -1), square.div_(size).view(1, -1)


def row_sums(
    grad: Tensor, rows: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Per row, sum(grad * (rows - mean)) and sum(grad), in one pass.

    Batch norm's backward returns them as the gradients of its scale and
    shift when the reciprocal standard deviation is 1.
    """
    # The kernel does not look at strides, such as those of an expand.
    mean = mean.contiguous()
    one = torch.ones_like(mean)
    _, product, total = aten.native_batch_norm_backward(
        grad,
        rows,
        one,  # its dtype is that of the sums
        None,
        None,
        mean,
        one,
        True,
        0.0,
        [False, True, True],
    )
    return product, total


def affine(
    rows: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    output: Tensor | None = None,
) -> Tensor:
    """Per row, (rows - mean) * scale + shift, in one pass.

    Computed in the dtype of scale, returned in that of rows; in output, if
    there is one. New memory costs more than the pass.
    """
    if output is None:
        output = torch.empty_like(rows)
    scale, shift = scale.flatten(), shift.flatten()
    # Batch norm takes half of the time, except in short rows and in
    # channels_last. Of two dtypes, it alone takes parameters in float32.
    is_wide = rows.is_contiguous() and rows.shape[2:].numel() >= WIDE
    if rows.dtype == scale.dtype and not is_wide:
        level = torch.addcmul(shift, mean, scale, value=-1)
        return torch.addcmul(
            _per_row(level, rows), rows, _per_row(scale, rows), out=output
        )
    none = scale.new_empty(0)
    aten.native_batch_norm.out(
        rows,
        scale,
        shift,
        mean,
        torch.ones_like(mean),
        False,
        0.0,
        0.0,
        out=output,
        save_mean=none,
        save_invstd=none,
    )
    return output


def _per_row(values: Tensor, rows: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (rows.dim() - 2))


def _affine_of_both(
    rows: Tensor,
    grad: Tensor,
    mean: Tensor,
    along_rows: Tensor,
    along_grad: Tensor,
    shift: Tensor,
) -> Tensor:
    """Per row, (rows - mean) * along_rows + grad * along_grad + shift.

    Half precision is rounded once, from chunks in float32.
    """
    factor = _per_row(along_grad, rows)
    if rows.dtype == mean.dtype:
        output = affine(rows, mean, along_rows, shift)
        return output.addcmul_(grad, factor)
    output = torch.empty_like(rows)
    dim, chunks = _chunks(rows, temporaries=2)
    for chunk in chunks:
        part = rows.narrow(dim, *chunk).to(mean.dtype)
        own = [mean, along_rows.flatten(), shift.flatten(), factor]
        if dim == 1:
            own = [x.narrow(int(x.dim() > 1), *chunk) for x in own]
        result = affine(part, *own[:3])
        result.addcmul_(grad.narrow(dim, *chunk).to(mean.dtype), own[3])
        output.narrow(dim, *chunk).copy_(result)
    return output


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
        e_i = a t_i + (u_i - U) s_i
        A_G = sum over G of r weight s_i
        B_G = r^2 sum over G of r weight e_i
        dy_i = r weight g_i - (A + B (a (input_i - m_i) + u_i - U)) / S
        dinput_i = a dy_i                                mean, var constant
    and if mean and var are those of the batch, less the part of a dy_i along
    1 and along input - mean, whose sums follow from s, t, m and v. If they
    are those of all ranks, total says of how many values, and these sums are
    added over the ranks: see :class:`.plain.SynchronizedBatchNorm`.

    Saves input and otherwise one number per sample and channel. Those have
    the shape (N, groups, channels of a group); numbers per group or per
    channel broadcast. On small maps these operations are the main cost.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        moments: tuple[Tensor, Tensor, Tensor],
        mean: Tensor,
        var: Tensor,
        total: Tensor | None,
        num_groups: int,
        eps: float,
        of_batch: bool,
    ) -> Tensor:
        m, v, output = moments
        shape = num_groups, -1
        inverse = torch.rsqrt(var + eps)
        a = inverse if bn_weight is None else inverse * bn_weight
        offset = m - mean
        u = (
            a * offset
            if bn_bias is None
            else torch.addcmul(bn_bias, a, offset)
        )
        u, v = u.view(len(m), *shape), v.view(len(m), *shape)
        a = a.view(shape)
        # As alpha or value, a factor is no operation of its own.
        u.sub_(u.sum(2, keepdim=True), alpha=1 / u.shape[2])
        spread = torch.addcmul(a.square() * v, u, u)
        r = spread.mean(2, keepdim=True).add_(eps).rsqrt_()
        p = r if weight is None else r * weight.view(shape)
        if bias is None:
            shift = p * u
        else:
            shift = torch.addcmul(bias.view(shape), p, u)
        slope = p * a
        rows = as_rows(input)
        affine(rows, m.flatten(), slope, shift, output.view(rows.shape))
        ctx.save_for_backward(
            *(input, bn_weight, bn_bias, weight, bias),
            *(total, m, v, mean, var, offset.view(u.shape)),
            *(inverse.view(shape), a, u, r, p, slope),
        )
        ctx.settings = num_groups, eps, of_batch
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, bn_weight, bn_bias, weight, bias, *saved = ctx.saved_tensors
        total, m, v, mean, var, offset, inverse, *others = saved
        a, u, r, p, slope = others
        num_groups, eps, of_batch = ctx.settings
        if torch.is_grad_enabled():  # for second derivatives

            def again(
                x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor
            ) -> Tensor:
                x = x.to(mean.dtype)
                if total is None:
                    return plain.normalize(
                        x, a, b, c, d, mean, var, *ctx.settings
                    )
                return plain.normalize_by_ranks(
                    x, a, b, c, d, mean, var, total, num_groups, eps
                )

            gradients = plain.gradients(
                again,
                [input, bn_weight, bn_bias, weight, bias],
                ctx.needs_input_grad[:5],
                grad,
            )
            return *gradients, *[None] * 7
        rows = as_rows(input)
        if input.is_contiguous():
            grad_rows = as_rows(grad.contiguous())
        else:
            grad_rows = grad.contiguous(memory_format=torch.channels_last)
        t, s = (
            x.view(u.shape) for x in row_sums(grad_rows, rows, m.flatten())
        )
        size = input.shape[2:].numel()

        # dy = p g - (q (input - m) + z) / (size * members)
        members = u.shape[2]
        e = torch.addcmul(a * t, u, s)
        ps = p * s
        b = (p * e).sum(2, keepdim=True) * r.square()
        q = a * b
        z = torch.addcmul(ps.sum(2, keepdim=True), u, b)

        sum_dy = torch.sub(ps, z, alpha=1 / members)
        sum_dy_x = torch.addcmul(p * t, q, v, value=-1 / members)
        sum_dy_x = sum_dy_x.addcmul_(offset, sum_dy)
        sum_dy_x, sum_dy = _total(sum_dy_x), _total(sum_dy)
        dinput = None
        if ctx.needs_input_grad[0]:
            if of_batch:
                count = len(m) * size
                sums: Any = inverse * sum_dy_x, sum_dy
                if total is not None:
                    # As many numbers in a row as on any other rank.
                    joined = all_reduced(torch.stack(sums).flatten())
                    sums, count = joined.view(2, *sum_dy.shape), total
                share = size * members / count
                along = inverse * sums[0] * share
                q = q + along
                z = torch.addcmul(z + sums[1] * share, along, offset)
            scale = a * (-1 / (size * members))
            dinput = _affine_of_both(
                rows, grad_rows, m.flatten(), scale * q, slope, scale * z
            ).view(input.shape)
        return (
            dinput,
            None if bn_weight is None else (inverse * sum_dy_x).flatten(),
            None if bn_bias is None else sum_dy.flatten(),
            None if weight is None else _fold(r * e, weight),
            None if bias is None else _fold(s, bias),
            *[None] * 7,
        )


def _total(values: Tensor) -> Tensor:
    """The sum over samples."""
    return values[0] if len(values) == 1 else values.sum(0)


def _fold(gradient: Tensor, affine: Tensor) -> Tensor:
    """Sum a gradient per channel to one per entry of the affine."""
    gradient = _total(gradient).view(affine.numel(), -1)
    return gradient.sum(-1) if gradient.shape[1] > 1 else gradient[:, 0]
