"""Batch Renormalization (arXiv 1702.03275)."""

from typing import Any, ClassVar

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..arguments import check_count, check_number
from ..kernels.settled import settle
from ..running_statistics import measured_moments
from ._maps import joined_moments, moments_of_maps
from ._norm import RunningNorm, fold, per_channel


@MODELS.register_module()
class BatchRenorm(RunningNorm):
    """Batch norm, corrected towards the running statistics.

    Formula, with mean and std of the batch, std = sqrt(var + eps):
        r = clip(std / running_std, 1 / R, R)
        d = clip((mean - running_mean) / running_std, -D, D)
        y = weight * ((x - mean) / std * r + d) + bias
        running_mean = (1 - momentum) * running_mean + momentum * mean
        running_std = (1 - momentum) * running_std + momentum * std
    r and d use the running values before this batch; no gradient passes
    through them. R goes from 1 to ``r_max`` and D from 0 to ``d_max``, both
    linearly, over the optimizer steps ``warmup`` to ``r_steps`` and
    ``d_steps``. At R = 1, D = 0 it is batch norm. In evaluation:
        y = weight * (x - running_mean) / running_std + bias

    Convention: algorithm 1 of the paper, and its schedule. The variance is
        biased, and running_std contains eps. A BatchNorm that it replaces,
        or whose checkpoint it loads, gives sqrt(running_var + eps).
    State: as its base, ``running_mean``, ``running_std``, both before their
        last move as ``previous_mean`` and ``previous_std``, for a recomputed
        forward, and ``num_forwards``, the number of training forwards.

    Args: those of :class:`~ws_mm.zoo._norm.RunningNorm`, and
        r_max: final bound of r, at least 1.
        d_max: final bound of d.
        warmup: optimizer steps of plain batch norm.
        r_steps: optimizer step at which R is ``r_max``.
        d_steps: the same of D.
        accumulative_counts: forwards per optimizer step: that of the
            optim_wrapper, times the calls of a shared layer per image.

    Source: arXiv 1702.03275; no official repository.
    """

    statistics: ClassVar = {
        'running_mean': 0.0,
        'running_std': 1.0,
        'previous_mean': 0.0,
        'previous_std': 1.0,
    }
    running_mean: Tensor
    running_std: Tensor
    previous_mean: Tensor
    previous_std: Tensor
    num_forwards: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.01,
        affine: bool = True,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: int = 5000,
        r_steps: int = 40000,
        d_steps: int = 25000,
        accumulative_counts: int = 1,
        **kwargs: Any,
    ) -> None:
        check_number('r_max', r_max, 1, 'norm_cfg')
        check_number('d_max', d_max, 0, 'norm_cfg')
        check_number('warmup', warmup, 0, 'norm_cfg')
        check_number('r_steps', r_steps, warmup, 'norm_cfg')
        check_number('d_steps', d_steps, warmup, 'norm_cfg')
        check_count('accumulative_counts', accumulative_counts, 1, 'norm_cfg')
        super().__init__(num_features, eps, momentum, affine, **kwargs)
        self.warmup, self.r_max, self.d_max = warmup, r_max, d_max
        self.r_steps, self.d_steps = r_steps, d_steps
        self.accumulative_counts = accumulative_counts
        self.count_forwards()

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize an input that has values."""
        if not self.training:
            mean, std = self.running(x)[:2]
            return self.scaled((x - mean) / std)
        self.check_values(x)
        moves = self.begin_forward(x)
        mean, var = joined_moments(*moments_of_maps(x), 0)
        std = (var + self.eps).sqrt()
        if moves:
            before = dict(
                previous_mean=self.running_mean, previous_std=self.running_std
            )
            self.move_statistics(before, 1.0)
            batch = dict(
                running_mean=mean.flatten(), running_std=std.flatten()
            )
            self.move_statistics(batch, self.momentum)
            settle(self.num_forwards, self.num_forwards + 1)
        r, d = self._correction(mean.detach(), std.detach())
        return self.scaled_maps(x, mean, r / std, d)

    def _correction(self, mean: Tensor, std: Tensor) -> tuple[Tensor, ...]:
        """The constants r and d of a batch that has been counted."""
        center = per_channel(self.previous_mean.to(std.dtype), std)
        scale = per_channel(self.previous_std.to(std.dtype), std)
        forwards = self.num_forwards - 1
        done = (forwards // self.accumulative_counts - self.warmup).to(std)
        lengths = self.r_steps - self.warmup, self.d_steps - self.warmup
        grown = [(done / max(n, 1)).clamp(0, 1) for n in lengths]
        r_bound = 1 + (self.r_max - 1) * grown[0]
        d_bound = self.d_max * grown[1]
        r = torch.minimum(torch.maximum(std / scale, 1 / r_bound), r_bound)
        d = (mean - center) / scale
        return r, torch.minimum(torch.maximum(d, -d_bound), d_bound)

    def batch_statistics(self, input: Tensor) -> dict[str, Tensor]:
        """Mean and standard deviation of a batch, eps included."""
        found = measured_moments(input, False, unbiased=False)[1]
        std = (found['running_var'] + self.eps).sqrt()
        return dict(running_mean=found['running_mean'], running_std=std)

    def of_batch_norm(self, mean: Tensor, var: Tensor) -> dict[str, Tensor]:
        """Take the root, which contains eps here."""
        return dict(running_mean=mean, running_std=(var + self.eps).sqrt())

    def folded(self) -> tuple[Tensor, Tensor, nn.Module]:
        """Scale and shift of evaluation."""
        mean, std = self.running_mean, self.running_std
        return fold(mean, std, self.weight, self.bias)
