"""Weight Normalization and mean-only batch normalization, 1602.07868."""

import torch
from torch import Tensor

from . import Case, State

MOMENTUM = 0.1


def weight_norm(
    weight: Tensor,
    state: State,
    centered: bool = False,
    whole: bool = False,
    per_entry: bool = False,
) -> Tensor:
    """Filters of a given length.

    Args:
        weight: filters, (out_channels, ...).
        state: ``gain``.
        centered: True is wrong (WS).
        whole: True is wrong (one norm for all filters).
        per_entry: True is wrong (root mean square).
    """
    filters = []
    for one, gain in zip(weight, state['gain'], strict=True):
        v = one - one.sum() / one.numel() if centered else one
        length = ((weight if whole else v) ** 2).sum() ** 0.5
        if per_entry:
            length = length / one.numel() ** 0.5
        filters.append(gain * v / length)
    return torch.stack(filters)


def mean_only(
    x: Tensor,
    state: State,
    training: bool,
    detached: bool = False,
    running: bool = False,
    per_image: bool = False,
    unscaled: bool = False,
    momentum: float = MOMENTUM,
) -> tuple[Tensor, State]:
    """Each channel without its mean.

    Args:
        x: (N, C, H, W).
        state: ``weight``, ``bias``, ``running_mean``.
        training: whether the mean is that of the batch.
        detached: True is wrong (no gradient through the mean).
        running: True is wrong (training with running_mean).
        per_image: True is wrong (a mean for each image).
        unscaled: True is wrong.
        momentum: another one is wrong.
    """
    channels, means = [], []
    for number in range(x.shape[1]):
        values = x[:, number]
        mean = values.sum() / values.numel()
        means.append(mean.detach())
        if per_image and training:
            mean = values.sum((1, 2), keepdim=True) / values[0].numel()
        if detached:
            mean = mean.detach()
        if not training or running:
            mean = state['running_mean'][number]
        scale = 1 if unscaled else state['weight'][number]
        channels.append(scale * (values - mean) + state['bias'][number])
    after = state['running_mean']
    if training:
        after = after + momentum * (torch.stack(means) - after)
    return torch.stack(channels, 1), {'running_mean': after}


CASES = [
    Case(
        'WNConv2d',
        weight_norm,
        wrong=(dict(centered=True), dict(whole=True), dict(per_entry=True)),
        is_conv=True,
    ),
    Case(
        'MeanOnlyBN',
        mean_only,
        wrong=(
            dict(detached=True),
            dict(running=True),
            dict(per_image=True),
            dict(unscaled=True),
            dict(momentum=1 - MOMENTUM),
        ),
        one_value='one value per channel',
    ),
]
