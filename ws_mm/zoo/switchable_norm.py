"""Switchable Normalization."""

from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..running_statistics import measured_moments
from ._batch import BatchStatistics
from ._maps import joined_moments, moments_of_maps


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
        Its figures need :func:`~ws_mm.update_estimates` after training.
    State: as its base; ``mean_weight`` and ``var_weight``, logits of the
        mixtures, 1 at the start. Weight decay draws them to equal shares.

    Args: those of :class:`~ws_mm.zoo._batch.BatchStatistics`, and
        using_bn: False leaves the mixtures IN and LN, as the authors do
            for one image per GPU. Running values then serve nothing.

    Source: arXiv 1806.10779; switchablenorms/Switchable-Normalization.
    """

    mean_weight: nn.Parameter
    var_weight: nn.Parameter

    def __init__(
        self, *args: Any, using_bn: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.using_bn = using_bn
        self.add_parameter('mean_weight', 1.0, 2 + using_bn)
        self.add_parameter('var_weight', 1.0, 2 + using_bn)

    def normalize(self, x: Tensor) -> Tensor:
        """Mix the statistics and normalize by them."""
        moves = self.begin_forward(x)
        of_batch: tuple[Tensor, ...]
        of_maps = moments_of_maps(x)
        if self.training:
            self.check_values(x, x.numel())
            of_batch = joined_moments(*of_maps, 0)
            if moves:
                mean, var = of_batch
                batch = {
                    'running_mean': mean.flatten(),
                    'running_var': var.flatten(),
                }
                self.move_statistics(batch, self.momentum)
        else:
            of_batch = self.running(x)
        moments = [of_maps, joined_moments(*of_maps, 1), of_batch]
        p = self.mean_weight.to(x.dtype).softmax(0)
        q = self.var_weight.to(x.dtype).softmax(0)
        mean = p[0] * moments[0][0] + p[1] * moments[1][0]
        var = q[0] * moments[0][1] + q[1] * moments[1][1]
        if self.using_bn:
            mean = mean + p[2] * moments[2][0]
            var = var + q[2] * moments[2][1]
        return self.scaled_maps(x, mean, torch.rsqrt(var + self.eps))

    def batch_statistics(self, input: Tensor) -> dict[str, Tensor]:
        """Mean and biased variance."""
        return measured_moments(input, False, unbiased=False)[1]

    def folded(self) -> None:
        """None: IN and LN are no affine maps."""
