"""Training hook that measures running statistics for validation."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dataset import DefaultSampler
from mmengine.dist import broadcast_object_list, get_dist_info
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.registry import HOOKS
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from .estimates import measure
from .hooks import inner_model
from .resume import NumberedSampler, SeededSamples


@HOOKS.register_module()
class UpdateEstimatesHook(Hook):
    """Validate and save with statistics measured for the current weights.

    Before each validation and each checkpoint, the running statistics of
    BCN and BatchNorm layers become means over training images, see
    :func:`~ws_mm.estimates.update_estimates`. With ``EMAHook`` they are
    measured for its averaged weights, which are validated and saved.

    Convention: training continues with its own statistics, the order of its
        images and its random numbers. A checkpoint holds these statistics
        as ``training_estimates``, and ``--resume`` takes them. After the
        last iteration the model keeps the measured ones; with ``EMAHook``
        it keeps its own, since the averaged weights are in the checkpoints
        only. The images are those of ``train_dataloader``, in an order that
        depends on the seed and the iteration.
    Distributed: each rank measures on its share of the images.

    Args:
        num_batches: number of batches that each rank averages over at most.
            A validation and a checkpoint of the same weights share one pass.

    Raises:
        ValueError: ``num_batches`` is no whole number of at least 1; the
            sampler of ``train_dataloader`` cannot be replaced (that of a
            stream, for one), or gives no batch; or ``EMAHook`` has
            ``evaluate_on_origin``.
    """

    # After EMAHook (NORMAL, 49 in configs) has averaged or put its weights
    # into a checkpoint, before CheckpointHook (VERY_LOW) saves.
    priority = 'BELOW_NORMAL'

    def __init__(self, num_batches: int = 200) -> None:
        if not isinstance(num_batches, int) or num_batches < 1:
            raise ValueError(
                f'num_batches={num_batches!r} must be a whole number of at '
                "least 1 (custom_hooks=[dict(type='ws_mm.UpdateEstimatesHook'"
                ', num_batches=...)])'
            )
        self.num_batches = num_batches
        self._in_training = False
        # Statistics of the current weights, by name.
        self._measured: dict[str, Tensor] | None = None
        # Statistics of training, while measured ones are in the model.
        self._own: dict[str, Tensor] | None = None

    def before_train(self, runner: Any) -> None:
        """Reset the state of an earlier training."""
        self._in_training = True
        self._measured = self._own = None
        # What a measurement cannot do is said before the first step.
        batches = self._batches(runner)
        loader = runner.train_loop.dataloader
        if loader.batch_sampler.drop_last and not len(batches):
            raise ValueError(
                'UpdateEstimatesHook has no batch to measure on: '
                f'train_dataloader has {len(loader.dataset)} images for all '
                f'processes, batches of {loader.batch_sampler.batch_size} and '
                'drop_last=True. Set drop_last=False or a smaller batch_size'
            )
        for hook in _hooks(runner, EMAHook):
            if getattr(hook, 'evaluate_on_origin', False):
                raise ValueError(
                    'UpdateEstimatesHook measures statistics of the averaged '
                    'weights. With evaluate_on_origin=True the weights that '
                    'train would be validated with them. Set '
                    'evaluate_on_ema=True and evaluate_on_origin=False in '
                    'the EMAHook of custom_hooks'
                )

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Forget what was measured; measure if a checkpoint follows."""
        self._measured = None
        if any(
            not hook.by_epoch
            and (
                hook.every_n_train_iters(
                    runner, hook.interval, hook.save_begin
                )
                or (hook.save_last and hook.is_last_train_iter(runner))
            )
            for hook in _hooks(runner, CheckpointHook)
        ):
            self._measure(runner)

    def after_train_epoch(self, runner: Any) -> None:
        """Measure if a checkpoint follows."""
        if any(
            hook.by_epoch
            and (
                hook.every_n_epochs(runner, hook.interval, hook.save_begin)
                or (hook.save_last and hook.is_last_train_epoch(runner))
            )
            for hook in _hooks(runner, CheckpointHook)
        ):
            self._measure(runner)

    def before_val(self, runner: Any) -> None:
        """Put the measured statistics into the model."""
        if self._in_training:
            self._own = self._statistics(runner)
            self._put(runner, self._measure(runner))

    def after_val(self, runner: Any) -> None:
        """Put the statistics of training back."""
        if self._own is not None:
            self._put(runner, self._own)
            self._own = None

    def before_save_checkpoint(
        self, runner: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Save the measured statistics, and beside them those of training."""
        if not self._in_training:
            return
        if self._measured is None and get_dist_info()[1] > 1:
            runner.logger.warning(
                'This checkpoint is saved by rank 0 at a time of its own, at '
                'which UpdateEstimatesHook cannot measure with all ranks: it '
                'holds the estimates of training. What CheckpointHook saves '
                'holds measured ones'
            )
            return
        own = self._own or self._statistics(runner)
        if not own:
            return
        own = _on_cpu(own)
        checkpoint['training_estimates'] = own
        # What EMAHook has put there is the model that trains. A checkpoint
        # is saved while others are in the place of its own, too: the best.
        trains = checkpoint.get('ema_state_dict')
        if trains and self._holder(runner) is inner_model(runner.model):
            trains.update({f'module.{name}': v for name, v in own.items()})
        checkpoint['state_dict'].update(_on_cpu(self._measure(runner)))

    def after_load_checkpoint(
        self, runner: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Resume with the estimates of training."""
        own = checkpoint.get('training_estimates')
        if own and runner._resume:
            if self._holder(runner) is inner_model(runner.model):
                checkpoint['state_dict'].update(own)
            else:
                self._put(runner, own)

    def after_train(self, runner: Any) -> None:
        """Leave the measured statistics in the model with these weights."""
        if not _hooks(runner, EMAHook):
            self._put(runner, self._measure(runner))
        self._in_training = False

    def _measure(self, runner: Any) -> dict[str, Tensor]:
        if self._measured is None:
            with _averaged(runner):
                measured = measure(
                    runner.model,
                    self._batches(runner),
                    num_batches=self.num_batches,
                )
            # A layer that a state dict holds under several names, too.
            named = inner_model(runner.model).named_modules(
                remove_duplicate=False
            )
            self._measured = {
                _saved_name(f'{name}.{statistic}'): values
                for name, layer in named
                for statistic, values in measured.get(layer, {}).items()
            }
        return self._measured

    def _batches(self, runner: Any) -> DataLoader[Any]:
        """The training images, in batches as in training.

        A loader of its own: restarting that of the training would end its
        sampler or its workers.
        """
        loader = runner.train_loop.dataloader
        if isinstance(loader.dataset, IterableDataset):
            kind = f'data set is a {type(loader.dataset).__name__}, a stream'
            raise _cannot_draw(kind)
        # With diff_rank_seed each rank has a seed of its own; one order is
        # shared by all.
        seeds = [runner.seed]
        broadcast_object_list(seeds)
        samples = DefaultSampler(loader.dataset, seed=seeds[0])
        samples.set_epoch(runner.iter)
        own = loader.batch_sampler
        drawn = getattr(own, 'sampler', None)
        # mmdet's samplers of several sources: each batch has some of all.
        if hasattr(drawn, 'source_ratio'):
            raise _cannot_draw(_sampled_by(drawn))
        try:
            batches = type(own)(
                samples, batch_size=own.batch_size, drop_last=own.drop_last
            )
        except (AttributeError, TypeError) as error:
            raise _cannot_draw(_sampled_by(own)) from error
        fetch = getattr(loader.dataset, '__getitems__', None)
        if isinstance(fetch, SeededSamples):
            # Once built: mmdet's refuse what is no Sampler of torch.
            batches.sampler = NumberedSampler(samples)
            batches.sampler.epoch = runner.iter
        return DataLoader(
            loader.dataset,
            batch_sampler=batches,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
        )

    def _holder(self, runner: Any) -> Any:
        """The model whose buffers a validation uses."""
        for hook in _hooks(runner, EMAHook):
            if hook.ema_model.update_buffers:
                return hook.ema_model.module
        return inner_model(runner.model)

    def _statistics(self, runner: Any) -> dict[str, Tensor]:
        buffers = _buffers(self._holder(runner))
        return {name: buffers[name].clone() for name in self._measure(runner)}

    @torch.no_grad()
    def _put(self, runner: Any, statistics: dict[str, Tensor]) -> None:
        buffers = _buffers(self._holder(runner))
        for name, values in statistics.items():
            buffers[name].copy_(values)


def _sampled_by(sampler: Any) -> str:
    return f'sampler is a {type(sampler).__name__}'


def _cannot_draw(kind: str) -> ValueError:
    return ValueError(
        'UpdateEstimatesHook cannot go over the images of train_dataloader: '
        f'its {kind}, and no other sampler can draw them in its place. '
        'Remove the hook from custom_hooks, and call '
        'ws_mm.update_estimates(model, loader) after training'
    )


def _hooks(runner: Any, kind: type) -> list[Any]:
    return [hook for hook in runner.hooks if isinstance(hook, kind)]


@contextmanager
def _averaged(runner: Any) -> Iterator[None]:
    """Put the averaged weights of EMAHook into the model meanwhile."""
    hooks = _hooks(runner, EMAHook)
    for hook in hooks:
        hook.before_val_epoch(runner)
    try:
        yield
    finally:
        for hook in hooks:
            hook.after_val_epoch(runner)


def _saved_name(name: str) -> str:
    """A name without the prefixes of wrappers of submodules."""
    return re.sub(r'_(fsdp|checkpoint)_wrapped_module\.', '', name)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_buffers(remove_duplicate=False)
    return {_saved_name(name): b for name, b in named}


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.cpu().clone() for name, values in tensors.items()}
