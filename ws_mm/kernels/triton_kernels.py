"""The Triton kernels of WS and BCN; :mod:`.cuda` launches them.

All of them work on tiles of ROWS rows by BLOCK columns, both powers of two,
masked at the edges. A row is a filter (WS) or a channel of a sample (BCN).
Arithmetic is float32 whatever the type in memory. No two programs write to
the same place, so equal inputs give equal bits. Offsets into activations are
64 bits wide; row and column numbers are 32, which :mod:`.cuda` checks.
"""

import triton
import triton.language as tl


@triton.jit
def standardize(
    weight,
    output,
    means,
    rests,
    stds,
    rows,
    fan_in,
    eps,
    INSIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Standardize filters; keep their means and standard deviations.

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
    tl.store(means + row, mean, mask=row_mask)
    tl.store(rests + row, rest, mask=row_mask)
    tl.store(stds + row, std, mask=row_mask)
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
    means,
    rests,
    stds,
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
    mean = tl.load(means + row, mask=row_mask, other=0.0)[:, None]
    rest = tl.load(rests + row, mask=row_mask, other=0.0)[:, None]
    std = tl.load(stds + row, mask=row_mask, other=1.0)
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
):
    """Split, rows and first column of this program.

    And where they start: one offset for all, and one each. Programs that run
    side by side read side by side.
    """
    program = tl.program_id(0)
    if CHANNELS_LAST:
        row_tiles = tl.cdiv(rows, ROWS)
        split = program // row_tiles
        row = program % row_tiles * ROWS + tl.arange(0, ROWS)
        first = split * span
        base = first.to(tl.int64) * channels
        sample = (row // channels).to(tl.int64)
        start = sample * channels * length + row % channels
    else:
        split = program % splits
        top = program // splits * ROWS
        row = top + tl.arange(0, ROWS)
        first = split * span
        base = top.to(tl.int64) * length + first
        # Several rows have no more than a tile of values.
        start = tl.arange(0, ROWS) * length
    return split, row, first, base, start[:, None]


@triton.jit
def _offsets(
    start, done, channels, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """Columns after the first, and their offsets after the base."""
    column = done + tl.arange(0, BLOCK)[None, :]
    if CHANNELS_LAST:
        offset = start + column.to(tl.int64) * channels
    else:
        offset = start + column
    return column, offset


@triton.jit
def moments(
    input,
    means,
    variances,
    rows,
    length,
    channels,
    splits,
    span,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and biased variance of each row over one split of its columns.

    Each block around its own mean, blocks joined by Chan's formula: sums of
    squares would cancel where the mean is large.
    """
    split, row, first, base, start = _tile(
        rows, length, channels, splits, span, CHANNELS_LAST, ROWS
    )
    row_mask = row < rows
    mean = tl.full((ROWS,), 0.0, tl.float32)
    squares = tl.full((ROWS,), 0.0, tl.float32)
    for done in range(0, span, BLOCK):
        column, offset = _offsets(start, done, channels, CHANNELS_LAST, BLOCK)
        mask = row_mask[:, None] & (column < length - first)
        values = tl.load(input + base + offset, mask=mask, other=0.0)
        values = values.to(tl.float32)
        # The last split may end before its last block begins.
        count = tl.minimum(tl.maximum(length - first - done, 0), BLOCK)
        count = count.to(tl.float32)
        block_mean = tl.sum(values, 1) / tl.maximum(count, 1.0)
        deviation = tl.where(mask, values - block_mean[:, None], 0.0)
        squares += tl.sum(deviation * deviation, 1)
        share = count / (done + tl.maximum(count, 1.0))
        delta = block_mean - mean
        squares += delta * delta * done * share
        mean += delta * share
    total = tl.minimum(length - first, span)
    place = split.to(tl.int64) * rows + row
    tl.store(means + place, mean, mask=row_mask)
    tl.store(variances + place, squares / total, mask=row_mask)


@triton.jit
def join_moments(
    split_means,
    split_variances,
    means,
    variances,
    rows,
    length,
    splits,
    span,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Moments of whole rows from those of their splits."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    mean = tl.full((ROWS,), 0.0, tl.float32)
    for first in range(0, splits, BLOCK):
        split = first + tl.arange(0, BLOCK)[None, :]
        mask = (row < rows) & (split < splits)
        share = tl.minimum(length - split * span, span).to(tl.float32) / length
        place = split.to(tl.int64) * rows + row
        part = tl.load(split_means + place, mask=mask, other=0.0)
        mean += tl.sum(tl.where(mask, part * share, 0.0), 1)
    variance = tl.full((ROWS,), 0.0, tl.float32)
    for first in range(0, splits, BLOCK):
        split = first + tl.arange(0, BLOCK)[None, :]
        mask = (row < rows) & (split < splits)
        share = tl.minimum(length - split * span, span).to(tl.float32) / length
        place = split.to(tl.int64) * rows + row
        part = tl.load(split_means + place, mask=mask, other=0.0)
        inner = tl.load(split_variances + place, mask=mask, other=0.0)
        delta = part - mean[:, None]
        spread = (inner + delta * delta) * share
        variance += tl.sum(tl.where(mask, spread, 0.0), 1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(means + row, mean, mask=row < rows)
    tl.store(variances + row, variance, mask=row < rows)


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
    u = a * (m - mean) + bn_shift
    u = u - (tl.sum(u, 1) / group_size)[:, None]
    spread = tl.where(mask, a * a * v + u * u, 0.0)
    r = 1.0 / tl.sqrt(tl.sum(spread, 1) / group_size + eps)
    return u, r[:, None]


@triton.jit
def coefficients(
    means,
    variances,
    running_mean,
    running_var,
    bn_weight,
    bn_bias,
    weight,
    bias,
    used_mean,
    used_var,
    scales,
    shifts,
    samples,
    channels,
    group_size,
    unbias,
    momentum,
    eps,
    OF_BATCH: tl.constexpr,
    UPDATE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Statistics of one group, and the affine that normalizes its rows.

    The output is (input - means) * scales + shifts. Every program has a
    group to itself and goes through all samples, twice.

    With UPDATE the running values move: towards the batch, and then they are
    the mean and variance used; or, with OF_BATCH, as those of a BatchNorm,
    and those of the batch are used. unbias is n / (n - 1) of its n values.
    """
    group = tl.program_id(0)
    inside = tl.arange(0, CHANNELS)[None, :]
    channel = group * group_size + inside
    channel_mask = inside < group_size
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


@triton.jit
def affine(
    input,
    means,
    scales,
    shifts,
    output,
    rows,
    length,
    channels,
    splits,
    span,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per row, (input - mean) * scale + shift."""
    _, row, first, base, start = _tile(
        rows, length, channels, splits, span, CHANNELS_LAST, ROWS
    )
    row_mask = row < rows
    mean = tl.load(means + row, mask=row_mask, other=0.0)[:, None]
    scale = tl.load(scales + row, mask=row_mask, other=0.0)[:, None]
    shift = tl.load(shifts + row, mask=row_mask, other=0.0)[:, None]
    column, offset = _offsets(start, 0, channels, CHANNELS_LAST, BLOCK)
    mask = row_mask[:, None] & (column < length - first)
    values = tl.load(input + base + offset, mask=mask, other=0.0).to(
        tl.float32
    )
    values = (values - mean) * scale + shift
    tl.store(
        output + base + offset, values.to(output.dtype.element_ty), mask=mask
    )


@triton.jit
def sums(
    grad,
    input,
    means,
    totals,
    products,
    rows,
    length,
    channels,
    splits,
    span,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per row and split, sum(grad) and sum(grad * (input - mean))."""
    split, row, first, base, start = _tile(
        rows, length, channels, splits, span, CHANNELS_LAST, ROWS
    )
    row_mask = row < rows
    mean = tl.load(means + row, mask=row_mask, other=0.0)[:, None]
    total = tl.full((ROWS,), 0.0, tl.float32)
    product = tl.full((ROWS,), 0.0, tl.float32)
    for done in range(0, span, BLOCK):
        column, offset = _offsets(start, done, channels, CHANNELS_LAST, BLOCK)
        mask = row_mask[:, None] & (column < length - first)
        g = tl.load(grad + base + offset, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(input + base + offset, mask=mask, other=0.0).to(
            tl.float32
        )
        total += tl.sum(g, 1)
        product += tl.sum(g * (values - mean), 1)
    place = split.to(tl.int64) * rows + row
    tl.store(totals + place, total, mask=row_mask)
    tl.store(products + place, product, mask=row_mask)


@triton.jit
def _slopes(s, t, m, v, mean, a, bn_shift, scale, mask, size, group_size, eps):
    """Direction, p, q, z and the sums of dy and dy x of some samples.

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
        p,
        q,
        z,
        tl.where(mask, sum_dy, 0.0),
        tl.where(mask, sum_dy_x, 0.0),
    )


@triton.jit
def slopes(
    totals,
    products,
    means,
    variances,
    used_mean,
    used_var,
    bn_weight,
    bn_bias,
    weight,
    along_grad,
    along_input,
    constants,
    grad_bn_weight,
    grad_bn_bias,
    grad_weight,
    grad_bias,
    samples,
    channels,
    group_size,
    size,
    eps,
    OF_BATCH: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of one group's affines, and the affine that is dinput.

    dinput is grad * along_grad + (input - means) * along_input + constants,
    row by row. Every program goes through all samples of its group, twice:
    sums over samples must be complete before constants follow from them.
    """
    group = tl.program_id(0)
    inside = tl.arange(0, CHANNELS)[None, :]
    channel = group * group_size + inside
    channel_mask = inside < group_size
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
        direction, p, q, z, dy, dy_x = _slopes(
            s, t, m, v, mean, a, bn_shift, scale, mask, size, group_size, eps
        )
        sum_s += tl.sum(s, 0)[None, :]
        sum_direction += tl.sum(direction, 0)[None, :]
        sum_dy += tl.sum(dy, 0)[None, :]
        sum_dy_x += tl.sum(dy_x, 0)[None, :]
    if bn_weight is not None:
        tl.store(
            grad_bn_weight + channel, inverse * sum_dy_x, mask=channel_mask
        )
    if bn_bias is not None:
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
        direction, p, q, z, dy, dy_x = _slopes(
            s, t, m, v, mean, a, bn_shift, scale, mask, size, group_size, eps
        )
        if OF_BATCH:
            # Less what the mean and variance of the batch take up.
            slope = inverse * inverse * sum_dy_x / (size * samples)
            q -= slope
            z -= sum_dy / (size * samples) + slope * (m - mean)
        tl.store(along_grad + place, a * p, mask=mask)
        tl.store(along_input + place, a * q, mask=mask)
        tl.store(constants + place, a * z, mask=mask)


@triton.jit
def affine_backward(
    grad,
    input,
    means,
    along_grad,
    along_input,
    constants,
    output,
    rows,
    length,
    channels,
    splits,
    span,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per row, grad * P + (input - mean) * Q + R."""
    _, row, first, base, start = _tile(
        rows, length, channels, splits, span, CHANNELS_LAST, ROWS
    )
    row_mask = row < rows
    mean = tl.load(means + row, mask=row_mask, other=0.0)[:, None]
    p = tl.load(along_grad + row, mask=row_mask, other=0.0)[:, None]
    q = tl.load(along_input + row, mask=row_mask, other=0.0)[:, None]
    r = tl.load(constants + row, mask=row_mask, other=0.0)[:, None]
    column, offset = _offsets(start, 0, channels, CHANNELS_LAST, BLOCK)
    mask = row_mask[:, None] & (column < length - first)
    g = tl.load(grad + base + offset, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(input + base + offset, mask=mask, other=0.0).to(
        tl.float32
    )
    values = g * p + ((values - mean) * q + r)
    tl.store(
        output + base + offset, values.to(output.dtype.element_ty), mask=mask
    )
