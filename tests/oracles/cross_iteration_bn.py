"""Cross-Iteration Batch Normalization, from section 3 of arXiv 2002.05712."""

import torch
from torch import Tensor, nn

from . import Case, State

EPS, MOMENTUM, WINDOW = 1e-3, 0.3, 3


class Narrow(nn.Module):
    """Means large beside the deviations, so that the maximum matters."""

    def forward(self, x: Tensor) -> Tensor:
        """Shift the images away from 0."""
        return x * 0.2 + 3


def within(layer: nn.Module) -> nn.Module:
    """A convolution before the layer."""
    channels = layer.num_features
    conv = nn.Conv2d(channels, channels, 1, bias=False)
    return nn.Sequential(Narrow(), conv, layer)


def oracle(
    x: Tensor,
    state: State,
    training: bool,
    *,
    compensated: bool = True,
    rule: str = 'maximum',
    through: bool = False,
    window: int = WINDOW,
    latest: bool = True,
) -> tuple[Tensor, State]:
    """Mean, mean square and their derivatives as sums over the pixels.

    Args:
        x: the images.
        state: parameters, buffers, and the window of former calls.
        training: whether by the statistics of x.
        compensated: False is wrong (former statistics as they were).
        rule: of a mean square below the square of the mean, 'drop' is wrong
            (left out, as in the official code), and 'none'.
        through: True is wrong (a gradient through former iterations).
        window: another one is wrong.
        latest: False is wrong (the mean of the last w, not of w now).
    """
    images = x * 0.2 + 3
    weight = state['1.weight'][:, :, 0, 0]
    y = torch.einsum('oi,nihw->nohw', weight, images)
    after = {
        name: values
        for name, values in state.items()
        if 'running' in name or name.startswith('past')
    }
    after['2.num_forwards'] = state['2.num_forwards'] + training
    if not training:
        mean, var = state['2.running_mean'], state['2.running_var']
        return finished(y, mean, var, state), after
    pixels = images.detach().transpose(0, 1).flatten(1)
    number = pixels.shape[1]
    values = y.transpose(0, 1).flatten(1)
    a, b = values.sum(1) / number, values.pow(2).sum(1) / number
    means, squares = [a], [b]
    for s in range(1, window):
        if f'past {s - 1} a' not in state:
            break
        old = [state[f'past {s - 1} {n}'] for n in ('a', 'b', 'da', 'db', 'w')]
        step = weight - old[4] if through else weight.detach() - old[4]
        if not compensated:
            step = torch.zeros_like(step)
        means.append(old[0] + (old[2] * step).sum(1))
        squares.append(old[1] + (old[3] * step).sum(1))
        if not latest:
            means[-1] = old[0]
    channels = []
    for c in range(len(a)):
        pairs = [(m[c], q[c]) for m, q in zip(means, squares, strict=True)]
        if rule == 'drop':
            pairs = [(m, q) for m, q in pairs if q >= m**2]
        if rule == 'maximum':
            pairs = [(m, torch.maximum(q, m**2)) for m, q in pairs]
        m = sum(m for m, _ in pairs) / len(pairs)
        q = sum(q for _, q in pairs) / len(pairs)
        channels.append((m, (q - m**2).clamp_min(0)))
    mean = torch.stack([m for m, _ in channels])
    var = torch.stack([v for _, v in channels])
    for s in range(window - 1, 0, -1):
        for n in ('a', 'b', 'da', 'db', 'w'):
            if f'past {s - 1} {n}' in after:
                after[f'past {s} {n}'] = after[f'past {s - 1} {n}']
    after['past 0 a'], after['past 0 b'] = a.detach(), b.detach()
    after['past 0 w'] = weight.detach().clone()
    # da/dw and db/dw by hand: y is linear in w.
    after['past 0 da'] = (pixels.sum(1) / number).repeat(len(a), 1)
    after['past 0 db'] = 2 * values.detach() @ pixels.T / number
    unbiased = (b - a**2).detach() * number / (number - 1)
    for name, new in (('mean', a.detach()), ('var', unbiased)):
        was = state[f'2.running_{name}']
        after[f'2.running_{name}'] = (1 - MOMENTUM) * was + MOMENTUM * new
    return finished(y, mean, var, state), after


def finished(y: Tensor, mean: Tensor, var: Tensor, state: State) -> Tensor:
    """The normalized and scaled output."""

    def shaped(values: Tensor) -> Tensor:
        return values.reshape(1, -1, 1, 1)

    y = (y - shaped(mean)) / (shaped(var) + EPS) ** 0.5
    return y * shaped(state['2.weight']) + shaped(state['2.bias'])


CASES = [
    Case(
        'CrossIterationBN',
        oracle,
        wrong=(
            dict(compensated=False),
            dict(rule='drop'),
            dict(rule='none'),
            dict(through=True),
            dict(window=2),
            dict(latest=False),
        ),
        options=dict(eps=EPS, momentum=MOMENTUM, window=WINDOW),
        one_value='more than one value per',
        within=within,
        forgets=True,
        not_compiled='a compiled convolution hides its weight: plain BN',
    )
]
