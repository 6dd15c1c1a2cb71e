"""Group Normalization of one group, from arXiv 1803.08494, section 3."""

import torch
from torch import Tensor

from oracles import Case, State


def group_norm1(
    x: Tensor,
    state: State,
    training: bool,
    *,
    over: str = 'image',
    unbiased: bool = False,
    one_affine: bool = False,
) -> tuple[Tensor, State]:
    """GN as a loop over images.

    Args:
        x: the input.
        state: weight and bias.
        training: makes no difference.
        over: 'channel' is wrong (instance norm), and so is 'position'
            (the norm over channels of a transformer).
        unbiased: True is wrong.
        one_affine: True is wrong (one scale for the group, as BCN's).
    """
    images = []
    for image in x:
        dims = dict(image=(0, 1, 2), channel=(1, 2), position=(0,))[over]
        number = 1
        for dim in dims:
            number *= image.shape[dim]
        centered = image - image.sum(dims, keepdim=True) / number
        var = (centered**2).sum(dims, keepdim=True) / (number - unbiased)
        y = centered / (var + 1e-5) ** 0.5
        maps = []
        for c, one in enumerate(y):
            entry = 0 if one_affine else c
            maps.append(one * state['weight'][entry] + state['bias'][entry])
        images.append(torch.stack(maps))
    return torch.stack(images), {}


CASES = [
    Case(
        'GroupNorm1',
        group_norm1,
        (
            dict(over='channel'),
            dict(over='position'),
            dict(unbiased=True),
            dict(one_affine=True),
        ),
    )
]
