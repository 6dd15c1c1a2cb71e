"""Take random source networks all the way to ONNX and compare the ends.

A GN+WS or BCN+WS ResNet is written down from torchvision's modules and the
papers' formulas, saved as the authors' releases are, converted
(convert_checkpoint.py), put into a config with a random neck or head, baked
(bake.py; GN only, no stock layer holds BCN) and exported (export.py). Random
images go through the source and through onnxruntime. Nothing is downloaded.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import Config
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deployment import bake, export
from model_converters import convert_checkpoint
from support import launch, models
from support.checks import SetupError

TOLERANCE = 1e-4
SIZES = ((1, 128, 128), (2, 97, 160))
# Backbones in torchvision's and in the host's words.
BACKBONES = {
    'resnet50': dict(type='ResNet', depth=50),
    'resnext50_32x4d': dict(type='ResNeXt', depth=50, groups=32, base_width=4),
}
MODELS = {
    'resnet50': 'resnet50',
    'resnext50': 'resnext50_32x4d',
    'deeplabv3_r50': 'resnet50',
    'mask-rcnn_r50_fpn': 'resnet50',
}
CHANNELS = (256, 512, 1024, 2048)


class StandardizedConv(nn.Conv2d):
    """The papers' formula: w - mean, over the deviation plus eps."""

    eps_inside = False

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        filters = self.weight.flatten(1)
        filters = filters - filters.mean(1, keepdim=True)
        if self.eps_inside:
            deviation = (filters.var(1, keepdim=True) + 1e-5).sqrt()
        else:
            deviation = filters.std(1, keepdim=True) + 1e-5
        weight = (filters / deviation).view_as(self.weight)
        return self._conv_forward(x, weight, self.bias)


class ReleasedBCN(nn.Module):
    """Norm of the BCN releases: BatchNorm, then 32 groups of one affine."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 32, 1))
        self.bias = nn.Parameter(torch.zeros(1, 32, 1))
        self.pbn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        groups = self.pbn(x).reshape(x.shape[0], 32, -1)
        groups = F.layer_norm(groups, groups.shape[2:])
        return (groups * self.weight + self.bias).view_as(x)


def group_norm(channels: int) -> nn.Module:
    """Norm of the GN releases."""
    return nn.GroupNorm(32, channels)


def parse_args() -> argparse.Namespace:
    """Command line of the round trips."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('models', nargs='*', help=f'of {", ".join(MODELS)}')
    parser.add_argument('--norm', choices=['gn', 'bcn'], help='default: both')
    return parser.parse_args()


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every tensor values that no default hides behind."""
    generator = torch.Generator().manual_seed(seed)
    for name, values in model.state_dict().items():
        if name.endswith('running_var'):
            values.uniform_(0.5, 2, generator=generator)
        elif values.dim() > 1 and values.shape[0] > 1:
            values.normal_(0.02, 0.1, generator=generator)
        elif name.endswith(('weight', 'bn_weight')):
            values.uniform_(0.5, 1.5, generator=generator)
        elif values.is_floating_point():
            values.uniform_(-0.5, 0.5, generator=generator)
    model.eval()
    return model


class Source(nn.Module):
    """A released backbone, its features of each stage."""

    def __init__(
        self, arch: str, norm: str, dilated: bool, stages: int
    ) -> None:
        super().__init__()
        import torchvision

        net = getattr(torchvision.models, arch)(
            norm_layer=group_norm if norm == 'gn' else ReleasedBCN,
            replace_stride_with_dilation=[False, False, dilated],
        )
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                layer.__class__ = StandardizedConv
                layer.eps_inside = norm == 'bcn'
        for stage in range(stages + 1, 5):
            delattr(net, f'layer{stage}')
        self.net = randomize(net)
        self.stages = stages

    def forward(self, image: Tensor) -> list[Tensor]:  # noqa: D102
        net, features = self.net, []
        x = net.maxpool(net.relu(net.bn1(net.conv1(image))))
        for stage in range(1, self.stages + 1):
            x = getattr(net, f'layer{stage}')(x)
            features.append(x)
        return features


def config_of(name: str, norm: str, stages: int = 4) -> Config:
    """The config that the released backbone goes into.

    Args:
        name: Key of :data:`MODELS`.
        norm: 'gn' or 'bcn'.
        stages: Backbone stages to keep; with less than 4, neck and
            head are narrow.
    """
    conv_cfg = dict(
        type='ws_mm.WSConv2d',
        eps_mode='outside' if norm == 'gn' else 'inside',
    )
    kind = 'GN' if norm == 'gn' else 'ws_mm.BCN'
    width = 256 if stages == 4 else 64
    cfgs = dict(conv_cfg=conv_cfg, norm_cfg=dict(type=kind, num_groups=32))
    backbone: dict[str, Any] = dict(
        BACKBONES[MODELS[name]],
        num_stages=stages,
        strides=(1, 2, 2, 2)[:stages],
        dilations=(1, 1, 1, 1)[:stages],
        out_indices=tuple(range(stages)),
        style='pytorch',
        norm_eval=False,
        **cfgs,
    )
    if name == 'deeplabv3_r50':
        if stages == 4:
            # As torchvision's: the first block keeps the former dilation.
            backbone |= dict(
                strides=(1, 2, 2, 1),
                dilations=(1, 1, 1, 2),
                contract_dilation=True,
            )
        model: dict[str, Any] = dict(
            type='EncoderDecoder',
            backbone=backbone,
            decode_head=dict(
                type='ASPPHead',
                in_channels=CHANNELS[stages - 1],
                in_index=stages - 1,
                channels=width,
                dilations=(1, 6, 12, 18),
                num_classes=21,
                **cfgs,
            ),
            test_cfg=dict(mode='whole'),
        )
        return Config(dict(default_scope='mmseg', model=model))
    if name.startswith('mask-rcnn'):
        anchors = dict(
            type='AnchorGenerator', scales=[8], ratios=[1.0], strides=[4]
        )
        coder = dict(type='DeltaXYWHBBoxCoder')
        model = dict(
            type='RPN',
            backbone=backbone,
            neck=dict(
                type='FPN',
                in_channels=list(CHANNELS[:stages]),
                out_channels=width,
                num_outs=stages + 1,
                **cfgs,
            ),
            rpn_head=dict(
                type='RPNHead',
                in_channels=width,
                anchor_generator=anchors,
                bbox_coder=coder,
            ),
            train_cfg=dict(rpn=dict()),
            test_cfg=dict(rpn=dict()),
        )
        return Config(dict(default_scope='mmdet', model=model))
    return Config(dict(default_scope='mmdet', model=backbone))


def call(script: Any, *args: object) -> None:
    """Run the main of a script of this folder."""
    before = sys.argv
    sys.argv = [script.__name__, *map(str, args)]
    try:
        script.main()
    finally:
        sys.argv = before


def round_trip(
    name: str, norm: str, folder: Path, stages: int = 4
) -> dict[tuple[int, int, int], float]:
    """Largest relative difference of source and ONNX, per size of input.

    Args:
        name: Key of :data:`MODELS`.
        norm: 'gn' or 'bcn'.
        folder: Folder of the intermediate files.
        stages: Backbone stages to keep.
    """
    dilated = name == 'deeplabv3_r50' and stages == 4
    source = Source(MODELS[name], norm, dilated, stages).eval()
    released = {f'module.{k}': v for k, v in source.net.state_dict().items()}
    torch.save(released, folder / 'released.pth')
    options = ['--ws-source'] if norm == 'gn' else []
    converted = folder / 'converted.pth'
    call(convert_checkpoint, folder / 'released.pth', converted, *options)

    cfg = config_of(name, norm, stages)
    cfg.dump(folder / 'model.py')
    model = randomize(models.build_model(cfg), 1)
    backbone = getattr(model, 'backbone', model)
    weights = torch.load(converted, weights_only=True)['state_dict']
    backbone.load_state_dict(weights)
    torch.save(dict(state_dict=model.state_dict()), folder / 'model.pth')
    pair = [folder / 'model.py', folder / 'model.pth']
    if norm == 'gn':
        call(bake, *pair, folder / 'baked')
        pair = [folder / 'baked/model.py', folder / 'baked/model.pth']
    path = str(folder / 'model.onnx')
    call(export, *pair, path)

    # What follows the backbone is ours either way.
    network = export.deployable(cfg, model)
    if backbone is model:
        network.backbone = source
    else:
        model.backbone = source
        network = export.deployable(cfg, model)
    return dict(export.differences(network, path, SIZES))


def main() -> None:
    """Run every trip and print a table."""
    args = parse_args()
    unknown = [name for name in args.models if name not in MODELS]
    if unknown:
        raise SetupError(
            f'{", ".join(unknown)}: known are {", ".join(MODELS)}.'
        )
    rows, worst = [], 0.0
    for name in args.models or MODELS:
        for norm in [args.norm] if args.norm else ['gn', 'bcn']:
            with tempfile.TemporaryDirectory() as folder:
                found = round_trip(name, norm, Path(folder))
            worst = max(worst, *found.values())
            shown = ' | '.join(f'{value:.1e}' for value in found.values())
            rows.append(f'| {name} | {norm} | {shown} |')
    sizes = ' | '.join(' x '.join(map(str, size)) for size in SIZES)
    print(f'| model | norm | {sizes} |\n|---|---|' + '---|' * len(SIZES))
    print('\n'.join(rows))
    if not worst <= TOLERANCE:
        raise SetupError(
            f'Source and ONNX differ by {worst:.1e}, accepted {TOLERANCE}.'
        )


if __name__ == '__main__':
    launch.run(main)
