"""Positional Normalization."""

from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor

from ._norm import Norm


@MODELS.register_module()
class PositionalNorm(Norm):
    """Normalize each position of each image over its channels.

    Formula, over the channels of one position:
        output = (input - mean) / sqrt(var + eps) * weight + bias

    Convention: unbiased variance, as in the official code; the paper divides
        by the number of channels. The official code has no affine
        (``affine=False``): it gives mean and deviation to a later layer of
        a generator (moment shortcut), for which a norm has no place here.
    State: affine per channel. Training and evaluation are alike.

    Args:
        num_features: channels of the input, at least 2.
        eps: constant added to the variance.
        affine: whether scale and shift are learned.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        TypeError: an argument is unknown.
        ValueError: an argument has an illegal value, or there is a single
            channel.

    Source: arXiv 1907.04312; Boyiliee/PONO.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(num_features, eps, affine, unknown, device, dtype)
        if num_features < 2:
            raise ValueError(
                f'num_features={num_features} must be at least 2: '
                'PositionalNorm normalizes over channels. Use '
                "norm_cfg=dict(type='GN', num_groups=1)"
            )

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize over channels."""
        var, mean = torch.var_mean(x, 1, correction=1, keepdim=True)
        return self.scaled((x - mean) * torch.rsqrt(var + self.eps))
