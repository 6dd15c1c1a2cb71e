"""The formulas of the papers' code, written out in float64.

Nothing here is fast or shared with ``ws_mm``. Each oracle takes the wrong
variants that a reader could mistake for it, so that the tests can show that
the comparison they use tells them apart.
"""

import torch
from torch import Tensor


def variance(values: Tensor, dim: int, unbiased: bool) -> Tensor:
    """Sum of squared deviations over n or n - 1, along one dimension."""
    mean = values.sum(dim, keepdim=True) / values.shape[dim]
    squares = ((values - mean) ** 2).sum(dim)
    return squares / (values.shape[dim] - (1 if unbiased else 0))


def standardize_weight(
    weight: Tensor,
    eps: float = 1e-5,
    eps_mode: str = 'outside',
    *,
    unbiased: bool = True,
    centered: bool = True,
    axis: int = 0,
) -> Tensor:
    """Standardize filter by filter, as a loop over output channels.

    Args:
        weight: the filters.
        eps: see eps_mode.
        eps_mode: place of eps.
        unbiased: False is wrong (timm's convention).
        centered: False is wrong (division only).
        axis: 1 is wrong (per input channel).
    """
    filters = []
    for one in weight.double().unbind(axis):
        flat = one.reshape(-1)
        var = variance(flat, 0, unbiased)
        if eps_mode == 'outside':
            denominator = var**0.5 + eps
        else:
            denominator = (var + eps) ** 0.5
        mean = flat.sum() / flat.numel() if centered else 0
        filters.append((one - mean) / denominator)
    return torch.stack(filters, axis)


def standardize_transposed_weight(
    weight: Tensor, groups: int, *, mixed: bool = False, **kwargs
) -> Tensor:
    """The same for a transposed convolution, as loops over its outputs.

    Args:
        weight: (in, out / groups, *kernel).
        groups: of the convolution.
        mixed: True is wrong (an output over the inputs of all groups).
        **kwargs: of ``standardize_weight``.
    """
    result = weight.double().clone()
    inputs = weight.shape[0] // groups
    for group in range(groups):
        rows = slice(None)
        if not mixed:
            rows = slice(group * inputs, (group + 1) * inputs)
        for output in range(weight.shape[1]):
            one = standardize_weight(weight[rows, output][None], **kwargs)
            result[rows, output] = one[0]
    return result


def batch_channel_norm(
    x: Tensor,
    state: dict[str, Tensor],
    num_groups: int,
    *,
    training: bool,
    momentum: float,
    eps: float = 1e-5,
    mode: str = 'estimate',
    around: str = 'running',
    order: str = 'update-normalize',
    constant: bool = True,
    outer: str = 'group',
    group_unbiased: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """BCN of an input (N, C, H, W).

    Args:
        x: the input.
        state: bn_weight, bn_bias, weight, bias, running_mean, running_var.
        num_groups: groups of the channel normalization.
        training: use and update statistics of x.
        momentum: update rate.
        eps: of both steps.
        mode: 'estimate' or 'batch'.
        around: 'batch' is wrong (variance around the batch mean).
        order: 'normalize-update' is wrong (estimates updated after use).
        constant: False is wrong (a gradient through the estimates).
        outer: 'interleaved' is wrong (channel c gets entry c % groups).
        group_unbiased: True is wrong.

    Returns:
        The output and the new running_mean and running_var.
    """
    x = x.double()
    state = {name: values.double() for name, values in state.items()}
    samples, channels = x.shape[:2]
    old_mean, old_var = state['running_mean'], state['running_var']
    mean, var, new_mean, new_var = old_mean, old_var, old_mean, old_var
    if training:
        values = x.transpose(0, 1).reshape(channels, -1)
        count = values.shape[1]
        batch_mean = values.sum(1) / count
        if mode == 'batch':
            mean = batch_mean
            var = variance(values, 1, unbiased=False)
            statistic = variance(values, 1, unbiased=True)
        else:
            center = old_mean if around == 'running' else batch_mean
            statistic = ((values - center[:, None]) ** 2).sum(1) / count
        new_mean = (1 - momentum) * old_mean + momentum * batch_mean
        new_var = (1 - momentum) * old_var + momentum * statistic
        if constant:
            new_mean, new_var = new_mean.detach(), new_var.detach()
        if mode == 'estimate' and order == 'update-normalize':
            mean, var = new_mean, new_var

    def shaped(per_channel: Tensor) -> Tensor:
        return per_channel.reshape(1, channels, 1, 1)

    y = (x - shaped(mean)) / (shaped(var) + eps) ** 0.5
    y = y * shaped(state['bn_weight']) + shaped(state['bn_bias'])

    groups = y.reshape(samples * num_groups, -1)
    group_mean = groups.sum(1, keepdim=True) / groups.shape[1]
    group_var = variance(groups, 1, unbiased=group_unbiased)[:, None]
    z = ((groups - group_mean) / (group_var + eps) ** 0.5).reshape(x.shape)
    weight, bias = state['weight'], state['bias']
    if weight.numel() != channels:
        entry = torch.arange(channels)
        if outer == 'interleaved':
            entry = entry % num_groups
        else:
            entry = entry // (channels // num_groups)
        weight, bias = weight[entry], bias[entry]
    z = z * shaped(weight) + shaped(bias)
    return z, {
        'running_mean': new_mean.detach(),
        'running_var': new_var.detach(),
    }
