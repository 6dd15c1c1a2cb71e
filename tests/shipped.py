"""Configs that the hosts ship, converted, small, with random weights."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from in_process import load
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import ws_mm
from ws_mm.shapes import build_without_memory

R18 = {
    'model.backbone.depth': 18,
    'model.backbone.base_channels': 8,
    'model.backbone.init_cfg': None,
}
FPN8 = {
    'model.neck.in_channels': [8, 16, 32, 64],
    'model.neck.out_channels': 16,
}
DETR = R18 | {
    'model.neck.in_channels': [64],
    'model.num_queries': 4,
    'model.encoder.num_layers': 1,
    'model.decoder.num_layers': 1,
}
SPARSE = (
    R18
    | FPN8
    | {
        'model.rpn_head.num_proposals': 4,
        'model.rpn_head.proposal_feature_channel': 16,
        'model.roi_head.proposal_feature_channel': 16,
        'model.roi_head.bbox_roi_extractor.out_channels': 16,
        'model.test_cfg.rcnn.max_per_img': 4,
    }
    | {
        f'model.roi_head.bbox_head.{stage}.{key}': value
        for stage in range(6)
        for key, value in {
            'in_channels': 16,
            'feedforward_channels': 16,
            'dynamic_conv_cfg.in_channels': 16,
            'dynamic_conv_cfg.feat_channels': 4,
            'dynamic_conv_cfg.out_channels': 16,
        }.items()
    }
)
SOLOV2 = (
    R18
    | FPN8
    | {
        'model.mask_head.in_channels': 16,
        'model.mask_head.feat_channels': 16,
        'model.mask_head.stacked_convs': 1,
        'model.mask_head.num_classes': 2,
        'model.mask_head.mask_feature_head.feat_channels': 8,
        'model.mask_head.mask_feature_head.out_channels': 16,
        'model.mask_head.mask_feature_head.norm_cfg.num_groups': 4,
    }
)
YOLACT = R18 | {
    'model.backbone.out_indices': (0, 1, 2, 3),
    'model.neck.in_channels': [8, 16, 32, 64],
    'model.neck.out_channels': 16,
    'model.bbox_head.in_channels': 16,
    'model.bbox_head.feat_channels': 16,
    'model.mask_head.in_channels': 16,
}
_HR = [4, 8, 8, 8]
OCRNET = {
    'model.pretrained': None,
    'model.backbone.extra.stage1.num_blocks': (1,),
    'model.backbone.extra.stage1.num_channels': (4,),
    **{
        f'model.backbone.extra.stage{stage}.{key}': value
        for stage in (2, 3, 4)
        for key, value in {
            'num_modules': 1,
            'num_blocks': (1,) * stage,
            'num_channels': tuple(_HR[:stage]),
        }.items()
    },
    'model.decode_head.0.in_channels': _HR,
    'model.decode_head.0.channels': 8,
    'model.decode_head.1.in_channels': _HR,
    'model.decode_head.1.channels': 8,
    'model.decode_head.1.ocr_channels': 8,
}
POINTREND = (
    R18
    | FPN8
    | {
        'model.pretrained': None,
        'model.decode_head.0.in_channels': [16] * 4,
        'model.decode_head.0.channels': 8,
        'model.decode_head.1.in_channels': [16],
        'model.decode_head.1.channels': 8,
        'model.test_cfg.subdivision_num_points': 64,
        # Its layers are of one dimension.
        'model.decode_head.1.conv_cfg': dict(type='ws_mm.WSConv1d'),
        'model.decode_head.1.norm_cfg': dict(type='GN', num_groups=4),
    }
)
RTMDET = {
    'model.backbone.widen_factor': 0.125,
    'model.backbone.init_cfg': None,
    'model.neck.in_channels': [32, 64, 128],
    'model.neck.out_channels': 16,
    'model.bbox_head.in_channels': 16,
    'model.bbox_head.feat_channels': 16,
}
UNET = {
    'model.backbone.base_channels': 8,
    'model.decode_head.in_channels': 8,
    'model.decode_head.channels': 8,
    'model.auxiliary_head.in_channels': 16,
    'model.auxiliary_head.channels': 8,
}
PSPNET = R18 | {
    'model.pretrained': None,
    'model.backbone.stem_channels': 8,
    'model.decode_head.in_channels': 64,
    'model.decode_head.channels': 8,
    'model.auxiliary_head.in_channels': 32,
    'model.auxiliary_head.channels': 8,
}
SEGFORMER = {
    'model.pretrained': None,
    'model.backbone.init_cfg': None,
    'model.backbone.embed_dims': 4,
    'model.backbone.num_heads': [1, 1, 1, 1],
    'model.backbone.num_layers': [1, 1, 1, 1],
    'model.decode_head.in_channels': [4, 4, 4, 4],
    'model.decode_head.channels': 8,
}
SEGNEXT = {
    'model.pretrained': None,
    'model.backbone.init_cfg': None,
    'model.backbone.embed_dims': [8, 8, 8, 8],
    'model.backbone.depths': [1, 1, 1, 1],
    'model.decode_head.in_channels': [8, 8, 8],
    'model.decode_head.channels': 8,
    'model.decode_head.ham_channels': 8,
}


def find(pattern: str) -> Path:
    """The one config of an installed package that a pattern fits.

    Args:
        pattern: ``package::folder/name``, with ``*`` for what is left out.
    """
    package, _, path = pattern.partition('::')
    spec = importlib.util.find_spec(package)
    root = Path(spec.submodule_search_locations[0])
    (found,) = (root / '.mim/configs').glob(path)
    return found


def name_of(pattern: str) -> str:
    """Its name as the tools take it."""
    path = find(pattern)
    return f'{pattern.partition("::")[0]}::{path.parent.name}/{path.name}'


def read(pattern: str) -> Config:
    """Its content."""
    return Config.fromfile(find(pattern))


def build(cfg: Config) -> torch.nn.Module:
    """The model of a config, on the meta device."""
    return build_without_memory(cfg.model, cfg.default_scope)


def counts(cfg: Config) -> tuple[int, int, int]:
    """Convolutions standardized, plain under a norm, and plain without."""
    report = ws_mm.check(build(cfg))
    assert report.mistakes == []
    return (
        sum(conv.standardized for conv in report),
        sum(not conv.standardized and bool(conv.norms) for conv in report),
        sum(not conv.standardized and not conv.norms for conv in report),
    )


def by_key(changes: list) -> dict[str, object]:
    """Changes of ``apply_norm`` by their keys."""
    return {'.'.join(map(str, change.key)): change.new for change in changes}


def apply_norm(
    cfg: Config,
    conv: Any = 'WSConv2d',
    norm: Any = 'BCN',
    *parts: Any,
    **options: Any,
) -> tuple[list[Any], list[Any]]:
    """Convert a config, pretrained backbones, too; to BCN+WS by default."""
    options = {'backbone': 'convert', **options}
    return ws_mm.apply_norm(cfg, conv, norm, *parts, **options)


def write_shipped(
    folder: Path, name: str, changes: dict[str, Any]
) -> tuple[Path, Path, torch.nn.Module]:
    """Convert a shipped config to GN and WS; also random weights of it.

    Args:
        folder: for the config and the checkpoint.
        name: as tools/model_converters/apply_norm.py takes it.
        changes: as ``--cfg-options``, before the conversion.
    """
    cfg = load('apply_norm').read_config(name)
    cfg.merge_from_dict(changes)
    apply_norm(cfg, 'WSConv2d', dict(type='GN', num_groups=4))
    config, weights = folder / 'tiny.py', folder / 'tiny.pth'
    cfg.dump(config)
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    logging.disable(logging.INFO)  # the values of each tensor
    try:
        model.init_weights()
    finally:
        logging.disable(logging.NOTSET)
    for layer in model.modules():
        if isinstance(layer, torch.nn.GroupNorm):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.uniform_(layer.bias, -0.5, 0.5)
    torch.save(dict(state_dict=model.state_dict()), weights)
    return config, weights, model.eval()
