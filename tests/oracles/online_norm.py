"""Online Normalization, from section 3 of arXiv 1905.05894."""

from typing import Any

import torch
from torch import Tensor

from . import Case, State

EPS, MOMENTUM, CONTROL = 1e-3, 0.2, 0.1
NAMES = ('running_mean', 'running_var', 'control_scale', 'control_shift')


class Controlled(torch.autograd.Function):
    """One channel: the normalized images, and the gradient of the paper."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, means: Any, roots: Any, control: Any, wrong: Any
    ) -> Tensor:
        y = torch.stack([(x[i] - means[i]) / roots[i] for i in range(len(x))])
        ctx.save_for_backward(y)
        ctx.roots, ctx.control, ctx.wrong = roots, control, wrong
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        scale, shift = ctx.control
        gradients = []
        for t in range(len(g)):
            if ctx.wrong == 'own':
                gradients.append(g[t] / ctx.roots[t])
                continue
            if ctx.wrong == 'order':
                scale += (g[t] * y[t]).mean()
            h = g[t] - CONTROL * scale * y[t]
            if ctx.wrong == 'average':
                scale += CONTROL * ((g[t] * y[t]).mean() - scale)
            elif ctx.wrong == 'raw':
                scale += (g[t] * y[t]).mean()
            elif ctx.wrong != 'order':
                scale += (h * y[t]).mean()
            dx = h / ctx.roots[t] - CONTROL * shift
            shift += dx.mean()
            gradients.append(dx)
        return torch.stack(gradients), None, None, None, None


def oracle(
    x: Tensor,
    state: State,
    training: bool,
    *,
    backward: str = '',
    own: bool = False,
    between: bool = True,
    guard: str = 'layer',
) -> tuple[Tensor, State]:
    """Channel by channel, image by image.

    Args:
        x: the input.
        state: parameters and buffers.
        training: whether the statistics move.
        backward: all are wrong: 'own' (the gradient of the forward),
            'order' (accumulators moved before their use), 'raw' (by g, not
            h) and 'average' (moving averages, not integrals).
        own: True is wrong (an image by statistics that contain it).
        between: False is wrong (variances within images alone).
        guard: 'none', or 'channel' (scaled per channel), are wrong.
    """
    after = {name: state[name].clone() for name in NAMES}
    for name in ('mean', 'var'):
        source = 'running' if training else 'previous'
        after[f'previous_{name}'] = state[f'{source}_{name}'].clone()
    outputs = []
    for c in range(x.shape[1]):
        mean, var, scale, shift = (after[name][c] for name in NAMES)
        means, variances = [], []
        for image in x[:, c].detach():
            if not own:
                means.append(mean.clone())
                variances.append(var.clone())
            if training:
                m = image.sum() / image.numel()
                within = ((image - m) ** 2).sum() / image.numel()
                # E[x^2] - E[x]^2 of the mixture of before and image.
                square = (1 - MOMENTUM) * (var + mean**2)
                square = square + MOMENTUM * (within + m**2)
                new = (1 - MOMENTUM) * mean + MOMENTUM * m
                if between:
                    var.copy_(square - new**2)
                else:
                    var.copy_((1 - MOMENTUM) * var + MOMENTUM * within)
                mean.copy_(new)
            if own:
                means.append(mean.clone())
                variances.append(var.clone())
        roots = [(v + EPS) ** 0.5 for v in variances]
        if training:
            # The control is a view: the backward moves it in after.
            y = Controlled.apply(
                x[:, c], means, roots, (scale, shift), backward
            )
        else:
            y = (x[:, c] - means[0]) / roots[0]
        outputs.append(y * state['weight'][c] + state['bias'][c])
    z = torch.stack(outputs, 1)
    if guard == 'layer':
        z = torch.stack([one / (one.pow(2).mean() + 1e-5) ** 0.5 for one in z])
    elif guard == 'channel':
        z = z / (z.pow(2).mean((2, 3), keepdim=True) + 1e-5) ** 0.5
    return z, after


CASES = [
    Case(
        'OnlineNorm',
        oracle,
        wrong=(
            dict(backward='own'),
            dict(backward='order'),
            dict(backward='raw'),
            dict(backward='average'),
            dict(own=True),
            dict(between=False),
            dict(guard='none'),
            dict(guard='channel'),
        ),
        options=dict(eps=EPS, momentum=MOMENTUM, control_momentum=CONTROL),
        keeps='layer scaling takes all channels of an image together',
        not_compiled='its training forward is kept from compilers',
    )
]
