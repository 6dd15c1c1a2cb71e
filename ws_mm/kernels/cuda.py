"""WS and BCN on a CUDA device: closed-form gradients in Triton kernels.

The interpreter of Triton (``TRITON_INTERPRET=1``) runs the same kernels on
CPU tensors; that is how the tests run them where there is no GPU.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import attempt, plain
from . import triton_kernels as kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Values of one tile. On 4 warps they are 32 to a thread, all in flight at
# once, and 8 such programs fit into the registers of a multiprocessor: more
# bytes under way than its share of the memory's bandwidth and latency asks.
TILE = 4096
# Wider filters than this are read block by block, not held in registers.
WIDEST = 8192
# Programs that keep a GPU of 132 multiprocessors busy. Filters share one only
# beyond the first number, and a reduction has no more than the second.
FEW, MANY = 256, 4096
# Numbers of rows and columns are 32 bits wide in the kernels.
LONGEST = 2**30

# bn_weight, bn_bias, weight, bias
Affines = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def standardize_weight(
    weight: Tensor, eps: float, inside: bool, dtype: torch.dtype
) -> Tensor | None:
    """Standardize filters of any dtype in DTYPES into dtype.

    None if the kernel cannot run.
    """
    if weight.dtype not in DTYPES or weight.numel() >= LONGEST:
        return None
    weight = _dense(weight)
    return attempt(StandardizeWeight.apply, weight, eps, inside, dtype)


class StandardizeWeight(torch.autograd.Function):
    """``standardize_weight`` of dense filters.

    Formula, per filter of K entries with D = std + eps or sqrt(var + eps):
        output = (weight - mean) / D
        dweight = (g - mean(g) - output sum(g output) D' / (K - 1)) / D
    with D' = D / std for eps outside the root, 1 inside it.

    Saves the weight, a parameter that lives anyway: an output in the dtype
    of autocast has too few digits for the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, eps: float, inside: bool, dtype: torch.dtype
    ) -> Tensor:
        rows, fan_in = weight.shape[0], weight.shape[1:].numel()
        output = torch.empty_like(weight, dtype=dtype)
        moments = weight.new_empty((3, rows), dtype=torch.float32)
        programs, meta = _filters(rows, fan_in)
        with _on(weight):
            kernels.standardize[(programs,)](
                weight,
                output,
                *moments,
                rows,
                fan_in,
                eps,
                INSIDE=inside,
                **meta,
            )
        ctx.save_for_backward(weight, moments)
        ctx.settings = eps, inside
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient = None
        if not torch.is_grad_enabled():  # else someone differentiates twice
            gradient = attempt(_standardize_backward, ctx, grad)
        if gradient is None:
            weight, _ = ctx.saved_tensors
            eps, inside = ctx.settings

            def again(weight: Tensor) -> Tensor:
                return plain.standardize_weight(
                    weight.float(), eps, 'inside' if inside else 'outside'
                )

            (gradient,) = plain.gradients(again, [weight], [True], grad)
        return gradient, None, None, None


def _standardize_backward(ctx: Any, grad: Tensor) -> Tensor:
    weight, moments = ctx.saved_tensors
    eps, inside = ctx.settings
    rows, fan_in = weight.shape[0], weight.shape[1:].numel()
    gradient = torch.empty_like(weight)
    programs, meta = _filters(rows, fan_in)
    with _on(weight):
        kernels.standardize_backward[(programs,)](
            grad.contiguous(memory_format=_memory_format(weight)),
            weight,
            *moments,
            gradient,
            rows,
            fan_in,
            eps,
            INSIDE=inside,
            **meta,
        )
    return gradient


def _filters(rows: int, fan_in: int) -> tuple[int, dict[str, Any]]:
    """Programs and tiles for filters; 16 or 32 values to a thread."""
    block = min(_power_of_2(fan_in), WIDEST)
    together = 1
    if block < TILE:
        together = min(_power_of_2(rows // FEW), TILE // block)
    return -(-rows // together), {
        'ROWS': together,
        'BLOCK': block,
        'WHOLE': fan_in <= block,
        'num_warps': min(max(together * block // 512, 1), 8),
    }


def _power_of_2(number: int) -> int:
    """The smallest one that is not below number."""
    return 1 << max(number - 1, 0).bit_length()


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments."""
    if tensor.device.type == 'cuda':
        return torch.cuda.device(tensor.device)
    return nullcontext()


def _memory_format(x: Tensor) -> torch.memory_format:
    """The format in which x is dense, or shall be: outermost N, or filters."""
    formats = [torch.contiguous_format]
    if x.dim() == 4:
        formats.append(torch.channels_last)
    elif x.dim() == 5:
        formats.append(torch.channels_last_3d)
    for memory_format in formats:
        if x.is_contiguous(memory_format=memory_format):
            return memory_format
    return torch.contiguous_format


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_memory_format(x))


class Tiling(NamedTuple):
    """How a kernel goes over (N, C, *): see triton_kernels."""

    programs: int
    splits: int
    sizes: tuple[int, ...]
    meta: dict[str, Any]


def _tiling(x: Tensor, reduces: bool = False) -> Tiling:
    """Tiles of TILE values; a reduction may give several to a program.

    Rows have L columns. Where they lie next to each other, tiles are as wide
    as L allows; in channels_last they are 64 channels wide, so that every
    access takes whole lines of the memory.
    """
    channels = x.shape[1]
    rows, length = x.shape[0] * channels, x.shape[2:].numel()
    last = not x.is_contiguous()
    if last:
        together = min(_power_of_2(channels), 64, TILE)
        block = min(_power_of_2(length), TILE // together)
    else:
        block = min(_power_of_2(length), TILE)
        together = min(_power_of_2(rows), TILE // block)
    row_tiles = -(-rows // together)
    blocks = -(-length // block)
    each = min(blocks, -(-row_tiles * blocks // MANY)) if reduces else 1
    splits = -(-blocks // each)
    return Tiling(
        row_tiles * splits,
        splits,
        (rows, length, channels, splits, each * block),
        {'CHANNELS_LAST': last, 'ROWS': together, 'BLOCK': block},
    )


def _groups(samples: int, channels: int, num_groups: int) -> dict[str, int]:
    width = _power_of_2(channels // num_groups)
    return {
        'SAMPLES': min(_power_of_2(samples), max(TILE // 2 // width, 1)),
        'CHANNELS': width,
    }


def takes(
    input: Tensor,
    num_groups: int,
    running: tuple[Tensor, Tensor],
    affines: Affines,
) -> bool:
    """Whether the kernels are made for these; they check no sizes."""
    channels = input.shape[1]
    inner, outer = affines[:2], affines[2:]
    sizes = {x.numel() for x in outer if x is not None}
    return (
        input.dtype in DTYPES
        and channels % num_groups == 0
        and input.shape[0] * channels < LONGEST
        and input.shape[2:].numel() < LONGEST
        and all(x.dtype == torch.float32 for x in running)
        and all(x.is_contiguous() for x in running)
        and all(x is None or x.numel() == channels for x in (*running, *inner))
        and (not sizes or sizes in ({channels}, {num_groups}))
        and all(
            x is None or x.device == input.device for x in (*running, *affines)
        )
    )


def batch_channel_norm(
    input: Tensor,
    num_groups: int,
    running: tuple[Tensor, Tensor],
    affines: Affines,
    momentum: float,
    eps: float,
    of_batch: bool,
    update: bool,
) -> Tensor | None:
    """See :func:`~ws_mm.functional.batch_channel_norm`.

    None if the kernels cannot run; nothing has been updated then.

    Args:
        input: the activations.
        num_groups: of the second step.
        running: means and variances, updated in place.
        affines: bn_weight, bn_bias, weight and bias.
        momentum: update rate.
        eps: of both steps.
        of_batch: normalize with the statistics of this batch.
        update: move the running values; without of_batch, before they are
            used.
    """
    if not takes(input, num_groups, running, affines):
        return None
    input = _dense(input)
    a, b, c, d = (
        None if x is None else x.float().contiguous() for x in affines
    )
    affines = a, b, c, d
    settings = num_groups, eps, of_batch
    statistics = attempt(
        _statistics, input, affines, running, settings, momentum, update
    )
    if statistics is None:
        return None
    output = attempt(
        BatchChannelNorm.apply, input, *affines, statistics, settings
    )
    if output is None:  # but the running values have moved
        mean, var = statistics[1]
        output = plain.batch_channel_norm(
            input.float(), *affines, mean, var, *settings
        ).to(input.dtype)
    return output


def _statistics(
    input: Tensor,
    affines: Affines,
    running: tuple[Tensor, Tensor],
    settings: tuple[int, float, bool],
    momentum: float,
    update: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of rows, mean and var used, and scales and shifts of rows."""
    num_groups, eps, of_batch = settings
    samples, channels = input.shape[:2]
    count = samples * input.shape[2:].numel()
    tiling = _tiling(input, reduces=True)
    rows, length, _, splits, span = tiling.sizes
    moments, coefficients = input.new_empty(
        (2, 2, samples, channels), dtype=torch.float32
    ).unbind()
    used = input.new_empty((2, channels), dtype=torch.float32)
    parts = moments
    if splits > 1:
        parts = input.new_empty((2, splits, rows), dtype=torch.float32)
    weight, bias = affines[2:]
    outer = bias if weight is None else weight
    with _on(input):
        kernels.moments[(tiling.programs,)](
            input, *parts, *tiling.sizes, **tiling.meta
        )
        if splits > 1:
            block = min(_power_of_2(splits), TILE // 4)
            together = min(_power_of_2(rows), TILE // block)
            kernels.join_moments[(-(-rows // together),)](
                *parts,
                *moments,
                rows,
                length,
                splits,
                span,
                ROWS=together,
                BLOCK=block,
            )
        kernels.coefficients[(num_groups,)](
            *moments,
            *running,
            *affines,
            *used,
            *coefficients,
            samples,
            channels,
            channels // num_groups,
            count / max(count - 1, 1),
            momentum,
            eps,
            OF_BATCH=of_batch,
            UPDATE=update,
            PER_CHANNEL=outer is not None and outer.numel() == channels,
            **_groups(samples, channels, num_groups),
        )
    if update:
        for values in running:
            torch.autograd.graph.increment_version(values)
    return moments, used, coefficients


class BatchChannelNorm(torch.autograd.Function):
    """``batch_channel_norm`` from given statistics.

    Formulas and names are those of :class:`.cpu.BatchChannelNorm`. Saves
    input; all else is one number per sample and channel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: tuple[Tensor, Tensor, Tensor],
        settings: tuple[int, float, bool],
    ) -> Tensor:
        moments, used, coefficients = statistics
        output = torch.empty_like(input)
        tiling = _tiling(input)
        with _on(input):
            kernels.affine[(tiling.programs,)](
                input,
                moments[0],
                *coefficients,
                output,
                *tiling.sizes,
                **tiling.meta,
            )
        ctx.save_for_backward(
            input, bn_weight, bn_bias, weight, bias, moments, used
        )
        ctx.settings = settings
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = None
        if not torch.is_grad_enabled():  # else someone differentiates twice
            gradients = attempt(_batch_channel_norm_backward, ctx, grad)
        if gradients is None:
            input, *affines, _, used = ctx.saved_tensors
            gradients = plain.gradients(
                lambda x, a, b, c, d: plain.batch_channel_norm(
                    x.float(), a, b, c, d, *used, *ctx.settings
                ),
                [input, *affines],
                ctx.needs_input_grad[:5],
                grad,
            )
        return *gradients, None, None


def _batch_channel_norm_backward(
    ctx: Any, grad: Tensor
) -> list[Tensor | None]:
    input, bn_weight, bn_bias, weight, bias, moments, used = ctx.saved_tensors
    num_groups, eps, of_batch = ctx.settings
    grad = grad.contiguous(memory_format=_memory_format(input))
    samples, channels = input.shape[:2]
    tiling = _tiling(input, reduces=True)
    parts = moments.new_empty((2, tiling.splits, samples, channels))
    coefficients = moments.new_empty((3, samples, channels))
    outer = bias if weight is None else weight
    per_channel = outer is not None and outer.numel() == channels
    inner_gradients = moments.new_empty((2, channels))
    outer_gradients = moments.new_empty(
        (2, channels if per_channel else num_groups)
    )
    with _on(input):
        kernels.sums[(tiling.programs,)](
            grad, input, moments[0], *parts, *tiling.sizes, **tiling.meta
        )
        kernels.slopes[(num_groups,)](
            *(parts[:, 0] if tiling.splits == 1 else parts.sum(1)),
            *moments,
            *used,
            bn_weight,
            bn_bias,
            weight,
            *coefficients,
            *inner_gradients,
            *outer_gradients,
            samples,
            channels,
            channels // num_groups,
            float(input.shape[2:].numel()),
            eps,
            OF_BATCH=of_batch,
            PER_CHANNEL=per_channel,
            **_groups(samples, channels, num_groups),
        )
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = torch.empty_like(input)
            tiling = _tiling(input)
            kernels.affine_backward[(tiling.programs,)](
                grad,
                input,
                moments[0],
                *coefficients,
                gradient,
                *tiling.sizes,
                **tiling.meta,
            )
    affines = (bn_weight, bn_bias, weight, bias)
    found = (*inner_gradients, *outer_gradients)
    return [
        gradient,
        *(
            None if affine is None else value
            for affine, value in zip(affines, found, strict=True)
        ),
    ]
