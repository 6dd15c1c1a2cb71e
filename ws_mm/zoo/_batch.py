"""The base of the norms here that keep a mean and a variance of batches."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_momentum
from ..running_statistics import RunningStatistics, measured_moments
from ._norm import Norm, per_channel


class BatchStatistics(RunningStatistics, Norm):
    """Base: running mean and variance, as those of ``nn.BatchNorm2d``.

    Training normalizes by the batch, so they serve evaluation only.

    State: buffers ``running_mean`` and ``running_var``, beside the affine.

    Args:
        num_features: channels of the input.
        eps: constant added to the variance.
        momentum: share of the newest batch in the running values.
        affine: whether scale and shift are learned.
        unknown: arguments that the subclass does not have.
        device: device of parameters and buffers.
        dtype: dtype of the parameters.
        num_rows: number of values of each statistic; None: one per channel.
    """

    statistics: ClassVar = {'running_mean': 0.0, 'running_var': 1.0}
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float,
        affine: bool,
        unknown: Mapping[str, Any],
        device: Any = None,
        dtype: torch.dtype | None = None,
        num_rows: int | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, unknown, device, dtype)
        check_momentum(momentum, 'norm_cfg')
        self.momentum = momentum
        self.register_statistics(num_rows or num_features, device, dtype)

    @property
    def estimating(self) -> bool:
        """Return False: training normalizes by the batch."""
        return False

    def rows(self, x: Tensor) -> Tensor:
        """View as (N, rows of the statistics, *)."""
        return x

    def batch_statistics(self, input: Tensor) -> dict[str, Tensor]:
        """Mean and unbiased variance."""
        return measured_moments(self.rows(input), False, unbiased=True)[1]

    def batch_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """``F.batch_norm`` of rows; moves the statistics in training."""
        moves = self.begin_forward(x)
        if weight is not None and bias is not None:
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        if not self.training:
            mean, var = self.running(x)
            return F.batch_norm(
                x, mean.flatten(), var.flatten(), weight, bias, eps=self.eps
            )
        self.check_values(x, x.numel() // x.shape[1])
        # With momentum 1 it leaves the moments of the batch in these.
        mean, var = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
        y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, self.eps)
        if moves:
            self.move_statistics(
                {'running_mean': mean, 'running_var': var}, self.momentum
            )
        return y

    def running(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the statistics, per channel of x.

        Later calls may change the buffers before a backward.
        """
        mean = self.running_mean.to(x.dtype, copy=True)
        var = self.running_var.to(x.dtype, copy=True)
        return per_channel(mean, x), per_channel(var, x)

    def check_values(self, x: Tensor, count: int) -> None:
        """Reject statistics of a single value."""
        if count < 2:
            raise ValueError(
                f'{type(self).__name__} needs more than one value per '
                'statistic in training, got an input of shape '
                f'{tuple(x.shape)}. Use larger batches or maps, or '
                "norm_cfg=dict(type='GN', num_groups=32), which normalizes "
                'each image'
            )

    def fold(
        self, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, nn.Module]:
        """What :meth:`folded` returns, with this affine."""
        scale = (self.running_var.double() + self.eps).rsqrt()
        shift = -self.running_mean.double() * scale
        repeats = self.num_features // len(scale)
        scale, shift = (
            values.repeat_interleave(repeats) for values in (scale, shift)
        )
        if weight is not None and bias is not None:
            scale, shift = scale * weight, shift * weight + bias
        return scale, shift, nn.Identity()


def instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each map, of shape (N, C, 1, ...)."""
    if x.dim() == 2:
        return x, torch.zeros_like(x)
    dims = tuple(range(2, x.dim()))
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return mean, var


def joined_moments(
    mean: Tensor, var: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Those of the maps along one dimension together; nothing cancels."""
    spread, joined = torch.var_mean(mean, dim, correction=0, keepdim=True)
    return joined, var.mean(dim, keepdim=True) + spread
