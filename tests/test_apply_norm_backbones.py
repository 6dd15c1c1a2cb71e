"""ws_mm.apply_norm: a pretrained backbone keeps its function."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from shipped import build
from test_apply_norm import MASK, PIDNET, PSP, RETINA, by_key, counts, read
from torch import nn

import ws_mm
from ws_mm.configs import ConfigError
from ws_mm.shapes import batch_norms

GN = {'type': 'GN', 'num_groups': 32}
WS = {'type': 'ws_mm.WSConv2d'}


def test_only_neck_and_heads_change() -> None:
    cfg = read(MASK)
    backbone = cfg.model.backbone.to_dict()
    changes, left = ws_mm.apply_norm(cfg)
    assert by_key(changes) == {
        'model.neck.conv_cfg': WS,
        'model.neck.norm_cfg': GN,
        'model.roi_head.mask_head.conv_cfg': WS,
        'model.roi_head.mask_head.norm_cfg': GN,
    }
    assert cfg.model.backbone.to_dict() == backbone
    words = [str(one) for one in left]
    assert not any('remain' in one for one in words)
    assert 'backbone: keeps its pretrained weights' in words[0]
    again, _ = ws_mm.apply_norm(cfg)
    assert again == []


def test_norms_that_were_trained_are_frozen() -> None:
    cfg = read(PSP)
    changes, _ = ws_mm.apply_norm(cfg)
    assert by_key(changes)['model.backbone.norm_eval'] is True
    assert cfg.model.pretrained == 'open-mmlab://resnet50_v1c'
    cfg.model.pretrained = None
    cfg.model.backbone.norm_cfg.type = 'BN'
    model = MODELS.build({**cfg.model, '_scope_': 'mmseg'})
    model.train()
    norms = [model.get_submodule(name) for name in batch_norms(model)]
    assert norms
    assert not any(norm.training for norm in norms)


def test_a_network_of_timm_is_not_downloaded() -> None:
    pytest.importorskip('mmpretrain', exc_type=ImportError)
    pytest.importorskip('timm')
    cfg = read('mmdet::timm_example/retinanet_timm-tv-resnet50_*')
    # The host takes a bool, and True would look for the weights.
    assert cfg.model.backbone.pretrained is True
    other = copy.deepcopy(cfg)
    changes, left = ws_mm.apply_norm(cfg)
    assert by_key(changes)['model.neck.norm_cfg'] == GN
    assert cfg.model.backbone.pretrained is True
    # Its class has no norm_eval, and cannot be told which norms to build.
    assert {k: v for k, v in by_key(changes).items() if 'backbone' in k} == {
        'model.backbone.of': 'mmpretrain.TIMMBackbone',
        'model.backbone.type': 'ws_mm.Converted',
        'model.backbone.norm_eval': True,
    }
    assert not any('batch norms remain' in one.why for one in left)
    again, left = ws_mm.apply_norm(cfg)
    assert again == []
    assert not any('batch norms remain' in one.why for one in left)
    cfg.model.backbone.pretrained = False
    model = MODELS.build({**cfg.model, '_scope_': 'mmdet'}).train()
    names = batch_norms(model)
    assert len(names) == 53
    assert not any(model.get_submodule(name).training for name in names)
    assert model.backbone.training
    cfg = other
    options = dict(remaining=True, backbone='convert')
    changes, _ = ws_mm.apply_norm(cfg, norm='BCN', **options)
    assert by_key(changes)['model.backbone.pretrained'] is False
    model = MODELS.build({**cfg.model, '_scope_': 'mmdet'})
    assert batch_norms(model) == []


@pytest.mark.parametrize('remaining', [False, True])
def test_the_backbone_of_a_student_and_its_teacher_is_frozen(
    remaining: bool,
) -> None:
    cfg = read('mmdet::soft_teacher/*_180k_semi-0.01-*')
    changes, left = ws_mm.apply_norm(cfg, norm='BCN', remaining=remaining)
    keys = {key.rpartition('.')[0] for key in by_key(changes)}
    assert keys == {'model.detector.neck', 'custom_hooks.0', ''}
    words = [str(one) for one in left]
    assert 'detector.backbone: keeps its pretrained weights' in words[0]
    assert not any('batch norms remain' in one for one in words)
    assert len(batch_norms(build(cfg))) == 2 * 53


def test_the_norms_of_a_student_that_remain_are_its_own() -> None:
    cfg = read('mmdet::soft_teacher/*_180k_semi-0.01-*')
    # An FPN without norms, and a backbone whose norms no norm_cfg reaches.
    cfg.model.detector.backbone = dict(
        type='ws_mm.Converted', of='ResNet', depth=50, conv={}
    )
    _, left = ws_mm.apply_norm(cfg, 'keep', 'BCN', backbone='convert')
    (why,) = (one.why for one in left if 'batch norms remain' in one.why)
    assert why.startswith('53 batch norms remain')
    assert '(detector.backbone.bn1, ' in why


def test_others_are_converted() -> None:
    # Its class takes norm_cfg, and no norm_eval.
    cfg, frozen = read(PIDNET), read(PIDNET)
    ws_mm.apply_norm(cfg)
    assert cfg.model.backbone.norm_cfg.type == 'GN'
    ws_mm.apply_norm(frozen, backbone='freeze')
    assert frozen.model.backbone.of == 'PIDNet'
    assert frozen.model.backbone.norm_eval is True
    model = build(frozen).train()
    assert not any(
        model.get_submodule(name).training
        for name in batch_norms(model)
        if name.startswith('backbone.')
    )
    # From random weights, frozen norms would be no norms.
    cfg, other = read(MASK), read(MASK)
    for one in (cfg, other):
        one.model.backbone.init_cfg = None
    ws_mm.apply_norm(cfg)
    ws_mm.apply_norm(other, backbone='convert')
    assert cfg.to_dict() == other.to_dict()
    assert counts(cfg)[0] > 50
    bare = read(MASK)
    bare.model.backbone.init_cfg = None
    with pytest.raises(ConfigError, match='backbone loads no checkpoint of b'):
        ws_mm.apply_norm(bare, backbone='ease')
    # Parts that are named are all that is changed.
    cfg = read(PSP)
    changes, _ = ws_mm.apply_norm(cfg, parts=['backbone'])
    assert 'model.backbone.conv_cfg' in by_key(changes)


@pytest.mark.parametrize('name', [MASK, PSP])
def test_batch_norms_are_continued(name: str) -> None:
    cfg, plain = read(name), read(name)
    changes, left = ws_mm.apply_norm(cfg, backbone='ease')
    assert by_key(changes)['model.backbone.norm_cfg'] == {
        'type': 'ws_mm.EasedBCN'
    }
    assert 'model.backbone.conv_cfg' not in by_key(changes)
    assert not cfg.model.backbone.norm_eval
    heads = cfg.model.get('decode_head') or cfg.model.roi_head.mask_head
    assert heads.norm_cfg.type == 'GN'
    assert 'EasedBCN continues its batch norms' in ' '.join(map(str, left))
    assert not any('EasedBCN remains' in str(one) for one in left)
    # What the checkpoint has, they compute.
    backbones = []
    for one in (plain, cfg):
        keep = ('init_cfg', 'frozen_stages')
        assert all(
            one.model.backbone.get(key) == plain.model.backbone.get(key)
            for key in keep
        )
        assert one.model.get('pretrained') == plain.model.get('pretrained')
        settings = {**one.model.backbone, 'init_cfg': None}
        settings['_scope_'] = cfg.default_scope
        if settings['norm_cfg']['type'] == 'SyncBN':
            settings['norm_cfg'] = dict(type='BN')
        backbones.append(MODELS.build(settings))
    trained, model = backbones
    for module in trained.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    missing, unexpected = model.load_state_dict(
        trained.state_dict(), strict=False
    )
    ours = ('gate', 'gn_weight', 'gn_bias')
    assert all(key.endswith(ours) for key in missing)
    assert all(key.endswith('num_batches_tracked') for key in unexpected)
    x = torch.randn(1, 3, 64, 96)
    for one in backbones:
        one.eval()  # which mmdet's do not return
    for found, expected in zip(model(x), trained(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    for again in ('ease', 'auto', 'freeze'):
        assert ws_mm.apply_norm(cfg, backbone=again)[0] == []


def test_a_backbone_without_batch_norms_may_stay() -> None:
    cfg = read('mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py')
    before = cfg.model.backbone.to_dict()
    changes, _ = ws_mm.apply_norm(cfg, backbone='freeze')
    assert 'model.neck.norm_cfg' in by_key(changes)
    # Its class takes no norm_eval.
    assert cfg.model.backbone.to_dict() == before


def test_remaining_norms_of_a_frozen_backbone_stay() -> None:
    cfg = read('mmdet::yolof/yolof_r50-c5_8xb8-1x_coco.py')
    ws_mm.apply_norm(cfg, norm='BCN', remaining=True)
    assert cfg.model.neck.type == 'ws_mm.Converted'
    assert cfg.model.type == 'YOLOF'
    assert cfg.model.backbone.type == 'ResNet'


def test_a_part_around_a_frozen_backbone_is_not_converted() -> None:
    cfg = read(RETINA)
    # Not a class: its batch norms are those of the model.
    cfg.model.neck.update(
        type='ws_mm.Converted', of='FPN', norm_cfg=dict(type='BN'), conv={}
    )
    before = cfg.model.to_dict()
    _, left = ws_mm.apply_norm(cfg, 'keep', 'BCN', remaining=True)
    assert cfg.model.to_dict() == before
    (why,) = (one.why for one in left if 'batch norms remain' in one.why)
    assert why.startswith('8 batch norms remain')
    assert '--remaining (remaining=True) with --backbone convert (b' in why
    ws_mm.apply_norm(cfg, 'keep', 'BCN', remaining=True, backbone='convert')
    assert batch_norms(build(cfg)) == []


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        (
            'mmdet::gn+ws/mask-rcnn_r50_fpn_gn-ws-all_2x_coco.py',
            dict(backbone='ease'),
            'backbone: it has no batch norms, so that .*freeze',
        ),
        (
            PIDNET,
            dict(backbone='ease', parts=['backbone']),
            'among the parts to convert',
        ),
        (MASK, dict(backbone='frozen'), "'frozen' is not one of 'auto', 'con"),
        (
            MASK,
            dict(parts=['backbone'], backbone='freeze'),
            r'backbone is among the parts to convert \(--parts\)',
        ),
    ],
)
def test_mistakes_are_named(name: str, options: dict, message: str) -> None:
    cfg = read(name)
    before = cfg.to_dict()
    with pytest.raises(ConfigError, match=message):
        ws_mm.apply_norm(cfg, **options)
    assert cfg.to_dict() == before


def test_the_tool_freezes_by_default(
    tmp_path: Path,
    script: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / 'new.py'
    assert script('apply_norm', MASK, out) == 0
    assert '--backbone convert' in capsys.readouterr().out
    cfg = Config.fromfile(out)
    assert cfg.model.backbone.norm_cfg.type == 'BN'
    assert cfg.model.backbone.norm_eval
    assert cfg.model.backbone.init_cfg.checkpoint == 'torchvision://resnet50'
    assert cfg.model.neck.norm_cfg.type == 'GN'


def test_a_backbone_without_batch_norms_is_converted() -> None:
    cfg = read('mmdet::gn+ws/mask-rcnn_r50_fpn_gn-ws-all_2x_coco.py')
    assert cfg.model.backbone.init_cfg.checkpoint
    ws_mm.apply_norm(cfg, norm='BCN')
    assert cfg.model.backbone.norm_cfg == dict(type='ws_mm.BCN')
    assert cfg.model.backbone.init_cfg is None


def test_weights_that_the_backbone_itself_names_are_kept() -> None:
    cfg, other = read(MASK), read(MASK)
    for one in (cfg, other):
        name = one.model.backbone.pop('init_cfg').checkpoint
        one.model.backbone.pretrained = name
    before = cfg.model.backbone.to_dict()
    changes, _ = ws_mm.apply_norm(cfg)
    assert 'model.neck.norm_cfg' in by_key(changes)
    assert cfg.model.backbone.to_dict() == before
    ws_mm.apply_norm(other, backbone='convert')
    assert other.model.backbone.pretrained is None


def test_what_a_frozen_backbone_holds_stays() -> None:
    cfg = read(MASK)
    block = dict(type='NonLocal2d', norm_cfg=dict(type='BN'))
    cfg.model.backbone.plugins = [dict(cfg=block, position='after_conv3')]
    before = cfg.model.backbone.to_dict()
    ws_mm.apply_norm(cfg)
    assert cfg.model.backbone.to_dict() == before
    ws_mm.apply_norm(cfg, backbone='convert')
    assert cfg.model.backbone.plugins[0].cfg.norm_cfg == GN


def test_a_backbone_that_does_not_build_is_named() -> None:
    cfg = read(MASK)
    cfg.model.backbone.norm_cfg.type = 'BNN'
    with pytest.raises(ConfigError, match='does not build as it is: KeyE'):
        ws_mm.apply_norm(cfg)
