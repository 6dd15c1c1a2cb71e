"""Switchable Normalization, map by map (arXiv 1806.10779)."""

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
    order: tuple[int, int, int] = (0, 1, 2),
    one_mixture: bool = False,
    pooled: bool = True,
    unbiased: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """SN of (N, C, *).

    Args:
        x: the input.
        state: mean_weight, var_weight, affine, running values.
        training: whether BN's statistics are those of x.
        order: another one is wrong (which logit is of which statistics).
        one_mixture: True is wrong (the means' logits for both).
        pooled: False is wrong (variances averaged, without the distances
            of the means).
        unbiased: True is wrong (unbiased running variance).
    """
    samples, channels = x.shape[:2]
    count = x.numel() // channels
    p = state['mean_weight'].exp() / state['mean_weight'].exp().sum()
    q = state['var_weight'].exp() / state['var_weight'].exp().sum()
    q = p if one_mixture else q
    batch = [moments(x[:, c]) for c in range(channels)]
    if not pooled:
        batch = [
            (batch[c][0], sum(moments(one[c])[1] for one in x) / samples)
            for c in range(channels)
        ]
    after = dict(state)
    if training:
        means, variances = (torch.stack(v) for v in zip(*batch, strict=True))
        after = moved(
            state,
            means,
            variances * (count / (count - 1) if unbiased else 1),
            MOMENTUM,
        )
    else:
        batch = list(
            zip(state['running_mean'], state['running_var'], strict=True)
        )
    rows = []
    for image in x:
        for c in range(channels):
            kinds = [moments(image[c]), moments(image), batch[c]]
            mean = sum(p[order[i]] * kinds[i][0] for i in range(3))
            var = sum(q[order[i]] * kinds[i][1] for i in range(3))
            rows.append((image[c] - mean) / (var + EPS) ** 0.5)
    y = torch.stack(rows).reshape(x.shape)
    return y * shaped(state['weight'], x) + shaped(state['bias'], x), after


CASES = [
    Case(
        'SwitchableNorm',
        oracle,
        wrong=(
            dict(order=(1, 0, 2)),
            dict(one_mixture=True),
            dict(pooled=False),
            dict(unbiased=True),
        ),
        keeps='statistics of the image take part in evaluation',
    )
]
