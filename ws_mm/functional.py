"""The mathematics of WS and BCN, without state.

Weight Standardization: Qiao et al., https://arxiv.org/abs/1903.10520
Batch-Channel Normalization: Qiao et al., https://arxiv.org/abs/1911.09738
"""

import math

import torch
from torch import Tensor, fx

from .distributed import synchronized_moments
from .kernels import cpu, fused, plain

EPS_MODES = ('outside', 'inside')
MODES = ('estimate', 'batch', 'sync_batch')


def standardize_weight(
    weight: Tensor,
    eps: float = 1e-5,
    eps_mode: str = 'outside',
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Give every filter of a convolution zero mean and unit variance.

    Formula, for each output channel o, over the fan_in other entries:
        mean_o = sum(weight[o]) / fan_in
        var_o = sum((weight[o] - mean_o)^2) / (fan_in - 1)
        'outside': (weight[o] - mean_o) / (sqrt(var_o) + eps)
        'inside': (weight[o] - mean_o) / sqrt(var_o + eps)

    Convention: variance is unbiased. 'outside' is the authors' first
        release, their DeepLab and mmcv's ``ConvWS``; 'inside' is their BCN
        ImageNet code. timm's ``StdConv2d`` differs: biased, 1e-6 inside.
    Shape:
        weight: (out_channels, in_channels / groups, *kernel_size).
        returns: same shape and memory format.

    Args:
        weight: the raw filters. Half-precision ones are standardized in
            float32.
        eps: added to a standard deviation ('outside', in units of weight)
            or to a variance ('inside', in units of weight squared).
        eps_mode: 'outside' or 'inside' the square root.
        dtype: of the result, rounded once. None is that of weight.

    Raises:
        ValueError: ``eps_mode`` is unknown, or a filter has a single entry.
    """
    check_eps_mode(eps_mode)
    fan_in = weight.shape[1:].numel()
    check_fan_in(fan_in)
    dtype = weight.dtype if dtype is None else dtype
    standardized: Tensor | None = None
    # Of two entries, the gradient is what cancellation leaves: no closed form.
    kernels = fused(weight) if fan_in > 2 else None
    if kernels is not None:
        standardized = kernels.standardize_weight(
            weight, eps, eps_mode == 'inside', dtype
        )
    if standardized is None:
        raw = _at_least_float32(weight)
        standardized = plain.standardize_weight(raw, eps, eps_mode)
    return standardized.to(dtype)


def updated_estimates(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    moments: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Move per-channel estimates towards the moments of one batch.

    Formula, for each channel, over N and all spatial positions:
        batch_mean = mean(input)
        batch_var = mean((input - running_mean)^2)
        returns (1 - momentum) * running_mean + momentum * batch_mean,
                (1 - momentum) * running_var + momentum * batch_var
    and, in channels where batch_var is infinite or NaN, the estimates as
    they were.

    Convention: the variance is biased and taken around the estimate before
        its update, not around batch_mean. Its expectation is then the
        total variance, spread between images included, even when every
        batch holds one image. Out of place and without gradient.

    Args:
        input: the activations.
        running_mean: the estimates before.
        running_var: the estimates before.
        momentum: update rate, in (0, 1].
        moments: mean and biased variance of every (sample, channel) of
            input, both (N, C), where they are known.

    Source: ``EstBN``, README of the authors' BCN repository.
    """
    with torch.no_grad():
        if moments is None:
            input = _at_least_float32(input)
            dims = (0, *range(2, input.dim()))
            batch_mean = input.mean(dims)
            deviation = input - _per_channel(running_mean, input)
            batch_var = deviation.square_().mean(dims)
        else:
            means, variances = moments
            batch_mean = means.mean(0)
            deviation = means - running_mean
            batch_var = (variances + deviation.square()).mean(0)
        return _moved(
            running_mean, running_var, batch_mean, batch_var, momentum
        )


def batch_channel_norm(
    input: Tensor,
    num_groups: int,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.01,
    eps: float = 1e-5,
    mode: str = 'estimate',
    update: bool = True,
) -> Tensor:
    """Normalize by batch statistics or their estimates, then by channels.

    Formula:
        y = (input - mean) / sqrt(var + eps) * bn_weight + bn_bias
        output = (y - group_mean) / sqrt(group_var + eps) * weight + bias
    with mean and var per channel, group_mean and group_var (biased) per
    sample and group of channels, always those of y itself. mean and var are

        ============  ==============================  ==================
        mode          training=True                   training=False
        ============  ==============================  ==================
        'estimate'    the updated estimates, see      running_mean and
                      :func:`updated_estimates`       running_var
        'batch'       of this batch (biased)          the same
        'sync_batch'  of the batches of all ranks     the same
        ============  ==============================  ==================

    Convention: 'estimate' updates the estimates first, then normalizes with
        them as constants: no gradient flows through mean and var. The other
        modes differentiate through them and update the running statistics
        as ``nn.BatchNorm2d`` does, with the unbiased variance. Infinities
        and NaN reach the output, where a loss shows them; the running
        values of their channels stay as they were, in every mode.
    Shape:
        input: (N, C, *), N may be 0: nothing is updated then.
        running_mean, running_var, bn_weight, bn_bias: (C,).
        weight, bias: (num_groups,) or (C,).
        returns: shape and dtype of input.
    Distributed: 'sync_batch' weights ranks by their number of values; all
        ranks must call it. The other modes do not communicate.
    dtype: half-precision inputs are normalized in float32.

    Args:
        input: the activations.
        num_groups: groups of channels of the second normalization.
        running_mean: estimates or running means, updated in place.
        running_var: estimates or running variances, updated in place.
        bn_weight: inner scale. None is 1.
        bn_bias: inner shift. None is 0.
        weight: outer scale, per group or per channel. None is 1.
        bias: outer shift, per group or per channel. None is 0.
        training: whether statistics come from this batch.
        momentum: update rate of the running values, in (0, 1].
        eps: added to both variances.
        mode: 'estimate', 'batch' or 'sync_batch'.
        update: whether to move the running values (in training).

    Raises:
        ValueError: one value per channel in a batch mode, or one value per
            group, which has no variance.

    Source: ``BCNorm`` and ``EstBN`` of the authors' BCN repository.
    """
    check_mode(mode)
    _check_group_size(input, num_groups)
    of_batch = training and mode == 'batch' and input.numel() > 0
    if of_batch and input.numel() == input.shape[1]:
        raise ValueError(_one_value_message(input, mode))
    kernels = fused(input, cpu.pays(input))
    if kernels not in (None, cpu) and not (training and mode == 'sync_batch'):
        result: Tensor | None = kernels.batch_channel_norm(
            input,
            num_groups,
            (running_mean, running_var),
            (bn_weight, bn_bias, weight, bias),
            momentum,
            eps,
            of_batch,
            training and update,
        )
        if result is not None:
            return result

    rows = kernels is cpu and cpu.takes_rows(input)
    dtype = plain.accumulation_dtype(input)
    bn_weight, bn_bias, weight, bias = (
        None if affine is None else affine.to(dtype)
        for affine in (bn_weight, bn_bias, weight, bias)
    )
    if training and mode == 'sync_batch':
        y = _synchronized_batch_norm(
            _at_least_float32(input),
            running_mean,
            running_var,
            bn_weight,
            bn_bias,
            momentum,
            eps,
            update,
        )
        output = plain.channel_norm(y, num_groups, weight, bias, eps)
        return output.to(input.dtype)

    x = input if rows else _at_least_float32(input)
    moments = cpu.instance_moments(x.detach()) if rows else None
    mean, var = running_mean, running_var
    if of_batch:
        mean, var = _batch_statistics(x, moments)
        if update:
            count = x.numel() / x.shape[1]
            unbiased = var * (count / (count - 1))
            new = _moved(running_mean, running_var, mean, unbiased, momentum)
            running_mean.copy_(new[0])
            running_var.copy_(new[1])
    elif training and update and x.numel():
        mean, var = updated_estimates(
            x, running_mean, running_var, momentum, moments
        )
        running_mean.copy_(mean)
        running_var.copy_(var)
    else:
        # The buffers change in later calls; what backward keeps must not.
        mean, var = mean.clone(), var.clone()
    mean, var = mean.to(dtype), var.to(dtype)
    settings = num_groups, eps, of_batch
    if moments is not None:
        closed: Tensor = cpu.BatchChannelNorm.apply(
            x, bn_weight, bn_bias, weight, bias, moments, mean, var, *settings
        )
        return closed
    output = plain.batch_channel_norm(
        x, bn_weight, bn_bias, weight, bias, mean, var, *settings
    )
    return output.to(input.dtype)


def _moved(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """Both running values, moved in the channels whose batch is finite."""
    new_mean = torch.lerp(running_mean, mean.to(running_mean), momentum)
    new_var = torch.lerp(running_var, var.to(running_var), momentum)
    # Whatever makes a mean infinite or NaN does so to the variance.
    finite = new_var < math.inf
    return (
        torch.where(finite, new_mean, running_mean),
        torch.where(finite, new_var, running_var),
    )


def _batch_statistics(
    x: Tensor, moments: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        if moments is None:
            dims = (0, *range(2, x.dim()))
            var, mean = torch.var_mean(x, dims, correction=0)
            return mean, var
        means, variances = moments
        mean = means.mean(0)
        return mean, (variances + (means - mean).square()).mean(0)


def _synchronized_batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    momentum: float,
    eps: float,
    update: bool,
) -> Tensor:
    mean, var, count = synchronized_moments(x)
    if count == 1:
        raise ValueError(_one_value_message(x, 'sync_batch'))
    if update and count > 0:
        with torch.no_grad():
            unbiased = var * (count / (count - 1))
            new = _moved(running_mean, running_var, mean, unbiased, momentum)
            running_mean.copy_(new[0])
            running_var.copy_(new[1])
    scale = torch.rsqrt(var + eps)
    if bn_weight is not None:
        scale = scale * bn_weight
    y = (x - _per_channel(mean, x)) * _per_channel(scale, x)
    return y if bn_bias is None else y + _per_channel(bn_bias, x)


def _check_group_size(input: Tensor, num_groups: int) -> None:
    # numel() would tie an exported program to the sizes of its example.
    if math.prod(input.shape[1:]) == num_groups:
        raise ValueError(
            f'a group of one value cannot be normalized: input of shape '
            f'{tuple(input.shape)} with num_groups={num_groups} leaves one '
            'value per group. Give this layer fewer groups than channels '
            '(norm_cfg=dict(num_groups=...)) or a larger feature map'
        )


def check_mode(mode: str) -> None:
    """Refuse a mode of BCN that does not exist."""
    if mode not in MODES:
        raise ValueError(
            f'mode={mode!r} is not a mode of BCN. Use one of '
            f'{", ".join(map(repr, MODES))} (norm_cfg=dict(mode=...))'
        )


def check_eps_mode(eps_mode: str) -> None:
    """Refuse a place of eps that does not exist."""
    if eps_mode not in EPS_MODES:
        raise ValueError(
            f'eps_mode={eps_mode!r} is not a place for eps. Use one of '
            f'{", ".join(map(repr, EPS_MODES))} (conv_cfg=dict(eps_mode=...))'
        )


def check_fan_in(fan_in: int) -> None:
    """Refuse filters of one entry: standardized, they are all zero."""
    if fan_in < 2:
        raise ValueError(
            f'a filter with {fan_in} entry has no variance and cannot be '
            'standardized: in_channels / groups * prod(kernel_size) must be '
            'at least 2. Use a plain convolution here (conv_cfg=None)'
        )


def check_not_symbolic(input: Tensor, layer: str) -> None:
    """Refuse symbolic tensors of torch.fx: they have no shape to go by."""
    if isinstance(input, fx.Proxy):
        raise TypeError(
            f'{layer} cannot be traced by torch.fx.symbolic_trace, which '
            'efficient_conv_bn_eval of a config does with the modules that '
            'it lists. Take those with this layer out of the list, or bake '
            'the model first (ws_mm.bake, tools/bake.py)'
        )


def _one_value_message(x: Tensor, mode: str) -> str:
    return (
        f'mode={mode!r} needs more than one value per channel in training, '
        f'got an input of shape {tuple(x.shape)}. Use '
        "norm_cfg=dict(mode='estimate'), which has no such limit"
    )


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.half, torch.bfloat16) else x


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).view(-1, *[1] * (x.dim() - 2))
