"""Elimination singularities: channels that a ReLU makes constant or linear.

A channel that is never, or always, positive before its ReLU is constant or
linear behind it; a network near such elimination singularities trains slowly
(arXiv 1911.09738, section 3). Batch normalization keeps away from them; norms
over channels alone do not.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .hooks import inner_model
from .restoring import restored
from .running_statistics import RunningStatistics

THRESHOLDS = (1e-2, 1e-3)
NORMS = (_NormBase, nn.GroupNorm, RunningStatistics)
FILE = 'singularities.jsonl'


@dataclass
class Moments:
    """Sums over all values that one ReLU was given, per channel."""

    count: float
    total: Tensor
    squares: Tensor
    positive: Tensor

    @classmethod
    def of(cls, x: Tensor) -> 'Moments':
        """The sums of one activation of shape (N, C, *)."""
        values = x.detach().double().transpose(0, 1).flatten(1)
        return cls(
            values.shape[1],
            values.sum(1),
            values.square().sum(1),
            (values > 0).double().sum(1),
        )

    def __add__(self, other: 'Moments') -> 'Moments':
        return Moments(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            self.positive + other.positive,
        )

    def report(self) -> dict[str, float]:
        """Shares of eliminated channels, and distance from N(0, 1).

        Formula, for each channel of mean m, variance v and share p of
        positive values:
            firing probability, Gaussian = Phi(m / sqrt(v)); empirical = p
            eliminated below t: min(probability, 1 - probability) < t
            kl = (v + m^2 - 1 - log(v)) / 2
        averaged over the channels. A constant channel has v = 0: it counts
        as eliminated, and its kl is that of v = 1e-12.
        """
        mean = self.total / self.count
        var = (self.squares / self.count - mean.square()).clamp(min=0)
        gaussian = 0.5 * torch.erfc(-mean / (2 * var).sqrt())
        # A constant 0 is 0 / 0 above.
        gaussian = torch.nan_to_num(gaussian, nan=0.0)
        empirical = self.positive / self.count
        shares = {}
        for name, firing in (('gaussian', gaussian), ('empirical', empirical)):
            rare = torch.minimum(firing, 1 - firing)
            for threshold in THRESHOLDS:
                below = (rare < threshold).double().mean().item()
                shares[f'{name}_below_{threshold:g}'] = below
        safe = var.clamp(min=1e-12)
        kl = 0.5 * (var + mean.square() - 1 - safe.log())
        return {**shares, 'kl': kl.mean().item()}


@torch.no_grad()
def measure(
    model: nn.Module, run: Callable[[nn.Module], object]
) -> dict[str, dict[str, float]]:
    """Measure the input of every ReLU that directly follows a norm.

    The model is in eval mode meanwhile; nothing of it changes.

    Args:
        model: any model whose ReLUs are modules.
        run: calls the model on the images to measure.

    Returns:
        :meth:`Moments.report` of each such ReLU, by the name of the norm
        before it.
    """
    names = {m: name for name, m in model.named_modules()}
    found: dict[str, Moments] = {}
    # Held until the ReLU has seen it: an id is reused once a tensor is gone.
    fresh: dict[int, tuple[Tensor, nn.Module]] = {}

    def after_norm(norm: nn.Module, args: Any, output: Any) -> None:
        fresh.clear()
        fresh[id(output)] = output, norm

    def before_relu(relu: nn.Module, args: Any, kwargs: Any) -> None:
        held = fresh.pop(id((*args, *kwargs.values())[0]), None)
        if held is None or held[0].numel() == 0:
            return
        name = names[held[1]]
        moments = Moments.of(held[0])
        found[name] = found[name] + moments if name in found else moments

    handles = []
    for module in names:
        if isinstance(module, NORMS):
            handles.append(module.register_forward_hook(after_norm))
        elif isinstance(module, nn.ReLU):
            handles.append(
                module.register_forward_pre_hook(before_relu, with_kwargs=True)
            )
    try:
        with restored(model):
            model.eval()
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return {name: moments.report() for name, moments in found.items()}


@HOOKS.register_module()
class SingularitiesHook(Hook):
    """Measure a fixed set of images at intervals during training.

    Writes one line for each measurement to ``singularities.jsonl`` in the
    work dir and the averages over all layers to the runner's visualizer
    (TensorBoard included).

    Args:
        interval: iterations between measurements; the start and the end are
            always measured.
        num_batches: number of first validation batches to measure.

    Raises:
        ValueError: an argument is below 1; or, before training, the config
            has no validation data or the model no ReLU after a norm.
    """

    priority = 'LOW'

    def __init__(self, interval: int = 500, num_batches: int = 8) -> None:
        for name, value in (
            ('interval', interval),
            ('num_batches', num_batches),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f'{name}={value!r} must be a whole number of at least 1 '
                    "(custom_hooks=[dict(type='ws_mm.SingularitiesHook', "
                    f'{name}=...)])'
                )
        self.interval = interval
        self.num_batches = num_batches

    def before_train(self, runner: Any) -> None:
        """Choose the images and measure the model as it starts."""
        if runner.val_loop is None:
            raise ValueError(
                'SingularitiesHook measures validation images and the config '
                'has none: set val_dataloader, val_evaluator and val_cfg'
            )
        self._batches = []
        for batch in runner.val_dataloader:
            self._batches.append(batch)
            if len(self._batches) == self.num_batches:
                break
        if not self._write(runner, runner.iter):
            raise ValueError(
                'SingularitiesHook found no ReLU module that directly '
                'follows a norm in this model: remove it from custom_hooks'
            )

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Measure every ``interval`` iterations and at the end."""
        done = runner.iter + 1
        if done % self.interval == 0 or done == runner.max_iters:
            self._write(runner, done)

    def after_train(self, runner: Any) -> None:
        """Measure the end of a training that stopped early."""
        if self._last != runner.iter:
            self._write(runner, runner.iter)

    def _write(self, runner: Any, iteration: int) -> bool:
        self._last = iteration
        model = inner_model(runner.model)

        def run(model: nn.Module) -> None:
            for batch in self._batches:
                model.val_step(batch)  # type: ignore[operator]

        layers = measure(model, run)
        if not layers or runner.rank != 0:
            return bool(layers)
        keys = next(iter(layers.values()))
        averages = {
            f'singularities/{key}': math.fsum(
                layer[key] for layer in layers.values()
            )
            / len(layers)
            for key in keys
        }
        runner.visualizer.add_scalars(averages, step=iteration)
        line = json.dumps({'iteration': iteration, 'layers': layers})
        with open(os.path.join(runner.work_dir, FILE), 'a') as file:
            file.write(line + '\n')
        return True
