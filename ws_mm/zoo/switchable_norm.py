"""Switchable Normalization."""

from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..kernels.plain import at_least_float32
from ._batch import BatchStatistics, instance_moments, joined_moments


@MODELS.register_module()
class SwitchableNorm(BatchStatistics):
    """Normalize by learned mixtures of IN, LN and BN statistics.

    Formula, with the moments of each image and channel (IN), of each image
    (LN), and of each channel (BN; running ones in evaluation):
        p = softmax(mean_weight), q = softmax(var_weight)
        mean = p[0] mean_IN + p[1] mean_LN + p[2] mean_BN
        var = q[0] var_IN + q[1] var_LN + q[2] var_BN
        output = (input - mean) / sqrt(var + eps) * weight + bias

    Convention: all variances are biased. The official code takes the
        unbiased one of each map, from which it computes the others, and is
        NaN for maps of 1x1. Its running variance starts at 0, ours at 1,
        as that of BN. Its momentum of 0.9 is the share that stays: 0.1 here.
        Its figures with the mean over many batches in the place of running
        values need :func:`~ws_mm.update_estimates` after training.
    State: ``mean_weight`` and ``var_weight``, logits of the mixtures, each 1
        at the start; affine; ``running_mean``, ``running_var`` (biased).
        A weight decay of norms draws the mixtures to equal shares.

    Args:
        num_features: channels of the input.
        eps: constant added to the variance.
        momentum: share of the newest batch in the running values.
        affine: whether scale and shift are learned; logits always are.
        using_bn: False leaves the mixtures IN and LN, as the authors do
            for one image per GPU. Running values then serve nothing.
        device: device of parameters and buffers.
        dtype: dtype of the parameters.

    Raises:
        TypeError: an argument is unknown.
        ValueError: an argument has an illegal value, or the whole batch is a
            single value in training.

    Source: arXiv 1806.10779; switchablenorms/Switchable-Normalization.
    """

    mean_weight: nn.Parameter
    var_weight: nn.Parameter

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        *,
        using_bn: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, unknown, device, dtype
        )
        self.using_bn = using_bn
        for name in ('mean_weight', 'var_weight'):
            logits = torch.ones(2 + using_bn, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(logits))

    def reset_parameters(self) -> None:
        """Restore affine, statistics and equal shares."""
        super().reset_parameters()
        for name in ('mean_weight', 'var_weight'):
            if name in self._parameters:
                nn.init.ones_(self.get_parameter(name))

    def normalize(self, x: Tensor) -> Tensor:
        """Mix the statistics and normalize by them."""
        moves = self.begin_forward(x)
        of_maps = instance_moments(x)
        moments = [of_maps, joined_moments(*of_maps, 1)]
        if self.training:
            self.check_values(x, x.numel())
            moments.append(joined_moments(*of_maps, 0))
            if moves:
                of_batch = {
                    'running_mean': moments[2][0].detach().flatten(),
                    'running_var': moments[2][1].detach().flatten(),
                }
                self.move_statistics(of_batch, self.momentum)
        else:
            moments.append(self.running(x))
        p = self.mean_weight.to(x.dtype).softmax(0)
        q = self.var_weight.to(x.dtype).softmax(0)
        mean = p[0] * moments[0][0] + p[1] * moments[1][0]
        var = q[0] * moments[0][1] + q[1] * moments[1][1]
        if self.using_bn:
            mean = mean + p[2] * moments[2][0]
            var = var + q[2] * moments[2][1]
        return self.scaled((x - mean) * torch.rsqrt(var + self.eps))

    def batch_statistics(self, input: Tensor) -> dict[str, Tensor]:
        """Mean and biased variance of each channel."""
        of_maps = instance_moments(at_least_float32(input))
        mean, var = joined_moments(*of_maps, 0)
        return dict(running_mean=mean.flatten(), running_var=var.flatten())
