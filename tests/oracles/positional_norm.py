"""Positional Normalization, position by position (arXiv 1907.04312)."""

import torch
from torch import Tensor

from oracles import Case

EPS = 1e-5


def oracle(
    x: Tensor,
    state: dict[str, Tensor],
    training: bool,
    *,
    unbiased: bool = True,
    inside: bool = True,
    whole: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PONO of (N, C, *), then an affine.

    Args:
        x: the input.
        state: affine.
        training: makes no difference.
        unbiased: False is wrong (the paper's formula, not its code).
        inside: False is wrong (eps added to the deviation).
        whole: True is wrong (layer normalization).
    """
    channels = x.shape[1]
    places = x.reshape(len(x), channels, -1)
    images = []
    for image in places:
        columns = []
        for place in range(image.shape[1]):
            column = image[:, place]
            values = image.flatten() if whole else column
            mean = values.sum() / len(values)
            squares = ((values - mean) ** 2).sum()
            var = squares / (len(values) - unbiased)
            scale = (var + EPS) ** 0.5 if inside else var**0.5 + 0.01
            columns.append(
                (column - mean) / scale * state['weight'] + state['bias']
            )
        images.append(torch.stack(columns, 1))
    return torch.stack(images).reshape(x.shape), dict(state)


CASES = [
    Case(
        'PositionalNorm',
        oracle,
        saves=2.2,
        wrong=(dict(unbiased=False), dict(inside=False), dict(whole=True)),
    )
]
