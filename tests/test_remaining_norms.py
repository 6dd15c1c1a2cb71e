"""Batch norms that no key of a config reaches."""

import pytest
from mmengine.registry import MODELS
from shipped import apply_norm, build, by_key, counts, read
from torch import nn

import ws_mm
from ws_mm.shapes import batch_norms

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

PIDNET = 'mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py'


@pytest.mark.parametrize(
    ('name', 'key', 'number'),
    [
        (
            PIDNET,
            'backbone',
            57,
        ),
        ('mmdet::yolof/yolof_r50-c5_8xb8-1x_*', 'neck', 14),
        (
            'mmdet::double_heads/dh-faster-rcnn_r50_fpn_1x_*',
            'roi_head.bbox_head',
            3,
        ),
        (
            'mmdet::centernet/centernet_r18_8xb16-*',
            'neck',
            6,
        ),
    ],
)
def test_batch_norms_that_remain_are_named_and_converted(name, key, number):
    cfg = read(name)
    _, left = apply_norm(cfg)
    names = batch_norms(build(cfg))
    assert len(names) == number
    (said,) = [str(one) for one in left if 'batch norms remain' in one.why]
    assert said.startswith(f'model.{key}: {number} batch norms remain')
    assert names[0] in said
    assert '--remaining' in said
    layers = counts(cfg)
    changes, left = apply_norm(cfg, remaining=True)
    assert {f'model.{key}.type', f'model.{key}.of'} <= set(by_key(changes))
    assert 'batch norms remain' not in ' '.join(map(str, left))
    built = build(cfg)
    assert not batch_norms(built)
    assert all(isinstance(built.get_submodule(n), ws_mm.BCN) for n in names)
    # Nothing else became another layer.
    assert counts(cfg) == layers
    assert apply_norm(cfg, remaining=True)[0] == []


def test_norms_of_other_kinds_stay_in_a_converted_part():
    cfg = read(PIDNET)
    apply_norm(cfg, norm=dict(type='GN', num_groups=4))
    before = build(cfg).backbone
    cfg.model.backbone |= dict(type='ws_mm.Converted', of='PIDNet')
    after = build(cfg).backbone
    group_norms = [
        name
        for name, layer in before.named_modules()
        if type(layer) is nn.GroupNorm
    ]
    assert group_norms
    assert all(
        type(after.get_submodule(name)) is nn.GroupNorm for name in group_norms
    )
    assert not batch_norms(after)


def test_filters_of_one_entry_stay_plain():
    class Stem(nn.Sequential):
        def __init__(self):
            super().__init__(
                nn.Conv2d(3, 8, 3),
                nn.BatchNorm2d(8),
                nn.Conv2d(8, 8, 1, groups=8),
                nn.BatchNorm2d(8),
            )

    part = MODELS.build(dict(type='ws_mm.Converted', of=Stem, conv={}))
    kinds = [ws_mm.WSConv2d, nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d]
    assert [type(module) for module in part] == kinds
