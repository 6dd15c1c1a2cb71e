"""Weight Normalization, and the batch norm that the paper pairs with it."""

import math
from typing import Any, ClassVar

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..kernels.plain import at_least_float32
from ._filters import Filters, reject_others
from ._norm import RunningNorm, fold, over_channels, per_channel

# A filter of zeros has no direction; it computes and learns as a plain one.
LEAST_NORM = 1e-12
FIRST_NORM = math.sqrt(2)


@MODELS.register_module()
class WNConv2d(Filters, nn.Conv2d):
    """2D convolution whose filters have a learned norm.

    Formula, for each filter (output channel) v, entries of ``weight``:
        w = gain * v / sqrt(sum(v^2))
        output = conv2d(input, w) + bias

    Convention: gains start at sqrt(2), the norm of a filter in He's
        initialization, whatever fills ``weight``. The authors start at 1 and
        scale by the data of the first batch. Mean and scale of an output are
        not fixed: a norm behind it, such as :class:`MeanOnlyBN`, is usual.
        The host decays ``gain`` as it does ``weight``, whose decay changes
        no output. The authors have no decay:
        ``paramwise_cfg=dict(custom_keys={'.gain': dict(decay_mult=0)})``.
    State: as ``nn.Conv2d``, and ``gain`` of shape (out_channels,). A plain
        checkpoint keeps its function: its gains are the norms of its filters.

    Source: arXiv 1602.07868; github.com/openai/weightnorm, lasagne/.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        reject_others(WNConv2d, kwargs)
        super().__init__(*args, **kwargs)
        gain = self.weight.new_full((self.out_channels,), FIRST_NORM)
        self.gain = nn.Parameter(gain)

    def reset_parameters(self) -> None:
        """Set new filters, and gains of sqrt(2)."""
        super().reset_parameters()
        if 'gain' in self._parameters:  # not in the constructor of torch
            nn.init.constant_(self.gain, FIRST_NORM)

    def standardized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The filters, of norm gain."""
        weight = at_least_float32(self.weight)
        norms, gain = _norms(weight), self.gain.to(weight.dtype)
        scale = torch.where(norms > LEAST_NORM, gain / norms, 1.0)
        filters = weight * scale.view(-1, 1, 1, 1)
        return filters.to(dtype or self.weight.dtype)

    def values_of(self, weight: Tensor) -> dict[str, Tensor]:
        """The norms of the filters."""
        return {'gain': _norms(at_least_float32(weight))}

    def extra_repr(self) -> str:
        """Constructor arguments."""
        return str(nn.Conv2d.extra_repr(self))


def _norms(filters: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(filters, dim=(1, 2, 3))
    return norms.clamp_min(LEAST_NORM)


@MODELS.register_module()
class MeanOnlyBN(RunningNorm):
    """Batch normalization of the mean alone, for :class:`WNConv2d`.

    Formula, for each channel:
        output = weight * (input - mean(input)) + bias
    with the mean of the batch in training, running_mean in evaluation.

    Convention: the mean is that of one process. The gradient flows through
        it. The authors have no ``weight``. It is for the host's
        ``zero_init_residual``, without which the sums of residual blocks
        grow from block to block.
    State: ``weight``, ``bias``; buffer ``running_mean``.

    Source: arXiv 1602.07868, section 4; github.com/openai/weightnorm.
    """

    filters = 'WNConv2d'  # by default, of apply_norm.py
    statistics: ClassVar = {'running_mean': 0.0}
    running_mean: Tensor
    estimating = False

    def normalize(self, x: Tensor) -> Tensor:
        """Subtract the mean of the batch, or the running one."""
        (mean,) = self.running(x)
        if self.training:
            self.check_values(x)
            of_batch = x.mean(over_channels(x))
            if self.begin_forward(x):
                batch = dict(running_mean=of_batch)
                self.move_statistics(batch, self.momentum)
            mean = per_channel(of_batch, x)
        return self.scaled(x - mean)

    def folded(self) -> tuple[Tensor, Tensor, nn.Module]:
        """Evaluation is affine."""
        mean = self.running_mean
        return fold(mean, torch.ones_like(mean), self.weight, self.bias)
