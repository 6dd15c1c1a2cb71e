"""Batch Group Normalization, group by group (arXiv 2012.02782)."""

import torch
from torch import Tensor

from oracles import Case
from oracles._moments import moments, moved, shaped

EPS, MOMENTUM, GROUPS = 1e-5, 0.1, 3


def oracle(
    x: Tensor,
    state: dict[str, Tensor],
    training: bool,
    *,
    interleaved: bool = False,
    each_image: bool = False,
    unbiased: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """BGN of (N, C, *), in the groups that 6 channels have by default.

    Args:
        x: the input.
        state: affine, running values of the groups.
        training: whether the statistics are those of x.
        interleaved: True is wrong (channel c is in group c % groups).
        each_image: True is wrong (Group Normalization).
        unbiased: False is wrong (biased running variance).
    """
    channels = x.shape[1]
    size = channels // GROUPS
    y = torch.empty_like(x)
    means, variances = [], []
    for group in range(GROUPS):
        members = [c for c in range(channels) if c // size == group]
        if interleaved:
            members = [c for c in range(channels) if c % GROUPS == group]
        values = x[:, members]
        mean, var = moments(values)
        count = values.numel()
        means.append(mean)
        variances.append(var * count / (count - 1) if unbiased else var)
        for n in range(len(x)):
            if not training:
                mean = state['running_mean'][group]
                var = state['running_var'][group]
            elif each_image:
                mean, var = moments(values[n])
            for c in members:
                y[n, c] = (x[n, c] - mean) / (var + EPS) ** 0.5
    y = y * shaped(state['weight'], x) + shaped(state['bias'], x)
    if not training:
        return y, dict(state)
    return y, moved(
        state, torch.stack(means), torch.stack(variances), MOMENTUM
    )


CASES = [
    Case(
        'BatchGroupNorm',
        oracle,
        wrong=(
            dict(interleaved=True),
            dict(each_image=True),
            dict(unbiased=False),
        ),
        saves=2,
    )
]
