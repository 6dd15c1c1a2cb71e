"""The base of the norms in this folder."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_eps, reject_unknown
from ..kernels.plain import at_least_float32
from ..running_statistics import RunningStatistics, legal_arguments
from ..symbolic import recorded


class Norm(nn.GroupNorm):
    """Base: an affine per channel, and the treatment of a norm by the host.

    A subclass defines :meth:`normalize`. If it keeps running statistics, it
    inherits from :class:`~ws_mm.running_statistics.RunningStatistics` first,
    and calls ``register_statistics`` in its constructor. If it has other
    parameters, it extends :meth:`reset_parameters`.

    State: ``weight`` and ``bias``, one entry per channel.
    Frozen: it is a ``nn.GroupNorm`` to the host, which decays, initializes
        and freezes it as one; ``norm_eval=True`` does not reach it.

    Args:
        num_features: channels of the input.
        eps: constant added to the variance.
        affine: whether scale and shift are learned.
        unknown: arguments that the subclass does not have.
        device: device of parameters and buffers.
        dtype: dtype of the parameters.

    Raises:
        TypeError: an argument is unknown.
        ValueError: an argument has an illegal value.
    """

    # As in torchvision, so that checkpoints of BN networks have its place.
    _abbr_ = 'bn'

    def __init__(
        self,
        num_features: int,
        eps: float,
        affine: bool,
        unknown: Mapping[str, Any],
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kind = type(self)
        reject_unknown(
            kind.__name__, 'norm_cfg', unknown, legal_arguments(kind)
        )
        check_eps(eps, 'norm_cfg')
        if num_features < 1:
            raise ValueError(f'num_features={num_features} must be at least 1')
        super().__init__(1, num_features, eps, False)
        self.num_features = num_features
        self.affine = affine
        for name in ('weight', 'bias'):
            values = torch.empty(num_features, device=device, dtype=dtype)
            self.register_parameter(
                name, nn.Parameter(values) if affine else None
            )
        Norm.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Set scale 1, shift 0, and statistics to their initial values.

        Builders without memory (FSDP, ``to_empty``) call this alone.
        """
        if isinstance(self, RunningStatistics) and self._buffers:
            self.reset_running_stats()
        if getattr(self, 'weight', None) is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    @recorded
    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` of shape (N, num_features, *)."""
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f'{type(self).__name__}({self.num_features}) takes an input '
                f'of shape (N, {self.num_features}, *), got '
                f'{tuple(input.shape)}'
            )
        x = at_least_float32(input)
        if not input.numel():
            # Every parameter gets a gradient, as DDP expects it.
            for parameter in self.parameters():
                x = x + 0 * parameter.sum()
            return x.to(input.dtype)
        return self.normalize(x).to(input.dtype)

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize an input that has values, in at least float32."""
        raise NotImplementedError

    def scaled(self, x: Tensor) -> Tensor:
        """Weight * x + bias, per channel."""
        if not self.affine:
            return x
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return x * per_channel(weight, x) + per_channel(bias, x)

    def affine_after(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift of ``scaled((x - mean) / std)``, in float64."""
        scale = 1 / std.double()
        shift = -mean.double() * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return scale, shift

    def extra_repr(self) -> str:
        """Constructor arguments."""
        names = ['eps', 'momentum', 'affine']
        told = (f'{n}={getattr(self, n)}' for n in names if hasattr(self, n))
        return ', '.join([str(self.num_features), *told])


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Values of shape (C,) in a shape that broadcasts over x, (N, C, *)."""
    return values.view(-1, *[1] * (x.dim() - 2))


def over_channels(x: Tensor) -> tuple[int, ...]:
    """The dimensions of x, (N, C, *), that a batch statistic reduces."""
    return (0, *range(2, x.dim()))
