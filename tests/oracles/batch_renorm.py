"""Batch Renormalization, from algorithm 1 of arXiv 1702.03275."""

import torch
from torch import Tensor

from . import Case, State

EPS, MOMENTUM = 1e-3, 0.2
# A short schedule: batch norm for two forwards, full bounds at the sixth.
WARMUP, R_STEPS, D_STEPS, COUNTS = 1, 3, 2, 2
R_MAX, D_MAX = 1.5, 0.4


def oracle(
    x: Tensor,
    state: State,
    training: bool,
    *,
    constant: bool = True,
    unbiased: bool = False,
    before: bool = True,
    clipped: bool = True,
    per_forward: bool = False,
) -> tuple[Tensor, State]:
    """Channel by channel.

    Args:
        x: the input.
        state: parameters and buffers.
        training: whether by the statistics of x.
        constant: False is wrong (a gradient through r and d).
        unbiased: True is wrong.
        before: False is wrong (r and d by the moved running values).
        clipped: False is wrong (no bounds).
        per_forward: True is wrong (a schedule in forwards).
    """
    after = {n: state[n].clone() for n in ('running_mean', 'running_std')}
    for name in ('mean', 'std'):
        source = 'running' if training else 'previous'
        after[f'previous_{name}'] = state[f'{source}_{name}'].clone()
    count = int(state['num_forwards'])
    step = count if per_forward else count // COUNTS
    after['num_forwards'] = torch.tensor(count + training)
    r_max = 1 + (R_MAX - 1) * share(step, WARMUP, R_STEPS)
    d_max = D_MAX * share(step, WARMUP, D_STEPS)
    if not clipped:
        r_max, d_max = 1e9, 1e9
    outputs = []
    for c in range(x.shape[1]):
        values = x[:, c]
        old = [state['running_mean'][c], state['running_std'][c]]
        if training:
            number = values.numel()
            mean = values.sum() / number
            squares = ((values - mean) ** 2).sum()
            std = (squares / (number - unbiased) + EPS) ** 0.5
            new = [
                (1 - MOMENTUM) * was + MOMENTUM * now.detach()
                for was, now in zip(old, (mean, std), strict=True)
            ]
            center, scale = old if before else new
            r = bounded(std / scale, 1 / r_max, r_max)
            d = bounded((mean - center) / scale, -d_max, d_max)
            if constant:
                r, d = r.detach(), d.detach()
            y = (values - mean) / std * r + d
            after['running_mean'][c], after['running_std'][c] = new
        else:
            y = (values - old[0]) / old[1]
        outputs.append(y * state['weight'][c] + state['bias'][c])
    return torch.stack(outputs, 1), after


def share(step: int, first: int, last: int) -> float:
    """Share of a linear schedule that is done."""
    return min(max((step - first) / (last - first), 0), 1)


def bounded(value: Tensor, low: float, high: float) -> Tensor:
    """A value, or the bound that it is beyond."""
    if value < low:
        return torch.tensor(low, dtype=value.dtype)
    return torch.tensor(high, dtype=value.dtype) if value > high else value


CASES = [
    Case(
        'BatchRenorm',
        oracle,
        wrong=(
            dict(constant=False),
            dict(unbiased=True),
            dict(before=False),
            dict(clipped=False),
            dict(per_forward=True),
        ),
        options=dict(
            eps=EPS,
            momentum=MOMENTUM,
            r_max=R_MAX,
            d_max=D_MAX,
            warmup=WARMUP,
            r_steps=R_STEPS,
            d_steps=D_STEPS,
            accumulative_counts=COUNTS,
        ),
        one_value='more than one value per',
        # As if it had trained a while: the bounds are open.
        values=dict(num_forwards=lambda count: count + 3),
    )
]
