"""A batch norm into which BCN's second step is let, image by image."""

import torch
from torch import Tensor

from oracles import Case
from oracles._moments import moments, moved, shaped

EPS, MOMENTUM, GROUPS = 1e-5, 0.25, 3


def oracle(
    x: Tensor,
    state: dict[str, Tensor],
    training: bool,
    *,
    late: bool = False,
    around: str = 'running',
    of_input: bool = False,
    before_affine: bool = False,
    open_gate: bool = False,
    across: bool = False,
    unbiased: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Both steps of (N, C, *), in the groups that 6 channels have.

    Args:
        x: the input.
        state: parameters, running values of the channels.
        training: whether the running values move.
        late: True is wrong (moves after the use).
        around: 'batch' is wrong (variance around the mean of the batch).
        of_input: True is wrong (group statistics of the input).
        before_affine: True is wrong (group statistics before the affine).
        open_gate: True is wrong (BCN).
        across: True is wrong (the gates of the groups' first channels).
        unbiased: True is wrong (unbiased variance of a group).
    """
    after = dict(state)
    if training:
        means, variances = [], []
        for c in range(x.shape[1]):
            values = x[:, c].detach()
            mean, var = moments(values)
            if around == 'running':
                away = values - state['running_mean'][c]
                var = (away**2).sum() / values.numel()
            means.append(mean)
            variances.append(var)
        after = moved(
            state, torch.stack(means), torch.stack(variances), MOMENTUM
        )
    used = state if late else after
    root = (shaped(used['running_var'], x) + EPS) ** 0.5
    plain = (x - shaped(used['running_mean'], x)) / root
    z = plain * shaped(state['weight'], x) + shaped(state['bias'], x)
    size = x.shape[1] // GROUPS
    images = []
    for n in range(len(x)):
        channels = []
        for c in range(x.shape[1]):
            group = c // size
            members = slice(group * size, group * size + size)
            source = x if of_input else plain if before_affine else z
            values = source[n, members]
            mean, var = moments(values)
            if unbiased:
                var = var * values.numel() / (values.numel() - 1)
            y = (z[n, c] - mean) / (var + EPS) ** 0.5
            y = y * state['gn_weight'][group] + state['gn_bias'][group]
            gate = state['gate'][group * size if across else c]
            if open_gate:
                gate = gate**0
            channels.append(z[n, c] + gate * (y - z[n, c]))
        images.append(torch.stack(channels))
    buffers = {name: after[name] for name in ('running_mean', 'running_var')}
    return torch.stack(images), buffers


CASES = [
    Case(
        'EasedBCN',
        oracle,
        wrong=(
            dict(late=True),
            dict(around='batch'),
            dict(of_input=True),
            dict(before_affine=True),
            dict(open_gate=True),
            dict(across=True),
            dict(unbiased=True),
        ),
        options=dict(momentum=MOMENTUM),
        keeps='the second step takes the statistics of the image',
    )
]
