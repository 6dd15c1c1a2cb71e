"""The bases of the norms in this folder."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_eps, check_momentum, reject_unknown
from ..kernels.plain import at_least_float32
from ..running_statistics import (
    RunningStatistics,
    legal_arguments,
    measured_moments,
)
from ..symbolic import recorded
from ._maps import affine_of_maps


class Norm(nn.GroupNorm):
    """Base: an affine per channel, and the treatment of a norm by the host.

    A subclass defines :meth:`normalize`. Its constructor, if it has one, adds
    its own arguments and parameters, and hands on all others. If it keeps
    running statistics, it inherits from :class:`RunningNorm`.

    State: ``weight`` and ``bias``, one entry per channel.
    Frozen: it is a ``nn.GroupNorm`` to the host, which decays, initializes
        and freezes it as one; ``norm_eval=True`` does not reach it.

    Args:
        num_features: channels of the input.
        eps: constant added to the variance.
        affine: whether scale and shift are learned.
        device: device of parameters and buffers.
        dtype: dtype of the parameters.
        **unknown: none; a misspelt argument is rejected by name.

    Raises:
        TypeError: an argument is unknown.
        ValueError: an argument has an illegal value.
    """

    # As in torchvision, so that checkpoints of BN networks have its place.
    _abbr_ = 'bn'
    __signature__: inspect.Signature

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Join the signatures of the constructors, for errors and tools."""
        super().__init_subclass__(**kwargs)
        found: dict[str, inspect.Parameter] = {}
        for base in cls.__mro__[: cls.__mro__.index(Norm) + 1]:
            if '__init__' not in vars(base):
                continue
            own = inspect.signature(vars(base)['__init__']).parameters
            found = {**found, **{k: own[k] for k in own if k not in found}}
            if all(p.kind is not p.VAR_KEYWORD for p in own.values()):
                break
        public = [
            p
            for name, p in found.items()
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            and name != 'self'
        ]
        public.sort(key=lambda p: p.kind)
        cls.__signature__ = inspect.Signature(public)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> None:
        name, legal = type(self).__name__, legal_arguments(type(self))
        reject_unknown(name, 'norm_cfg', unknown, legal)
        check_eps(eps, 'norm_cfg')
        if num_features < 1:
            raise ValueError(f'num_features={num_features} must be at least 1')
        super().__init__(1, num_features, eps, False)
        self.num_features, self.affine = num_features, affine
        self._made: dict[str, Any] = dict(device=device, dtype=dtype)
        self._initial: dict[str, float] = {}
        self.add_parameter('weight', 1.0, num_features, exists=affine)
        self.add_parameter('bias', 0.0, num_features, exists=affine)

    def add_parameter(
        self, name: str, initial: float, *shape: int, exists: bool = True
    ) -> None:
        """Register a parameter of one initial value; None unless it exists."""
        if not exists:
            return self.register_parameter(name, None)
        self._initial[name] = initial
        values = torch.full(shape, initial, **self._made)
        return self.register_parameter(name, nn.Parameter(values))

    def reset_parameters(self) -> None:
        """Set parameters and statistics to their initial values.

        Builders without memory (FSDP, ``to_empty``) call this alone.
        """
        # nn.GroupNorm calls it before there are any.
        for name, initial in vars(self).get('_initial', {}).items():
            nn.init.constant_(self.get_parameter(name), initial)

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
        if self.weight is not None:
            x = x * per_channel(self.weight.to(x.dtype), x)
        if self.bias is not None:
            x = x + per_channel(self.bias.to(x.dtype), x)
        return x

    def scaled_maps(
        self,
        x: Tensor,
        center: Tensor,
        scale: Tensor,
        shift: Tensor | None = None,
    ) -> Tensor:
        """((x - center) * scale + shift) * weight + bias, in one pass.

        Args:
            x: the input.
            center: broadcasts to (N, C, 1, ...), as the next two.
            scale: factors.
            shift: what is added; None means 0.
        """
        if shift is None:
            shift = torch.zeros_like(scale)
        if self.weight is not None:
            weight = per_channel(self.weight.to(x.dtype), x)
            scale, shift = scale * weight, shift * weight
        if self.bias is not None:
            shift = shift + per_channel(self.bias.to(x.dtype), x)
        return affine_of_maps(x, center, scale, shift)

    def extra_repr(self) -> str:
        """Constructor arguments."""
        names = legal_arguments(type(self))[1:]
        values = {name: getattr(self, name, None) for name in names}
        told = (
            f'{name}={value!r}'
            for name, value in values.items()
            if isinstance(value, (int, float, str))
        )
        return ', '.join([str(self.num_features), *told])


class RunningNorm(RunningStatistics, Norm):
    """Base of norms that keep running statistics.

    A subclass names them, see
    :class:`~ws_mm.running_statistics.RunningStatistics`. If they are not one
    value per channel, it also registers them.

    Args: those of :class:`Norm`, and
        momentum: share of the newest batch in the statistics, in (0, 1].

    Raises:
        ValueError: training by the batch sees one value per channel.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, eps, affine, **kwargs)
        check_momentum(momentum, 'norm_cfg')
        self.momentum = momentum
        # A function fills rows, whose width the subclass knows.
        if not any(callable(v) for v in self.statistics.values()):
            self.register_statistics(num_features, **self._made)

    def count_forwards(self) -> None:
        """Keep ``num_forwards``, a count that the subclass adds to."""
        count = torch.zeros((), dtype=torch.long, device=self._made['device'])
        self.register_buffer('num_forwards', count)

    def reset_parameters(self) -> None:
        """Set parameters, statistics and counts to their initial values."""
        super().reset_parameters()
        if self._buffers:
            self.reset_running_stats()
        if 'num_forwards' in self._buffers:
            self.get_buffer('num_forwards').zero_()

    def of_batch_norm(self, mean: Tensor, var: Tensor) -> dict[str, Tensor]:
        """Own statistics that evaluate as those of a batch norm, if any."""
        return {}

    @classmethod
    def from_norm(
        cls, norm: Any, arguments: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Tensor]]:
        """Make a layer for the place of a norm; see the base."""
        layer, values = super().from_norm(norm, arguments)
        if getattr(norm, 'running_var', None) is not None:
            moments = norm.running_mean, norm.running_var
            values |= layer.of_batch_norm(*moments)
        return layer, values

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any
    ) -> None:
        # A state without some of the statistics is a batch norm's.
        names = [f'{prefix}running_{name}' for name in ('mean', 'var')]
        if any(f'{prefix}{name}' not in state_dict for name in self._names):
            moments = [state_dict[k] for k in names if k in state_dict]
            if [v.shape for v in moments] == 2 * [(self.num_features,)]:
                own = self.of_batch_norm(*moments)
                if own and 'running_var' not in self._names:
                    del state_dict[names[1]]
                for name, values in own.items():
                    state_dict[f'{prefix}{name}'] = values
        super()._load_from_state_dict(state_dict, prefix, *args)

    def running(self, x: Tensor) -> tuple[Tensor, ...]:
        """Copies of the statistics, in their order, per channel of x.

        Later calls may change the buffers before a backward.
        """
        return tuple(
            per_channel(getattr(self, name).to(x.dtype, copy=True), x)
            for name in self._names
        )

    def check_values(self, x: Tensor, count: int | None = None) -> None:
        """Reject statistics of a single value; one channel's by default."""
        if count is None:
            count = x.numel() // x.shape[1]
        if count < 2:
            raise ValueError(
                f'{type(self).__name__} needs more than one value per channel '
                'in training, or per group of channels, got an input of shape '
                f'{tuple(x.shape)}. Use larger batches or maps, or '
                "norm_cfg=dict(type='GN', num_groups=32), which normalizes "
                'each image'
            )

    def batch_statistics(self, input: Tensor) -> dict[str, Tensor]:
        """Mean and biased variance, of those that are kept."""
        found = measured_moments(input, False, unbiased=False)[1]
        kept = {k: v for k, v in found.items() if k in self.statistics}
        return kept or super().batch_statistics(input)


def fold(
    mean: Tensor, std: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, nn.Module]:
    """Fold (x - mean) / std * weight + bias, as ``folded`` returns it."""
    scale = 1 / std.double()
    if weight is not None:
        scale = scale * weight
    shift = -mean.double() * scale
    return scale, shift if bias is None else shift + bias, nn.Identity()


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Values (C,) or (N, C) in a shape that broadcasts over x, (N, C, *)."""
    return values.view(*values.shape, *[1] * (x.dim() - 2))


def over_channels(x: Tensor) -> tuple[int, ...]:
    """The dimensions of x, (N, C, *), that a batch statistic reduces."""
    return (0, *range(2, x.dim()))
