"""The base of the norms here that keep a mean and a variance of batches."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..running_statistics import measured_moments
from ._norm import RunningNorm, fold


class BatchStatistics(RunningNorm):
    """Base: running mean and variance, as those of ``nn.BatchNorm2d``.

    Training normalizes by the batch, so they serve evaluation only.

    State: buffers ``running_mean`` and ``running_var``, beside the affine.

    Args: those of :class:`~ws_mm.zoo._norm.RunningNorm`.
    """

    statistics: ClassVar = {'running_mean': 0.0, 'running_var': 1.0}
    running_mean: Tensor
    running_var: Tensor
    estimating = False

    def batch_statistics(self, input: Tensor) -> dict[str, Tensor]:
        """Mean and unbiased variance."""
        return measured_moments(input, False, unbiased=True)[1]

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
        self.check_values(x)
        # With momentum 1 it leaves the moments of the batch in these.
        mean, var = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
        y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, self.eps)
        if moves:
            batch = dict(running_mean=mean, running_var=var)
            self.move_statistics(batch, self.momentum)
        return y

    def folded(self) -> tuple[Tensor, Tensor, nn.Module] | None:
        """Scale and shift of evaluation."""
        return self.folded_with(self.weight, self.bias)

    def folded_with(
        self, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, nn.Module]:
        """The same, with this affine; a statistic may be of a group."""
        std = (self.running_var.double() + self.eps).sqrt()
        repeats = self.num_features // len(std)
        mean = self.running_mean.repeat_interleave(repeats)
        return fold(mean, std.repeat_interleave(repeats), weight, bias)
