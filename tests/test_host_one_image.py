"""Backbones and heads of the hosts train on one image."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_parts import WS, features, image
from mmengine.registry import DefaultScope
from torch import nn

from ws_mm import BCN

mmdet = pytest.importorskip('mmdet.models', exc_type=ImportError)
mmseg = pytest.importorskip('mmseg.models', exc_type=ImportError)
mmseg_heads = pytest.importorskip('mmseg.models.decode_heads')


def hrnet(**options: Any) -> nn.Module:
    """HRNet-W18: 18, 36, 72 and 144 channels, one block each."""
    widths = [18, 36, 72, 144]
    extra = {
        f'stage{branches}': dict(
            num_modules=1,
            num_branches=branches,
            block='BASIC' if branches > 1 else 'BOTTLENECK',
            num_blocks=[1] * branches,
            num_channels=widths[:branches] if branches > 1 else [64],
        )
        for branches in (1, 2, 3, 4)
    }
    return mmdet.HRNet(extra, norm_eval=False, **options)


ONE_STAGE = dict(
    num_stages=1, strides=[1], dilations=[1], out_indices=[0], norm_eval=False
)


# Channels as published, where 32 does not divide them: 18 to 144 in HRNet-W18,
# 72 and 168 in RegNetX-1.6GF, 26 in Res2Net-50, 48 in DeepLabV3+. Maps of one
# value per channel: the pooled ones of ResNeSt and ASPP.
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    'HRNet': hrnet,
    'RegNet': lambda **options: mmdet.RegNet(
        dict(w0=80, wa=88, wm=2.25, group_w=24, depth=2, bot_mul=1.0),
        strides=(2, 2),
        dilations=(1, 1),
        out_indices=(0, 1),
        norm_eval=False,
        **options,
    ),
    'Res2Net': lambda **options: mmdet.Res2Net(
        depth=50, scales=4, base_width=26, **ONE_STAGE, **options
    ),
    'ResNeSt of mmdet': lambda **options: mmdet.ResNeSt(
        depth=50, **ONE_STAGE, **options
    ),
    'ResNeSt of mmseg': lambda **options: mmseg.ResNeSt(
        depth=50, **ONE_STAGE, **options
    ),
}


HEAD = dict(
    in_channels=16,
    channels=64,
    num_classes=2,
    in_index=1,
    dilations=(1, 6),
    conv_cfg=WS,
)


HEADS: dict[str, Callable[..., nn.Module]] = {
    'DeepLabV3': lambda **options: mmseg_heads.ASPPHead(**HEAD, **options),
    'DeepLabV3+': lambda **options: mmseg_heads.DepthwiseSeparableASPPHead(
        c1_in_channels=16, c1_channels=48, **HEAD, **options
    ),
}


def step_of_one_image(model: nn.Module, inputs: Any) -> None:
    """Train on one image; everything is finite, and in eval after it."""
    for training in (True, False):
        model.train(training)
        output = features(model, inputs)
        assert output.isfinite().all()
        if training:
            output.backward(torch.randn_like(output))
            used = [p.grad for p in model.parameters() if p.grad is not None]
            assert used
            assert all(gradient.isfinite().all() for gradient in used)
    assert all(values.isfinite().all() for values in model.buffers())


def group_counts(model: nn.Module) -> dict[int, int]:
    """Groups by channels of the BCN layers."""
    return {
        module.num_features: module.num_groups
        for module in model.modules()
        if isinstance(module, BCN)
    }


@pytest.mark.parametrize(
    ('name', 'groups', 'counts'),
    [
        ('HRNet', 32, {18: 9, 36: 18, 72: 24, 144: 24}),
        ('RegNet', 32, {72: 24, 168: 28}),
        ('Res2Net', 32, {26: 13, 104: 26}),
        ('ResNeSt of mmdet', 16, {32: 16}),
        ('ResNeSt of mmseg', 16, {32: 16}),
    ],
)
def test_backbones_train_on_one_image(
    name: str, groups: int, counts: dict[int, int]
) -> None:
    norm = dict(type='ws_mm.BCN', num_groups=groups)
    model = BACKBONES[name](conv_cfg=WS, norm_cfg=norm)
    found = group_counts(model)
    assert found.items() >= counts.items()
    step_of_one_image(model, image(64))


@pytest.mark.parametrize('package', ['mmdet', 'mmseg'])
def test_one_value_per_group_is_refused_with_the_key(package: str) -> None:
    # 32 pooled channels in 32 groups, as published with BatchNorm.
    norm = dict(type='ws_mm.BCN', num_groups=32)
    model = BACKBONES[f'ResNeSt of {package}'](conv_cfg=WS, norm_cfg=norm)
    with pytest.raises(ValueError, match=r'num_groups=32.*norm_cfg=dict'):
        model(image())


@pytest.mark.parametrize('name', HEADS)
def test_heads_train_on_one_image(name: str) -> None:
    with DefaultScope.overwrite_default_scope('mmseg'):
        head = HEADS[name](norm_cfg=dict(type='ws_mm.BCN'))
    levels = [torch.randn(1, 16, size, size) for size in (8, 4)]
    step_of_one_image(head, levels)
    # The pooled branch learned from its one value per channel, too.
    assert head.image_pool[1].bn.running_mean.all()
    if name == 'DeepLabV3+':
        assert group_counts(head)[48] == 24
