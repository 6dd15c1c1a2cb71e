"""The Triton kernels of WS and BCN; :mod:`.cuda` launches them.

All of them work on tiles of ROWS rows by BLOCK columns, both powers of two,
masked at the edges. A row is a filter (WS) or a channel of a sample (BCN).
Arithmetic is float32 whatever the type in memory. No two programs write to
the same place, so equal inputs give equal bits. Offsets into activations are
64 bits wide; row and column numbers are 32, which :mod:`.cuda` checks.

What BCN keeps between launches lies in two float32 buffers, given by their
base pointers. With one number per row, or per channel (C), they hold
    kept: means, variances, scales, shifts, used_mean (C), used_var (C)
    scratch: sums of grad, of grad * (input - mean), along, constants
and after that, from parts_at on, the moments and sums of each split, if there
are several. Else parts_at is 0.
"""

import triton
import triton.language as tl

# Sizes that change with the image. A kernel compiled for the kind of number
# that one of them is would be compiled again for nearly every image.
SIZES = ['rows', 'units', 'length', 'splits', 'blocks', 'span', 'parts_at']
GROUP_SIZES = [*SIZES, 'samples', 'channels', 'group_size', 'num_groups']


@triton.jit
def standardize(
    weight,
    output,
    kept,
    rows,
    fan_in,
    eps,
    INSIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Standardize filters; keep their means, rests and deviations.

    With WHOLE a filter fits into a block and is read once. The mean is the
    sum of two numbers, means and what that leaves, rests: filters with a mean
    of many standard deviations keep all their digits.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    start = row.to(tl.int64)[:, None] * fan_in
    if WHOLE:
        column = tl.arange(0, BLOCK)[None, :]
        mask = row_mask[:, None] & (column < fan_in)
        values = tl.load(weight + start + column, mask=mask, other=0.0)
        values = values.to(tl.float32)
        mean = tl.sum(values, 1) / fan_in
        values = tl.where(mask, values - mean[:, None], 0.0)
        rest = tl.sum(values, 1) / fan_in
        values = tl.where(mask, values - rest[:, None], 0.0)
        variance = tl.sum(values * values, 1) / (fan_in - 1)
    else:
        mean = tl.full((ROWS,), 0.0, tl.float32)
        for first in range(0, fan_in, BLOCK):
            column = first + tl.arange(0, BLOCK)[None, :]
            mask = row_mask[:, None] & (column < fan_in)
            values = tl.load(weight + start + column, mask=mask, other=0.0)
            mean += tl.sum(values.to(tl.float32), 1)
        mean /= fan_in
        rest = tl.full((ROWS,), 0.0, tl.float32)
        squares = tl.full((ROWS,), 0.0, tl.float32)
        for first in range(0, fan_in, BLOCK):
            column = first + tl.arange(0, BLOCK)[None, :]
            mask = row_mask[:, None] & (column < fan_in)
            values = tl.load(weight + start + column, mask=mask, other=0.0)
            values = tl.where(mask, values.to(tl.float32) - mean[:, None], 0.0)
            rest += tl.sum(values, 1)
            squares += tl.sum(values * values, 1)
        rest /= fan_in
        # The rest, a rounding error of the mean, has no digit in its square.
        variance = squares / (fan_in - 1)
    std = tl.sqrt(variance)
    tl.store(kept + row, mean, mask=row_mask)
    tl.store(kept + rows + row, rest, mask=row_mask)
    tl.store(kept + 2 * rows + row, std, mask=row_mask)
    if INSIDE:
        factor = 1.0 / tl.sqrt(variance + eps)
    else:
        factor = 1.0 / (std + eps)
    if WHOLE:
        values *= factor[:, None]
        values = values.to(output.dtype.element_ty)
        tl.store(output + start + column, values, mask=mask)
    else:
        for first in range(0, fan_in, BLOCK):
            column = first + tl.arange(0, BLOCK)[None, :]
            mask = row_mask[:, None] & (column < fan_in)
            values = tl.load(weight + start + column, mask=mask, other=0.0)
            values = values.to(tl.float32) - mean[:, None] - rest[:, None]
            values *= factor[:, None]
            values = values.to(output.dtype.element_ty)
            tl.store(output + start + column, values, mask=mask)


@triton.jit
def standardize_backward(
    grad,
    weight,
    kept,
    output,
    rows,
    fan_in,
    eps,
    INSIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Gradient of standardize from the raw filters and their moments.

    Formula, with d = weight - mean, h = grad - mean(grad):
        output = h / D - d sum(h d) D' / (D^3 (fan_in - 1))
    with D and D' as in :class:`.cuda.StandardizeWeight`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    start = row.to(tl.int64)[:, None] * fan_in
    mean = tl.load(kept + row, mask=row_mask, other=0.0)[:, None]
    rest = tl.load(kept + rows + row, mask=row_mask, other=0.0)[:, None]
    std = tl.load(kept + 2 * rows + row, mask=row_mask, other=1.0)
    if WHOLE:
        column = tl.arange(0, BLOCK)[None, :]
        mask = row_mask[:, None] & (column < fan_in)
        g = tl.load(grad + start + column, mask=mask, other=0.0)
        g = g.to(tl.float32)
        grad_mean = (tl.sum(g, 1) / fan_in)[:, None]
        g = tl.where(mask, g - grad_mean, 0.0)
        d = tl.load(weight + start + column, mask=mask, other=0.0)
        d = tl.where(mask, d.to(tl.float32) - mean - rest, 0.0)
        product = tl.sum(g * d, 1)
    else:
        total = tl.full((ROWS,), 0.0, tl.float32)
        for first in range(0, fan_in, BLOCK):
            column = first + tl.arange(0, BLOCK)[None, :]
            mask = row_mask[:, None] & (column < fan_in)
            g = tl.load(grad + start + column, mask=mask, other=0.0)
            total += tl.sum(g.to(tl.float32), 1)
        grad_mean = (total / fan_in)[:, None]
        product = tl.full((ROWS,), 0.0, tl.float32)
        for first in range(0, fan_in, BLOCK):
            column = first + tl.arange(0, BLOCK)[None, :]
            mask = row_mask[:, None] & (column < fan_in)
            g = tl.load(grad + start + column, mask=mask, other=0.0)
            g = tl.where(mask, g.to(tl.float32) - grad_mean, 0.0)
            d = tl.load(weight + start + column, mask=mask, other=0.0)
            d = tl.where(mask, d.to(tl.float32) - mean - rest, 0.0)
            product += tl.sum(g * d, 1)
    # In a constant filter sum(h d) is zero, and its factor must be finite.
    safe = tl.where(std > 0.0, std, 1.0)
    if INSIDE:
        factor = 1.0 / tl.sqrt(std * std + eps)
        slope = product * factor * factor / (fan_in - 1)
    else:
        factor = 1.0 / (std + eps)
        slope = product * factor / (safe * (fan_in - 1))
    slope = slope[:, None]
    factor = factor[:, None]
    if WHOLE:
        result = ((g - d * slope) * factor).to(output.dtype.element_ty)
        tl.store(output + start + column, result, mask=mask)
    else:
        for first in range(0, fan_in, BLOCK):
            column = first + tl.arange(0, BLOCK)[None, :]
            mask = row_mask[:, None] & (column < fan_in)
            g = tl.load(grad + start + column, mask=mask, other=0.0)
            d = tl.load(weight + start + column, mask=mask, other=0.0)
            g = g.to(tl.float32) - grad_mean
            d = d.to(tl.float32) - mean - rest
            result = ((g - d * slope) * factor).to(output.dtype.element_ty)
            tl.store(output + start + column, result, mask=mask)


@triton.jit
def _tile(
    rows,
    length,
    channels,
    splits,
    span,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Split, rows, their mask and the first column of this program.

    And where its first block lies: one offset for all, and one for each
    value. Programs that run side by side read side by side. In channels_last
    the rows of a program are channels of one sample.
    """
    program = tl.program_id(0)
    inside = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    if CHANNELS_LAST:
        across = tl.cdiv(channels, ROWS)
        tiles = rows // channels * across
        split = program // tiles
        sample = program % tiles // across
        channel = program % tiles % across * ROWS
        first = split * span
        row = sample * channels + channel + inside
        row_mask = channel + inside < channels
        base = (sample.to(tl.int64) * length + first) * channels + channel
        offset = inside[:, None] + column * channels
    else:
        split = program % splits
        top = program // splits * ROWS
        first = split * span
        row = top + inside
        row_mask = row < rows
        base = top.to(tl.int64) * length + first
        offset = inside[:, None] * length + column
    return split, row, row_mask, first, base, offset


@triton.jit(do_not_specialize=SIZES)
def moments(
    input,
    kept,
    rows,
    units,
    channels,
    splits,
    blocks,
    parts_at,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and biased variance of each row over one split of its columns.

    Sums are taken around the mean of the split's first block. The share of
    that block in the split bounds what cancels: no more than the number of
    blocks times a rounding error.
    """
    length = units * UNIT
    span = blocks * BLOCK
    split, row, row_mask, first, base, offset = _tile(
        rows, length, channels, splits, span, CHANNELS_LAST, ROWS, BLOCK
    )
    step = BLOCK * channels if CHANNELS_LAST else BLOCK
    size = tl.minimum(length - first, span)
    column = tl.arange(0, BLOCK)[None, :]
    mask = row_mask[:, None] & (column < size)
    values = tl.load(input + base + offset, mask=mask, other=0.0)
    values = values.to(tl.float32)
    pivot = tl.sum(values, 1) / tl.minimum(size, BLOCK)
    deviation = tl.where(mask, values - pivot[:, None], 0.0)
    sums_1 = deviation
    sums_2 = deviation * deviation
    for done in range(BLOCK, size, BLOCK):
        base += step
        mask = row_mask[:, None] & (column < size - done)
        values = tl.load(input + base + offset, mask=mask, other=0.0)
        values = values.to(tl.float32)
        deviation = tl.where(mask, values - pivot[:, None], 0.0)
        sums_1 += deviation
        sums_2 += deviation * deviation
    off = tl.sum(sums_1, 1) / size
    variance = tl.sum(sums_2, 1) / size - off * off
    # Unlike maximum(), this keeps the NaN of values that are not finite.
    variance = tl.where(variance < 0.0, 0.0, variance)
    place = kept + parts_at + split * rows + row
    tl.store(place, pivot + off, mask=row_mask)
    tl.store(place + splits * rows, variance, mask=row_mask)


@triton.jit
def _affines(
    bn_weight,
    bn_bias,
    weight,
    bias,
    channel,
    group,
    mask,
    PER_CHANNEL: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Both affines at these channels, 1 and 0 where there are none."""
    bn_scale = tl.full((1, CHANNELS), 1.0, tl.float32)
    bn_shift = tl.full((1, CHANNELS), 0.0, tl.float32)
    scale = tl.full((1, CHANNELS), 1.0, tl.float32)
    shift = tl.full((1, CHANNELS), 0.0, tl.float32)
    entry = channel if PER_CHANNEL else channel * 0 + group
    if bn_weight is not None:
        bn_scale = tl.load(bn_weight + channel, mask=mask, other=0.0)
    if bn_bias is not None:
        bn_shift = tl.load(bn_bias + channel, mask=mask, other=0.0)
    if weight is not None:
        scale = tl.load(weight + entry, mask=mask, other=0.0)
    if bias is not None:
        shift = tl.load(bias + entry, mask=mask, other=0.0)
    return bn_scale, bn_shift, scale, shift


@triton.jit
def _levels(m, v, mean, a, bn_shift, mask, group_size, eps):
    """Of :class:`.cpu.BatchChannelNorm`: u - U and r of some samples."""
    u = tl.where(mask, a * (m - mean) + bn_shift, 0.0)
    u = u - (tl.sum(u, 1) / group_size)[:, None]
    spread = tl.where(mask, a * a * v + u * u, 0.0)
    r = 1.0 / tl.sqrt(tl.sum(spread, 1) / group_size + eps)
    return u, r[:, None]


@triton.jit(do_not_specialize=GROUP_SIZES)
def coefficients(
    kept,
    running_mean,
    running_var,
    bn_weight,
    bn_bias,
    weight,
    bias,
    momentum,
    samples,
    channels,
    group_size,
    length,
    splits,
    span,
    parts_at,
    unbias,
    eps,
    OF_BATCH: tl.constexpr,
    UPDATE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Statistics of one group, and the affine that normalizes its rows.

    The output is (input - mean) * scale + shift, row by row. Every program
    has a group to itself and goes through all samples, twice. Moments of
    several splits are joined first.

    With UPDATE the running values move: towards the batch, and then they are
    the mean and variance used; or, with OF_BATCH, as those of a BatchNorm,
    and those of the batch are used. unbias is n / (n - 1) of its n values.
    """
    rows = samples * channels
    means = kept
    variances = means + rows
    scales = variances + rows
    shifts = scales + rows
    used_mean = shifts + rows
    used_var = used_mean + channels
    group = tl.program_id(0)
    inside = tl.arange(0, CHANNELS)[None, :]
    channel = group * group_size + inside
    channel_mask = inside < group_size
    if splits > 1:
        for first in range(0, samples, SAMPLES):
            sample = first + tl.arange(0, SAMPLES)[:, None]
            mask = (sample < samples) & channel_mask
            place = sample * channels + channel
            part = kept + parts_at + place
            mean = tl.full((SAMPLES, CHANNELS), 0.0, tl.float32)
            for split in range(0, splits):
                size = tl.minimum(length - split * span, span)
                m = tl.load(part + split * rows, mask=mask, other=0.0)
                mean += m * (size.to(tl.float32) / length)
            part += splits * rows
            variance = tl.full((SAMPLES, CHANNELS), 0.0, tl.float32)
            for split in range(0, splits):
                size = tl.minimum(length - split * span, span)
                m = kept + parts_at + place + split * rows
                m = tl.load(m, mask=mask, other=0.0) - mean
                v = tl.load(part + split * rows, mask=mask, other=0.0)
                variance += (v + m * m) * (size.to(tl.float32) / length)
            tl.store(means + place, mean, mask=mask)
            tl.store(variances + place, variance, mask=mask)
        # Other threads of this program read what these have written.
        tl.debug_barrier()
    mean = tl.load(running_mean + channel, mask=channel_mask, other=0.0)
    var = tl.load(running_var + channel, mask=channel_mask, other=1.0)
    bn_scale, bn_shift, scale, shift = _affines(
        bn_weight,
        bn_bias,
        weight,
        bias,
        channel,
        group,
        channel_mask,
        PER_CHANNEL,
        CHANNELS,
    )
    if UPDATE or OF_BATCH:
        batch_mean = tl.full((1, CHANNELS), 0.0, tl.float32)
        for first in range(0, samples, SAMPLES):
            sample = first + tl.arange(0, SAMPLES)[:, None]
            mask = (sample < samples) & channel_mask
            place = sample * channels + channel
            m = tl.load(means + place, mask=mask, other=0.0)
            batch_mean += tl.sum(m, 0)[None, :]
        batch_mean /= samples
        around = batch_mean if OF_BATCH else mean
        batch_var = tl.full((1, CHANNELS), 0.0, tl.float32)
        for first in range(0, samples, SAMPLES):
            sample = first + tl.arange(0, SAMPLES)[:, None]
            mask = (sample < samples) & channel_mask
            place = sample * channels + channel
            m = tl.load(means + place, mask=mask, other=0.0)
            v = tl.load(variances + place, mask=mask, other=0.0)
            spread = v + (m - around) * (m - around)
            batch_var += tl.sum(tl.where(mask, spread, 0.0), 0)[None, :]
        batch_var /= samples
        new_mean = mean + momentum * (batch_mean - mean)
        if OF_BATCH:
            new_var = var + momentum * (batch_var * unbias - var)
        else:
            new_var = var + momentum * (batch_var - var)
        # Not with an infinite or NaN batch, whose variance is not finite.
        finite = new_var < float('inf')
        new_mean = tl.where(finite, new_mean, mean)
        new_var = tl.where(finite, new_var, var)
        if OF_BATCH:
            mean, var = batch_mean, batch_var
        else:
            mean, var = new_mean, new_var
        if UPDATE:
            # Several threads have loaded a value that one of them replaces.
            tl.debug_barrier()
            tl.store(running_mean + channel, new_mean, mask=channel_mask)
            tl.store(running_var + channel, new_var, mask=channel_mask)
    tl.store(used_mean + channel, mean, mask=channel_mask)
    tl.store(used_var + channel, var, mask=channel_mask)
    a = bn_scale / tl.sqrt(var + eps)
    for first in range(0, samples, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)[:, None]
        mask = (sample < samples) & channel_mask
        place = sample * channels + channel
        m = tl.load(means + place, mask=mask, other=0.0)
        v = tl.load(variances + place, mask=mask, other=0.0)
        u, r = _levels(m, v, mean, a, bn_shift, mask, group_size, eps)
        tl.store(scales + place, r * a * scale, mask=mask)
        tl.store(shifts + place, r * u * scale + shift, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def affine(
    input,
    kept,
    output,
    rows,
    units,
    channels,
    splits,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per row, (input - mean) * scale + shift."""
    length = units * UNIT
    _, row, row_mask, first, base, offset = _tile(
        rows, length, channels, splits, BLOCK, CHANNELS_LAST, ROWS, BLOCK
    )
    column = tl.arange(0, BLOCK)[None, :]
    mask = row_mask[:, None] & (column < length - first)
    values = tl.load(input + base + offset, mask=mask, other=0.0)
    row = kept + row
    mean = tl.load(row, mask=row_mask, other=0.0)
    scale = tl.load(row + 2 * rows, mask=row_mask, other=0.0)
    shift = tl.load(row + 3 * rows, mask=row_mask, other=0.0)
    values = values.to(tl.float32) - mean[:, None]
    values = values * scale[:, None] + shift[:, None]
    tl.store(
        output + base + offset, values.to(output.dtype.element_ty), mask=mask
    )


@triton.jit(do_not_specialize=SIZES)
def sums(
    grad,
    input,
    kept,
    scratch,
    rows,
    units,
    channels,
    splits,
    blocks,
    parts_at,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per row and split, sum(grad) and sum(grad * (input - mean))."""
    length = units * UNIT
    span = blocks * BLOCK
    split, row, row_mask, first, base, offset = _tile(
        rows, length, channels, splits, span, CHANNELS_LAST, ROWS, BLOCK
    )
    step = BLOCK * channels if CHANNELS_LAST else BLOCK
    column = tl.arange(0, BLOCK)[None, :]
    mean = tl.load(kept + row, mask=row_mask, other=0.0)[:, None]
    size = tl.minimum(length - first, span)
    total = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    product = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    for done in range(0, size, BLOCK):
        mask = row_mask[:, None] & (column < size - done)
        g = tl.load(grad + base + offset, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(input + base + offset, mask=mask, other=0.0)
        total += g
        product += g * (values.to(tl.float32) - mean)
        base += step
    place = scratch + parts_at + split * rows + row
    tl.store(place, tl.sum(total, 1), mask=row_mask)
    tl.store(place + splits * rows, tl.sum(product, 1), mask=row_mask)


@triton.jit
def _slopes(s, t, m, v, mean, a, bn_shift, scale, mask, size, group_size, eps):
    """Direction, q, z and the sums of dy and dy x of some samples.

    Names and formulas are those of :class:`.cpu.BatchChannelNorm`; size is
    the number of values of a row, as a float.
    """
    u, r = _levels(m, v, mean, a, bn_shift, mask, group_size, eps)
    direction = tl.where(mask, r * (a * t + u * s), 0.0)
    group = size * group_size
    along_1 = (tl.sum(scale * s, 1) / group)[:, None]
    along_y = (tl.sum(scale * direction, 1) / group)[:, None]
    p = r * scale
    q = -r * r * a * along_y
    z = -r * (along_1 + r * u * along_y)
    offset = m - mean
    sum_dy = p * s + z * size
    sum_dy_x = p * (t + offset * s) + (q * v + z * offset) * size
    return (
        direction,
        q,
        z,
        tl.where(mask, sum_dy, 0.0),
        tl.where(mask, sum_dy_x, 0.0),
    )


@triton.jit(do_not_specialize=GROUP_SIZES)
def slopes(
    kept,
    scratch,
    grad_bn_weight,
    grad_bn_bias,
    grad_weight,
    grad_bias,
    bn_weight,
    bn_bias,
    weight,
    samples,
    channels,
    group_size,
    num_groups,
    splits,
    parts_at,
    size,
    eps,
    OF_BATCH: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of one group's affines, and the affine that is dinput.

    dinput is grad * scale + (input - mean) * along + constant, row by row,
    with the scale of the forward. Every program goes through all samples of
    its group, twice: sums over samples must be complete before constants
    follow from them. Sums of several splits are joined first.
    """
    rows = samples * channels
    means = kept
    variances = means + rows
    used_mean = kept + 4 * rows
    used_var = used_mean + channels
    totals = scratch
    products = totals + rows
    along_input = products + rows
    constants = along_input + rows
    group = tl.program_id(0)
    inside = tl.arange(0, CHANNELS)[None, :]
    channel = group * group_size + inside
    channel_mask = inside < group_size
    if splits > 1:
        for first in range(0, samples, SAMPLES):
            sample = first + tl.arange(0, SAMPLES)[:, None]
            mask = (sample < samples) & channel_mask
            place = sample * channels + channel
            part = scratch + parts_at + place
            s = tl.full((SAMPLES, CHANNELS), 0.0, tl.float32)
            t = tl.full((SAMPLES, CHANNELS), 0.0, tl.float32)
            for _split in range(0, splits):
                s += tl.load(part, mask=mask, other=0.0)
                t += tl.load(part + splits * rows, mask=mask, other=0.0)
                part += rows
            tl.store(totals + place, s, mask=mask)
            tl.store(products + place, t, mask=mask)
        # Other threads of this program read what these have written.
        tl.debug_barrier()
    mean = tl.load(used_mean + channel, mask=channel_mask, other=0.0)
    var = tl.load(used_var + channel, mask=channel_mask, other=1.0)
    bn_scale, bn_shift, scale, _shift = _affines(
        bn_weight,
        bn_bias,
        weight,
        None,
        channel,
        group,
        channel_mask,
        PER_CHANNEL,
        CHANNELS,
    )
    inverse = 1.0 / tl.sqrt(var + eps)
    a = bn_scale * inverse
    sum_s = tl.full((1, CHANNELS), 0.0, tl.float32)
    sum_direction = tl.full((1, CHANNELS), 0.0, tl.float32)
    sum_dy = tl.full((1, CHANNELS), 0.0, tl.float32)
    sum_dy_x = tl.full((1, CHANNELS), 0.0, tl.float32)
    for first in range(0, samples, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)[:, None]
        mask = (sample < samples) & channel_mask
        place = sample * channels + channel
        s = tl.load(totals + place, mask=mask, other=0.0)
        t = tl.load(products + place, mask=mask, other=0.0)
        m = tl.load(means + place, mask=mask, other=0.0)
        v = tl.load(variances + place, mask=mask, other=0.0)
        direction, _q, _z, dy, dy_x = _slopes(
            s, t, m, v, mean, a, bn_shift, scale, mask, size, group_size, eps
        )
        sum_s += tl.sum(s, 0)[None, :]
        sum_direction += tl.sum(direction, 0)[None, :]
        sum_dy += tl.sum(dy, 0)[None, :]
        sum_dy_x += tl.sum(dy_x, 0)[None, :]
    tl.store(grad_bn_weight + channel, inverse * sum_dy_x, mask=channel_mask)
    tl.store(grad_bn_bias + channel, sum_dy, mask=channel_mask)
    if PER_CHANNEL:
        tl.store(grad_weight + channel, sum_direction, mask=channel_mask)
        tl.store(grad_bias + channel, sum_s, mask=channel_mask)
    else:
        tl.store(grad_weight + group, tl.sum(sum_direction))
        tl.store(grad_bias + group, tl.sum(sum_s))
    for first in range(0, samples, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)[:, None]
        mask = (sample < samples) & channel_mask
        place = sample * channels + channel
        s = tl.load(totals + place, mask=mask, other=0.0)
        t = tl.load(products + place, mask=mask, other=0.0)
        m = tl.load(means + place, mask=mask, other=0.0)
        v = tl.load(variances + place, mask=mask, other=0.0)
        _direction, q, z, _dy, _dy_x = _slopes(
            s, t, m, v, mean, a, bn_shift, scale, mask, size, group_size, eps
        )
        if OF_BATCH:
            # Less what the mean and variance of the batch take up.
            slope = inverse * inverse * sum_dy_x / (size * samples)
            q -= slope
            z -= sum_dy / (size * samples) + slope * (m - mean)
        tl.store(along_input + place, a * q, mask=mask)
        tl.store(constants + place, a * z, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def affine_backward(
    grad,
    input,
    kept,
    scratch,
    output,
    rows,
    units,
    channels,
    splits,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per row, grad * scale + (input - mean) * along + constant."""
    length = units * UNIT
    _, row, row_mask, first, base, offset = _tile(
        rows, length, channels, splits, BLOCK, CHANNELS_LAST, ROWS, BLOCK
    )
    column = tl.arange(0, BLOCK)[None, :]
    mask = row_mask[:, None] & (column < length - first)
    g = tl.load(grad + base + offset, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(input + base + offset, mask=mask, other=0.0)
    mean = tl.load(kept + row, mask=row_mask, other=0.0)
    scale = tl.load(kept + 2 * rows + row, mask=row_mask, other=0.0)
    along = tl.load(scratch + 2 * rows + row, mask=row_mask, other=0.0)
    constant = tl.load(scratch + 3 * rows + row, mask=row_mask, other=0.0)
    values = values.to(tl.float32) - mean[:, None]
    values = values * along[:, None] + constant[:, None]
    values = g * scale[:, None] + values
    tl.store(
        output + base + offset, values.to(output.dtype.element_ty), mask=mask
    )
