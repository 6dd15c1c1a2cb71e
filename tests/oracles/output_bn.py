"""BN of the outputs of a classifier, class by class."""

import torch
from torch import Tensor

from oracles import Case, State


def output_bn(
    x: Tensor,
    state: State,
    training: bool,
    *,
    unbiased: bool = False,
    biased_running: bool = False,
    scaled: bool = False,
) -> tuple[Tensor, State]:
    """BN without a scale.

    Args:
        x: the outputs, (N, classes, H, W).
        state: bias, running_mean, running_var.
        training: use and move the statistics.
        unbiased: True is wrong (normalizes by the variance of n - 1).
        biased_running: True is wrong (keeps the variance of n).
        scaled: True is wrong (the shift comes before the division).
    """
    classes = []
    mean, var = state['running_mean'].clone(), state['running_var'].clone()
    for number, own in enumerate(x.unbind(1)):
        mu, sigma = mean[number].clone(), var[number].clone()
        if training:
            count = own.numel()
            mu = own.sum() / count
            squares = ((own - mu) ** 2).sum()
            sigma = squares / (count - unbiased)
            kept = squares / (count - (not biased_running))
            mean[number] = 0.9 * mean[number] + 0.1 * mu.detach()
            var[number] = 0.9 * var[number] + 0.1 * kept.detach()
        shift, root = state['bias'][number], (sigma + 1e-5) ** 0.5
        shifted = own - mu + shift if scaled else own - mu + shift * root
        classes.append(shifted / root)
    after = {'running_mean': mean, 'running_var': var}
    return torch.stack(classes, 1), after


CASES = [
    Case(
        'OutputBN',
        output_bn,
        (
            dict(unbiased=True),
            dict(biased_running=True),
            dict(scaled=True),
        ),
        one_value='OutputBN needs more than one image in training',
        one_image='OutputBN needs more than one image in training',
    )
]
