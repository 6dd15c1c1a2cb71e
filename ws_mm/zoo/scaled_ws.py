"""Scaled Weight Standardization, of networks without normalization."""

import math
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..conv import WSConv2d
from ..functional import standardize_weight
from ..kernels.plain import at_least_float32
from ..replacement import fan_in
from ._filters import reject_others


@MODELS.register_module()
class ScaledWSConv2d(WSConv2d, nn.Conv2d):
    """2D convolution that keeps the variance of what it is given.

    Formula, for each filter (output channel), of fan_in entries w:
        w = gain * gamma * (w - mean(w)) / sqrt(fan_in * (var(w) + eps))
        output = conv2d(input, w) + bias
    with the biased variance.

    Convention: eps and the shape of ``gain`` are those of timm's
        ``ScaledStdConv2d``, whose checkpoints load; the authors' code has
        max(fan_in * var, 1e-4) instead. ``padding`` is 0 by default; in timm
        it is half the kernel. The host decays ``gain`` as ``weight``, the
        authors do not:
        ``paramwise_cfg=dict(custom_keys={'.gain': dict(decay_mult=0)})``.
    State: as ``nn.Conv2d``, and ``gain`` of shape (out_channels, 1, 1, 1),
        1 at the start. A plain checkpoint loses its function, as in WS.

    Args: those of ``nn.Conv2d``, and
        gamma: constant that brings the variance of the activation before it
            back to 1: 1.7139588594 for ReLU.
        eps: constant added to the variance, in units of weight squared.

    Source: arXiv 2101.08692; google-deepmind/deepmind-research, nfnets/.
    """

    def __init__(
        self, *args: Any, gamma: float = 1.0, eps: float = 1e-6, **kwargs: Any
    ) -> None:
        reject_others(ScaledWSConv2d, kwargs)
        if not (isinstance(gamma, (int, float)) and 0 < gamma < math.inf):
            raise ValueError(
                f'gamma={gamma!r} must be a finite number above 0 '
                '(conv_cfg=dict(gamma=...))'
            )
        super().__init__(*args, eps=eps, eps_mode='inside', **kwargs)
        self.gamma = gamma
        gain = self.weight.new_ones(self.out_channels, 1, 1, 1)
        self.gain = nn.Parameter(gain)

    def reset_parameters(self) -> None:
        """Set new filters, and gains of 1."""
        super().reset_parameters()
        if 'gain' in self._parameters:  # not in the constructor of torch
            nn.init.ones_(self.gain)

    def standardized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The filters, of mean 0 and norm gain * gamma."""
        entries = fan_in(self)  # and entries - 1 of the unbiased variance
        exact = at_least_float32(self.weight).dtype
        eps = self.eps * entries / (entries - 1)
        filters = standardize_weight(self.weight, eps, 'inside', exact)
        scale = self.gain.to(exact) * (self.gamma / math.sqrt(entries - 1))
        return (filters * scale).to(dtype or self.weight.dtype)

    def extra_repr(self) -> str:
        """Constructor arguments."""
        plain = nn.Conv2d.extra_repr(self)
        return f'{plain}, gamma={self.gamma}, eps={self.eps}'
