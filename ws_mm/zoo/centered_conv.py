"""Convolution with centered filters, as MABN needs them."""

from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..checkpoint import CENTERED
from ..conv import WSConv2d
from ..kernels.plain import at_least_float32
from ._filters import reject_others


@MODELS.register_module()
class CenteredConv2d(WSConv2d):
    """2D convolution whose filters have mean 0.

    Formula, for each filter (output channel) w:
        output = conv2d(input, w - mean(w)) + bias

    Convention: a ``nn.Conv2d`` in arguments, initial values and state, where
        the authors' has bias=False. The scale of the filters counts: those of
        a WS network mean something else here, and loading them warns.

    Source: arXiv 2001.06838; github.com/megvii-model/MABN, ``CenConv2d``.
    """

    _version = CENTERED
    _unknown_filters = (
        'the checkpoint does not say that its filters were trained centered. '
        'Those of a plain or a WS network compute something else here'
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        reject_others(CenteredConv2d, kwargs)
        super().__init__(*args, **kwargs)

    def standardized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The centered weight."""
        weight = at_least_float32(self.weight)
        centered = weight - weight.mean((1, 2, 3), keepdim=True)
        return centered.to(dtype or self.weight.dtype)

    def _fits(self, version: int) -> bool:
        return version == CENTERED

    def _is_scaled(self, before: Tensor | None, after: Tensor) -> bool:
        return False  # a scale stays one

    def extra_repr(self) -> str:
        """Constructor arguments."""
        return str(nn.Conv2d.extra_repr(self))
