"""FRN with TLU, from arXiv 1911.09737, section 3."""

import torch
from torch import Tensor

from oracles import Case, State


def frn(
    x: Tensor,
    state: State,
    training: bool,
    *,
    eps: float = 1e-5,
    centered: bool = False,
    outside: bool = False,
    over: str = 'image',
    unit: str = 'tlu',
    signed: bool = False,
) -> tuple[Tensor, State]:
    """FRN as a loop over images and channels.

    Args:
        x: the input.
        state: weight, bias, tau, learned_eps or not.
        training: makes no difference.
        eps: the constant.
        centered: True is wrong (a variance).
        outside: True is wrong (eps added to the root).
        over: 'batch' is wrong (a mean square of the batch).
        unit: 'relu' and 'shifted' are wrong (relu(y - tau)).
        signed: True is wrong (a learned eps without its absolute value).
    """
    images = []
    for image in x:
        maps = []
        for c, one in enumerate(image):
            values = x[:, c] if over == 'batch' else one
            if centered:
                values = values - values.sum() / values.numel()
            square = (values * values).sum() / values.numel()
            added = eps
            if 'learned_eps' in state:
                learned = state['learned_eps'][0]
                added = added + (learned if signed else learned.abs())
            root = (square + added) ** 0.5
            if outside:
                root = square**0.5 + added
            y = state['weight'][c] * one / root + state['bias'][c]
            tau = state['tau'][c]
            if unit == 'tlu':
                z = torch.where(y > tau, y, tau)
            else:
                z = (y - tau if unit == 'shifted' else y).clamp(min=0)
            maps.append(z)
        images.append(torch.stack(maps))
    return torch.stack(images), {}


WRONG = (
    dict(centered=True),
    dict(over='batch'),
    dict(unit='relu'),
    dict(unit='shifted'),
)
CASES = [
    Case('FRN', frn, WRONG, saves=2, activates=True),
    Case(
        'FRN',
        frn,
        (dict(signed=True), dict(outside=True)),
        options=dict(learned_eps=True),
        saves=2,
        activates=True,
        values=dict(learned_eps=lambda old: old * 0 - 0.02),
    ),
]
