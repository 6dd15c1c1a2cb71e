"""Stochastic Whitening BN, with the rules of both criteria."""

from functools import partial

import torch
from torch import Tensor

from oracles import Case, State

# The published step of 1e-5 shows no mistake; that of 'kl' diverges earlier.
STEPS, MOMENTUM = {'fro': 0.1, 'kl': 0.02}, 0.05


def symmetric(w: Tensor) -> Tensor:
    """A whitening matrix, as of a trained network."""
    values = torch.linspace(-0.3, 0.4, w.numel(), dtype=w.dtype).sin()
    w = values.view(w.shape)
    return torch.eye(len(w), dtype=w.dtype) + (w + w.T) / 4


def stochastic_whitening_bn(
    x: Tensor,
    state: State,
    training: bool,
    *,
    step: float,
    criterion: str = 'fro',
    late: bool = False,
    symmetrized: bool = True,
    constant: bool = True,
    whole: bool = False,
    unbiased: bool = False,
) -> tuple[Tensor, State]:
    """Standardize each channel, move w, and multiply by it.

    Args:
        x: the input.
        state: weight, bias, running_mean, running_var, whitening.
        training: use and move the statistics.
        step: step size of the rule.
        criterion: 'fro' or 'kl'.
        late: True is wrong (w moves after its use).
        symmetrized: False is wrong.
        constant: False is wrong (a gradient through the rule).
        whole: True is wrong ('fro' without the division).
        unbiased: True is wrong (running variance of n - 1).
    """
    channels = x.shape[1]
    rows = torch.stack([x[:, i].reshape(-1) for i in range(channels)])
    count = rows.shape[1]
    after = {k: v for k, v in state.items() if k not in ('weight', 'bias')}
    mean, var, w = (
        after[k] for k in ('running_mean', 'running_var', 'whitening')
    )
    if training:
        mean = rows.sum(1) / count
        var = ((rows - mean[:, None]) ** 2).sum(1) / count
        kept = var * count / (count - 1) if unbiased else var
        for name, new in (('running_mean', mean), ('running_var', kept)):
            moved = (1 - MOMENTUM) * after[name] + MOMENTUM * new
            after[name] = moved.detach()
    z = (rows - mean[:, None]) / (var + 1e-5)[:, None] ** 0.5
    used = w
    if training:
        sigma = sum(torch.outer(v, v) for v in z.T) / count
        error = w @ sigma @ w.T - torch.eye(channels, dtype=x.dtype)
        if criterion == 'kl':
            delta = error @ w
        else:
            delta = error @ w @ sigma
            if not whole:
                delta = delta / (error**2).sum() ** 0.5
        w = w - step * delta
        if symmetrized:
            w = (w + w.T) / 2
        if not late:
            used = w
        if constant:
            used = used.detach()
        after['whitening'] = w.detach()
    y = (used @ z).reshape(channels, len(x), *x.shape[2:]).transpose(0, 1)
    weight, bias = state['weight'], state['bias']
    return y * weight.view(-1, 1, 1) + bias.view(-1, 1, 1), after


def case(criterion: str, *wrong: dict[str, object]) -> Case:
    return Case(
        'StochasticWhiteningBN',
        partial(
            stochastic_whitening_bn,
            criterion=criterion,
            step=STEPS[criterion],
        ),
        (
            dict(late=True),
            dict(symmetrized=False),
            dict(constant=False),
            *wrong,
        ),
        options=dict(criterion=criterion, step=STEPS[criterion]),
        values=dict(whitening=symmetric),
        one_value='StochasticWhiteningBN needs more than one value',
        saves=3,
        keeps='channels are mixed',
    )


CASES = [
    case(
        'fro',
        dict(criterion='kl'),
        dict(whole=True),
        dict(unbiased=True),
    ),
    case('kl', dict(criterion='fro')),
]
