"""Look at a config before a long training."""

import contextlib
import copy
import functools
import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, VISUALIZERS, DefaultScope
from mmengine.runner import Runner
from torch import Tensor, nn

from support import checkpoints, checks, data_checks, launch, models
from support.checks import SetupError, is_local
from support.failures import HOST_ERRORS
from support.findings import Finding
from support.tensors import saved_bytes
from ws_mm.hooks import batch_norm_problems, frozen_problems
from ws_mm.shapes import batch_norms

DRAWN_BY = {'mmdet': 'DetLocalVisualizer', 'mmseg': 'SegLocalVisualizer'}
WARM_UPS = ('LinearLR', 'ConstantLR')
# Copies of each weight: itself, its gradient, and what the optimizer keeps.
COPIES = {'SGD': 3, 'Adam': 4, 'AdamW': 4}
MIB = 2**20


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep mmengine's three lines per parameter out of the findings."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


class Training:
    """What the checks have in common.

    Args:
        cfg: the config.
        processes: of the training.
        folder: for pictures.
    """

    def __init__(self, cfg: Config, processes: int, folder: Path) -> None:
        self.cfg, self.processes, self.folder = cfg, processes, folder
        self.broken: SetupError | None = None
        loader = cfg.get('train_dataloader') or {}
        batch = loader.get('batch_sampler') or {}
        self.batch = loader.get('batch_size') or batch.get('batch_size')

    @functools.cached_property
    def model(self) -> nn.Module:
        """Built once."""
        return models.build_model(self.cfg)

    def checks(self, size: int, memory: bool) -> list[Callable]:
        """All checks of this config.

        Args:
            size: pixels of the random image that judges the layers.
            memory: whether to train for a step.
        """
        loaders = [
            f'{phase}_dataloader'
            for phase in ('train', 'val', 'test')
            if self.cfg.get(f'{phase}_dataloader')
        ]
        data = [partial(self.data, loader) for loader in loaders]
        try:
            _ = self.model
        except SetupError as error:
            self.broken = error
            return [self.does_not_build, self.learning_rate, *data]
        return [
            partial(self.layers, size),
            self.norms_of_batches,
            self.frozen,
            self.weights,
            self.learning_rate,
            *data,
            *[self.memory] * memory,
        ]

    def does_not_build(self) -> Iterator[Finding]:
        """Say it once; checks that need the model are left out."""
        yield Finding('error', str(self.broken))

    def layers(self, size: int) -> Iterator[Finding]:
        """See that a norm follows each standardized convolution."""
        report, note = models.judge(self.cfg, self.model, size)
        for mistake in report.mistakes:
            yield Finding('error', mistake)
        count = sum(conv.standardized for conv in report)
        text = f'{count} of {len(report)} convolutions standardized. {note}'
        yield Finding('ok', text.strip())

    def norms_of_batches(self) -> Iterator[Finding]:
        """Name batch norms that train on few images."""
        self.model.train()
        found = batch_norm_problems(
            self.model, self.batch or 0, self.processes
        )
        for problem in found:
            yield Finding('warning', problem)
        if not found:
            count = len(batch_norms(self.model))
            yield Finding(
                'ok',
                f'{count} batch norms, none of which trains on the '
                'statistics of one or two images',
            )

        problem = self._one_value()
        for text, fix in HOST_ERRORS.items():
            if text in problem:
                yield Finding('error', problem, fix.format(layer=''))

    def _one_value(self) -> str:
        """Run a segmentor on one image as in training; return its error."""
        if self.batch != 1 or not hasattr(self.model, 'encode_decode'):
            return ''
        size = self.cfg.model.get('data_preprocessor', {}).get('size')
        image = models.random_image(self.model, 1, *(size or (128, 128)))
        try:
            with torch.no_grad():
                models.segment(self.model, image)
        # What else it may lack, train.py says.
        except Exception as error:
            return str(error)
        return ''

    def frozen(self) -> Iterator[Finding]:
        """Name norms that stay as they were built."""
        if checkpoints.named_checkpoints(self.cfg):
            return  # what they hold is not loaded here
        for problem in frozen_problems(self.model.train()):
            yield Finding('warning', problem)

    def weights(self) -> Iterator[Finding]:
        """Load the checkpoints of this machine, as a training does."""
        paths = [path for _, path in checkpoints.named_checkpoints(self.cfg)]
        checkpoints.check_checkpoints(self.cfg)
        remote = [path for path in paths if not is_local(path)]
        if remote:
            words = f'{", ".join(remote)}: not loaded here'
            yield Finding('ok', words)
        elif paths:
            model = models.build_model(self.cfg)
            load_from = self.cfg.get('load_from')
            checkpoints.check_weights_fit(load_from, model)
            checkpoints.check_parts_fit(model)
            with quiet():
                model.init_weights()
            yield Finding('ok', f'{", ".join(paths)}: can be loaded')

    def learning_rate(self) -> Iterator[Finding]:
        """Compare the images of a step with those that the rate is for."""
        scale = self.cfg.get('auto_scale_lr') or {}
        wrapper = self.cfg.get('optim_wrapper') or {}
        rate = (wrapper.get('optimizer') or {}).get('lr')
        base = scale.get('base_batch_size')
        counts = wrapper.get('accumulative_counts', 1)
        if not (base and rate and self.batch):
            yield Finding(
                'warning',
                f'the config does not say for which batch lr={rate} is meant',
                'auto_scale_lr = dict(base_batch_size=IMAGES_OF_A_STEP)',
            )
            return
        images = self.batch * self.processes * counts
        words = (
            f'lr={rate:g} is meant for {base} images per step, and a step '
            f'has {self.batch} images x {self.processes} processes x '
            f'{counts} iterations = {images}'
        )
        if images == base or scale.get('enable'):
            yield Finding('ok', words)
            return
        yield Finding(
            'warning',
            words,
            '--auto-scale-lr, or --cfg-options optim_wrapper.optimizer.lr='
            f'{rate * images / base:g} (linear rule), or --processes of the '
            'training',
        )

    def warm_up(self, images: int) -> Iterator[Finding]:
        """See that warm-ups end before the training does.

        Args:
            images: of the training set.
        """
        plan = self.cfg.get('train_cfg') or {}
        step = (self.batch or 1) * self.processes
        epoch = math.ceil(images / step)  # the last may be smaller
        total = plan.get('max_iters') or epoch * plan.get('max_epochs', 0)
        schedulers = self.cfg.get('param_scheduler') or []
        if not isinstance(schedulers, dict):
            named = {
                f'param_scheduler.{i}': s for i, s in enumerate(schedulers)
            }
        else:  # one, or those of each optimizer
            one = 'type' in schedulers
            named = {'param_scheduler': schedulers} if one else {}
        for name, scheduler in named.items():
            end = scheduler.get('end') or 0
            if checks.short_name(scheduler) not in WARM_UPS or scheduler.get(
                'by_epoch', True
            ):
                continue
            if 0 < total <= end:
                yield Finding(
                    'warning',
                    f'{name}, a warm-up, ends at iteration '
                    f'{end}, and the training has {total}: it never has its '
                    'full learning rate',
                    f'--cfg-options {name}.end='
                    f'{max(total // 20, 1)}, or more epochs',
                )

    def data(self, loader: str) -> Iterator[Finding]:
        """Read and draw the first sample of a loader."""
        checks.check_data(self.cfg, (loader,))
        scope = self.cfg.get('default_scope') or 'mmengine'
        with DefaultScope.overwrite_default_scope(scope):
            dataset = launch.open_data(
                self.cfg,
                loader,
                lambda: Runner.build_dataloader(self.cfg[loader]).dataset,
            )
            if loader == 'train_dataloader':
                yield from self.warm_up(len(dataset))
            if self.broken is None:
                data_checks.check_num_classes(loader, dataset, self.model)
            sample = dataset[0]
            classes = (dataset.metainfo or {}).get('classes') or ()
            words = f'{loader}: {len(dataset)} images, {len(classes)} classes'
            image = sample.get('inputs')
            if scope not in DRAWN_BY or not isinstance(image, Tensor):
                yield Finding('ok', f'{words}; a sample is read, not drawn')
                return
            boxes = sample['data_samples'].get('gt_instances', {})
            if hasattr(boxes.get('bboxes'), 'tensor'):
                boxes.bboxes = boxes.bboxes.tensor  # what it can draw
            path = self.folder / f'{loader}.png'
            drawer = dict(type=DRAWN_BY[scope], name=str(path))
            visualizer = VISUALIZERS.build(drawer)
            visualizer.dataset_meta = dataset.metainfo
            visualizer.add_datasample(
                *(loader, seen(loader, image, sample['data_samples'])),
                sample['data_samples'],
                draw_pred=False,
                out_file=str(path),
            )
        size = 'x'.join(map(str, image.shape[1:]))
        yield Finding('ok', f'{words}; a sample of {size} is in {path}')

    def memory(self) -> Iterator[Finding]:
        """Count what one training step keeps, on the CPU."""
        batch, model = self._step()
        own = [*model.parameters(), *model.buffers()]
        activations = saved_bytes(lambda: model(**batch, mode='loss'), own)
        kind = checks.short_name(self.cfg.optim_wrapper.optimizer)
        copies = COPIES.get(kind, 4)
        weights = sum(
            p.nbytes * (copies if p.requires_grad else 1)
            for p in model.parameters()
        )
        total = (activations + weights) / MIB
        words = (
            f'one step keeps about {total:.0f} MiB in float32: '
            f'{activations / MIB:.0f} activations of {self.batch} images, '
            f'{weights / MIB:.0f} weights, gradients and {kind}; workspace '
            'of the operators comes on top'
        )
        if not torch.cuda.is_available():
            yield Finding('ok', words)
            return
        there = torch.cuda.get_device_properties(0).total_memory / MIB
        full = total / there
        yield Finding(
            'error' if full > 1 else 'warning' if full > 0.8 else 'ok',
            f'{words}. The GPU has {there:.0f} MiB',
            'train_dataloader.batch_size smaller and '
            'optim_wrapper.accumulative_counts larger, --amp, or '
            'model.backbone.with_cp=True'
            if full > 0.8
            else '',
        )

    def _step(self) -> tuple[dict[str, Any], nn.Module]:
        """The first batch, and the whole model in training."""
        config = copy.deepcopy(self.cfg.train_dataloader)
        config.update(num_workers=0, persistent_workers=False)
        scope = self.cfg.get('default_scope') or 'mmengine'
        with DefaultScope.overwrite_default_scope(scope):
            batch = next(iter(Runner.build_dataloader(config)))
            # models.build_model lets it predict few objects.
            model = MODELS.build(copy.deepcopy(self.cfg.model))
        model = revert_sync_batchnorm(model).train()
        return model.data_preprocessor(batch, True), model


def seen(loader: str, image: Tensor, sample: Any) -> np.ndarray:
    """The picture to which the truth of a sample belongs.

    Evaluation compares with the file: the hosts' pipelines load the truth
    behind all that changes the size.
    """
    masks = sample.get('gt_instances', {}).get('masks')
    areas = sample.get('gt_sem_seg', {}).get('data')
    size = tuple(image.shape[1:])
    if masks is not None:
        fits = (masks.height, masks.width) == size
    elif areas is not None:
        fits = tuple(areas.shape[-2:]) == size
    else:
        fits = loader == 'train_dataloader'
    path = sample.metainfo.get('img_path')
    if fits or not path:
        return picture(image)
    return mmcv.imread(path, channel_order='rgb')


def picture(image: Tensor) -> np.ndarray:
    """Colours of an input, (C, H, W) in BGR, as (H, W, 3) in RGB."""
    values = image.float()[:3].flip(0)
    if image.dtype != torch.uint8:  # normalized by the pipeline
        low, high = values.min(), values.max()
        values = (values - low) / (high - low).clamp(min=1e-6) * 255
    rgb = values.expand(3, -1, -1).permute(1, 2, 0)
    return np.ascontiguousarray(rgb.byte().numpy())
