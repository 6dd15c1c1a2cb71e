"""Filter Response Normalization (arXiv 1911.09737)."""

from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ._activating import ActivatingNorm
from ._maps import moments_of_maps
from ._norm import per_channel


@MODELS.register_module()
class FRN(ActivatingNorm):
    """Filter Response Normalization with its Thresholded Linear Unit.

    Formula, for each channel of each image:
        y = weight * x / sqrt(mean(x^2) + eps + |learned_eps|) + bias
        output = max(y, tau)
    with the mean over height and width.

    Convention: eps of the paper is 1e-6; mmcv passes 1e-5, as timm has it,
        unless the config sets another. Of one value per map the formula
        keeps only the sign: the paper learns eps there (image pooling).
        Values are widened before they are squared, where timm's half
        precision overflows. Names are those of timm's
        ``FilterResponseNormTlu2d``.
    State: ``weight``, ``bias``, ``tau`` per channel, which starts at 0;
        with learned_eps one ``learned_eps``, which starts at 1e-4.

    Args: those of :class:`~ws_mm.zoo._activating.ActivatingNorm`, and
        learned_eps: whether eps is learned, too; see Convention.

    Source: the listing in the paper, which has no official repository.
    """

    tau: nn.Parameter
    learned_eps: nn.Parameter | None

    def __init__(
        self, *args: Any, learned_eps: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.add_parameter('tau', 0.0, self.num_features)
        self.add_parameter('learned_eps', 1e-4, 1, exists=learned_eps)

    def linear(self, x: Tensor) -> Tensor:
        """Divide by the root mean square, scale and shift."""
        mean, var = moments_of_maps(x)
        square = var + mean.square() + self.eps + 0 * per_channel(self.tau, x)
        if self.learned_eps is not None:
            square = square + self.learned_eps.to(x.dtype).abs()
        return self.scaled_maps(x, torch.zeros_like(mean), square.rsqrt())

    def activated(self, x: Tensor, linear: Tensor | None = None) -> Tensor:
        """Apply the TLU."""
        y = self.linear(x) if linear is None else linear
        # max(y, tau), whose own gradient is slow.
        tau = per_channel(self.tau.to(y.dtype), y)
        return torch.relu(y - tau) + tau
