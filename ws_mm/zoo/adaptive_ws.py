"""Adaptive Weight Standardization, for plain pretrained filters."""

from collections.abc import Callable
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..functional import standardize_weight
from ..kernels.plain import at_least_float32
from ..running_statistics import keep_exact
from ._filters import Filters


@MODELS.register_module()
class AdaptiveWSConv2d(Filters, nn.Conv2d):
    """2D convolution with a standardized weight that starts as it was.

    Formula, for each filter (output channel) w:
        w = weight_gamma * (w - mean(w)) / sqrt(var(w) + eps) + weight_beta
        output = conv2d(input, w) + bias
    with the unbiased variance; ``eps_mode='outside'`` is std(w) + eps. At
    the start, weight_beta is mean(w), weight_gamma the root: nothing
    changes.

    Convention: names, eps and constant gains are those of DetectoRS, that is
        of mmcv's ``ConvAWS``, whose checkpoints load. They are buffers:
        nothing trains or decays them. Decay of ``weight`` changes no output.
        An initializer that fills ``weight`` later does not set them; a norm
        behind it takes the scale out.
    State: as ``nn.Conv2d``, and buffers ``weight_gamma``, ``weight_beta`` of
        shape (out_channels, 1, 1, 1), which ``half()`` does not round. A
        checkpoint without them keeps its function, see ``Filters``.

    Args: those of :class:`~ws_mm.conv.WSConv2d`; ``eps_mode`` is 'inside'.

    Source: arXiv 2006.02334; ``ConvAWS2d`` of github.com/open-mmlab/mmcv.
    """

    weight_gamma: Tensor
    weight_beta: Tensor

    def __init__(
        self,
        *args: Any,
        eps: float = 1e-5,
        eps_mode: str = 'inside',
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, eps=eps, eps_mode=eps_mode, **kwargs)
        for name, values in self.values_of(self.weight.detach()).items():
            self.register_buffer(name, values)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set new filters, and the buffers that belong to them."""
        super().reset_parameters()
        if self._buffers:  # not in the constructor of torch
            for name, values in self.values_of(self.weight).items():
                self.get_buffer(name).copy_(values)

    def standardized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The standardized weight, times weight_gamma, plus weight_beta."""
        exact = at_least_float32(self.weight).dtype
        filters = standardize_weight(
            self.weight, self.eps, self.eps_mode, exact
        )
        filters = self.weight_gamma.to(exact) * filters
        filters = filters + self.weight_beta.to(exact)
        return filters.to(dtype or self.weight.dtype)

    def values_of(self, weight: Tensor) -> dict[str, Tensor]:
        """Root of the variance, and mean, of each filter."""
        weight = at_least_float32(weight)
        var, mean = torch.var_mean(weight, (1, 2, 3), keepdim=True)
        if self.eps_mode == 'inside':
            return dict(weight_gamma=(var + self.eps).sqrt(), weight_beta=mean)
        return dict(weight_gamma=var.sqrt() + self.eps, weight_beta=mean)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> 'AdaptiveWSConv2d':
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        keep_exact(self, exact)
        return self
