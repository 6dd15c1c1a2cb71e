"""Weight Normalization, and the batch norm that the paper pairs with it."""

import math
from typing import Any, ClassVar

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..arguments import check_momentum
from ..kernels.plain import at_least_float32
from ..running_statistics import RunningStatistics, values_per_channel
from ._filters import Filters, reject_others
from ._norm import Norm, over_channels, per_channel

# A filter of zeros has no direction; it computes and learns as a plain one.
LEAST_NORM = 1e-12


@MODELS.register_module()
class WNConv2d(Filters, nn.Conv2d):
    """2D convolution whose filters have a learned norm.

    Formula, for each filter (output channel) v, entries of ``weight``:
        w = gain * v / sqrt(sum(v^2))
        output = conv2d(input, w) + bias

    Convention: gains start at sqrt(2), the norm of a filter in He's
        initialization, whatever fills ``weight``. The authors start at 1 and
        scale by the data of the first batch. Mean and scale of an output are
        not fixed: a norm behind it, such as :class:`MeanOnlyBN`, is usual,
        but not needed. Weight decay: the optimizer of the host decays
        ``gain`` as it does ``weight``, and on ``weight`` alone decay changes
        no output. The authors have none:
        ``paramwise_cfg=dict(custom_keys={'.gain': dict(decay_mult=0)})``.
    State: as ``nn.Conv2d``, and ``gain`` of shape (out_channels,). The
        checkpoint of a plain convolution keeps its function: its gains are
        the norms of its filters.

    Args:
        *args: arguments of ``nn.Conv2d``, in its order.
        **kwargs: arguments of ``nn.Conv2d``.

    Raises:
        TypeError: an argument is unknown; ``eps`` and ``eps_mode`` are.
        ValueError: filters of one entry.

    Source: arXiv 1602.07868; github.com/openai/weightnorm, lasagne/.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        reject_others(WNConv2d, kwargs)
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(self.weight.new_empty(self.out_channels))
        self._reset_gain()

    def reset_parameters(self) -> None:
        """Set new filters, and gains of sqrt(2)."""
        super().reset_parameters()
        if 'gain' in self._parameters:  # not in the constructor of torch
            self._reset_gain()

    def _reset_gain(self) -> None:
        nn.init.constant_(self.gain, math.sqrt(2))

    def standardized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The filters, of norm gain."""
        weight = at_least_float32(self.weight)
        scale = self.gain.to(weight.dtype) / _norms(weight)
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
class MeanOnlyBN(RunningStatistics, Norm):
    """Batch normalization of the mean alone, for :class:`WNConv2d`.

    Formula, for each channel:
        output = weight * (input - mean(input)) + bias
    with the mean over batch and space in training, running_mean in
    evaluation.

    Convention: the mean is that of one process. The gradient flows through
        it. The authors have no scale but the gain of the filters. This one
        is for the host's ``zero_init_residual``: nothing else keeps the sums
        of residual blocks from growing from block to block.
    State: ``weight``, ``bias``; buffer ``running_mean``.

    Args:
        num_features: channels of the input.
        eps: not used; the host passes one to every norm.
        momentum: share of the newest batch in running_mean, in (0, 1].
        affine: whether scale and shift are learned.
        device: device of parameters and buffers.
        dtype: dtype of the parameters.
        **unknown: none; a misspelt argument is rejected by name.

    Raises:
        TypeError: an argument is unknown.
        ValueError: an argument has an illegal value; or one value per
            channel in training, which is its own mean.

    Source: arXiv 1602.07868, section 4; github.com/openai/weightnorm.
    """

    statistics: ClassVar = {'running_mean': 0.0}
    running_mean: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(num_features, eps, affine, unknown, device, dtype)
        check_momentum(momentum, 'norm_cfg')
        self.momentum = momentum
        self.register_statistics(num_features, device, dtype)

    @property
    def estimating(self) -> bool:
        """False: the running mean serves evaluation only."""
        return False

    def normalize(self, x: Tensor) -> Tensor:
        """Subtract the mean of the batch, or the running one."""
        mean = self.running_mean.to(x.dtype)
        if self.training:
            if values_per_channel(x) == 1:
                raise ValueError(
                    'MeanOnlyBN got one value per channel in training, which '
                    'is its own mean: the output would not depend on the '
                    f'input, of shape {tuple(x.shape)}. Use more images or '
                    "larger maps, or norm_cfg=dict(type='GN', num_groups=32)"
                )
            mean = x.mean(over_channels(x))
            if self.begin_forward(x):
                self.move_statistics(
                    {'running_mean': mean.detach()}, self.momentum
                )
        return self.scaled(x - per_channel(mean, x))

    def batch_statistics(self, input: Tensor) -> dict[str, Tensor]:
        """The mean of each channel."""
        x = at_least_float32(input.detach())
        return {'running_mean': x.mean(over_channels(x))}

    def folded(self) -> tuple[Tensor, Tensor, nn.Module]:
        """Evaluation is affine."""
        shift = -self.running_mean.double()
        scale = torch.ones_like(shift)
        if self.affine:
            scale = scale * self.weight
            shift = shift * scale + self.bias
        return scale, shift, nn.Identity()
