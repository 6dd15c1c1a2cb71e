"""Show that a change of the code changes no result.

    python tools/proofs/freeze.py write FILE    # on the commit before
    python tools/proofs/freeze.py compare FILE  # on the commit after

FILE holds outputs, gradients and buffers of the layers (equal to 1e-12 in
float64, bit for bit in other dtypes), the layer types and the names and shapes
in the state dict of every config (equal), and the losses of 20 steps of a
detector and a segmentor on composed operations (equal bit for bit).
"""

import argparse
import hashlib
import itertools
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
if __name__ == '__main__':
    sys.path[:0] = str(ROOT), str(ROOT / 'tools')

import ws_mm  # noqa: E402
from ws_mm.shapes import build_without_memory  # noqa: E402

DETECTOR = 'mask-rcnn_r18_fpn64_bcn-ws-all_2xb1-4e_nuclei.py'
SEGMENTOR = 'deeplabv3_r18-w32-d8_bcn-ws-all_1xb1-1k_nuclei.py'
TOLERANCE = 1e-12
STEPS = 20


def parse_args() -> argparse.Namespace:
    """Command line of the proof."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('command', choices=('write', 'compare'))
    parser.add_argument('file', type=Path, help='the frozen results')
    return parser.parse_args()


def kernels(form: str) -> Any:
    """Choose the form of the layers: 'plain' or 'fused'."""
    return mock.patch.dict(os.environ, WS_MM_KERNELS=form)


def norm_cases() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """BCN in its modes, affines, groups, layouts and dtypes."""
    shape = 3, 16, 6, 5
    wide = torch.float64
    options: list[dict[str, Any]] = [
        dict(mode=mode, outer_affine=outer, affine=affine, training=training)
        for mode, outer, affine, training in itertools.product(
            ('estimate', 'batch'),
            ('group', 'channel'),
            (True, False),
            (True, False),
        )
        if affine or outer == 'group'
    ]
    options += [
        dict(mode='sync_batch'),
        dict(num_groups=16),
        dict(num_groups=1, momentum=1.0, eps=1e-3),
        dict(dtype=torch.float32),
        dict(dtype=torch.bfloat16),
        dict(dtype=torch.float32, mode='batch', layout='channels_last'),
        dict(layout='channels_last'),
        dict(shape=(1, 16, 1, 1)),
        dict(shape=(0, 16, 4, 4)),
        dict(shape=(4, 16)),
        dict(shape=(2, 16, 3, 4, 2), mode='batch'),
        dict(shape=(1, 64, 40, 52), dtype=torch.float32),
        dict(shape=(2, 64, 40, 52), dtype=torch.float32, mode='batch'),
    ]
    for option in options:
        own = dict(option)
        x = torch.randn(own.pop('shape', shape), dtype=torch.float64) * 2 + 1
        x = x.to(own.setdefault('dtype', wide))
        if own.pop('layout', '') == 'channels_last':
            x = x.contiguous(memory_format=torch.channels_last)
        training = own.pop('training', True)
        own.setdefault('num_groups', 4)
        layer = ws_mm.BCN(x.shape[1], **own).train(training)
        yield f'BCN {option}', layer, x


def conv_cases() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Standardized convolutions of every class."""
    size = {1: (9,), 2: (7, 6), 3: (5, 4, 4)}
    for dims, transposed in itertools.product((1, 2, 3), (False, True)):
        name = f'WSConv{"Transpose" if transposed else ""}{dims}d'
        for option in (
            dict(),
            dict(groups=2, bias=False, stride=2, padding=1),
            dict(eps_mode='inside', eps=1e-3),
        ):
            layer = getattr(ws_mm, name)(4, 6, 3, dtype=torch.double, **option)
            x = torch.randn(2, 4, *size[dims], dtype=torch.double)
            yield f'{name} {option}', layer, x
    x = torch.randn(1, 64, 9, 8)
    yield 'WSConv2d float32', ws_mm.WSConv2d(64, 128, 3, padding=1), x


def run_layer(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of two steps with random cotangents."""
    for values in (*layer.parameters(), *layer.buffers()):
        with torch.no_grad():
            values.uniform_(0.5, 1.5)
    found: dict[str, Tensor] = {}
    for step in range(2):
        x = x.detach().requires_grad_()
        y = layer(x)
        inputs = [x, *layer.parameters()]
        grads = torch.autograd.grad(y, inputs, torch.randn_like(y))
        found[f'output {step}'] = y.detach()
        names = ['input', *(name for name, _ in layer.named_parameters())]
        for name, grad in zip(names, grads, strict=True):
            found[f'gradient of {name} {step}'] = grad
        for name, values in layer.named_buffers():
            found[f'{name} {step}'] = values.clone()
    return found


def layers() -> dict[str, dict[str, Tensor]]:
    """Results of every layer case in both forms."""
    found = {}
    for form in ('plain', 'fused'):
        torch.manual_seed(0)
        with kernels(form):
            for name, layer, x in (*norm_cases(), *conv_cases()):
                found[f'{form}: {name}'] = run_layer(layer, x)
    return found


def digests() -> dict[str, str]:
    """A digest of the model of each config."""
    found = {}
    for path in sorted((ROOT / 'configs').glob('*/*.py')):
        if '_base_' in path.parts:
            continue
        cfg = Config.fromfile(path)
        model = build_without_memory(cfg.model, cfg.default_scope)
        lines = [
            f'{name} {tuple(values.shape)} {values.dtype}'
            for name, values in model.state_dict().items()
        ]
        lines += [
            f'{name} {type(module).__name__} {module.extra_repr()}'
            for name, module in model.named_modules()
        ]
        text = '\n'.join(lines).encode()
        found[path.name] = hashlib.sha256(text).hexdigest()
    return found


def losses(name: str, data: dict[str, Any]) -> list[float]:
    """Losses of a model in 20 steps on the same images."""
    torch.manual_seed(0)
    cfg = Config.fromfile(next((ROOT / 'configs').glob(f'*/{name}')))
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found = []
    for _ in range(STEPS):
        prepared = model.data_preprocessor(data, True)
        loss, _ = model.parse_losses(model(**prepared, mode='loss'))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def traces() -> dict[str, list[float]]:
    """The losses of a detector and of a segmentor."""
    from mmdet.testing import demo_mm_inputs
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    with kernels('plain'), DefaultScope.overwrite_default_scope('mmdet'):
        data = demo_mm_inputs(
            1, [[3, 96, 128]], num_items=[3], num_classes=2, with_mask=True
        )
        data['data_samples'][0].gt_instances.labels.zero_()
        detector = losses(DETECTOR, data)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 255, (3, 96, 96), generator=generator)
    label = torch.randint(0, 2, (1, 96, 96), generator=generator)
    sample = SegDataSample(
        metainfo=dict(img_shape=(96, 96), ori_shape=(96, 96)),
        gt_sem_seg=PixelData(data=label),
    )
    data = dict(inputs=[image.to(torch.uint8)], data_samples=[sample])
    with kernels('plain'), DefaultScope.overwrite_default_scope('mmseg'):
        segmentor = losses(SEGMENTOR, data)
    return dict(detector=detector, segmentor=segmentor)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Name every result that is not what it was."""
    found = []
    for case, tensors in old['layers'].items():
        if case not in new['layers']:
            found.append(f'{case}: gone')
            continue
        for name, before in tensors.items():
            after = new['layers'][case][name]
            if before.dtype == torch.float64 == after.dtype:
                scale = before.abs().max().clamp_min(1) if len(before) else 1
                same = before.shape == after.shape and bool(
                    ((before - after).abs() <= TOLERANCE * scale).all()
                )
            else:
                same = torch.equal(before, after)
            if not same:
                worst = (before.double() - after.double()).abs().max()
                found.append(f'{case}: {name} differs by {worst:.1e}')
    for name in new['digests'].keys() & old['digests'].keys():
        if new['digests'][name] != old['digests'][name]:
            found.append(f'{name}: another model')
    for name, before in old['traces'].items():
        if new['traces'][name] != before:
            found.append(f'{name}: other losses')
    return found


def main() -> int:
    """Write or compare the frozen results."""
    args = parse_args()
    MMLogger.get_instance('freeze', log_level='ERROR')
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter('ignore')
    new = dict(layers=layers(), digests=digests(), traces=traces())
    if args.command == 'write':
        torch.save(new, args.file)
        print(f'written: {args.file}')
        return 0
    old = torch.load(args.file, weights_only=True)
    gone = sorted(old['digests'].keys() - new['digests'].keys())
    found = differences(old, new)
    print(
        f'{len(old["layers"])} layer cases, '
        f'{len(old["digests"]) - len(gone)} configs ({len(gone)} are gone), '
        f'{len(old["traces"])} traces: {len(found)} differences'
    )
    for line in found:
        print(line)
    return bool(found)


if __name__ == '__main__':
    raise SystemExit(main())
