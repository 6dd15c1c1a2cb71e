"""Positional Normalization."""

from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor

from ._norm import Norm


@MODELS.register_module()
class PositionalNorm(Norm):
    """Normalize each position of each image over its channels.

    Formula, over the channels, at least two, of one position:
        output = (input - mean) / sqrt(var + eps) * weight + bias

    Convention: unbiased variance, as in the official code; the paper divides
        by the number of channels. The official code has no affine, and gives
        mean and deviation to a later layer of a generator; this does not.
    State: affine per channel. Training and evaluation are alike.

    Source: arXiv 1907.04312; Boyiliee/PONO.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.num_features < 2:
            raise ValueError(
                f'num_features={self.num_features} must be at least 2: '
                'PositionalNorm normalizes over channels. Use '
                "norm_cfg=dict(type='GN', num_groups=1)"
            )

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize over channels."""
        deviation = x - x.mean(1, keepdim=True)
        square = deviation.square().sum(1, keepdim=True)
        var = square / (self.num_features - 1)
        return self.scaled(deviation * torch.rsqrt(var + self.eps))
