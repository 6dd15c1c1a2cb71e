"""BNET, pixel by pixel (arXiv 2011.14150)."""

import torch
from torch import Tensor

from oracles import Case
from oracles._moments import moments, moved

EPS, MOMENTUM, SIZE = 1e-5, 0.1, 3


def oracle(
    x: Tensor,
    state: dict[str, Tensor],
    training: bool,
    *,
    columns_first: bool = False,
    flipped: bool = False,
    padded_input: bool = False,
    unbiased: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """BN of (N, C, H, W) without affine, then a kernel per channel.

    Args:
        x: the input.
        state: weight (middle), around, bias, running values.
        training: whether the statistics are those of x.
        columns_first: True is wrong (order of the entries).
        flipped: True is wrong (a convolution of the mathematicians).
        padded_input: True is wrong (the mean, not 0, beyond the border).
        unbiased: False is wrong (biased running variance).
    """
    channels, height, width = x.shape[1:]
    count = x.numel() // channels
    outputs, means, variances = [], [], []
    for c in range(channels):
        mean, var = moments(x[:, c])
        means.append(mean)
        variances.append(var * count / (count - 1) if unbiased else var)
        if not training:
            mean, var = state['running_mean'][c], state['running_var'][c]
        deviation = (var + EPS) ** 0.5
        y = (x[:, c] - mean) / deviation
        outside = -mean / deviation if padded_input else mean * 0
        per_channel = SIZE * SIZE - 1
        entries = list(
            state['around'][c * per_channel : (c + 1) * per_channel]
        )
        entries.insert(per_channel // 2, state['weight'][c])
        result = 0
        for i in range(SIZE):
            for j in range(SIZE):
                entry = entries[
                    j * SIZE + i if columns_first else i * SIZE + j
                ]
                down, right = i - SIZE // 2, j - SIZE // 2
                if flipped:
                    down, right = -down, -right
                shifted = torch.stack(
                    [
                        y[:, h + down, w + right]
                        if 0 <= h + down < height and 0 <= w + right < width
                        else outside.expand(len(x))
                        for h in range(height)
                        for w in range(width)
                    ],
                    1,
                )
                result = result + entry * shifted
        outputs.append(result.reshape(y.shape) + state['bias'][c])
    y = torch.stack(outputs, 1)
    if not training:
        return y, dict(state)
    return y, moved(
        state, torch.stack(means), torch.stack(variances), MOMENTUM
    )


CASES = [
    Case(
        'BNET',
        oracle,
        saves=2,
        wrong=(
            dict(columns_first=True),
            dict(flipped=True),
            dict(padded_input=True),
            dict(unbiased=False),
        ),
        one_value="BNET needs more than one value.*type='GN'",
        refuses=(0, 1, 3),
    )
]
