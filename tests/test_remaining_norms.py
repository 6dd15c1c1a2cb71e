"""Batch norms that no key of a config reaches."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS
from shipped import apply_norm, build, by_key, counts, read
from torch import nn

import ws_mm
from ws_mm.configs import ConfigError
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
    # BCN is what it gives by itself.
    assert f'model.{key}.norm' not in by_key(changes)
    why = 'batch norms that no norm_cfg reaches'
    reasons = {change.key[-1]: change.why for change in changes}
    assert (reasons['type'], reasons['of']) == (why, why)
    assert 'batch norms remain' not in ' '.join(map(str, left))
    built = build(cfg)
    assert not batch_norms(built)
    assert all(isinstance(built.get_submodule(n), ws_mm.BCN) for n in names)
    # Nothing else became another layer.
    assert counts(cfg) == layers
    assert apply_norm(cfg, remaining=True)[0] == []


def test_a_converted_part_gets_the_norm_with_its_options() -> None:
    cfg = read(PIDNET)
    apply_norm(cfg, norm=dict(type='BCN', num_groups=8), remaining=True)
    assert cfg.model.backbone.norm == dict(type='ws_mm.BCN', num_groups=8)
    norms = [m for m in build(cfg).modules() if isinstance(m, ws_mm.BCN)]
    assert {norm.num_groups for norm in norms} == {8}


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


class Doubled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ('kind', 'groups'), [(nn.Conv2d, 8), (nn.Conv2d, 4), (Doubled, 1)]
)
def test_filters_of_one_entry_and_other_convolutions_stay(kind, groups):
    class Stem(nn.Sequential):
        def __init__(self):
            super().__init__(
                nn.Conv2d(3, 8, 3),
                nn.BatchNorm2d(8),
                kind(8, 8, 1, groups=groups),
                nn.BatchNorm2d(8),
            )

    part = MODELS.build(dict(type='ws_mm.Converted', of=Stem, conv={}))
    second = ws_mm.WSConv2d if groups == 4 else kind
    kinds = [ws_mm.WSConv2d, nn.BatchNorm2d, second, nn.BatchNorm2d]
    assert [type(module) for module in part] == kinds


def test_weights_that_a_host_loads_later_are_not_warned_of(monkeypatch):
    said = []
    monkeypatch.setattr(
        'ws_mm.converted.print_log', lambda line, **_: said.append(line)
    )
    small = dict(depth=18, base_channels=8, stem_channels=8, num_stages=1)
    cfg = dict(of='mmdet.ResNet', **small, strides=(1,), dilations=(1,))
    cfg |= dict(out_indices=(0,), pretrained='a.pth', conv={})
    part = MODELS.build(dict(type='ws_mm.Converted', **cfg))
    assert part.init_cfg['checkpoint'] == 'a.pth'
    assert len(said) == 1
    assert '5 convolutions of ResNet now standardize' in said[0]


class Bare(nn.Sequential):
    """One convolution with a batch norm, and one without a norm."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        )


class HasNormEval(Bare):
    """A part that is told by its own argument."""

    def __init__(self, norm_eval: bool = False) -> None:
        super().__init__()
        self.norm_eval = norm_eval


@pytest.mark.parametrize('conv', [None, {}])
def test_norms_of_a_part_stay_in_eval_mode(conv) -> None:
    cfg = dict(type='ws_mm.Converted', of=Bare, conv=conv, norm_eval=True)
    part = MODELS.build(cfg)
    for one in (part, copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert one.train() is one
        assert isinstance(one, Bare)
        modes = [module.training for module in one]
        assert modes == [True, False, True]
        x = torch.randn(1, 3, 5, 5)
        before = one[1].running_mean.clone()
        one(x)
        assert torch.equal(one[1].running_mean, before)
        assert not one.eval()[0].training
        assert one[1].weight.requires_grad
    assert (type(part[0]) is nn.Conv2d) == (conv is None)
    # New norms train, and a class may have the argument itself.
    part = MODELS.build({**cfg, 'norm': dict(type='ws_mm.BCN')}).train()
    assert type(part[1]) is ws_mm.BCN
    assert part[1].training
    for value in (True, False):
        own = cfg | dict(of=HasNormEval, conv={}, norm_eval=value)
        part = MODELS.build(own).train()
        assert part.norm_eval is value
        assert part[1].training


def test_only_convolutions_under_a_norm_get_the_options() -> None:
    conv = dict(type='ws_mm.WSConv2d', eps=1e-3, eps_mode='inside')
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
        (dict(conv=dict(bias=False)), TypeError, r'conv=dict\(bias=False\)'),
        (dict(conv=True), TypeError, 'conv=True must be a dict'),
        (dict(norm='BCN'), TypeError, "norm='BCN' must be a dict"),
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


def test_weights_that_a_class_loads_when_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    for module in ('converted', 'conversion'):
        monkeypatch.setattr(
            f'ws_mm.{module}.print_log', lambda line, **_: said.append(line)
        )
    timm = pytest.importorskip('timm')
    small = dict(model_name='resnet10t', features_only=True)
    path = tmp_path / 'w.pth'
    torch.save(timm.create_model(**small).state_dict(), path)
    cfg = read('mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py')
    cfg.model.pretrained = cfg.model.auxiliary_head = None
    cfg.model.decode_head.in_channels = 512
    cfg.model.backbone = dict(
        type='mmseg.TIMMBackbone', **small, pretrained=False
    )
    cfg.model.backbone.update(checkpoint_path=str(path))
    given = copy.deepcopy(cfg)
    with pytest.raises(ConfigError, match="backbone='freeze'"):
        ws_mm.apply_norm(cfg, norm='BCN', backbone='ease')
    changes, _ = apply_norm(
        cfg, norm='BCN', remaining=True, backbone='convert'
    )
    assert by_key(changes)['model.backbone.checkpoint_path'] is None
    assert cfg.model.backbone.pretrained is False
    said.clear()
    MODELS.build(cfg.model.backbone)
    assert said == ['ws_mm.convert: 14 norms are now BCN']
    # Written by hand, with a file of plain filters.
    for options, warns in (
        ({}, True),
        (dict(conv={}), True),
        (dict(norm=dict(type='EasedBCN')), False),
        (dict(norm=dict(type='EasedBCN'), conv={}), True),
    ):
        backbone = given.model.backbone | dict(of='mmseg.TIMMBackbone')
        backbone |= dict(type='ws_mm.Converted', **options)
        said.clear()
        MODELS.build(backbone)
        warning, lines = 'TIMMBackbone has loaded weights when it was', said
        if warns:
            first, *lines = lines
            assert warning in first
            assert f'(checkpoint_path={str(path)!r})' in first
        assert warning not in str(lines)
        # By names, bn1 does not follow the last of conv1.
        convs = '13 convolutions of TIMMBackbone now standardize'
        assert (convs in str(lines)) == ('conv' in options)
        assert len(lines) == ('conv' in options) + (options != dict(conv={}))
