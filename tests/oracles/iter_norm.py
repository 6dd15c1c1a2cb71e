"""IterNorm, group by group."""

import torch
from torch import Tensor

from oracles import Case, State

CHANNELS, LARGEST = 5, 3  # groups of 3 and 2


def covariances(rows: Tensor) -> Tensor:
    """Some of a trained network: of values of their own in each group."""
    result = torch.zeros_like(rows)
    for group in (range(3), range(3, 5)):
        own = [[1 + (i * j + 3 * i) % 5 / 4 for j in range(9)] for i in group]
        values = torch.tensor(own, dtype=rows.dtype)
        values = values - values.mean(1, keepdim=True)
        result[list(group), : len(group)] = values @ values.T
    return result


def iter_norm(
    x: Tensor,
    state: State,
    training: bool,
    *,
    iterations: int = 5,
    unbiased: bool = False,
    scaled: bool = True,
    constant: bool = False,
    interleaved: bool = False,
    of_matrices: bool = False,
) -> tuple[Tensor, State]:
    """Whiten each group by Newton iterations.

    Args:
        x: the input.
        state: weight, bias, running_mean, running_cov.
        training: use and move the statistics.
        iterations: another number than 5 is wrong.
        unbiased: True is wrong (division by m - 1).
        scaled: False is wrong (without the root of the trace).
        constant: True is wrong (no gradient through the whitening matrix).
        interleaved: True is wrong (channels 0, 2, 4 and 1, 3 are groups).
        of_matrices: True is wrong (running whitening matrices, as in the
            authors' code).
    """
    count = x.numel() // CHANNELS
    output = torch.zeros_like(x)
    mean, cov = state['running_mean'].clone(), state['running_cov'].clone()
    groups = [[0, 1, 2], [3, 4]]
    if interleaved:
        groups = [[0, 2, 4], [1, 3]]
    for group in groups:
        own = x[:, group]
        size = len(group)
        if training:
            mu = own.sum((0, 2, 3)) / count
            centered = own - mu.view(-1, 1, 1)
            sigma = torch.zeros(size, size, dtype=x.dtype)
            for i in range(size):
                for j in range(size):
                    product = centered[:, i] * centered[:, j]
                    sigma[i, j] = product.sum() / (count - unbiased)
        else:
            mu = mean[group]
            centered = own - mu.view(-1, 1, 1)
            sigma = cov[group][:, :size]
        p = unit = torch.eye(size, dtype=x.dtype)
        sigma = sigma + 1e-5 * unit
        trace = sum(sigma[i, i] for i in range(size))
        for _ in range(iterations):
            p = (3 * p - torch.linalg.matrix_power(p, 3) @ sigma / trace) / 2
        if scaled:
            p = p / trace**0.5
        if constant:
            p = p.detach()
        for i, channel in enumerate(group):
            if training:
                new = p[i] if of_matrices else sigma[i] - 1e-5 * unit[i]
                new = 0.9 * cov[channel, :size] + 0.1 * new
                cov[channel, :size] = new.detach()
                mean[channel] = 0.9 * mean[channel] + 0.1 * mu[i].detach()
            y = sum(p[i, j] * centered[:, j] for j in range(size))
            output[:, channel] = y
    weight, bias = state['weight'], state['bias']
    output = output * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
    return output, {'running_mean': mean, 'running_cov': cov}


CASES = [
    Case(
        'IterNorm',
        iter_norm,
        (
            dict(iterations=4),
            dict(unbiased=True),
            dict(scaled=False),
            dict(constant=True),
            dict(interleaved=True),
            dict(of_matrices=True),
        ),
        saves=3.6,
        options=dict(channels_per_group=LARGEST),
        values=dict(running_cov=covariances),
        one_value='IterNorm needs more than one value per channel',
        keeps='channels are mixed',
        channels=CHANNELS,
    )
]
