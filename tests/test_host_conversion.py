"""ws_mm.convert on networks of mmseg and mmdet, as they are built."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from networks import (  # noqa: F401
    BOTH,
    batch_norms,
    image,
    kinds,
    log_of_convert,
    randomized,
    trains,
)
from torch import Tensor, nn

from ws_mm import BCN, WSConv2d, check, convert
from ws_mm.shapes import build_without_memory, image_channels

timm = pytest.importorskip('timm')


def host_model(host: str, pattern: str) -> nn.Module:
    """A network of a config that mmdet or mmseg ships, as it is built."""
    pytest.importorskip(f'{host}.models', exc_type=ImportError)
    package = importlib.import_module(host)
    configs = Path(package.__file__).parent / '.mim/configs'
    path = min(configs.glob(pattern))
    with DefaultScope.overwrite_default_scope(host):
        return MODELS.build(without_weights(Config.fromfile(path).model))


def without_weights(value: Any) -> Any:
    """A model that downloads nothing."""
    if isinstance(value, dict):
        return ConfigDict(
            {
                key: without_weights(inner)
                for key, inner in value.items()
                if key not in ('init_cfg', 'pretrained')
            }
        )
    if isinstance(value, list):
        return [without_weights(inner) for inner in value]
    return value


@pytest.mark.parametrize(
    ('host', 'pattern', 'channels'),
    [
        ('mmdet', 'yolox/yolox_tiny_*', 3),
        ('mmdet', 'retinanet/retinanet_r50_fpn_1x_*', 3),
        ('mmseg', 'swin/swin-tiny-*_levir-*', 6),
        ('mmseg', 'unet/*_hsidrive-*', 25),
    ],
)
def test_images_have_the_channels_that_a_model_takes(host, pattern, channels):
    package = pytest.importorskip(host)
    path = min((Path(package.__file__).parent / '.mim/configs').glob(pattern))
    model = without_weights(Config.fromfile(path).model)
    # The preprocessors of the last two do not build.
    model.pop('data_preprocessor', None)
    built = build_without_memory(model, host)
    assert image_channels(built) == channels
    with DefaultScope.overwrite_default_scope(host):
        assert image_channels(MODELS.build(model.backbone)) == channels


def all_heads(model: nn.Module) -> list[Any]:
    """Everything that mmseg runs in training, on one image."""
    features = model.extract_feat(image(64))
    heads = [model.decode_head, getattr(model, 'auxiliary_head', None) or []]
    if not isinstance(heads[1], nn.ModuleList):
        heads[1] = [heads[1]] if heads[1] else []
    return [head(features) for head in (heads[0], *heads[1])]


def bcns(model: nn.Module) -> list[BCN]:
    return [module for module in model.modules() if isinstance(module, BCN)]


SEGMENTORS = [
    'pidnet/pidnet-s_*',
    'bisenetv2/bisenetv2_fcn_4xb4-160k*',
    'ddrnet/ddrnet_23-slim_*',
    'erfnet/*.py',
    'stdc/stdc1_4xb12*',
    'cgnet/*512x1024.py',
]


@pytest.mark.parametrize('pattern', SEGMENTORS)
def test_a_segmentor_is_converted_as_it_was_built(
    pattern: str, said: list[str]
) -> None:
    model = host_model('mmseg', pattern)
    norms = len(batch_norms(model))
    new = convert(model, norm={})
    assert len(batch_norms(model)) == norms > 30
    assert not batch_norms(new)
    assert f' {norms} norms are now BCN' in said[0]
    new.init_weights()
    # PIDNet and DDRNet train norms on 1x1 maps, which BN cannot on one image.
    trains(new, all_heads)
    assert all(bcn.running_mean.any() for bcn in bcns(new))


def test_a_segmentor_gets_ws_too(said: list[str]) -> None:
    model = host_model('mmseg', SEGMENTORS[1])
    new = convert(model, **BOTH, inputs=all_heads)
    assert not batch_norms(new)
    assert not check(new, all_heads).mistakes
    assert kinds(new)['WSConv2d'] > 50
    assert 'on 1x1 maps: 2 layers (backbone.' in said[0]
    new.init_weights()
    trains(new, all_heads)


def test_layers_that_heads_share_have_all_their_names() -> None:
    heads = pytest.importorskip('mmdet.models.dense_heads')
    head = heads.RetinaSepBNHead(
        *(3, 2, 8),
        stacked_convs=1,
        feat_channels=8,
        norm_cfg=dict(type='BN'),
    )
    x = torch.randn(1, 8, 8, 8)
    options = dict(**BOTH, inputs=([x, x],))
    # The branches of both levels run one convolution.
    new = convert(head, **options, skip=['cls_convs.1'])
    assert type(new.cls_convs[0][0].conv) is nn.Conv2d
    assert type(new.cls_convs[0][0].bn) is BCN
    assert type(new.reg_convs[0][0].conv) is WSConv2d
    for names in (['cls_convs.1'], ['cls_convs.1.0.conv', 'cls_convs.1.0.bn']):
        new = convert(head, **options, parts=names)
        assert kinds(new)['WSConv2d'] == kinds(new)['BCN'] == 1
        assert type(new.cls_convs[1][0].conv) is WSConv2d
        assert type(new.cls_convs[1][0].bn) is BCN


def test_pooled_maps_leave_two_channels_to_a_group(said: list[str]) -> None:
    model = host_model('mmseg', 'fastscnn/*.py')
    options = dict(norm=dict(num_groups=32), inputs=all_heads)
    new = convert(model, **options)
    (name,) = re.findall(r'on 1x1 maps: 1 layer \((\S*)\)', said[0])
    pooled = new.get_submodule(name)
    assert (pooled.num_features, pooled.num_groups) == (32, 16)
    trains(new, all_heads)
    # Of one channel there is nothing to normalize over.
    single = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1))
    both = nn.Sequential(nn.BatchNorm2d(1), single)
    x = image()[:, :1]
    kept = convert(both, norm={}, inputs=x)
    assert [type(kept[0]), type(kept[1][1])] == [BCN, nn.BatchNorm2d]
    assert 'a single channel on 1x1 maps: 1 layer (1.1)' in said[-1]


def test_a_detector_on_the_meta_device() -> None:
    model = host_model('mmdet', 'yolof/yolof_r50-c5_8xb8-1x_coco.py')
    model = model.to('meta')
    norms = len(batch_norms(model))
    inside = len(batch_norms(model.backbone))
    new = convert(model, norm={}, skip=['backbone'])
    assert len(bcns(new)) == norms - inside > 10
    assert len(batch_norms(new)) == inside
    assert all(t.is_meta for t in (*new.parameters(), *new.buffers()))


def test_what_has_norm_in_its_name_only_is_not_named(said: list[str]) -> None:
    pytest.importorskip('mmdet.models')
    from mmdet.models.layers import NormedConv2d, NormedLinear

    model = nn.ModuleList(
        [
            nn.BatchNorm2d(8),
            NormedConv2d(3, 8, 1),
            NormedLinear(8, 8),
            nn.LocalResponseNorm(2),
        ]
    )
    convert(model, norm={})
    assert said == ['ws_mm.convert: 1 norms are now BCN']


class Own(nn.Module):
    """A user's own backbone, with norms that no config names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8))
        self.body = timm.create_model('test_resnet', features_only=True)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.stem(x), *self.body(x)[-1:]]


def test_user_defined_backbone() -> None:
    pytest.importorskip('mmseg.models', exc_type=ImportError)
    MODELS.register_module(module=Own, force=True)
    channels = dict(in_channels=8, channels=8, num_classes=2, in_index=0)
    cfg = dict(
        type='EncoderDecoder',
        backbone=dict(type='mmengine.Own'),
        decode_head=dict(type='FCNHead', norm_cfg=dict(type='BN'), **channels),
    )
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg)
    new = convert(model, **BOTH, inputs=all_heads)
    assert not batch_norms(new)
    assert type(new.backbone.stem[0]) is WSConv2d
    assert not check(new, all_heads).mistakes
    trains(new, all_heads)


def test_branches_that_begin_as_zero_do_not_jump() -> None:
    torch.manual_seed(0)
    old = pytest.importorskip('mmdet.models').ResNet(
        18, base_channels=8, stem_channels=8, norm_eval=False, out_indices=(3,)
    )
    old.init_weights()  # zero_init_residual=True
    x = torch.randn(2, 3, 64, 64)
    sizes = {}
    for name, model in (('BN', old), ('BCN', convert(old, norm={}))):
        seen = []
        model.layer1[0].bn2.register_forward_hook(
            lambda *args, seen=seen: seen.append(args[2].detach().std())
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        for _ in range(2):
            optimizer.zero_grad()
            (model(x)[0].mean((2, 3)) - 1).square().mean().backward()
            optimizer.step()
        sizes[name] = [float(value) for value in seen]
    assert sizes['BN'][0] == sizes['BCN'][0] == 0
    assert sizes['BCN'][1] < 10 * sizes['BN'][1]
