"""Running statistics measured anew, as means over a data loader."""

import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from mmengine.dist import all_reduce, get_dist_info
from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import Tensor, nn

from .arguments import counted
from .replacement import BATCH_NORMS
from .restoring import restored
from .running_statistics import (
    RunningStatistics,
    along_rows,
    measured_moments,
    sum_of_rows,
    weighted_mean,
)

Forward = Callable[[nn.Module, Any], Any]


def update_estimates(
    model: nn.Module,
    loader: Iterable[Any],
    device: int | str | torch.device | None = None,
    *,
    num_batches: int | None = None,
    forward: Forward | None = None,
) -> None:
    """Replace running statistics by means over the batches of a loader.

    Formula, for each channel of a layer, over its batches b of n_b values
    per channel, with mean m_b and biased variance v_b:
        running_mean = sum(n_b m_b) / sum(n_b)
        running_var = sum(n_b (v_b + (m_b - running_mean)^2)) / sum(n_b)
                                                     BCN, mode 'estimate'
        running_var = sum(n_b v_b n_b / (n_b - 1)) / sum(n_b)     the others

    Convention: as ``torch.optim.swa_utils.update_bn``, with each batch
        weighed by its values. It measures every layer with running
        statistics (BCN and other subclasses of
        :class:`~ws_mm.running_statistics.RunningStatistics`, torch's
        BatchNorms) that ``model.train()`` leaves in training mode; layers
        that ``frozen_stages`` or ``norm_eval`` freeze keep theirs. The model
        runs in training mode, dropout included, without gradients. Layers
        that are ``estimating``, as BCN in mode 'estimate', normalize each
        batch with the mean over the batches up to this one, the others with
        the batch. Channels of a batch that are infinite or NaN are left out.
    State: changes the running statistics and ``num_batches_tracked`` of
        these layers. Modes, momentum, other buffers and random states stay.
    Distributed: every rank calls it with its own batches; all end with the
        statistics of the batches of all ranks. Where a layer synchronizes,
        the pass ends with the rank that has the fewest batches.

    Args:
        model: any model, wrapped for several processes or by an average of
            weights (torch's or mmengine's), too.
        loader: batches for training. A model of mmengine takes them through
            its ``data_preprocessor``, in mode 'loss'; any other one is
            called on the batch, or the first element of a list or tuple.
        device: device that the batch moves to, of models not of mmengine.
        num_batches: number of batches to take at most; None takes all.
        forward: function that runs the model, ``forward(model, batch)``.

    Raises:
        ValueError: the loader gave no batch, none reached a layer, or no
            value was finite; or ``num_batches`` is less than 1. As after any
            other error, nothing has changed then.
        TypeError: a batch cannot move to ``device``.
    """
    measured = measure(
        model, loader, device, num_batches=num_batches, forward=forward
    )
    with torch.no_grad():
        for layer, statistics in measured.items():
            for name, values in statistics.items():
                layer.get_buffer(name).copy_(values)


@torch.no_grad()
def measure(
    model: nn.Module,
    loader: Iterable[Any],
    device: int | str | torch.device | None = None,
    *,
    num_batches: int | None = None,
    forward: Forward | None = None,
) -> dict[nn.Module, dict[str, Tensor]]:
    """Return what :func:`update_estimates` writes; arguments are the same."""
    if num_batches is not None and (
        not isinstance(num_batches, int) or num_batches < 1
    ):
        raise ValueError(
            f'num_batches={num_batches!r} must be a whole number of at least '
            '1, or None for all batches'
        )
    model = _eager_and_alone(model)
    host = _host_model(model)
    # A copy: it may draw the size of the next images, which is no buffer.
    preprocess = copy.deepcopy(host.data_preprocessor) if host else None
    forward = forward or partial(_run, preprocess=preprocess, device=device)
    with restored(model):
        model.train()
        running = {
            layer: _Running(layer)
            for layer in model.modules()
            if layer.training
            and isinstance(layer, (RunningStatistics, BATCH_NORMS))
            and getattr(layer, 'running_mean', layer) is not None
        }
        if not running:
            return {}
        handles = [
            layer.register_forward_pre_hook(each, with_kwargs=True)
            for layer, each in running.items()
        ]
        taken = 0
        try:
            together = any(each.synchronizes for each in running.values())
            for batch in _batches(loader, num_batches, together):
                forward(model, batch)
                taken += 1
        finally:
            for handle in handles:
                handle.remove()
        _merge_ranks(list(running.values()))
    found: dict[nn.Module, dict[str, Tensor]] = {
        layer: each.result()
        for layer, each in running.items()
        if each.count.any()
    }
    if not found and any(each.calls for each in running.values()):
        raise ValueError(
            f'no layer with running statistics saw a finite value in {taken} '
            'batches: inputs of the layers are empty, infinite or NaN. The '
            'statistics are as they were. Check the images and the weights of '
            'the model; under autocast with float16, values overflow at 65504'
        )
    if not found:
        raise ValueError(
            f'the loader gave {taken} batches, and none reached a layer with '
            'running statistics. They are as they were. Give a loader of at '
            'least one batch (a generator is empty after its first use, '
            'drop_last=True drops the only one), and a model that is not '
            'compiled'
        )
    missed = [
        name
        for name, layer in model.named_modules()
        if layer in running and layer not in found
    ]
    if missed:
        print_log(
            f'{counted(missed)} saw no value in {taken} batches. The '
            'statistics there are as they were',
            logger='current',
            level=logging.WARNING,
        )
    return found


def _eager_and_alone(model: nn.Module) -> nn.Module:
    """The model without torch.compile and DDP, whichever is outside.

    A compiled one runs no hooks; DDP broadcasts buffers in each forward.
    """
    inner = getattr(model, '_orig_mod', None)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        inner = model.module
    return model if inner is None else _eager_and_alone(inner)


class _BatchNorm:
    """Contract of running statistics for a BatchNorm of torch."""

    statistics = ('running_mean', 'running_var')
    estimating = False

    def __init__(self, layer: nn.Module) -> None:
        self.synchronizes = isinstance(layer, nn.SyncBatchNorm)

    def measure(self, input: Tensor) -> tuple[float, dict[str, Tensor]]:
        """Moments of a batch, with the unbiased variance."""
        return measured_moments(input, self.synchronizes, unbiased=True)

    join = staticmethod(weighted_mean)


class _Running:
    """The statistics of what a layer has seen, in float64.

    Args:
        layer: one in training mode that keeps running statistics. One that
            is ``estimating`` gets them from here, before each forward.
    """

    def __init__(self, layer: Any) -> None:
        self.declared: Any = layer
        if not isinstance(layer, RunningStatistics):
            self.declared = _BatchNorm(layer)
        self.feeds = self.declared.estimating
        self.synchronizes = self.declared.synchronizes
        self.tracks_batches = (
            getattr(layer, 'num_batches_tracked', None) is not None
        )
        self.before = {
            name: layer.get_buffer(name).clone()
            for name in self.declared.statistics
        }
        self.clear()
        if self.feeds:
            layer.training = False  # it then uses the buffers as they are

    def clear(self) -> None:
        """Forget what was seen."""
        self.calls = 0
        self.values = {
            name: torch.zeros_like(values.double())
            for name, values in self.before.items()
        }
        first = next(iter(self.values.values()))
        self.count = first.new_zeros(len(first))

    def __call__(self, layer: Any, args: Any, kwargs: Any) -> None:
        """Take an input of the layer; a hook before its forward."""
        self.calls += 1
        count, batch = self.declared.measure((*args, *kwargs.values())[0])
        if not count:
            return
        # What an input does not determine stays as it is.
        batch = {**self.before, **batch}
        finite = sum_of_rows(batch.values()).isfinite()
        self.merge(
            torch.where(finite, float(count), 0.0).double(),
            {name: values.double() for name, values in batch.items()},
        )
        if self.feeds:
            for name, values in self.result().items():
                layer.get_buffer(name).copy_(values)

    def merge(self, count: Tensor, values: dict[str, Tensor]) -> None:
        """Add the statistics of other values."""
        used, total = count > 0, self.count + count
        joined = self.declared.join(self.values, values, count / total)
        self.count = total
        self.values = {
            name: torch.where(along_rows(used, before), joined[name], before)
            for name, before in self.values.items()
        }

    def result(self) -> dict[str, Tensor]:
        """The buffers of the layer; as they were in channels without any."""
        found = {
            name: torch.where(
                along_rows(self.count > 0, before),
                self.values[name].to(before),
                before,
            )
            for name, before in self.before.items()
        }
        if self.tracks_batches:
            found['num_batches_tracked'] = torch.tensor(self.calls)
        return found


def _merge_ranks(running: list[_Running]) -> None:
    """Give every rank the moments of all, in one collective."""
    rank, world = get_dist_info()
    own = [each for each in running if not each.synchronizes]
    if world == 1 or not own:
        return
    parts = [
        part
        for each in own
        for part in (
            each.count.new_tensor([each.calls]),
            each.count,
            *(values.flatten() for values in each.values.values()),
        )
    ]
    flat = torch.cat(parts)
    # Each rank fills its own row, so that one sum gathers all of them.
    rows = flat.new_zeros(world, flat.numel())
    rows[rank] = flat
    all_reduce(rows)
    for each in own:
        each.clear()
    sizes = [part.numel() for part in parts]
    for row in rows:
        moments = iter(row.split(sizes))
        for each in own:
            each.calls += int(next(moments))
            count = next(moments)
            each.merge(
                count,
                {
                    name: next(moments).view_as(values)
                    for name, values in each.values.items()
                },
            )


def _batches(
    loader: Iterable[Any], num_batches: int | None, together: bool
) -> Iterator[Any]:
    """The batches of this rank; as many as on every other one, if asked."""
    iterator, end = iter(loader), object()
    for number in itertools.count():
        is_last = num_batches is not None and number >= num_batches
        batch = end if is_last else next(iterator, end)
        more = torch.tensor(int(batch is not end))
        if together:
            all_reduce(more, op='min')
        if not more:
            return
        yield batch


def _host_model(model: nn.Module) -> BaseModel | None:
    """The model of mmengine within its wrappers, if it is one."""
    inner: Any = model
    while not isinstance(inner, BaseModel):
        inner = getattr(inner, 'module', None)
        if not isinstance(inner, nn.Module):
            return None
    return inner


def _run(
    model: nn.Module, batch: Any, preprocess: nn.Module | None, device: Any
) -> Any:
    if preprocess is not None:
        data = preprocess(batch, True)
        if isinstance(data, dict):
            return model(**data, mode='loss')
        return model(*data, mode='loss')
    if isinstance(batch, (list, tuple)):
        batch = batch[0]
    if device is None:
        return model(batch)
    if not hasattr(batch, 'to'):
        raise TypeError(
            f'the loader gives a {type(batch).__name__}, which cannot move to '
            f'device={device!r}: give a loader of tensors, or forward=, a '
            'function of the model and a batch'
        )
    return model(batch.to(device))
