"""Batch-Instance Normalization, channel by channel (arXiv 1805.07925)."""

import torch
from torch import Tensor

from oracles import Case
from oracles._moments import moments, moved, shaped

EPS, MOMENTUM = 1e-5, 0.1


def oracle(
    x: Tensor,
    state: dict[str, Tensor],
    training: bool,
    *,
    factor: float = 10**0.5,
    clamped: bool = True,
    stuck: bool = False,
    swapped: bool = False,
    unbiased: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """BIN of (N, C, *).

    Args:
        x: the input.
        state: gate_offset, affine, running values.
        training: whether BN's statistics are those of x.
        factor: 1 and 10 are wrong (steps 1 and 100 times those of others).
        clamped: False is wrong.
        stuck: True is wrong (no gradient beyond the bounds).
        swapped: True is wrong (the gate is the share of IN).
        unbiased: False is wrong (biased running variance).
    """
    channels = x.shape[1]
    count = x.numel() // channels
    gate = 1 + factor * state['gate_offset']
    if clamped:
        bound = gate.clamp(0, 1)
        gate = bound if stuck else gate + (bound - gate).detach()
    if swapped:
        gate = 1 - gate
    batch = [moments(x[:, c]) for c in range(channels)]
    after = dict(state)
    if training:
        means, variances = (torch.stack(v) for v in zip(*batch, strict=True))
        if unbiased:
            variances = variances * count / (count - 1)
        after = moved(state, means, variances, MOMENTUM)
    else:
        batch = list(
            zip(state['running_mean'], state['running_var'], strict=True)
        )
    rows = []
    for image in x:
        for c in range(channels):
            parts = [
                (image[c] - mean) / (var + EPS) ** 0.5
                for mean, var in (batch[c], moments(image[c]))
            ]
            rows.append(gate[c] * parts[0] + (1 - gate[c]) * parts[1])
    y = torch.stack(rows).reshape(x.shape)
    return y * shaped(state['weight'], x) + shaped(state['bias'], x), after


CASES = [
    Case(
        'BatchInstanceNorm',
        oracle,
        wrong=(
            dict(factor=1.0),
            dict(factor=10.0),
            dict(clamped=False),
            dict(stuck=True),
            dict(swapped=True),
            dict(unbiased=False),
        ),
        not_recomputed='an error of autograd: it clamps a parameter',
        one_value="BatchInstanceNorm needs more than one value.*type='GN'",
        # Within and beyond both bounds.
        values={
            'gate_offset': lambda gate: torch.linspace(-0.4, 0.1, len(gate))
        },
        keeps='IN takes part in evaluation',
    )
]
