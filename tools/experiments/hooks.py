"""Hooks of the experiments."""

import json
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import StochasticWeightAverage
from mmengine.registry import HOOKS, MODELS
from torch import Tensor, nn

from ws_mm import update_estimates
from ws_mm.restoring import restored
from ws_mm.running_statistics import RunningStatistics
from ws_mm.singularities import NORMS

DIVERGED = 'diverged.json'
# What says that a norm cannot do its work on these activations.
IMPOSSIBLE = re.compile(
    '.*more than (?:1|one) value per (?:channel|statistic).*'
    '|a group of one value cannot be normalized.*'
    '|.*more than one image in training.*'
)
Batch = Any


@HOOKS.register_module()
class StopWhenDiverged(Hook):
    """Stop at the first loss that is not finite.

    Raises:
        FloatingPointError: with the iteration, after it was written to
            ``diverged.json`` in the work dir.
    """

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Batch = None,
        outputs: dict[str, Tensor] | None = None,
    ) -> None:
        """Look at the loss of every iteration."""
        loss = (outputs or {}).get('loss')
        if loss is None or bool(torch.isfinite(loss)):
            return
        path = os.path.join(runner.work_dir, DIVERGED)
        with open(path, 'w') as file:
            json.dump({'iteration': runner.iter + 1}, file)
        raise FloatingPointError(
            f'the loss is {loss.item()} at iteration {runner.iter + 1}'
        )


@HOOKS.register_module()
class TrainModeGapHook(Hook):
    """Evaluate once more at the end, with the norms as in training.

    The metrics get the prefix ``train_mode/``. What the norms keep is put
    back afterwards. Where one validation image leaves a norm one value per
    channel, as a training on many images need not, there is no such metric.
    """

    def after_train(self, runner: Any) -> None:
        """Run the validation images through training-mode norms."""
        norms = [m for m in runner.model.modules() if isinstance(m, NORMS)]
        with restored(runner.model):
            runner.model.eval()
            for norm in norms:
                norm.training = True
            try:
                evaluate(runner, 'train_mode')
            except ValueError as error:
                if not IMPOSSIBLE.search(str(error)):
                    raise
                print_log(f'no train_mode metrics: {error}', 'current')


@HOOKS.register_module()
class RecalibratedHook(Hook):
    """Evaluate once more at the end, with other estimates.

    The running statistics are replaced by means over training images, see
    ``ws_mm.update_estimates``, the weights left as they are. The metrics get
    the prefix ``recalibrated/``; what the norms keep is put back afterwards.
    A model without estimates is not evaluated.

    Args:
        num_batches: training batches to average over.
    """

    def __init__(self, num_batches: int = 200) -> None:
        self.num_batches = num_batches

    def after_train(self, runner: Any) -> None:
        """Average the moments of training images, then evaluate."""
        model = runner.model
        if not any(
            isinstance(module, RunningStatistics) for module in model.modules()
        ):
            return
        with restored(model):
            update_estimates(
                model, runner.train_dataloader, num_batches=self.num_batches
            )
            model.eval()
            evaluate(runner, 'recalibrated')


@HOOKS.register_module()
class AveragedHook(Hook):
    """Evaluate once more at the end, with the mean of the last weights.

    The mean is over parameters and running statistics of every iteration in
    the last part of the run. The metrics get the prefix ``averaged/``; the
    weights are put back afterwards.

    Args:
        share: this part of the run. It lies behind the last checkpoint
            before the end, so that a resumed run has the same mean.

    Raises:
        ValueError: share is not above 0 and at most 0.2.
    """

    priority = 'LOW'  # after the optimizer's step

    def __init__(self, share: float = 0.2) -> None:
        if not 0 < share <= 0.2:
            raise ValueError(f'share={share!r} must be above 0, at most 0.2')
        self.share = share
        self.mean: StochasticWeightAverage | None = None

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Batch = None,
        outputs: Any = None,
    ) -> None:
        """Take the weights of this iteration in."""
        if runner.iter < (1 - self.share) * runner.max_iters:
            return
        if self.mean is None:
            self.mean = StochasticWeightAverage(
                runner.model, update_buffers=True
            )
        self.mean.update_parameters(runner.model)

    def after_train(self, runner: Any) -> None:
        """Evaluate with the mean."""
        if self.mean is None:
            return
        model = runner.model
        own = {k: v.clone() for k, v in model.state_dict().items()}
        with restored(model):
            try:
                model.load_state_dict(self.mean.module.state_dict())
                model.eval()
                evaluate(runner, 'averaged')
            finally:
                model.load_state_dict(own)


@HOOKS.register_module()
class SmoothnessHook(Hook):
    """Measure how much the gradient turns over one optimizer step.

    Formula, with g and g' the gradients of one batch before and after the
    step that moved the parameters by d:
        smoothness/lipschitz = |g' - g| / |d|
        smoothness/change = |g' - g| / |g|

    Convention: the second needs no scale of the weights; standardized ones
        have none. Both batches' statistics are those of that batch.

    Args:
        interval: iterations between measurements.
    """

    def __init__(self, interval: int = 100) -> None:
        self.interval = interval

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Batch = None
    ) -> None:
        """Take gradient and parameters before the step."""
        self._before = None
        if runner.iter % self.interval == 0:
            parameters = [p.detach().clone() for p in learned(runner.model)]
            self._before = parameters, gradient(runner.model, data_batch)

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Batch = None,
        outputs: Any = None,
    ) -> None:
        """Compare with those after it."""
        if self._before is None:
            return
        parameters, before = self._before
        after = gradient(runner.model, data_batch)
        moved = [
            p - q
            for p, q in zip(learned(runner.model), parameters, strict=True)
        ]
        turned = [a - b for a, b in zip(after, before, strict=True)]
        turn = length(turned)
        runner.visualizer.add_scalars(
            {
                'smoothness/lipschitz': turn / length(moved),
                'smoothness/change': turn / length(before),
            },
            step=runner.iter + 1,
        )


@HOOKS.register_module()
class StartHook(Hook):
    """Measure, before the first step, what is left of a pretrained function.

    Formula, over the first validation images, one by one:
        start/loss_train, start/loss_eval = mean loss, by the mode of norms
        start/kept_train, start/kept_eval = mean over channels of r^2
    with r the correlation, over images and places, of the last map of the
    backbone with that of the reference in eval mode: 1 where a scale and a
    shift of each channel turn the one into the other.

    Convention: heads are new, so the losses say little of a backbone. Each
        image sees the model as it is before the first step, dropout is off.
        Where one image leaves a norm one value per channel, nothing is
        measured in training mode.

    Args:
        reference: config of the pretrained backbone; None for the losses
            alone.
        images: number of images.
    """

    def __init__(
        self, reference: dict[str, Any] | None = None, images: int = 16
    ) -> None:
        self.reference, self.images = reference, images

    def before_train(self, runner: Any) -> None:
        """Write the losses and the correlations to the curves."""
        if runner.iter:  # resumed: the first call has measured
            return
        model = runner.model
        loader = runner.val_dataloader
        with restored(model):
            model.train()  # a backbone may keep its norms in eval mode
            training = {
                m: m.training for m in model.modules() if isinstance(m, NORMS)
            }
            count = min(self.images, len(loader.dataset))
            batches = [
                loader.collate_fn([loader.dataset[i]]) for i in range(count)
            ]
            reference = None
            if self.reference is not None:
                reference = MODELS.build(self.reference)
                reference.init_weights()
                reference.to(next(model.parameters()).device).eval()
        found: dict[str, float] = {}
        for mode in ('eval', 'train'):
            modes = {n: mode == 'train' and t for n, t in training.items()}
            try:
                measured = [
                    start_of(model, modes, batch, reference)
                    for batch in batches
                ]
            except ValueError as error:
                if not IMPOSSIBLE.search(str(error)):
                    raise
                print_log(f'no start in {mode} mode: {error}', 'current')
                continue
            values, maps, expected = zip(*measured, strict=True)
            found[f'start/loss_{mode}'] = sum(values) / len(values)
            if reference is not None:
                found[f'start/kept_{mode}'] = kept(maps, expected)
        runner.visualizer.add_scalars(found, step=0)


@torch.no_grad()
def start_of(
    model: Any,
    modes: dict[nn.Module, bool],
    batch: Batch,
    reference: nn.Module | None,
) -> tuple[float, Tensor, Tensor]:
    """Loss of a batch, and the last maps of two backbones.

    Args:
        model: it stays as it is.
        modes: of the norms, whether they are in training mode.
        batch: images with their labels.
        reference: the other backbone; None for an empty map.
    """
    maps: list[Tensor] = []

    def look(_: nn.Module, inputs: Any, outputs: Any) -> None:
        if reference is not None:
            maps[:] = outputs[-1], reference(*inputs)[-1]

    with restored(model):
        model.eval()
        for norm, training in modes.items():
            norm.training = training
        torch.manual_seed(0)  # detectors sample
        watched = model.backbone.register_forward_hook(look)
        try:
            loss, _ = model.parse_losses(losses(model, batch))
        finally:
            watched.remove()
    own, other = maps or (torch.empty(0), torch.empty(0))
    return loss.item(), own, other


def kept(maps: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Mean over channels of the squared correlation.

    Shape: maps of (N, C, H, W), of any sizes. A constant channel counts 0.
    """
    rows = [
        torch.cat([m.transpose(0, 1).flatten(1).double() for m in own], 1)
        for own in (maps, expected)
    ]
    x, y = (row - row.mean(1, keepdim=True) for row in rows)
    scale = (x.square().sum(1) * y.square().sum(1)).clamp_min(1e-30)
    return ((x * y).sum(1).square() / scale).mean().item()


@torch.no_grad()
def evaluate(runner: Any, prefix: str) -> None:
    """Write the metrics of the model, in the modes it has, to the curves."""
    evaluator = runner.val_evaluator
    for batch in runner.val_dataloader:
        outputs = runner.model.val_step(batch)
        evaluator.process(data_samples=outputs, data_batch=batch)
    found = evaluator.evaluate(len(runner.val_dataloader.dataset))
    runner.visualizer.add_scalars(
        {f'{prefix}/{key}': value for key, value in found.items()},
        step=runner.iter,
    )


def losses(model: Any, batch: Batch) -> Any:
    """Return the losses of a training batch."""
    data = model.data_preprocessor(batch, True)
    if isinstance(data, dict):
        return model(**data, mode='loss')
    return model(*data, mode='loss')


def learned(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [p for p in model.parameters() if p.requires_grad]


def length(values: list[Tensor]) -> float:
    """Euclidean length of all the tensors together."""
    with torch.no_grad():
        return torch.stack([v.norm() for v in values]).norm().item()


def gradient(model: Any, batch: Batch) -> list[Tensor]:
    """Gradient of the loss of a batch; the model stays as it is."""
    with restored(model):
        torch.manual_seed(0)  # detectors sample; both times the same
        loss, _ = model.parse_losses(losses(model, batch))
        parameters = learned(model)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(parameters, found, strict=True)
    ]
