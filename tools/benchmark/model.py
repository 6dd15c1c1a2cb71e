"""Time whole training steps and inference of detectors and segmentors.

    python tools/benchmark/model.py OUT_DIR [--rounds 5] [--seed 0]

Writes OUT_DIR/model--<device>.json and its plot. The models are those of
configs/ (ResNet-50, one image, random weights). A training step is forward,
loss, backward and SGD. The image has as many objects as a detector samples
positive RoIs, so that every contender has the same RoIs to do. Inference
ends before the boxes are selected, which random weights would make unequal.
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.race import Row, race
from benchmark.result import Suite, arguments, run
from support import ROOT
from support.models import build_model
from support.tensors import saved_bytes

import ws_mm

MASK_RCNN = 'configs/mask_rcnn/mask-rcnn_r50_fpn_{}_8xb2-2x_coco.py'
DEEPLAB = 'configs/deeplabv3/deeplabv3_r50-d16_{}_8xb2-50e_voc12aug-513x513.py'
# Which config a contender is, and the changes that no config of ours makes.
# SyncBN of one process is BN; scaling.py has it over several.
MODELS: dict[str, tuple[str, dict[str, str]]] = {
    'GN': ('gn-ws-all', {'ws_mm.WSConv2d': 'Conv2d'}),
    'GN + mmcv ConvWS': ('gn-ws-all', {'ws_mm.WSConv2d': 'ConvWS'}),
    'BN': ('syncbn-all', {'SyncBN': 'BN'}),
    'GN+WS': ('gn-ws-all', {}),
    'BCN+WS': ('bcn-ws-all', {}),
}
POSITIVES, CLASSES = 128, 80
DETECTION = (800, 1344)  # 800 x 1333, padded to a multiple of 32
SEGMENTATION = (513, 513)


def renamed(value: Any, names: dict[str, str]) -> Any:
    """A config with some of its types replaced, without its weights."""
    if isinstance(value, dict):
        return type(value)(
            {
                key: renamed(item, names)
                for key, item in value.items()
                if key not in ('init_cfg', 'pretrained')
            }
        )
    if isinstance(value, (list, tuple)):
        return type(value)(renamed(item, names) for item in value)
    return names.get(value, value) if isinstance(value, str) else value


def config_of(template: str, contender: str) -> Config:
    """The config of a contender, without pretrained weights."""
    frozen = 'frozen-bn', {}
    name, names = frozen if contender == 'frozen BN' else MODELS[contender]
    cfg = Config.fromfile(ROOT / template.format(name))
    cfg.model = renamed(cfg.model, names)
    return cfg


def build(template: str, contender: str, device: str) -> nn.Module:
    """Build a contender's model with its random weights."""
    torch.manual_seed(0)
    model = build_model(config_of(template, contender))
    model.init_weights()
    return model.to(device)


class Batch:
    """One image and what is known of it, as the host passes them."""

    image: Tensor
    sample: Any

    def loss(self, model: nn.Module) -> Tensor:
        """The summed losses of a training step."""
        losses = model(self.image, [self.sample], mode='loss')
        return model.parse_losses(losses)[0]

    def infer(self, model: nn.Module) -> Any:
        """The network in one forward; a detector's boxes stay unselected."""
        return model(self.image, [self.sample], mode='tensor')


class Detection(Batch):
    """One image with objects for Mask R-CNN."""

    def __init__(self, device: str) -> None:
        import numpy as np
        from mmdet.structures import DetDataSample
        from mmdet.structures.mask import BitmapMasks
        from mmengine.structures import InstanceData

        height, width = DETECTION
        corners = torch.rand(POSITIVES, 2) * torch.tensor([width, height]) / 2
        sizes = torch.rand(POSITIVES, 2) * 300 + 60
        boxes = torch.cat([corners, corners + sizes], 1)
        masks = np.zeros((POSITIVES, height, width), np.uint8)
        for mask, (left, top, right, bottom) in zip(
            masks, boxes.int().tolist(), strict=True
        ):
            mask[top:bottom, left:right] = 1
        self.image = torch.randn(1, 3, height, width, device=device)
        shapes = dict.fromkeys(
            ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'),
            DETECTION,
        )
        self.sample = DetDataSample(
            metainfo={**shapes, 'scale_factor': (1.0, 1.0)},
            gt_instances=InstanceData(
                bboxes=boxes,
                labels=torch.randint(CLASSES, (POSITIVES,)),
                masks=BitmapMasks(masks, height, width),
            ),
        ).to(device)


class Segmentation(Batch):
    """One image with labels for DeepLab."""

    def __init__(self, device: str) -> None:
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        self.image = torch.randn(1, 3, *SEGMENTATION, device=device)
        self.sample = SegDataSample(
            metainfo={'img_shape': SEGMENTATION, 'ori_shape': SEGMENTATION},
            gt_sem_seg=PixelData(data=torch.randint(21, (1, *SEGMENTATION))),
        ).to(device)


def time_training(
    template: str,
    contenders: list[str],
    data: Callable[[str], Any],
    rounds: int,
    device: str,
) -> list[Row]:
    """Whole steps: forward, loss, backward, SGD."""
    batch = data(device)
    models: dict[str, nn.Module] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}

    def loss(name: str) -> Tensor:
        # Autocast as users of a GPU train; a CPU has no such Runner.
        with torch.autocast(device, enabled=device == 'cuda'):
            return batch.loss(models[name])

    def step(name: str) -> Callable[[], None]:
        def run_once() -> None:
            if name not in models:
                models[name] = build(template, name, device).train()
                learned = [
                    p for p in models[name].parameters() if p.requires_grad
                ]
                optimizers[name] = torch.optim.SGD(
                    learned, lr=1e-6, momentum=0.9
                )
            optimizers[name].zero_grad()
            loss(name).backward()
            optimizers[name].step()

        return run_once

    rows = race(
        {name: step(name) for name in contenders},
        'GN',
        rounds,
        device,
        warm_up=1,
    )
    for row in rows:
        if 'error' not in row:
            name = row['contender']
            row['saved_bytes'] = saved_bytes(lambda name=name: loss(name))
    return rows


def time_inference(
    template: str,
    contenders: list[str],
    data: Callable[[str], Any],
    rounds: int,
    device: str,
) -> list[Row]:
    """The network in eval mode; baked models hold plain convolutions."""
    batch = data(device)
    models: dict[str, nn.Module] = {}

    def step(name: str) -> Callable[[], None]:
        def run_once() -> None:
            if name not in models:
                models[name] = prepare(name)
            with torch.no_grad():
                batch.infer(models[name])

        return run_once

    def prepare(name: str) -> nn.Module:
        model = build(template, name.removesuffix(' baked'), device).eval()
        if not name.endswith(' baked'):
            return model
        if name.startswith('GN'):
            return ws_mm.bake(model)
        return ws_mm.bake(model, batch.infer, fold_estimates=True)

    return race(
        {name: step(name) for name in contenders},
        'GN',
        rounds,
        device,
        warm_up=1,
    )


def main() -> None:
    """Run the suite."""
    options = arguments(__doc__, rounds=5)
    rounds, device = options.rounds, options.device
    inferred = [*MODELS, 'GN+WS baked', 'BCN+WS baked']
    plan = {
        'Mask R-CNN': (MASK_RCNN, ['frozen BN', *MODELS], Detection),
        'DeepLabV3': (DEEPLAB, [*MODELS], Segmentation),
    }
    suite: Suite = {}
    for name, (template, trained, data) in plan.items():
        size = 'x'.join(
            str(edge)
            for edge in (DETECTION if data is Detection else SEGMENTATION)
        )
        suite[f'{name} train 1x3x{size}'] = (
            'GN',
            lambda t=template, c=trained, d=data: time_training(
                t, c, d, rounds, device
            ),
        )
        suite[f'{name} infer 1x3x{size}'] = (
            'GN',
            lambda t=template, d=data: time_inference(
                t, inferred, d, rounds, device
            ),
        )
    what = 'whole training step, or the network in eval mode, ResNet-50'
    run('model', what, suite, options)


if __name__ == '__main__':
    logging.disable(logging.INFO)  # which weights were initialized how
    main()
