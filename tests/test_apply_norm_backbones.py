"""ws_mm.apply_norm: a pretrained backbone keeps its frozen batch norms."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS
from test_apply_norm import MASK, PIDNET, PSP, by_key, counts, read

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
    assert not any('batch norms remain' in one for one in words)
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


def test_others_are_converted() -> None:
    # It cannot be frozen: its class has no norm_eval.
    cfg = read(PIDNET)
    ws_mm.apply_norm(cfg)
    assert cfg.model.backbone.norm_cfg.type == 'GN'
    # From random weights, frozen norms would be no norms.
    cfg, other = read(MASK), read(MASK)
    for one in (cfg, other):
        one.model.backbone.init_cfg = None
    ws_mm.apply_norm(cfg)
    ws_mm.apply_norm(other, backbone='convert')
    assert cfg.to_dict() == other.to_dict()
    assert counts(cfg)[0] > 50
    # Parts that are named are all that is changed.
    cfg = read(PSP)
    changes, _ = ws_mm.apply_norm(cfg, parts=['backbone'])
    assert 'model.backbone.conv_cfg' in by_key(changes)


def test_remaining_norms_of_a_frozen_backbone_stay() -> None:
    cfg = read('mmdet::yolof/yolof_r50-c5_8xb8-1x_coco.py')
    ws_mm.apply_norm(cfg, norm='BCN', remaining=True)
    assert cfg.model.neck.type == 'ws_mm.Converted'
    assert cfg.model.type == 'YOLOF'
    assert cfg.model.backbone.type == 'ResNet'


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        (PIDNET, dict(backbone='freeze'), "PIDNet takes no norm_eval.*'conv"),
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
