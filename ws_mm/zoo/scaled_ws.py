"""Scaled Weight Standardization, of networks without normalization."""

import math
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..conv import WSConv2d
from ..functional import standardize_weight
from ..replacement import fan_in
from ._filters import exact_dtype, reject_others


@MODELS.register_module()
class ScaledWSConv2d(WSConv2d, nn.Conv2d):
    """2D convolution that keeps the variance of what it is given.

    Formula, for each filter (output channel), of fan_in entries w:
        w = gain * gamma * (w - mean(w)) / sqrt(fan_in * (var(w) + eps))
        output = conv2d(input, w) + bias
    with the biased variance.

    Convention: eps and the shape of ``gain`` are those of timm's
        ``ScaledStdConv2d``, whose checkpoints load; the authors' code has
        max(fan_in * var, 1e-4) instead, which differs in filters of almost
        no variance. ``padding`` is that of ``nn.Conv2d``, 0 by default; in
        timm it is half the kernel. Weight decay: the optimizer of the host
        decays ``gain`` as it does ``weight``. The authors exclude gains:
        ``paramwise_cfg=dict(custom_keys={'.gain': dict(decay_mult=0)})``.
        It is no adapter of timm's class, which takes no ``padding_mode``,
        does not say in its state dict that its filters are standardized, and
        cannot be baked; this one is shorter.
    State: as ``nn.Conv2d``, and ``gain`` of shape (out_channels, 1, 1, 1),
        1 at the start. A plain checkpoint loses its function, as in WS.

    Args:
        *args: arguments of ``nn.Conv2d``, in its order.
        gamma: constant of the activation before it, which brings its
            variance back to 1: 1.7139588594 for ReLU. 1 where the activation
            has it already.
        eps: constant added to the variance, in units of weight squared.
        **kwargs: arguments of ``nn.Conv2d``.

    Raises:
        TypeError: an argument is unknown; ``eps_mode`` is.
        ValueError: filters of one entry, or a ``gamma`` that is no finite
            number above 0.

    Source: arXiv 2101.08692; github.com/google-deepmind/deepmind-research,
        nfnets/base.py; timm.layers.
    """

    def __init__(
        self,
        *args: Any,
        gamma: float = 1.0,
        eps: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        reject_others(ScaledWSConv2d, kwargs)
        is_number = isinstance(gamma, (int, float))
        if not is_number or not 0 < gamma < math.inf:
            raise ValueError(
                f'gamma={gamma!r} must be a finite number above 0 '
                '(conv_cfg=dict(gamma=...))'
            )
        super().__init__(*args, eps=eps, eps_mode='inside', **kwargs)
        self.gamma = gamma
        shape = self.out_channels, 1, 1, 1
        self.gain = nn.Parameter(self.weight.new_ones(shape))

    def reset_parameters(self) -> None:
        """Set new filters, and gains of 1."""
        super().reset_parameters()
        if 'gain' in self._parameters:  # not in the constructor of torch
            nn.init.ones_(self.gain)

    def standardized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The filters, of mean 0 and norm gain * gamma."""
        # By the unbiased variance, which is fan_in / (fan_in - 1) times the
        # biased one.
        entries = fan_in(self)
        exact = exact_dtype(self.weight)
        eps = self.eps * entries / (entries - 1)
        filters = standardize_weight(self.weight, eps, 'inside', exact)
        scale = self.gain.to(exact) * (self.gamma / math.sqrt(entries - 1))
        return (filters * scale).to(dtype or self.weight.dtype)

    def extra_repr(self) -> str:
        """Constructor arguments."""
        plain = nn.Conv2d.extra_repr(self)
        return f'{plain}, gamma={self.gamma}, eps={self.eps}'
