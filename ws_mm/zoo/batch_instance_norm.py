"""Batch-Instance Normalization."""

import math
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ._batch import BatchStatistics
from ._maps import joined_moments, moments_of_maps
from ._norm import per_channel

# A step of SGD on gate / ROOT moves the gate ROOT ** 2 = 10 times as far.
ROOT = math.sqrt(10)


@MODELS.register_module()
class BatchInstanceNorm(BatchStatistics):
    """Mix BN and IN of the input by a learned gate per channel.

    Formula:
        gate = clamp(1 + sqrt(10) * gate_offset, 0, 1)
        output = (gate * BN(input) + (1 - gate) * IN(input)) * weight + bias

    Convention: IN of maps of 1x1 is 0. The official training loop clamps the
        gate after each step and trains it with 10 times the learning rate,
        without weight decay. Here the factor in the formula gives SGD, with
        momentum, the same steps; those of Adam are sqrt(10) times as large.
        Each training forward clamps the parameter in place; the clamp in the
        formula is constant to autograd, so no gate gets stuck at a bound.
        Weight decay draws gates to 1, to BN; switch it off as the authors
        do: paramwise_cfg=dict(norm_decay_mult=0).
    State: as its base; ``gate_offset``, one entry per channel, 0 at the
        start, which is BN.

    Source: arXiv 1805.07925; hyeonseob-nam/Batch-Instance-Normalization.
    """

    gate_offset: nn.Parameter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_parameter('gate_offset', 0.0, self.num_features)

    def normalize(self, x: Tensor) -> Tensor:
        """Both normalizations in one step, around the mean of each map."""
        moves = self.begin_forward(x)
        map_mean, map_var = moments_of_maps(x)
        if self.training:
            self.check_values(x)
            mean, var = joined_moments(map_mean, map_var, 0)
            if moves:
                count = x.numel() // x.shape[1]
                unbiased = var.flatten() * (count / (count - 1))
                batch = dict(running_mean=mean.flatten(), running_var=unbiased)
                self.move_statistics(batch, self.momentum)
            if torch.is_grad_enabled():  # what only measures changes nothing
                # Not as a new version: a graph of before may keep it.
                self.gate_offset.data.clamp_(-1 / ROOT, 0)
        else:
            mean, var = self.running(x)
        gate = 1 + self.gate_offset.to(x.dtype) * ROOT
        gate = gate + (gate.clamp(0, 1) - gate).detach()
        gate = per_channel(gate, x)
        of_batch_scale = gate * torch.rsqrt(var + self.eps)
        scale = of_batch_scale + (1 - gate) * torch.rsqrt(map_var + self.eps)
        shift = of_batch_scale * (map_mean - mean)
        return self.scaled_maps(x, map_mean, scale, shift)

    def folded(self) -> None:
        """None: IN is no affine map."""
