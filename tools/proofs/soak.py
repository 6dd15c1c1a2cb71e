"""Train one image at a time for long, and see that nothing drifts.

A narrow Mask R-CNN made of WS and BCN learns to find rectangles under
bfloat16 autocast: images of changing sizes, every eighth of them empty, so
that the mask head often sees no RoI at all. One JSON line is printed; the
exit code is 1 where a buffer or a loss is not finite, where memory grew, or
where the iterations became slower.
"""

import argparse
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from proofs.tiny import DET

# What may change between the first and the last part, as a factor: medians
# of CPU time still differ by some percent on a busy machine.
MORE_MEMORY = 1.02
MORE_TIME = 1.15


def model_cfg() -> ConfigDict:
    """Config of the model: every norm is BCN, every conv before one WS."""
    cfg = Config.fromstring(DET, '.py')
    layers = dict(conv_cfg=cfg.conv_cfg, norm_cfg=cfg.norm_cfg)
    model = cfg.model
    model.data_preprocessor.update(mean=[128] * 3, std=[64] * 3)
    model.backbone.update(
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(1, 2),
    )
    model.neck.update(in_channels=[16, 32], num_outs=3, **layers)
    model.rpn_head.anchor_generator.update(
        scales=[4], ratios=[1.0], strides=[8, 16, 32]
    )
    heads, settings = model.roi_head, model.train_cfg
    for extractor in (heads.bbox_roi_extractor, heads.mask_roi_extractor):
        extractor.featmap_strides = [8, 16]
    heads.mask_head.update(layers)
    settings.rpn.sampler.add_gt_as_proposals = False
    for part in (settings.rpn, settings.rcnn):
        part.assigner.min_pos_iou = 0.3
    model.test_cfg.rcnn = dict(
        score_thr=0.0, nms=dict(type='nms'), max_per_img=5
    )
    return model


def keep_boxes_in_float32(model: torch.nn.Module) -> None:
    """Leave autocast where mmcv's NMS and RoIAlign on a CPU need it."""
    model.neck.register_forward_hook(
        lambda *call: tuple(level.float() for level in call[-1])
    )
    model.rpn_head.forward = torch.autocast('cpu', enabled=False)(
        model.rpn_head.forward
    )


def rectangles(rng: np.random.Generator, empty: bool) -> dict[str, Any]:
    """One image of noise with bright rectangles, as a dataloader gives it.

    Args:
        rng: source of the image.
        empty: draw no rectangle, give no box.
    """
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    height, width = (32 * int(side) for side in rng.integers(2, 5, 2))
    image = rng.integers(0, 100, (3, height, width), np.uint8)
    boxes, masks = [], []
    for _ in range(0 if empty else rng.integers(1, 4)):
        x, y = rng.integers(0, width - 24), rng.integers(0, height - 24)
        right, low = x + rng.integers(16, 25), y + rng.integers(16, 25)
        mask = np.zeros((height, width), np.uint8)
        mask[y:low, x:right] = 1
        image[:, y:low, x:right] += 100
        boxes.append([x, y, right, low])
        masks.append(mask)
    sample = DetDataSample(
        metainfo=dict(img_shape=(height, width), ori_shape=(height, width))
    )
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        labels=torch.zeros(len(boxes), dtype=torch.int64),
        masks=BitmapMasks(masks, height, width),
    )
    return dict(inputs=[torch.from_numpy(image)], data_samples=[sample])


def rss_mib() -> float:
    """Memory of this process that is in RAM, in MiB."""
    try:
        pages = Path('/proc/self/statm').read_text().split()[1]
    except FileNotFoundError:
        # Elsewhere only the highest value so far is known.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return int(pages) * resource.getpagesize() / 2**20


def failures(
    numbers: dict[str, list[float]], not_finite: Sequence[str]
) -> list[str]:
    """List the failures of the run, one line each.

    Args:
        numbers: ``mib`` and ``ms`` of the first and of the last part.
        not_finite: names of buffers, parameters and losses that are not.
    """
    lines = [f'not finite: {name}' for name in not_finite]
    for unit, factor in (('mib', MORE_MEMORY), ('ms', MORE_TIME)):
        first, last = numbers[unit]
        if last > factor * first:
            lines.append(
                f'{unit} rose from {first} to {last}, by more than a factor '
                f'of {factor}'
            )
    return lines


def soak(iterations: int) -> dict[str, Any]:
    """Train and measure.

    Args:
        iterations: Iterations of one image; a tenth of them warms up, the
            next and the last tenth are compared.
    """
    import mmdet.utils
    from mmdet.registry import MODELS

    import ws_mm  # noqa: F401

    mmdet.utils.register_all_modules(init_default_scope=False)
    init_default_scope('mmdet')
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = MODELS.build(model_cfg())
    model.init_weights()
    model.train()
    keep_boxes_in_float32(model)
    optimizer = OptimWrapper(
        torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9),
        clip_grad=dict(max_norm=10),
    )
    part = max(iterations // 10, 1)
    ms, mib, losses, no_rois = [], [], [], 0
    not_finite = []
    seen: dict[str, int] = {}
    model.roi_head.mask_head.register_forward_pre_hook(
        lambda _, inputs: seen.update(rois=len(inputs[0]))
    )
    for index in range(iterations):
        data = rectangles(rng, empty=index % 8 == 7)
        start = time.process_time()
        with torch.autocast('cpu', torch.bfloat16):
            values = model.train_step(data, optimizer)
        ms.append(1e3 * (time.process_time() - start))
        no_rois += seen['rois'] == 0
        losses.append(values['loss'].item())
        if not math.isfinite(losses[-1]):
            not_finite.append(f'loss of iteration {index}')
            break
        if index % 10 == 9:
            mib.append(rss_mib())
    not_finite += [
        name
        for name, value in model.state_dict().items()
        if not value.isfinite().all()
    ]

    def first_and_last(values: list[float], count: int) -> list[float]:
        return [
            round(median(few), 1)
            for few in (values[count : 2 * count], values[-count:])
        ]

    numbers = {
        'ms': first_and_last(ms, part),
        'mib': first_and_last(mib or [rss_mib()] * 2, max(part // 10, 1)),
        'loss': [
            round(median(few), 3) for few in (losses[:part], losses[-part:])
        ],
    }
    return {
        'iterations': len(losses),
        'compared': f'medians of the second and of the last {part}',
        'cpu_ms_per_iteration': numbers['ms'],
        'rss_mib': numbers['mib'],
        'loss_of_first_and_last': numbers['loss'],
        'iterations_without_rois': no_rois,
        'buffers': sum(1 for _ in model.buffers()),
        'autocast': 'bfloat16',
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'machine': f'{platform.machine()}, {os.cpu_count()} cores',
        'failures': failures(numbers, not_finite),
    }


def main() -> None:
    """Print the measurements; exit with 1 where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--iterations', type=int, default=10000)
    args = parser.parse_args()
    if args.iterations < 20:
        parser.error('--iterations must be 20 or more')
    result = soak(args.iterations)
    print(json.dumps(result))
    sys.exit(1 if result['failures'] else 0)


if __name__ == '__main__':
    main()
