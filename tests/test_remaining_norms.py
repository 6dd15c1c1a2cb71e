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


class Bare(nn.Sequential):
    """One convolution with a batch norm, and one without a norm."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        )


def test_only_convolutions_under_a_norm_get_the_options() -> None:
    conv = dict(eps=1e-3, eps_mode='inside')
    part = MODELS.build(dict(type='ws_mm.Converted', of=Bare, conv=conv))
    kinds = [ws_mm.WSConv2d, nn.BatchNorm2d, nn.Conv2d]
    assert [type(module) for module in part] == kinds
    assert (part[0].eps, part[0].eps_mode) == (1e-3, 'inside')
    norm = dict(type='ws_mm.BCN', num_groups=2)
    cfg = dict(type='ws_mm.Converted', of=Bare, conv={}, norm=norm)
    part = MODELS.build(cfg)
    kinds = [ws_mm.WSConv2d, ws_mm.BCN, nn.Conv2d]
    assert [type(module) for module in part] == kinds
    assert part[1].num_groups == 2


def test_convolutions_of_ours_keep_their_options() -> None:
    class Mixed(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(
                ws_mm.WSConv2d(3, 8, 3, eps=1e-3),
                nn.BatchNorm2d(8),
                nn.Conv2d(8, 8, 3),
                nn.BatchNorm2d(8),
            )

    cfg = dict(type='ws_mm.Converted', of=Mixed, conv=dict(eps=1e-4))
    part = MODELS.build(cfg)
    assert type(part[2]) is ws_mm.WSConv2d
    assert [part[0].eps, part[2].eps] == [1e-3, 1e-4]


def test_a_part_without_batch_norms_is_what_it_was() -> None:
    part = MODELS.build(dict(type='ws_mm.Converted', of=Bare))
    assert type(part[1]) is ws_mm.BCN
    shape = dict(in_channels=3, out_channels=4, kernel_size=1)
    part = MODELS.build(dict(type='ws_mm.Converted', of=nn.Conv2d, **shape))
    assert type(part) is nn.Conv2d


@pytest.mark.parametrize(
    ('options', 'error', 'match'),
    [
        (
            dict(norm=dict(type='GN', num_groups=4)),
            ValueError,
            r"norm=dict\(type='GN'\) must be of type 'ws_mm.BCN'",
        ),
        (dict(conv=dict(epss=1)), TypeError, "did you mean 'eps'"),
        (dict(conv=dict(eps_mode='in')), ValueError, "eps_mode='in' must be"),
        (
            dict(conv={}, of=nn.Identity),
            ValueError,
            'Identity has no plain convolution with a norm after it',
        ),
    ],
)
def test_what_cannot_replace_layers_is_refused(
    options: dict, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        MODELS.build(dict(type='ws_mm.Converted', of=Bare) | options)
