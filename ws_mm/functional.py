"""WS and BCN as functions, without state.

Weight Standardization: Qiao et al., https://arxiv.org/abs/1903.10520
Batch-Channel Normalization: Qiao et al., https://arxiv.org/abs/1911.09738
"""

import math

import torch
from torch import Tensor

from . import kernels
from .arguments import check_choice
from .distributed import world_size
from .kernels import plain

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
        weight: (out_channels, in_channels / groups, *kernel_size); use
            :func:`swap_channels` for a transposed convolution.
        returns: same shape and memory format.

    Args:
        weight: raw filters. Half precision is standardized in float32.
        eps: constant added to a std ('outside', in units of weight) or to a
            variance ('inside', in units of weight squared).
        eps_mode: 'outside' or 'inside' the square root.
        dtype: output dtype, rounded to once; defaults to weight.dtype.

    Raises:
        ValueError: ``eps_mode`` is unknown, or a filter has a single entry.
    """
    check_choice('eps_mode', eps_mode, EPS_MODES, 'conv_cfg')
    check_fan_in(math.prod(weight.shape[1:]))
    standardized: Tensor = kernels.for_weight(weight).standardize_weight(
        weight, eps, eps_mode == 'inside', dtype or weight.dtype
    )
    return standardized


def swap_channels(weight: Tensor, groups: int) -> Tensor:
    """Give a transposed convolution's weight one row per output channel.

    Shape:
        weight: (in_channels, out_channels / groups, *kernel_size).
        returns: (out_channels, in_channels / groups, *kernel_size), which
            the same call takes back.
    """
    rows, columns, *kernel = weight.shape
    weight = weight.reshape(groups, rows // groups, columns, *kernel)
    return weight.transpose(1, 2).reshape(
        groups * columns, rows // groups, *kernel
    )


def updated_estimates(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
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
        variance of all values, spread between images included, plus the
        variance of running_mean itself, which is momentum / (2 - momentum)
        of the variance of batch_mean: 0.5 % at the default momentum. This
        holds for batches of one image, too. Returns new tensors, without
        gradient.

    Args:
        input: activations.
        running_mean: estimates before the update.
        running_var: estimates before the update.
        momentum: share of the batch, in (0, 1].

    Source: ``EstBN``, README of the authors' BCN repository.
    """
    running = running_mean, running_var
    with torch.no_grad():
        batch = plain.batch_moments(
            plain.at_least_float32(input), running_mean
        )
        mean, var = plain.moved(running, batch, momentum)
    return mean, var


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
        values of their channels stay unchanged, in every mode.
    Shape:
        input: (N, C, *), N may be 0: nothing is updated then.
        running_mean, running_var, bn_weight, bn_bias: (C,).
        weight, bias: (num_groups,) or (C,).
        returns: shape and dtype of input.
    Distributed: 'sync_batch' weights ranks by their number of values; all
        ranks must call it. The other modes do not communicate.
    dtype: half-precision inputs are normalized in float32.

    Args:
        input: activations.
        num_groups: groups of channels of the second normalization.
        running_mean: estimates or running means, updated in place.
        running_var: estimates or running variances, updated in place.
        bn_weight: inner scale; None means 1.
        bn_bias: inner shift; None means 0.
        weight: outer scale, per group or per channel; None means 1.
        bias: outer shift, per group or per channel; None means 0.
        training: whether statistics come from this batch.
        momentum: share of the batch in the running values, in (0, 1].
        eps: constant added to both variances.
        mode: 'estimate', 'batch' or 'sync_batch'.
        update: whether to move the running values (in training).

    Raises:
        ValueError: groups that do not divide the channels; one value per
            channel in a batch mode, or one value per group, which has no
            variance. Not for one value among several ranks, which only the
            device knows of: its running values stay.

    Source: ``BCNorm`` and ``EstBN`` of the authors' BCN repository.
    """
    check_choice('mode', mode, MODES, 'norm_cfg')
    if input.shape[1] % num_groups:
        raise ValueError(
            f'num_groups={num_groups} does not divide the {input.shape[1]} '
            'channels of the input'
        )
    check_group_size(input, num_groups)
    source = 'running'
    if training and mode == 'sync_batch' and world_size() > 1:
        source = 'ranks'
    # torch.jit.trace makes tensors of sizes, and of what they are compared to.
    elif training and mode != 'estimate' and bool(input.numel() > 0):
        source = 'batch'
        if input.numel() == input.shape[1]:
            raise ValueError(plain.one_value_message(input, mode))
    output: Tensor = kernels.for_activations(input).batch_channel_norm(
        input,
        num_groups,
        (running_mean, running_var),
        (bn_weight, bn_bias, weight, bias),
        momentum,
        eps,
        source,
        training and update,
    )
    return output


def largest_group_count(num_channels: int, most: int) -> int:
    """Return the largest divisor up to most that leaves two channels a group.

    One channel in a group makes the second normalization of BCN undo the
    first: an instance norm. Of a single channel there is no other.
    """
    most = max(min(most, num_channels // 2), 1)
    return next(n for n in range(most, 0, -1) if num_channels % n == 0)


def check_group_size(
    input: Tensor, num_groups: int, layer: str = 'BCN'
) -> None:
    """Reject groups of one value, which has no variance.

    Args:
        input: activations.
        num_groups: groups of channels.
        layer: class name of the layer.
    """
    # Groups divide the channels. numel() would tie an exported program to the
    # sizes of its example.
    if input.shape[1] != num_groups or math.prod(input.shape[2:]) != 1:
        return
    fix = 'no norm (norm_cfg=None)'
    if num_groups > 1:
        fewer = largest_group_count(num_groups, num_groups)
        fix = f'fewer groups (norm_cfg=dict(num_groups={fewer}))'
    raise ValueError(
        f'a group of one value cannot be normalized: {layer} of '
        f'{input.shape[1]} channels got an input of shape '
        f'{tuple(input.shape)}, of which num_groups={num_groups} leaves one '
        f'value per group. Give it a larger feature map, or {fix}'
    )


def check_fan_in(fan_in: int) -> None:
    """Reject filters of one entry: standardized, they are all zero."""
    if fan_in < 2:
        raise ValueError(
            f'a filter with {fan_in} entry has no variance and cannot be '
            'standardized: in_channels / groups * prod(kernel_size) must be '
            'at least 2. Use a plain convolution here (conv_cfg=None)'
        )
