"""Training hooks: averaging over ranks, and checks of the model."""

import logging
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn

from .arguments import counted
from .checking import check
from .distributed import world_size
from .replacement import BATCH_NORMS
from .running_statistics import RunningStatistics
from .shapes import batch_norms

# mmdet's hook of semi-supervised detectors.
MEAN_TEACHER = 'MeanTeacherHook'


def inner_model(model: nn.Module) -> Any:
    """The model inside a wrapper for several processes, or itself."""
    return model.module if is_model_wrapper(model) else model


class _FrozenLayersHook(Hook):
    """Warn once of layers that are frozen as they were built."""

    _looked = False

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Look before the first iteration."""
        if not self._looked:
            self._looked = True
            report_frozen(runner.model)
            report_teacher(runner)


@HOOKS.register_module()
class SyncEstimatesHook(_FrozenLayersHook):
    """Average running statistics over the ranks.

    It serves BCN in mode 'estimate' and every other layer that is
    ``estimating``, see :mod:`ws_mm.running_statistics`.

    Formula, for each layer, over the ranks r:
        estimate = sum(n_r * estimate_r) / sum(n_r)
    with n_r the values per channel that moved estimate_r in this iteration.

    Convention: the estimates move linearly with the batch moments, so ranks
        that started equal then hold what one process would hold after the
        concatenated batch, with unequal batches and N = 0 on some ranks,
        too. For a layer that is called several times per iteration, they
        are the average of each rank's own sequence of updates instead.
        Where no rank saw a value, nothing changes. A channel that was
        infinite or NaN on one rank did not move there and counts as it was.
    Distributed: one collective per training iteration for the whole model,
        the same on every rank whatever it saw. Without this hook each rank
        trains and validates with its own estimates, and the checkpoint
        holds those of rank 0. mmengine's ``SyncBuffersHook`` does not
        replace it: it averages without weights, at the end of an epoch and
        before a validation only, after EMAHook took its copies. DDP's
        ``broadcast_buffers=True`` drops what the other ranks have seen.

    With any number of processes it warns of layers that ``frozen_stages``
    froze as they were built, see :func:`report_frozen`.
    """

    # Before EMAHook copies them (NORMAL, or 49 in configs) and CheckpointHook
    # saves them (VERY_LOW), and so before any validation.
    priority = 'HIGH'

    def before_train(self, runner: Any) -> None:
        """Find the layers once, after the model was wrapped."""
        self._layers = estimating_layers(runner.model)
        if world_size() == 1:
            return
        for layer in self._layers:
            layer.count_values()

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Average the estimates."""
        average_estimates(self._layers)


@HOOKS.register_module()
class CheckModelHook(_FrozenLayersHook):
    """Check before training that a norm follows every WS convolution.

    It also warns of layers frozen as built, see :func:`report_frozen`, of
    batch norms that train on one or two images, see
    :func:`report_batch_norms`, and, after the first iteration, of running
    statistics that pyramid levels share.

    It judges by names and order, see :func:`~ws_mm.checking.check`, which
    unusual names can mislead; ``tools/analysis_tools/check_model.py`` runs
    the model instead.

    Args:
        on_mistake: 'raise' to stop before the first step, or 'print'.

    Raises:
        ValueError: ``on_mistake`` is unknown; before training, in 'raise',
            with every mistake and its fix.
    """

    def __init__(self, on_mistake: str = 'raise') -> None:
        if on_mistake not in ('raise', 'print'):
            raise ValueError(
                f"on_mistake={on_mistake!r} must be 'raise' or 'print' "
                "(custom_hooks=[dict(type='ws_mm.CheckModelHook', "
                'on_mistake=...)])'
            )
        self.on_mistake = on_mistake
        self._watched: list[Any] = []
        # By name and class name of a layer.
        self._sizes: dict[tuple[str, str], set[torch.Size]] = {}

    def before_train(self, runner: Any) -> None:
        """Check the model that is about to be trained."""
        model = inner_model(runner.model)
        self._watch_sizes(model, runner)
        mistakes = check(model).mistakes
        if not mistakes:
            return
        lines = [
            'The model standardizes convolutions that nothing normalizes:',
            *mistakes,
        ]
        if self.on_mistake == 'raise':
            lines.append(
                "If this is not so, set on_mistake='print' in CheckModelHook."
            )
            raise ValueError('\n'.join(lines))
        print_log('\n'.join(lines), logger='current', level=logging.WARNING)

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Look when the first iteration is about to run."""
        if not self._looked:
            # Other hooks measured other images as the training began.
            for seen in self._sizes.values():
                seen.clear()
            loader = getattr(runner, 'train_dataloader', None)
            # A loader with a sampler of batches has no size of its own.
            sampler = getattr(loader, 'batch_sampler', None)
            images = getattr(sampler, 'batch_size', None)
            if isinstance(images, int):
                report_batch_norms(runner.model, images)
        super().before_train_iter(runner, batch_idx, data_batch)

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Warn, after the first iteration, of layers that levels share."""
        if not self._watched:
            return
        for handle in self._watched:
            handle.remove()
        self._watched = []
        shared = [key for key, seen in self._sizes.items() if len(seen) > 1]
        if shared:
            names, (kind, *_) = zip(*shared, strict=True)
            part = names[0].split('.')[0]
            print_log(
                f'{counted(names, f"{kind} layer")} ran on maps of several '
                'sizes in one iteration: a head shared over pyramid levels. '
                'Their estimates mix the levels and move '
                'once per level. GN has none: set '
                f"model.{part}.norm_cfg=dict(type='GN', num_groups=32)",
                logger='current',
                level=logging.WARNING,
            )

    def _watch_sizes(self, model: nn.Module, runner: Any) -> None:
        self._sizes = {}
        # A compiler would compile the first iteration for its hooks alone.
        # A student has images of two sizes in a step, whatever its heads.
        if getattr(runner, 'cfg', {}).get('compile') or 'student' in dict(
            model.named_children()
        ):
            return
        for name, module in model.named_modules():
            if isinstance(module, RunningStatistics):
                key = name, type(module).__name__
                seen = self._sizes.setdefault(key, set())
                self._watched.append(
                    module.register_forward_pre_hook(
                        lambda _, args, kwargs, seen=seen: seen.add(
                            (*args, *kwargs.values())[0].shape[2:]
                        ),
                        with_kwargs=True,
                    )
                )


def report_frozen(model: nn.Module) -> None:
    """Warn of norms that are frozen as they were built, or must not be so."""
    for problem in frozen_problems(model):
        _warn_once(problem)


def frozen_problems(model: nn.Module) -> list[str]:
    """Name norms that are frozen as they were built, or must not be so.

    A norm with running statistics is named if it is in eval mode in a model
    that trains, as ``frozen_stages`` of a backbone puts it, with initial
    statistics and constant affines. Learned affines are left alone: those
    are a GN checkpoint's, and such a BCN is its GroupNorm. A GN is named if
    its parameters do not train and are 1 and 0, a batch norm if it is in
    eval mode as it was built. A norm that continues a batch norm is named
    in training, too. A teacher follows its student.

    Args:
        model: the model, in its training modes.
    """
    inner = inner_model(model)
    names: dict[str, list[str]] = {}
    untrained: dict[str, list[str]] = {}
    groups: dict[str, list[str]] = {}
    batches: dict[str, list[str]] = {}
    for name, module in inner.named_modules():
        if name.startswith('teacher.'):
            continue
        if isinstance(module, RunningStatistics):
            if module.training and not module.continues_batch_norm:
                continue
            if module.is_as_built():
                found = untrained if module.training else names
                found.setdefault(type(module).__name__, []).append(name)
        elif isinstance(module, nn.GroupNorm) and _is_frozen_as_built(module):
            groups.setdefault(type(module).__name__, []).append(name)
        elif isinstance(module, BATCH_NORMS) and _is_identity(module):
            batches.setdefault(type(module).__name__, []).append(name)
    problems = [
        f'These {kind} layers are in eval mode while the model trains, '
        f'and have never learned any estimates: {", ".join(found)}. They '
        'stay as they were built. Set frozen_stages=-1 in the config of '
        'this part, or start it from a checkpoint that has them, for BCN '
        'also from a GN+WS one (init_cfg)'
        for kind, found in names.items()
    ]
    problems += [
        f'These {kind} layers train, and begin with the '
        f'statistics that they were built with: {counted(found)}. They '
        'normalize nothing at first. Start them from a checkpoint of batch '
        'norms (init_cfg), or set another norm_cfg in this part of the model, '
        "such as dict(type='GN', num_groups=32)"
        for kind, found in untrained.items()
    ]
    problems += [
        f'These {kind} layers do not train, and are as they were '
        f'built: {counted(found)}. So the convolutions before them may '
        'stay random. Set frozen_stages=-1 in the config of this part, or '
        'start it from a checkpoint (init_cfg)'
        for kind, found in groups.items()
    ]
    problems += [
        f'These {kind} layers use the statistics that they were '
        f'built with, in training, too: {counted(found)}. They normalize '
        'nothing. Start this part from a checkpoint (init_cfg). For a start '
        'without one, tools/model_converters/apply_norm.py replaces them and '
        'sets norm_eval=False and frozen_stages=-1'
        for kind, found in batches.items()
    ]
    return problems


def report_teacher(runner: Any) -> None:
    """Warn of a teacher that is not given the student's estimates."""
    teacher = getattr(inner_model(runner.model), 'teacher', None)
    skips = any(
        type(hook).__name__ == MEAN_TEACHER
        and getattr(hook, 'skip_buffers', False)
        for hook in getattr(runner, 'hooks', ())
    )
    if skips and teacher is not None and estimating_layers(teacher):
        _warn_once(
            f'{MEAN_TEACHER} averages parameters alone, so that the estimates '
            'of the teacher stay as they are and its labels are those of '
            f"another network. Set dict(type='{MEAN_TEACHER}', "
            'skip_buffer=False) in custom_hooks'
        )


def _is_identity(norm: Any) -> bool:
    if norm.training or norm.running_mean is None:
        return False
    # Statistics that a checkpoint folded into weight and bias are these, too.
    parameters = norm.parameters(recurse=False)
    return bool(
        (norm.running_mean == 0).all()
        and (norm.running_var == 1).all()
        and all((p == p.flatten()[0]).all() for p in parameters)
    )


def _is_frozen_as_built(norm: nn.GroupNorm) -> bool:
    return (
        norm.affine
        and not any(p.requires_grad for p in norm.parameters())
        and bool((norm.weight == 1).all() and (norm.bias == 0).all())
    )


def report_batch_norms(model: nn.Module, images: int) -> None:
    """Warn of batch norms that train on one or two images.

    Args:
        model: the model, in its training modes.
        images: number per process; 0 if unknown.
    """
    for problem in batch_norm_problems(model, images, world_size()):
        _warn_once(problem)


def batch_norm_problems(
    model: nn.Module, images: int, processes: int
) -> list[str]:
    """Name batch norms that train on one or two images.

    Args:
        model: the model, in its training modes. Batch norms in eval mode,
            as ``norm_eval=True`` puts them, use no statistics of the batch.
        images: number per process; 0 if unknown.
        processes: their number: ``SyncBatchNorm`` counts images of all.
    """
    few: dict[int, list[str]] = {}
    for name in batch_norms(model):
        layer = model.get_submodule(name)
        together = isinstance(layer, nn.SyncBatchNorm)
        number = images * (processes if together else 1)
        if layer.training and 0 < number <= 2:
            few.setdefault(number, []).append(name.removeprefix('module.'))
    return [
        f'The model trains {counted(names, "batch norm")} on the statistics '
        f'of {number} image{"s" if number > 1 else ""}. '
        'tools/model_converters/apply_norm.py replaces them, with '
        '--remaining those that no norm_cfg reaches; norm_eval=True freezes '
        'those of a pretrained backbone'
        for number, names in few.items()
    ]


@cache
def _warn_once(message: str) -> None:
    print_log(message, logger='current', level=logging.WARNING)


def estimating_layers(model: nn.Module) -> list[RunningStatistics]:
    """The layers of a model whose statistics normalize in training."""
    return [
        module
        for module in model.modules()
        if isinstance(module, RunningStatistics) and module.estimating
    ]


def sync_estimates(model: nn.Module) -> None:
    """Average running statistics over the ranks, in a loop of your own.

    It does what :class:`SyncEstimatesHook` does in mmengine's. Call it once
    before the first step, which begins to count values, then after each step,
    before averaged weights (EMA) are updated and a checkpoint is saved.

    Distributed: one collective, the same on every rank, so that all ranks
        call it. In one process nothing happens. Wrap the model in
        ``DistributedDataParallel`` with ``broadcast_buffers=False``.

    Args:
        model: any model, wrapped or not, on the device that it trains on.
    """
    if world_size() == 1:
        return
    layers = estimating_layers(model)
    for layer in layers:
        if layer.values_seen is None:
            layer.count_values()
    average_estimates(layers)


@torch.no_grad()
def average_estimates(layers: Sequence[RunningStatistics]) -> None:
    """Average over the ranks, by values seen, in one collective.

    Whatever the number of layers, these are 12 operations on the device, and
    nothing waits for it.

    Args:
        layers: those of one device that count the values that they see.
    """
    if not layers or world_size() == 1:
        return
    counts = []
    for layer in layers:
        assert layer.values_seen is not None
        counts.append(layer.values_seen)
    # A get_buffer for each would take longer than all that follows.
    buffers: list[Any] = [
        layer._buffers[name] for layer in layers for name in layer.statistics
    ]
    if any(values.dim() != 1 for values in buffers):
        buffers = [values.view(-1) for values in buffers]
    sizes = [values.numel() for values in buffers]
    old = torch.cat(buffers)
    of_each = tuple(len(x.statistics) for x in layers)
    owner = _owner(of_each, tuple(sizes), old.device)
    sums = old.new_empty(len(layers) + len(old), dtype=torch.float64)
    # Two views: the number of values of each layer, and weighted estimates.
    seen, weighted = sums[: len(layers)], sums[len(layers) :]
    on_host = torch.tensor(
        [count.on_host for count in counts],
        dtype=torch.float64,
        pin_memory=old.is_cuda,  # else the copy would wait for the device
    )
    seen.copy_(on_host, non_blocking=old.is_cuda)
    compiled = [count.compiled for count in counts]
    seen.add_(torch.cat(compiled))
    torch._foreach_zero_(compiled)
    for count in counts:
        count.on_host = 0
    torch.mul(old, seen[owner], out=weighted)
    dist.all_reduce(sums)
    total = seen[owner]
    average = torch.div(weighted, total, out=torch.empty_like(old))
    new = torch.where(total > 0, average, old)
    if len({values.dtype for values in buffers}) == 1:
        torch.split_with_sizes_copy(new, sizes, out=buffers)
    else:
        torch._foreach_copy_(buffers, new.split(sizes))


@lru_cache(maxsize=4)
def _owner(
    of_each: tuple[int, ...], sizes: tuple[int, ...], device: torch.device
) -> Tensor:
    """The number of the layer of each value.

    Args:
        of_each: numbers of statistics of the layers.
        sizes: those of all statistics.
        device: where to put it.
    """
    left = iter(sizes)
    owner = [
        number
        for number, count in enumerate(of_each)
        for size in islice(left, count)
        for _ in range(size)
    ]
    return torch.tensor(owner).to(device)
