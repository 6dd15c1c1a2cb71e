"""Sandwich BN, channel by channel (arXiv 2102.11382)."""

import torch
from torch import Tensor

from oracles import Case
from oracles._moments import moments, moved

EPS, MOMENTUM = 1e-5, 0.1


def oracle(
    x: Tensor,
    state: dict[str, Tensor],
    training: bool,
    *,
    condition: int = 0,
    shared_first: bool = True,
    unbiased: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """SaBN of (N, C, *), of the first condition.

    Args:
        x: the input.
        state: both affines, running values.
        training: whether the statistics are those of x.
        condition: 1 is wrong.
        shared_first: False is wrong (the order of the affines).
        unbiased: False is wrong (biased running variance).
    """
    count = x.numel() // x.shape[1]
    columns, means, variances = [], [], []
    for c in range(x.shape[1]):
        mean, var = moments(x[:, c])
        means.append(mean)
        variances.append(var * count / (count - 1) if unbiased else var)
        if not training:
            mean, var = state['running_mean'][c], state['running_var'][c]
        y = (x[:, c] - mean) / (var + EPS) ** 0.5
        affines = [
            (state['weight'][c], state['bias'][c]),
            (
                state['condition_weight'][condition, c],
                state['condition_bias'][condition, c],
            ),
        ]
        for weight, bias in affines if shared_first else reversed(affines):
            y = y * weight + bias
        columns.append(y)
    y = torch.stack(columns, 1)
    if not training:
        return y, dict(state)
    return y, moved(
        state, torch.stack(means), torch.stack(variances), MOMENTUM
    )


CASES = [
    Case(
        'SandwichBN',
        oracle,
        wrong=(
            dict(condition=1),
            dict(shared_first=False),
            dict(unbiased=False),
        ),
        options=dict(num_conditions=3),
        one_value="SandwichBN needs more than one value.*type='GN'",
    )
]
