"""Moving Average Batch Normalization, arXiv 2001.06838, by its equations.

Channel by channel, in a list of the latest batches.
"""

import torch
from torch import Tensor

from . import RECENT_COMPILER, Case, State

SIZE, WARMUP, RENORM = 4, 10, 100


def shifted(row: Tensor, newest: Tensor) -> Tensor:
    """A row without its oldest entry, which is the first one."""
    return torch.tensor([*row.tolist()[1:], float(newest)], dtype=row.dtype)


class Channel(torch.autograd.Function):
    """One channel; its backward is no gradient of its forward.

    Args of ``forward``:
        x: values of the channel.
        var: mean square.
        ratio: constant.
        early: whether the newest mean is used alone.
        row: means of earlier backwards, which the backward moves.
        own: True is wrong (the gradient of this batch).
        unscaled: True is wrong (the mean is taken before the ratio).
    """

    @staticmethod
    def forward(ctx, x, var, ratio, early, row, own, unscaled):
        z = x / (var + 1e-5) ** 0.5
        ctx.kept = z, var, ratio, early, row, own, unscaled
        return ratio * z

    @staticmethod
    def backward(ctx, grad):
        z, var, ratio, early, row, own, unscaled = ctx.kept
        g = grad * ratio
        newest = sum((grad if unscaled else g) * z) / len(z)
        row.copy_(shifted(row, newest))
        mean = newest if early or own else sum(row) / SIZE
        return (g - z * mean) / (var + 1e-5) ** 0.5, *[None] * 6


def mabn(
    x: Tensor,
    state: State,
    training: bool,
    *,
    centered: bool = False,
    own: bool = False,
    unscaled: bool = False,
    updated: bool = False,
    clipped: bool = True,
    of_batch: bool = False,
) -> tuple[Tensor, State]:
    """One iteration.

    Args:
        x: the input.
        state: parameters and buffers.
        training: whether it is one of training.
        centered: True is wrong (the mean is subtracted, as in BN).
        own: True is wrong, as in Channel.
        unscaled: likewise.
        updated: True is wrong (ratio by the running value after its move).
        clipped: False is wrong (any ratio).
        of_batch: True is wrong (the running value moves to the batch).
    """
    after = {name: state[name].clone() for name in state}
    outputs = []
    for c, values in enumerate(x.transpose(0, 1)):
        flat = values.reshape(-1)
        if centered:
            flat = flat - sum(flat) / len(flat)
        running = state['running_var'][c]
        if training:
            t = int(state['iterations'][c]) + 1
            early = t <= SIZE or t < WARMUP
            square = sum(flat.detach() ** 2) / len(flat)
            row = shifted(state['squares'][c], square)
            var = square if early else sum(row) / SIZE
            new = 0.98 * running + 0.02 * (square if of_batch else var)
            by = new if updated else running
            ratio = ((var + 1e-5) / (by + 1e-5)) ** 0.5
            if clipped:
                ratio = ratio.new_tensor(min(max(float(ratio), 0.2), 5))
            if t <= RENORM:
                ratio = torch.ones(())
            after['iterations'][c] = t
            after['squares'][c] = row
            after['running_var'][c] = new
            after['previous_var'][c] = running
            y = Channel.apply(
                flat, var, ratio, early, after['gradients'][c], own, unscaled
            )
        else:
            y = flat / (running + 1e-5) ** 0.5
        y = y * state['weight'][c] + state['bias'][c]
        outputs.append(y.reshape(values.shape))
    buffers = 'running_var previous_var iterations squares gradients'.split()
    return torch.stack(outputs, 1), {name: after[name] for name in buffers}


def centered(
    weight: Tensor, state: State, *, axis: int = 0, standardized: bool = False
) -> Tensor:
    """The filters minus their means, as a loop over output channels.

    Args:
        weight: the filters.
        state: unused.
        axis: 1 is wrong (per input channel).
        standardized: True is wrong (WS).
    """
    filters = []
    for one in weight.unbind(axis):
        filter_ = one - one.sum() / one.numel()
        if standardized:
            filter_ = filter_ / (filter_**2).mean() ** 0.5
        filters.append(filter_)
    return torch.stack(filters, axis)


CASES = [
    Case(
        'MABN',
        mabn,
        not_compiled=''
        if RECENT_COMPILER
        else 'this compiler cannot take its backward',
        wrong=(
            dict(centered=True),
            dict(own=True),
            dict(unscaled=True),
            dict(updated=True),
            dict(clipped=False),
            dict(of_batch=True),
        ),
        options=dict(
            buffer_size=SIZE, warmup_iters=WARMUP, renorm_iters=RENORM
        ),
        values=dict(
            # One channel for each phase, and its begin.
            iterations=lambda _: torch.tensor([0, 8, 50, 98, 5000, 5000]),
            running_var=lambda _: torch.tensor([2, 0.5, 1, 3, 1e-3, 1e3]),
        ),
    ),
    Case(
        'CenteredConv2d',
        centered,
        wrong=(dict(axis=1), dict(standardized=True)),
        is_conv=True,
    ),
]
