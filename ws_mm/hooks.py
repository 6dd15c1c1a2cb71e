"""What has to happen between training iterations."""

import logging
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn

from .norm import BCN
from .surgery import check


class _FrozenLayersHook(Hook):
    """Name, once, the BCN layers that are frozen as they were built."""

    _looked = False

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Look when the first iteration is about to run."""
        if not self._looked:
            self._looked = True
            report_frozen(runner.model)


@HOOKS.register_module()
class SyncEstimatesHook(_FrozenLayersHook):
    """Average the estimates of all BCN layers over the ranks.

    Formula, for each layer, over the ranks r:
        estimate = sum(n_r * estimate_r) / sum(n_r)
    with n_r the values per channel that moved estimate_r in this iteration.

    Convention: the estimates move linearly with the batch moments, so ranks
        that started equal then hold what one process would hold after the
        concatenated batch, unequal batches and ranks with N = 0 included.
        Of a layer that is called several times per iteration, they are the
        average of each rank's own sequence of updates instead. Where no
        rank saw a value, nothing changes. A channel that was infinite or
        NaN on one rank did not move there and counts as it was.
    Distributed: one collective per training iteration for the whole model,
        the same on every rank whatever it saw. Without this hook each rank
        trains and validates with its own estimates, and the checkpoint
        holds those of rank 0. mmengine's ``SyncBuffersHook`` averages at the
        end of an epoch and before a validation only, without weights, which
        is after an iter-based loop and EMAHook took their copies; DDP's
        ``broadcast_buffers=True`` drops what the other ranks have seen.

    In any number of processes it warns of BCN layers that ``frozen_stages``
    froze before they learned any estimates, see :func:`report_frozen`.
    """

    # Before EMAHook copies them (NORMAL, or 49 in configs) and CheckpointHook
    # saves them (VERY_LOW), and so before any validation.
    priority = 'HIGH'

    def before_train(self, runner: Any) -> None:
        """Find the layers once, after the model was wrapped."""
        self._layers = estimating_layers(runner.model)
        if _world_size() == 1:
            return
        for layer in self._layers:
            layer.values_seen = layer.running_mean.new_zeros(
                1, dtype=torch.float64
            )

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
    """Look for standardized convolutions without a norm before training.

    It also warns of frozen BCN layers, see :func:`report_frozen`, and, after
    the first iteration, of BCN layers that pyramid levels share.

    It judges by names and order, see :func:`~ws_mm.surgery.check`, which a
    model with unusual names can mislead; ``tools/check_model.py`` runs the
    model instead.

    Args:
        on_mistake: 'raise' to stop before the first step, or 'print'.

    Raises:
        ValueError: ``on_mistake`` is unknown; before training, in 'raise',
            with every mistake and what mends it.
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

    def before_train(self, runner: Any) -> None:
        """Check the model that is about to be trained."""
        model = runner.model
        if is_model_wrapper(model):
            model = model.module
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

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Say, after the first iteration, which layers levels share."""
        if not self._watched:
            return
        for handle in self._watched:
            handle.remove()
        self._watched = []
        shared = [name for name, seen in self._sizes.items() if len(seen) > 1]
        if shared:
            part = shared[0].split('.')[0]
            print_log(
                f'{len(shared)} BCN layers ran on maps of several sizes in '
                f'one iteration ({", ".join(shared[:3])}, ...): a head shared '
                'over pyramid levels. Their estimates mix the levels and move '
                'once per level. GN has none: set '
                f"model.{part}.norm_cfg=dict(type='GN', num_groups=32)",
                logger='current',
                level=logging.WARNING,
            )

    def _watch_sizes(self, model: nn.Module, runner: Any) -> None:
        self._sizes: dict[str, set[torch.Size]] = {}
        # A compiler would compile the first iteration for its hooks alone.
        if getattr(runner, 'cfg', {}).get('compile'):
            return
        for name, module in model.named_modules():
            if isinstance(module, BCN):
                seen = self._sizes.setdefault(name, set())
                self._watched.append(
                    module.register_forward_pre_hook(
                        lambda _, args, seen=seen: seen.add(args[0].shape[2:])
                    )
                )


def report_frozen(model: nn.Module) -> None:
    """Warn of BCN layers that are frozen as they were built.

    These are in eval mode in a model that trains, as ``frozen_stages`` of a
    backbone puts them, with estimates of mean 0 and variance 1 and constant
    affines. Learned affines are left alone: those are a GN checkpoint's, and
    such a layer is its GroupNorm.
    """
    inner: Any = model.module if is_model_wrapper(model) else model
    names = [
        name
        for name, module in inner.named_modules()
        if isinstance(module, BCN)
        and not module.training
        and _is_as_built(module)
    ]
    if names:
        _warn_once(
            'These BCN layers are in eval mode while the model trains, and '
            f'have never learned any estimates: {", ".join(names)}. They '
            'stay at mean 0 and variance 1. Set frozen_stages=-1 in the '
            'config of this part, or start it from a BCN or GN+WS checkpoint '
            '(init_cfg)'
        )


def _is_as_built(layer: BCN) -> bool:
    affines = (layer.weight, layer.bias, layer.bn_weight, layer.bn_bias)
    constant = [layer.running_mean, layer.running_var - 1] + [
        values - values[0] for values in affines if values is not None
    ]
    return not any(values.any() for values in constant)


@cache
def _warn_once(message: str) -> None:
    print_log(message, logger='current', level=logging.WARNING)


def estimating_layers(model: nn.Module) -> list[BCN]:
    """The BCN layers of a model that are in 'estimate' mode."""
    return [
        module
        for module in model.modules()
        if isinstance(module, BCN) and module.mode == 'estimate'
    ]


@torch.no_grad()
def average_estimates(layers: list[BCN]) -> None:
    """Average over the ranks, by values seen, in one collective."""
    if not layers or _world_size() == 1:
        return
    weighted = []
    for layer in layers:
        assert layer.values_seen is not None
        values = layer.values_seen
        weighted += [
            values,
            values * layer.running_mean,
            values * layer.running_var,
        ]
    flat = torch.cat(weighted)
    dist.all_reduce(flat)
    parts = iter(flat.split([part.numel() for part in weighted]))
    for layer in layers:
        assert layer.values_seen is not None
        layer.values_seen.zero_()
        total, mean, var = next(parts), next(parts), next(parts)
        for estimate, part in (
            (layer.running_mean, mean),
            (layer.running_var, var),
        ):
            average = (part / total).to(estimate)
            estimate.copy_(torch.where(total > 0, average, estimate))


def _world_size() -> int:
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size()
