"""EvoNorm-B0 and -S0, from arXiv 2004.02967, tables 2 and 4."""

import torch
from torch import Tensor

from oracles import Case, State

EPS = 1e-5


def variance(values: Tensor, unbiased: bool = False) -> Tensor:
    """Mean squared deviation of all values."""
    deviation = values - values.sum() / values.numel()
    return (deviation * deviation).sum() / (values.numel() - unbiased)


def s0(
    x: Tensor,
    state: State,
    training: bool,
    *,
    groups: int = 3,
    gate: str = 'learned',
    centered: bool = False,
    interleaved: bool = False,
) -> tuple[Tensor, State]:
    """EvoNorm-S0 as a loop over images and channels.

    Args:
        x: the input.
        state: weight, bias and v.
        training: makes no difference.
        groups: 1 and 6 are wrong (all channels, or each of its own).
        gate: 'plain' is wrong (v is left out), and so is 'normalized' (of
            the quotient).
        centered: True is wrong (the mean is subtracted).
        interleaved: True is wrong (channel c is of group c % groups).
    """
    channels = x.shape[1]
    size = channels // groups
    images = []
    for image in x:
        maps = []
        for c in range(channels):
            first = c // size * size
            own = image[first : first + size]
            if interleaved:
                own = image[c % groups :: groups]
            std = (variance(own) + EPS) ** 0.5
            one = image[c]
            if centered:
                one = one - own.sum() / own.numel()
            v = 1 if gate == 'plain' else state['v'][c]
            inner = one / std if gate == 'normalized' else one
            y = one / (1 + torch.exp(-v * inner)) / std
            maps.append(y * state['weight'][c] + state['bias'][c])
        images.append(torch.stack(maps))
    return torch.stack(images), {}


def b0(
    x: Tensor,
    state: State,
    training: bool,
    *,
    momentum: float = 0.1,
    unbiased: bool = False,
    larger: bool = True,
    inside: bool = False,
    detached: bool = False,
    evaluated: str = 'running',
) -> tuple[Tensor, State]:
    """EvoNorm-B0 as a loop over images and channels.

    Args:
        x: the input.
        state: weight, bias, v and running_var.
        training: use and move statistics of x.
        momentum: 0.9 is wrong (the decay of the official code).
        unbiased: True is wrong (timm's running variance).
        larger: False is wrong (the deviation of the batch alone).
        inside: True is wrong (v times the deviation, too).
        detached: True is wrong (no gradient through the batch).
        evaluated: 'image' is wrong (evaluation without running_var).
    """
    images = []
    running = state['running_var']
    moved = []
    for c in range(x.shape[1]):
        var = variance(x[:, c].detach(), unbiased)
        moved.append((1 - momentum) * running[c] + momentum * var)
    for image in x:
        maps = []
        for c, one in enumerate(image):
            own = (variance(one) + EPS) ** 0.5
            var = running[c]
            if training:
                var = variance(x[:, c].detach() if detached else x[:, c])
            elif evaluated == 'image':
                var = variance(one)
            batch = (var + EPS) ** 0.5
            v = state['v'][c]
            right = v * (one + own) if inside else v * one + own
            divisor = batch + 0 * one
            if larger:
                divisor = torch.where(right > batch, right, batch)
            maps.append(one / divisor * state['weight'][c] + state['bias'][c])
        images.append(torch.stack(maps))
    after = torch.stack(moved) if training else running
    return torch.stack(images), dict(running_var=after)


CASES = [
    Case(
        'EvoNormS0',
        s0,
        (
            dict(groups=1),
            dict(groups=6),
            dict(gate='plain'),
            dict(gate='normalized'),
            dict(centered=True),
            dict(interleaved=True),
        ),
        saves=3,
        activates=True,
    ),
    Case(
        'EvoNormB0',
        b0,
        (
            dict(momentum=0.9),
            dict(unbiased=True),
            dict(larger=False),
            dict(inside=True),
            dict(detached=True),
            dict(evaluated='image'),
        ),
        one_value='more than one value per channel',
        saves=4,
        activates=True,
        keeps='its divisor depends on each image',
    ),
]
