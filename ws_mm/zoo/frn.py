"""Filter Response Normalization (arXiv 1911.09737)."""

from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ._activating import ActivatingNorm
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
        keeps the sign, and no gradient reaches the layers before: the paper
        learns eps there (image pooling). Values are widened before they are
        squared, where timm's half precision overflows. Parameters have the
        names of timm's ``FilterResponseNormTlu2d``.
    State: ``weight``, ``bias``, ``tau`` per channel, which starts at 0;
        with learned_eps one ``learned_eps``, which starts at 1e-4.

    Args:
        num_features: channels of the input.
        eps: constant added to the mean square.
        affine: whether scale and shift are learned.
        replaces_act: whether the ReLU that directly follows becomes
            the TLU, see :class:`~ws_mm.zoo._activating.ActivatingNorm`.
        learned_eps: whether eps is learned, too; see Convention.
        device: device of the parameters.
        dtype: dtype of the parameters.
        **unknown: none; a misspelt argument is rejected by name.

    Raises:
        TypeError: an argument is unknown.
        ValueError: an argument has an illegal value.

    Source: the listing in the paper, which has no official repository.
    """

    learned_eps: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        replaces_act: bool = False,
        learned_eps: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            affine,
            replaces_act,
            unknown,
            device,
            dtype,
        )
        made = dict(device=device, dtype=dtype)
        self.tau = nn.Parameter(torch.empty(num_features, **made))
        of_eps = nn.Parameter(torch.empty(1, **made)) if learned_eps else None
        self.register_parameter('learned_eps', of_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set scale 1, shift and threshold 0, the learned eps 1e-4."""
        super().reset_parameters()
        if hasattr(self, 'tau'):  # nn.GroupNorm calls this before it is made
            nn.init.zeros_(self.tau)
        learned = getattr(self, 'learned_eps', None)
        if learned is not None:
            nn.init.constant_(learned, 1e-4)

    def linear(self, x: Tensor) -> Tensor:
        """Divide by the root mean square, scale and shift."""
        square, space = x.square(), tuple(range(2, x.dim()))
        if space:
            square = square.mean(space, keepdim=True)
        square = square + self.eps + 0 * per_channel(self.tau, x)
        if self.learned_eps is not None:
            square = square + self.learned_eps.to(x.dtype).abs()
        return self.scaled(x * square.rsqrt())

    def activated(self, x: Tensor, linear: Tensor | None = None) -> Tensor:
        """Apply the TLU."""
        y = self.linear(x) if linear is None else linear
        return torch.maximum(y, per_channel(self.tau.to(y.dtype), y))
