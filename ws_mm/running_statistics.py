"""The contract of layers that keep running statistics.

Hooks, converters and baking ask for what this class declares, never for a
layer by name. A new norm is a subclass; tests/test_third_party_norm.py holds
the smallest one.
"""

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn

from . import compat
from .distributed import synchronized_moments
from .kernels.plain import at_least_float32, batch_moments, moved
from .kernels.settled import settle

Layer = TypeVar('Layer', bound='RunningStatistics')
Initial: TypeAlias = float | Callable[[Tensor], Any]
HALF = (torch.half, torch.bfloat16)


class ValueCount:
    """Number of values, which a device need not be asked for.

    The host counts. A compiler counts in a tensor instead: it would take a
    number for a constant of its graph, and compile again for the next one.
    That tensor is no buffer: copies of the model made before training (EMA)
    pair buffers by position.

    Args:
        device: where the layer is.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_host = 0
        self.compiled = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, number: int) -> None:
        """Count so many more."""
        if compat.is_compiling():
            self.compiled.add_(number)
        else:
            self.on_host += number


class RunningStatistics(nn.Module):
    """Base of layers that keep running statistics, one row per channel.

    A row is one value, or several, as of a covariance with other channels.

    A subclass names its statistics with their initial values, calls
    :meth:`register_statistics` in its constructor and, in its forward,
    :meth:`begin_forward` and :meth:`move_statistics`. Its first argument is
    the number of channels.

    State: one buffer for each statistic, in float32 or float64. Neither
        ``half()`` nor FSDP rounds them: a small momentum would no longer
        move them. They move in training, but not in the recomputation of
        activation checkpointing, at N = 0, or in channels whose batch is
        infinite or NaN.
    Distributed: :class:`~ws_mm.hooks.SyncEstimatesHook` averages those of
        layers that are ``estimating``; rank 0 warns once without it.
    """

    # Name and initial value of each buffer, or a function that fills it.
    # Infinities and NaN in a batch have to show in the sum of its statistics.
    statistics: ClassVar[Mapping[str, Initial]] = {}
    # Whether it begins as the batch norm whose checkpoint it loads. Without
    # one it does not normalize, of which the hooks warn.
    continues_batch_norm: ClassVar[bool] = False
    # Values per channel that moved the statistics in this iteration, if
    # SyncEstimatesHook asks for them.
    values_seen: ValueCount | None = None
    # Forwards that moved the statistics since the last recomputed one.
    _moves = 0

    # Their names: the compiler of torch 2.1 reads no dict of a class.
    _names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Note the names of the statistics."""
        super().__init_subclass__(**kwargs)
        cls._names = tuple(cls.statistics)

    @property
    def estimating(self) -> bool:
        """Return whether training, too, normalizes by the statistics.

        All ranks then need the same ones, and
        :func:`~ws_mm.update_estimates` measures them over all values.
        """
        return True

    @property
    def synchronizes(self) -> bool:
        """Return whether the ranks exchange statistics in each forward."""
        return False

    def register_statistics(
        self,
        num_features: int,
        device: Any = None,
        dtype: torch.dtype | None = None,
        widths: Mapping[str, int] | None = None,
    ) -> None:
        """Make the buffers, in at least float32.

        Args:
            num_features: number of channels.
            device: where to make them.
            dtype: that of the parameters.
            widths: lengths of rows, for statistics that have a row of values
                for each channel: (num_features, width).
        """
        for name in self.statistics:
            row = [widths[name]] if widths and name in widths else []
            values = torch.empty(
                num_features, *row, device=device, dtype=dtype
            )
            if values.dtype in HALF:
                values = values.float()
            self.register_buffer(name, values)
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Set the statistics to their initial values."""
        for name, value in self.statistics.items():
            _fill(self.get_buffer(name), value)

    def begin_forward(self, input: Tensor) -> bool:
        """Return whether this forward moves the statistics.

        Counts the values of the input where a hook asks for them.
        """
        for name in self._names:
            # Attributes of a module take the host a microsecond.
            values = self._buffers.get(name)
            if values is not None and values.dtype in HALF:
                # FSDP with a buffer_dtype casts past _apply, once.
                setattr(self, name, values.float())
        # Activation checkpointing repeats the forward inside the backward.
        # A compiler decides itself what it recomputes, and keeps updates out.
        if not self.training:
            return False
        compiling = compat.is_compiling()
        if not compiling and compat.is_backward():
            if self._moves > 1:
                _report_moved_again(type(self).__name__)
            self._moves = 0
            return False
        if self.estimating:
            if not compiling:  # a compiler takes it for a constant
                vars(self)['_moves'] = self._moves + 1
            if self.values_seen is None:
                _report_unsynchronized(type(self).__name__)
            else:
                self.values_seen.add(values_per_channel(input))
        return True

    def count_values(self) -> None:
        """Begin to count the values that move the statistics."""
        first = self.get_buffer(next(iter(self.statistics)))
        self.values_seen = ValueCount(first.device)

    @torch.no_grad()
    def move_statistics(
        self, batch: Mapping[str, Tensor], momentum: float
    ) -> None:
        """Move the statistics towards those of a batch, where it is finite."""
        running = [getattr(self, name) for name in batch]
        new = moved(running, [batch[name] for name in batch], momentum)
        for number, old in enumerate(running):
            settle(old, new[number])

    def batch_statistics(self, input: Tensor) -> dict[str, Tensor]:
        """The statistics of one batch, in the shapes of the buffers.

        They are detached: activation checkpointing refuses a forward that
        saves more for its backward than the recomputation, where nothing
        moves. Those that the values of the input do not determine, such as a
        count, are left out: :func:`~ws_mm.update_estimates` keeps them.
        """
        raise NotImplementedError(
            f'{type(self).__name__} does not define batch_statistics'
        )

    def measure(self, input: Tensor) -> tuple[float, dict[str, Tensor]]:
        """Number of values per channel, and their statistics.

        A layer that ``synchronizes`` returns those of all ranks.
        """
        count = values_per_channel(input)
        return count, self.batch_statistics(input) if count else {}

    def join(
        self,
        first: dict[str, Tensor],
        second: dict[str, Tensor],
        share: Tensor,
    ) -> dict[str, Tensor]:
        """Statistics of two sets of values; the second has this share."""
        return weighted_mean(first, second, share)

    def is_as_built(self) -> bool:
        """Return whether statistics are initial and parameters constant."""
        differences = [
            *(
                self.get_buffer(k)
                - _fill(torch.empty_like(self.get_buffer(k)), v)
                for k, v in self.statistics.items()
            ),
            *(p - p.flatten()[0] for p in self.parameters(recurse=False)),
        ]
        return not any(values.any() for values in differences)

    @classmethod
    def from_norm(
        cls: type[Layer], norm: nn.Module, arguments: Mapping[str, Any]
    ) -> tuple[Layer, dict[str, Tensor]]:
        """Make a layer for the place of a BatchNorm or GroupNorm.

        Args:
            norm: layer to replace; :func:`channels_of` gives its channels.
            arguments: constructor arguments, which win over those of norm.

        Returns:
            The new layer, and the values that it takes from norm, by the
            names of its own parameters and buffers. By default those of
            equal name and shape.

        Raises:
            ValueError: an argument does not fit the norm.
        """
        options = dict(arguments)
        if 'eps' in legal_arguments(cls):
            options.setdefault('eps', getattr(norm, 'eps', 0) or 1e-5)
        layer = cls(channels_of(norm), **options)
        theirs = norm.state_dict(keep_vars=True)
        return layer, {
            name: theirs[name]
            for name, values in layer.state_dict().items()
            if name in theirs and theirs[name].shape == values.shape
        }

    def folded(self) -> tuple[Tensor, Tensor, nn.Module] | None:
        """Split an eval-mode layer for the convolution before it.

        Returns:
            Scale and shift per channel, in float64, for the convolution, and
            the remaining plain norm, or ``nn.Identity()``. None, the
            default, if the layer has no such form.
        """
        return None

    def _apply(self: Layer, fn: Any, recurse: bool = True) -> Layer:
        exact = {name: self.get_buffer(name) for name in self.statistics}
        super()._apply(fn, recurse)
        keep_exact(self, exact)
        return self


def keep_exact(layer: nn.Module, exact: Mapping[str, Tensor]) -> None:
    """Undo a cast of these buffers to half precision, but no move."""
    for name, values in exact.items():
        cast = layer.get_buffer(name)
        if cast.dtype in HALF:
            setattr(layer, name, values.to(cast.device))


@torch.no_grad()
def _fill(values: Tensor, initial: Initial) -> Tensor:
    if callable(initial):
        initial(values)
    else:
        values.fill_(initial)
    return values


def values_per_channel(input: Tensor) -> int:
    """Number of values per channel of an input of shape (N, C, *)."""
    return input.shape[0] * math.prod(input.shape[2:])


def measured_moments(
    input: Tensor, synchronizes: bool, unbiased: bool
) -> tuple[float, dict[str, Tensor]]:
    """Number of values per channel, and their mean and variance.

    Args:
        input: activations.
        synchronizes: whether to count the values of all ranks.
        unbiased: whether the variance is unbiased.
    """
    x = at_least_float32(input)
    count: float = values_per_channel(input)
    if synchronizes:
        mean, var, total = synchronized_moments(x)
        count = float(total)
    elif count:
        mean, var = batch_moments(x, None)
    if not count:
        return 0, {}
    if unbiased:
        # The layer itself raises for a single value.
        var = var * (count / max(count - 1, 1))
    return count, dict(running_mean=mean, running_var=var)


def weighted_mean(
    first: dict[str, Tensor], second: dict[str, Tensor], share: Tensor
) -> dict[str, Tensor]:
    """(1 - share) * first + share * second, for each name."""
    return {
        name: values + along_rows(share, values) * (second[name] - values)
        for name, values in first.items()
    }


def moments_of_both(
    first: dict[str, Tensor], second: dict[str, Tensor], share: Tensor
) -> dict[str, Tensor]:
    """Mean and biased variance of two sets of values together.

    Args:
        first: ``running_mean`` and ``running_var`` of one set.
        second: those of the other.
        share: share of the values of the second set.
    """
    joined = weighted_mean(first, second, share)
    offset = second['running_mean'] - first['running_mean']
    between = share * (1 - share) * offset.square()
    joined['running_var'] = joined['running_var'] + between
    return joined


def along_rows(of_channels: Tensor, rows: Tensor) -> Tensor:
    """Values of shape (C,) in a shape that broadcasts over rows, (C, *)."""
    return of_channels.view(-1, *[1] * (rows.dim() - 1))


def sum_of_rows(statistics: Iterable[Tensor]) -> Tensor:
    """The sum of all statistics of each channel, of shape (C,)."""
    rows = [v.view(len(v), -1).sum(1) for v in statistics]
    return torch.stack(rows).sum(0)


def channels_of(norm: Any) -> int:
    """Number of channels of a norm."""
    for name in ('num_features', 'num_channels'):
        if isinstance(getattr(norm, name, None), int):
            return int(getattr(norm, name))
    return int(norm.running_mean.numel())


def legal_arguments(layer: type) -> tuple[str, ...]:
    """Names of a class's arguments, ``*args`` and ``**kwargs`` excepted."""
    return tuple(
        name
        for name, parameter in inspect.signature(layer).parameters.items()
        if parameter.kind
        not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    )


def norm_class(kind: str | type) -> type[RunningStatistics] | None:
    """The class of a norm that keeps running statistics; None for others.

    Args:
        kind: a class, or the registered name of one: 'ws_mm.BCN', 'BCN'.
    """
    found = MODELS.get(kind) if isinstance(kind, str) else kind
    if isinstance(found, type) and issubclass(found, RunningStatistics):
        return found
    return None


_reported: list[str] = []


def report_once(message: str) -> bool:
    """Warn, unless this process did so before; whether it does."""
    if message in _reported:
        return False
    _reported.append(message)
    print_log(message, logger='current', level=logging.WARNING)
    return True


def _report_moved_again(kind: str) -> None:
    report_once(
        f'A {kind} layer was called several times before a backward that '
        'computes it again (activation checkpointing). Its estimates moved '
        'with each call. If the loss has more than the last one, as in '
        'semi-supervised training, gradients are not exact. Set '
        'with_cp=False in this part, and no activation_checkpointing'
    )


# While it traces, a compiler runs this and puts nothing into its graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _report_unsynchronized(kind: str) -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return False
    if dist.get_world_size() == 1 or dist.get_rank() != 0:
        return False
    return report_once(
        f'{kind} layers train in several processes and nothing averages '
        'their estimates after each iteration: ranks differ, and a '
        'checkpoint holds those of rank 0. Add to the config: '
        "custom_hooks = [dict(type='ws_mm.SyncEstimatesHook')] "
        '(SyncBuffersHook and broadcast_buffers=True do not replace it: the '
        "one comes after an iteration's checkpoint was saved, the other "
        'keeps what rank 0 saw). In a loop of your own, call '
        'ws_mm.sync_estimates(model) before the first step and after each'
    )
