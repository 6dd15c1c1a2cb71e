"""BCN with one ingredient changed: what an experiment asks, no user needs."""

from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor
from torch.nn import functional as F

from ws_mm import BCN
from ws_mm.functional import batch_channel_norm, updated_estimates


class EstimateBCN(BCN):
    """What the variants share: estimates that move, and the second step.

    Args:
        *args: Arguments of ``BCN``.
        **kwargs: Arguments of ``BCN``.

    Raises:
        ValueError: ``mode`` is not 'estimate'.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.mode != 'estimate':
            raise ValueError(
                f'mode={self.mode!r}: {type(self).__name__} is for '
                "mode='estimate'"
            )

    def moved(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The estimates, in training after they moved towards ``x``."""
        if not self.training:
            return self.running_mean, self.running_var
        mean, var = updated_estimates(
            x, self.running_mean, self.running_var, self.momentum
        )
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)
        return mean, var

    def normalize_channels(self, x: Tensor) -> Tensor:
        """The second step alone."""
        affine = (
            a
            if a is None
            else a.repeat_interleave(self.num_features // len(a))
            for a in (self.weight, self.bias)
        )
        return F.group_norm(x, self.num_groups, *affine, self.eps)

    def normalize_batch(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """The first step alone, by given statistics."""
        affine = self.bn_weight, self.bn_bias
        return F.batch_norm(x, mean, var, *affine, eps=self.eps)


@MODELS.register_module()
class VariantBCN(EstimateBCN):
    """BCN whose inner normalization does less, or blends in the image's own.

    Formula, with mean and var the estimates after their update, m and v the
    moments of one image (constants to the gradient, as the estimates are):
        centering=False: mean = 0
        scaling=False: var = 1
        blend=b: (1 - b) mean + b m and (1 - b) var + b v

    Convention: a blend is taken in training and in evaluation.

    Args:
        *args: Arguments of ``BCN``.
        centering: subtract the mean.
        scaling: divide by the standard deviation.
        blend: share of the image's own moments, in [0, 1].
        **kwargs: Arguments of ``BCN``.

    Raises:
        ValueError: ``blend`` is outside [0, 1], or ``mode`` not 'estimate'.
    """

    def __init__(
        self,
        *args: Any,
        centering: bool = True,
        scaling: bool = True,
        blend: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= blend <= 1:
            raise ValueError(
                f'blend={blend!r} must be in [0, 1] (norm_cfg=dict(blend=...))'
            )
        self.centering, self.scaling, self.blend = centering, scaling, blend

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` of shape (N, num_features, *)."""
        if not input.numel():
            return self._normalize(input, self.running_mean, self.running_var)
        mean, var = self.moved(input)
        if self.blend:
            with torch.no_grad():
                own = torch.var_mean(
                    input.reshape(*input.shape[:2], -1), 2, correction=0
                )
                mean = torch.lerp(mean, own[1], self.blend)
                var = torch.lerp(var, own[0], self.blend)
        return self._normalize(input, mean, var)

    def _normalize(self, input: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        # Images with moments of their own are channels of one image.
        count = mean.numel() // self.num_features
        affines = (self.bn_weight, self.bn_bias, self.weight, self.bias)
        output = batch_channel_norm(
            input.reshape(-1, mean.numel(), *input.shape[2:]),
            self.num_groups * count,
            (mean if self.centering else torch.zeros_like(mean)).flatten(),
            (var if self.scaling else torch.ones_like(var)).flatten(),
            *(a if a is None else a.repeat(count) for a in affines),
            eps=self.eps,
        )
        return output.view_as(input)


@MODELS.register_module()
class ChannelFirstBCN(EstimateBCN):
    """BCN in the other order: the groups of an image, then the channels.

    Formula, with mean and var the estimates of z after their update:
        z = group_norm(input, num_groups, weight, bias)
        output = (z - mean) / sqrt(var + eps) * bn_weight + bn_bias

    Convention: the estimates are of what an image's own statistics have
        normalized, so they do not see its brightness and contrast.

    Args:
        *args: Arguments of ``BCN``.
        **kwargs: Arguments of ``BCN``.

    Raises:
        ValueError: ``mode`` is not 'estimate'.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` of shape (N, num_features, *)."""
        if not input.numel():
            return super().forward(input)
        z = self.normalize_channels(input)
        return self.normalize_batch(z, *self.moved(z))
