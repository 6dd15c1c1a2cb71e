"""Configs of both hosts get our layers, and nothing else changes."""

import importlib.util
import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from in_process import load, tools  # noqa: F401
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from tiny_runs import DET, ROOT, SEG, call, write_config, write_data
from torch import nn

import ws_mm
from ws_mm.configs import (
    ConfigError,
    convert_config,
)
from ws_mm.running_statistics import RunningStatistics
from ws_mm.shapes import batch_norms, build_without_memory

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

WS, BCN = dict(type='ws_mm.WSConv2d'), dict(type='ws_mm.BCN')
HOOK = dict(type='ws_mm.SyncEstimatesHook')

# Convolutions: standardized, plain under a norm, plain without one.
SHIPPED = {
    'mmdet::mask_rcnn/mask-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco.py': (32, 0, 5),
    'mmdet::faster_rcnn/faster-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco.py': (
        28,
        0,
        3,
    ),
    'mmdet::cascade_rcnn/cascade-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco.py': (
        28,
        0,
        3,
    ),
    'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py': (36, 0, 2),
    'mmdet::fcos/fcos_r18_fpn_'
    'gn-head-center-normbbox-centeronreg-giou_8xb8-amp-lsj-200e_coco.py': (
        36,
        0,
        3,
    ),
    'mmdet::atss/atss_r18_fpn_8xb8-amp-lsj-200e_coco.py': (36, 0, 3),
    'mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py': (72, 0, 3),
    'mmdet::yolox/yolox_s_8xb8-300e_coco.py': (74, 0, 9),
    'mmdet::ssd/ssd300_coco.py': (8, 0, 27),
    'mmdet::detr/detr_r50_8xb2-150e_coco.py': (54, 0, 0),
    'mmdet::dyhead/atss_swin-l-p4-w12_fpn_dyhead_ms-2x_coco.py': (8, 1, 27),
    'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py': (72, 0, 6),
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py': (
        53,
        5,
        1,
    ),
    'mmdet::res2net/cascade-rcnn_res2net-101_fpn_20e_coco.py': (8, 73, 102),
    'mmdet::regnet/faster-rcnn_regnetx-800MF_fpn_ms-3x_coco.py': (61, 0, 3),
    'mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_'
    '180k_semi-0.01-coco.py': (122, 0, 6),
    'mmdet::centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py': (
        20,
        3,
        9,
    ),
    'mmdet::point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py': (62, 0, 7),
    'mmdet::dcn/cascade-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py': (8, 40, 16),
    'mmdet::efficientnet/retinanet_effb3_fpn_8xb4-crop896-1x_coco.py': (
        8,
        82,
        57,
    ),
    'mmdet::htc/htc-without-semantic_r50_fpn_1x_coco.py': (75, 0, 9),
    # Levels share convolutions, and each has norms of its own.
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py': (57, 11, 10),
    'mmseg::deeplabv3/deeplabv3_r18b-d8_4xb2-80k_cityscapes-512x1024.py': (
        27,
        0,
        2,
    ),
    'mmseg::deeplabv3plus/deeplabv3plus_r18b-d8_4xb2-80k_'
    'cityscapes-512x1024.py': (25, 10, 2),
    'mmseg::pspnet/pspnet_r18b-d8_4xb2-80k_cityscapes-512x1024.py': (26, 0, 2),
    'mmseg::fcn/fcn_r18b-d8_4xb2-80k_cityscapes-512x1024.py': (24, 0, 2),
    'mmseg::upernet/upernet_r18_4xb2-40k_cityscapes-512x1024.py': (35, 0, 2),
    'mmseg::unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py': (20, 4, 2),
    'mmseg::bisenetv1/bisenetv1_r18-d32-in1k-pre_4xb4-160k_'
    'cityscapes-1024x1024.py': (23, 13, 3),
    'mmseg::bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py': (
        9,
        52,
        7,
    ),
    'mmseg::fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py': (11, 35, 3),
    'mmseg::icnet/icnet_r18-d8-in1k-pre_4xb2-160k_cityscapes-832x832.py': (
        39,
        0,
        3,
    ),
    'mmseg::mobilenet_v2/mobilenet-v2-d8_fcn_4xb2-80k_'
    'cityscapes-512x1024.py': (55, 0, 2),
    'mmseg::mobilenet_v3/mobilenet-v3-d8-s_lraspp_4xb4-320k_'
    'cityscapes-512x1024.py': (29, 8, 23),
    'mmseg::pidnet/pidnet-m_2xb6-120k_1024x1024-cityscapes.py': (0, 65, 14),
    'mmseg::segnext/segnext_mscan-s_1xb16-adamw-160k_ade20k-512x512.py': (
        2,
        6,
        132,
    ),
    'mmseg::point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024.py': (
        70,
        0,
        5,
    ),
    'mmseg::ocrnet/ocrnet_hr18s_4xb2-40k_cityscapes-512x1024.py': (153, 0, 2),
    'mmseg::sem_fpn/fpn_r101_4xb4-160k_ade20k-512x512.py': (70, 0, 1),
    'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py': (
        0,
        15,
        25,
    ),
}


@pytest.fixture
def script(monkeypatch):
    """Run the main of a script of tools/; return its exit code."""

    def run(name, *args):
        monkeypatch.setattr('sys.argv', [name, *map(str, args)])
        try:
            load(name).main()
        except SystemExit as stop:
            return stop.code
        return 0

    return run


@pytest.fixture
def refuses(monkeypatch):
    """Run the main of a script of tools/ and require its error."""

    def run(match, name, *args):
        monkeypatch.setattr('sys.argv', [name, *map(str, args)])
        module = load(name)
        with pytest.raises(module.SetupError, match=f'(?s){match}'):
            module.main()

    return run


def shipped(name: str) -> Config:
    package, _, path = name.partition('::')
    spec = importlib.util.find_spec(package)
    root = Path(spec.submodule_search_locations[0])
    return Config.fromfile(root / '.mim' / 'configs' / path)


def build(cfg: Config) -> nn.Module:
    return build_without_memory(cfg.model, cfg.default_scope)


def counts(cfg: Config) -> tuple[int, int, int]:
    report = ws_mm.check(build(cfg))
    assert report.mistakes == []
    return (
        sum(conv.standardized for conv in report),
        sum(not conv.standardized and bool(conv.norms) for conv in report),
        sum(not conv.standardized and not conv.norms for conv in report),
    )


def by_key(changes) -> dict[str, object]:
    return {'.'.join(map(str, change.key)): change.new for change in changes}


@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_configs_convert_build_and_stay(name):
    cfg = shipped(name)
    changes, _ = ws_mm.apply_norm(cfg)
    assert counts(cfg) == SHIPPED[name]
    assert changes
    again, _ = ws_mm.apply_norm(cfg)
    assert again == []


@pytest.mark.parametrize(
    'path',
    [
        'mask_rcnn/mask-rcnn_r50_fpn_bcn-ws-all_8xb2-2x_coco.py',
        'deeplabv3/deeplabv3_r101-d16_bcn-sync-ws-all_8xb2-50e_'
        'voc12aug-513x513.py',
        'deeplabv3plus/deeplabv3plus_r50-d16_bcn-ws_8xb2-50e_'
        'voc12aug-513x513.py',
    ],
)
def test_our_own_configs_stay_as_they_are(path):
    cfg = Config.fromfile(ROOT / 'configs' / path)
    before = cfg.to_dict()
    changes, _ = ws_mm.apply_norm(cfg, images_per_step=None)
    assert changes == []
    assert cfg.to_dict() == before


def test_exactly_what_must_change_changes():
    cfg = shipped('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    before = cfg.to_dict()
    changes, left = ws_mm.apply_norm(cfg, images_per_step=8)
    assert by_key(changes) == {
        'model.backbone.conv_cfg': WS,
        'model.backbone.norm_cfg': BCN,
        'model.backbone.norm_eval': False,
        'model.backbone.init_cfg': None,
        'model.backbone.frozen_stages': -1,
        'model.neck.conv_cfg': WS,
        'model.neck.norm_cfg': BCN,
        'model.roi_head.mask_head.conv_cfg': WS,
        'model.roi_head.mask_head.norm_cfg': BCN,
        'custom_hooks': [HOOK],
        'optim_wrapper.optimizer.lr': 0.01,
        'auto_scale_lr.base_batch_size': 8,
    }
    after = cfg.to_dict()
    for change in changes:
        node, old = after, before
        for key in change.key[:-1]:
            node, old = node[key], old[key]
        assert node.pop(change.key[-1]) == change.new
        old.pop(change.key[-1], None)
    assert after == before
    why = {'.'.join(map(str, one.key)): one.why for one in left}
    assert why['model.rpn_head'] == 'RPNHead takes no norm_cfg'
    assert 'neither a convolution' in why['model.roi_head.bbox_head']


def test_segmentors_lose_the_weights_that_the_model_names():
    cfg = shipped(
        'mmseg::deeplabv3plus/'
        'deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py'
    )
    _, left = ws_mm.apply_norm(cfg, images_per_step=4)
    assert cfg.model.pretrained is None
    # Four GPUs with two images each, says the file's name.
    assert cfg.optim_wrapper.optimizer.lr == 0.005
    assert cfg.model.auxiliary_head.conv_cfg == WS
    said = ' '.join(map(str, left))
    assert '10 convolutions stay plain under their norm' in said


@pytest.mark.parametrize(
    ('parts', 'changed'),
    [
        (['backbone'], {'backbone'}),
        (['neck', 'heads'], {'neck', 'roi_head'}),
        (['roi_head.mask_head'], {'roi_head'}),
    ],
)
def test_only_the_parts_selected_change(parts, changed):
    cfg = shipped('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    changes, _ = ws_mm.apply_norm(cfg, parts=parts)
    of_model = {c.key[1] for c in changes if c.key[0] == 'model'}
    assert of_model == changed
    # The weights of a backbone that stays still fit.
    kept = cfg.model.backbone.get('init_cfg') is not None
    assert kept == ('backbone' not in changed)


def test_other_parts_are_not_judged_as_if_changed():
    name = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
    # It has no layer that could change: no hook is needed, either.
    changes, _ = ws_mm.apply_norm(shipped(name), parts=['roi_head.bbox_head'])
    assert changes == []
    cfg = shipped(name)
    *_, built = convert_config(cfg, parts=['neck'])
    report = [ws_mm.check(one) for one in (built, build(cfg))]
    judged, made = ([conv.standardized for conv in one] for one in report)
    assert judged == made


def test_what_a_class_takes_through_others(monkeypatch):
    """Arguments of a base class count where ``**kwargs`` hands them on."""
    from mmdet.models import ResNet
    from mmdet.registry import MODELS

    class Closed(ResNet):
        def __init__(self, depth, style='caffe'):
            super().__init__(depth, style=style, frozen_stages=1)

    class Open(ResNet):
        def __init__(self, depth, frozen_stages=0, **kwargs):
            super().__init__(depth, frozen_stages=frozen_stages, **kwargs)

    said = {}
    for cls in (Closed, Open):
        monkeypatch.setitem(MODELS._module_dict, cls.__name__, cls)
        cfg = shipped('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py')
        cfg.model.backbone = dict(type=cls.__name__, depth=18, frozen_stages=1)
        if cls is Closed:
            cfg.model.backbone.pop('frozen_stages')
        changes, left = ws_mm.apply_norm(cfg, parts=['backbone'])
        said[cls] = by_key(changes), [str(one) for one in left]
    changes, left = said[Closed]
    assert changes == {}
    assert left[0] == 'model.backbone: Closed takes no norm_cfg'
    assert left[1].startswith('model.backbone: 20 batch norms remain')
    changes, left = said[Open]
    # What freezes nothing is the default of the class itself.
    assert changes['model.backbone.frozen_stages'] == 0
    assert changes['model.backbone.norm_cfg'] == BCN
    assert left == []


def test_the_batch_of_a_process_divides_the_batch_asked():
    cfg = shipped('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    ws_mm.apply_norm(cfg, images_per_step=3)
    assert cfg.train_dataloader.batch_size == 1
    assert cfg.optim_wrapper.optimizer.lr == 0.00375


def test_groups_of_gn_divide_all_channels_of_a_part():
    cfg = shipped(
        'mmseg::deeplabv3plus/'
        'deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py'
    )
    ws_mm.apply_norm(cfg, norm='GN')
    assert cfg.model.decode_head.norm_cfg == dict(type='GN', num_groups=16)
    assert cfg.model.backbone.norm_cfg == dict(type='GN', num_groups=16)
    assert 'custom_hooks' not in cfg
    assert counts(cfg)[0] == 60


MASK = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
GN_ALL = 'mmdet::gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py'
PSP = 'mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'


@pytest.mark.parametrize(
    ('name', 'norm'),
    [(MASK, 'BN'), (MASK, 'keep'), (GN_ALL, 'GN'), (PSP, 'BN'), (PSP, 'keep')],
)
def test_weights_of_plain_convolutions_do_not_start_standardized(name, norm):
    cfg = shipped(name)
    backbone = cfg.model.backbone
    given = backbone.get('init_cfg') or cfg.model.get('pretrained')
    assert given
    ws_mm.apply_norm(cfg, norm=norm)
    assert backbone.conv_cfg == WS
    assert not backbone.get('init_cfg')
    assert not cfg.model.get('pretrained')
    assert backbone.get('frozen_stages', -1) == -1
    built = build(cfg)
    built.train()
    layers = [
        layer
        for layer in built.backbone.modules()
        if isinstance(layer, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm))
    ]
    assert len(layers) == 53 + 2 * (name == PSP)
    assert all(layer.training for layer in layers)


def test_weights_of_what_stays_are_kept():
    cfg = shipped(PSP)
    before = cfg.model.pretrained
    ws_mm.apply_norm(cfg, parts=['decode_head'])
    assert cfg.model.decode_head.conv_cfg == WS
    assert cfg.model.pretrained == before
    # Batch normalization over all processes reads the same checkpoint.
    cfg = shipped(MASK)
    changes, _ = ws_mm.apply_norm(cfg, 'keep', 'SyncBN', ['backbone'])
    assert set(by_key(changes)) == {
        'model.backbone.norm_cfg',
        'model.backbone.norm_eval',
    }


def test_a_norm_cfg_without_a_type_above_it_is_found():
    cfg = shipped(
        'mmdet::condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py'
    )
    _, left = ws_mm.apply_norm(cfg)
    assert cfg.model.mask_head.mask_feature_head.norm_cfg == BCN
    assert not batch_norms(build(cfg))
    assert 'batch norms remain' not in ' '.join(map(str, left))


@pytest.mark.parametrize(
    ('name', 'key', 'number'),
    [
        (
            'mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py',
            'backbone',
            57,
        ),
        ('mmdet::yolof/yolof_r50-c5_8xb8-1x_coco.py', 'neck', 14),
        (
            'mmdet::double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py',
            'roi_head.bbox_head',
            3,
        ),
        (
            'mmdet::centernet/centernet_r18_8xb16-crop512-140e_coco.py',
            'neck',
            6,
        ),
    ],
)
def test_batch_norms_that_remain_are_named_and_converted(name, key, number):
    cfg = shipped(name)
    _, left = ws_mm.apply_norm(cfg)
    names = batch_norms(build(cfg))
    assert len(names) == number
    (said,) = [str(one) for one in left if 'batch norms remain' in one.why]
    assert said.startswith(f'model.{key}: {number} batch norms remain')
    assert names[0] in said
    assert '--remaining' in said
    layers = counts(cfg)
    changes, left = ws_mm.apply_norm(cfg, remaining=True)
    assert {f'model.{key}.type', f'model.{key}.of'} <= set(by_key(changes))
    assert 'batch norms remain' not in ' '.join(map(str, left))
    built = build(cfg)
    assert not batch_norms(built)
    assert all(isinstance(built.get_submodule(n), ws_mm.BCN) for n in names)
    # Nothing else became another layer.
    assert counts(cfg) == layers
    assert ws_mm.apply_norm(cfg, remaining=True)[0] == []


def test_norms_of_other_kinds_stay_in_a_converted_part():
    cfg = shipped('mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py')
    ws_mm.apply_norm(cfg, norm=dict(type='GN', num_groups=4))
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


@pytest.mark.parametrize(
    ('name', 'before'),
    [
        ('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', 'GN'),
        ('mmdet::tood/tood_r50_fpn_1x_coco.py', 'GN'),
        ('mmdet::solo/solo_r50_fpn_1x_coco.py', 'GN'),
        ('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', None),
        # It has norms of its own on each level.
        ('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py', 'own'),
    ],
)
def test_heads_that_levels_share_get_no_estimates(name, before):
    cfg = shipped(name)
    key = 'mask_head' if 'solo' in name else 'bbox_head'
    _, left = ws_mm.apply_norm(cfg)
    said = ' '.join(map(str, left))
    kinds = {type(m).__name__ for m in build(cfg).get_submodule(key).modules()}
    if before == 'own':
        assert 'BCN' in kinds
        assert 'shared over pyramid levels' not in said
        return
    assert 'GroupNorm' in kinds
    assert 'BCN' not in kinds
    assert f'model.{key}: GN instead of BCN' in said
    # Who asks for it gets it.
    ws_mm.apply_norm(cfg, parts=[key])
    assert cfg.model[key].norm_cfg == BCN


def test_a_convolution_whose_weight_is_read_raw_stays_plain():
    """TOOD multiplies the weight itself, and calls no forward."""
    cfg = shipped('mmdet::tood/tood_r50_fpn_1x_coco.py')
    _, left = ws_mm.apply_norm(cfg)
    assert cfg.model.bbox_head.get('conv_cfg') is None
    assert cfg.model.neck.conv_cfg == WS
    said = ' '.join(map(str, left))
    assert 'cls_decomp.reduction_conv.conv is not called' in said
    head = build(cfg).bbox_head
    assert not any(isinstance(m, ws_mm.WSConv2d) for m in head.modules())


def test_a_part_without_norm_gets_one_by_its_key():
    cfg = shipped(MASK)
    changes, _ = ws_mm.apply_norm(cfg, 'keep', 'GN', ['neck'])
    assert by_key(changes) == {
        'model.neck.norm_cfg': dict(type='GN', num_groups=32)
    }


FAST = 'mmseg::fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py'


def test_a_group_has_more_than_one_value_on_a_map_of_one_pixel():
    """Behind its pooling pyramid 32 channels meet one pixel."""
    cfg = shipped(FAST)
    ws_mm.apply_norm(cfg, norm='GN')
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model).train()
    assert all(
        layer.num_groups < layer.num_channels
        for layer in model.modules()
        if isinstance(layer, nn.GroupNorm)
    )
    model.extract_feat(torch.randn(1, 3, 64, 64))
    deeplab = (
        'mmseg::deeplabv3/deeplabv3_r18b-d8_4xb2-80k_cityscapes-512x1024.py'
    )
    for name, norm, groups in ((FAST, 'BCN', 32), (deeplab, 'GN', 128)):
        with pytest.raises(
            ConfigError,
            match=f'num_groups={groups}: .* maps of one pixel.* at most '
            f'{groups // 2}',
        ):
            ws_mm.apply_norm(
                shipped(name),
                'keep',
                dict(type=norm, num_groups=groups),
                ['heads'] if norm == 'GN' else None,
            )


def test_weights_of_the_same_layers_are_kept():
    cfg = shipped('mmdet::gn+ws/mask-rcnn_r50_fpn_gn-ws-all_2x_coco.py')
    changes, _ = ws_mm.apply_norm(cfg, norm='GN')
    assert {c.key[-1] for c in changes} == {'conv_cfg'}
    changes, _ = ws_mm.apply_norm(cfg, norm='BCN')
    assert cfg.model.backbone.init_cfg is None


def test_other_convolutions_are_left_alone():
    cfg = shipped('mmdet::dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py')
    _, left = ws_mm.apply_norm(cfg)
    assert 'conv_cfg' not in cfg.model.backbone
    assert cfg.model.backbone.norm_cfg == BCN
    assert cfg.model.neck.conv_cfg == WS
    assert 'conv_cfg must be None for DCN' in ' '.join(map(str, left))


def test_a_part_with_a_convolution_without_norm_stays_plain():
    cfg = shipped('mmdet::hrnet/faster-rcnn_hrnetv2p-w18-1x_coco.py')
    _, left = ws_mm.apply_norm(cfg)
    assert 'conv_cfg' not in cfg.model.neck
    said = {'.'.join(map(str, one.key)): one.why for one in left}
    assert 'would have no norm after it' in said['model.neck']


def test_other_parts_are_converted_where_a_package_is_missing(monkeypatch):
    from mmdet.registry import MODELS

    class Lacking(nn.Module):
        def __init__(self, conv_cfg=None, norm_cfg=None, **more):
            raise ImportError('no module named extra')

    monkeypatch.setitem(MODELS._module_dict, 'Lacking', Lacking)
    cfg = shipped(MASK)
    norm = dict(type='BN')
    cfg.model.rpn_head = dict(type='Lacking', norm_cfg=norm)
    changes, left = ws_mm.apply_norm(cfg)
    for key in ('backbone', 'neck'):
        assert {f'model.{key}.conv_cfg', f'model.{key}.norm_cfg'} <= set(
            by_key(changes)
        )
    assert cfg.model.rpn_head == dict(type='Lacking', norm_cfg=norm)
    why = {'.'.join(map(str, one.key)): one.why for one in left}
    assert why['model'].startswith('each changed part was built alone')
    stays = 'stays as it is: ImportError: no module named extra'
    assert why['model.rpn_head'] == stays


def test_hooks_and_checkpoints_of_the_config(tmp_path):
    cfg = shipped('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    cfg.custom_hooks = [dict(type='NumClassCheckHook')]
    cfg.load_from = 'somewhere.pth'
    ws_mm.apply_norm(cfg, norm=dict(type='BCN', mode='estimate'))
    assert cfg.custom_hooks == [dict(type='NumClassCheckHook'), HOOK]
    assert cfg.load_from is None
    # Statistics of the batch need no hook.
    cfg = shipped('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    ws_mm.apply_norm(cfg, norm=dict(type='BCN', mode='sync_batch'))
    assert 'custom_hooks' not in cfg


def test_a_config_that_fails_is_left_as_it_was():
    cfg = shipped('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    before = cfg.to_dict()
    with pytest.raises(ConfigError, match="must be one of 'WSConv2d'"):
        ws_mm.apply_norm(cfg, conv='WSConv')
    with pytest.raises(ConfigError, match='images_per_step=0 must be at lea'):
        ws_mm.apply_norm(cfg, images_per_step=0)
    cfg.model.neck.out_channels = 'many'
    with pytest.raises(ConfigError, match='does not build as it is'):
        ws_mm.apply_norm(cfg)
    cfg.model.neck.out_channels = 256
    assert cfg.to_dict() == before


class Running(RunningStatistics):
    """A norm with running statistics that the package does not know."""

    statistics: ClassVar = {'running_var': 1.0}

    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.num_features = num_features
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.register_statistics(num_features)

    def forward(self, x):
        if self.begin_forward(x):
            self.move_statistics(self.batch_statistics(x), self.momentum)
        scale = self.weight / (self.running_var + self.eps).sqrt()
        return x * scale.view(-1, 1, 1)

    def batch_statistics(self, x):
        return dict(running_var=x.detach().square().mean((0, 2, 3)))


class Halved(ws_mm.WSConv2d):
    """A convolution that the package does not know."""


@pytest.fixture
def third_party(monkeypatch):
    for cls in (Running, Halved):
        monkeypatch.setitem(MODELS._module_dict, cls.__name__, cls)


@pytest.mark.parametrize('prefix', ['', 'ws_mm.'])
@pytest.mark.parametrize(
    ('name', 'changed', 'shared'),
    [
        (
            'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
            ['backbone', 'neck'],
            'bbox_head',
        ),
        (
            'mmseg::pspnet/pspnet_r18b-d8_4xb2-80k_cityscapes-512x1024.py',
            ['backbone', 'decode_head', 'auxiliary_head'],
            None,
        ),
    ],
)
def test_layers_of_a_third_party_are_converted(
    name, prefix, changed, shared, third_party
):
    cfg = shipped(name)
    norm = dict(type=f'{prefix}Running', momentum=0.02)
    conv = f'{prefix}Halved'
    _, left = ws_mm.apply_norm(cfg, conv, norm)
    built = build(cfg)
    assert ws_mm.check(built).mistakes == []
    assert cfg.custom_hooks == [HOOK]
    for part in changed:
        assert cfg.model[part].norm_cfg == norm
        assert cfg.model[part].conv_cfg == dict(type=conv)
        kinds = {type(layer) for layer in built.get_submodule(part).modules()}
        assert kinds >= {Running, Halved}
        assert not kinds & {nn.BatchNorm2d, nn.SyncBatchNorm, ws_mm.WSConv2d}
    if shared:
        # Levels would mix its statistics, as they do BCN's.
        assert cfg.model[shared].norm_cfg == dict(type='GN', num_groups=32)
        assert 'GN instead of Running' in str(left)
    assert ws_mm.apply_norm(cfg, conv, norm)[0] == []
    wrong = dict(type=f'{prefix}Running', momentun=0.02)
    with pytest.raises(ConfigError, match='momentun.*--norm-options'):
        ws_mm.apply_norm(cfg, conv, wrong)


# ------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ('name', 'base'),
    [
        (
            'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
            'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
        ),
        (
            'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py',
            'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py',
        ),
        # Keys that are None in the base, with which no dict merges.
        ('mmseg::unet/unet-s5-d16_deeplabv3_4xb4-40k_drive-64x64.py', None),
        ('mmdet::detr/detr_r50_8xb2-150e_coco.py', None),
        # A list of heads, and a folder that mmengine cannot name.
        ('mmdet::gn+ws/mask-rcnn_r50_fpn_gn-ws-all_2x_coco.py', None),
        (
            'mmdet::gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py',
            'mmdet::gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py',
        ),
        (
            'mmdet::seesaw_loss/cascade-mask-rcnn_r101_fpn_seesaw-loss_'
            'sample1e-3-ms-2x_lvis-v1.py',
            'mmdet::seesaw_loss/cascade-mask-rcnn_r101_fpn_seesaw-loss_'
            'sample1e-3-ms-2x_lvis-v1.py',
        ),
        ('mmseg::icnet/icnet_r50-d8_4xb2-80k_cityscapes-832x832.py', None),
    ],
)
def test_the_file_written_is_what_python_makes(
    name, base, script, tmp_path, capsys
):
    out = tmp_path / 'new.py'
    assert script('apply_norm', name, out, '--images-per-step', 4) == 0
    printed = capsys.readouterr().out
    assert 'model.backbone' in printed
    assert 'conv_cfg: not set -> ' in printed or 'gn' in name
    assert f'written: {out}' in printed
    cfg = shipped(name)
    ws_mm.apply_norm(cfg, images_per_step=4)
    found = loaded(out).to_dict()
    for key in ('model', 'optim_wrapper'):
        assert unscoped(found[key]) == unscoped(cfg.to_dict()[key])
    source = out.read_text()
    if base:
        assert f'{base!r}\n' in source
    assert len(source.splitlines()) < 80
    assert [path.name for path in tmp_path.iterdir()] == ['new.py']


def unscoped(value):
    """Without the ``_scope_`` that ``package::`` adds."""
    if isinstance(value, dict):
        return {k: unscoped(v) for k, v in value.items() if k != '_scope_'}
    if isinstance(value, (list, tuple)):
        return [unscoped(item) for item in value]
    return value


def loaded(path: Path) -> Config:
    load('launch')
    return Config.fromfile(path)


def without_ws(text: str) -> str:
    """A tiny config with the layers that others have."""
    text = text.replace(
        "norm_cfg = dict(type='ws_mm.BCN', num_groups=4)",
        "norm_cfg = dict(type='BN', requires_grad=True)",
    )
    lines = text.splitlines(keepends=True)
    return ''.join(line for line in lines if 'conv_cfg' not in line)


@pytest.mark.parametrize(
    ('text', 'weights'), [(DET, 'epoch_1.pth'), (SEG, 'iter_2.pth')]
)
def test_a_converted_model_trains(text, weights, script, tmp_path):
    config = write_config(write_data(tmp_path / 'data'), without_ws(text))
    out = tmp_path / 'child.py'
    options = ('--norm-options', 'num_groups=4')
    assert script('apply_norm', config, out, *options) == 0
    cfg = Config.fromfile(out)
    norm = dict(type='ws_mm.BCN', num_groups=4)
    assert cfg.model.backbone.norm_cfg == norm
    assert "_base_ = 'data/tiny.py'" in out.read_text()
    run = call('train.py', out, '--work-dir', tmp_path / 'run')
    assert run.returncode == 0, run.stdout
    content = torch.load(tmp_path / 'run' / weights, weights_only=False)
    state = content['state_dict']
    parts = {key.partition('.')[0] for key in state if 'bn_weight' in key}
    assert parts >= {'backbone'} | ({'neck'} if text is DET else set())
    means = [v for k, v in state.items() if k.endswith('running_mean')]
    assert sum(bool(mean.any()) for mean in means) > 0.9 * len(means)
    assert all(torch.isfinite(value).all() for value in state.values())


# A backbone of the user's own, with norms that no key reaches.
USERS = """
from mmseg.registry import MODELS
from torch import nn


@MODELS.register_module()
class Plain(nn.Sequential):
    def __init__(self, channels):
        super().__init__(
            nn.Conv2d(3, channels, 3, 4, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )

    def forward(self, x):
        return [super().forward(x)] * 4
"""


def test_a_backbone_of_the_users_own_is_converted(script, tmp_path):
    (tmp_path / 'users.py').write_text(USERS)
    text = without_ws(SEG).replace('in_channels=64', 'in_channels=8')
    extra = (
        "custom_imports = dict(imports=['users'])\n"
        "model['backbone'] = dict(type='Plain', channels=8)\n"
    )
    config = write_config(write_data(tmp_path / 'data'), text, extra)
    first, second = tmp_path / 'first.py', tmp_path / 'second.py'
    path = f'{tmp_path}:{ROOT}'
    groups = ('--norm-options', 'num_groups=4')
    done = call('apply_norm.py', config, first, *groups, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout
    assert '1 batch norms remain' in done.stdout
    done = call('check_model.py', first, PYTHONPATH=path)
    assert '1 batch norms: backbone.1.' in done.stdout
    run = ('--work-dir', tmp_path / 'run')
    done = call('train.py', first, *run, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout
    assert '1 batch norms train on the statistics of 1 image' in done.stdout
    options = (*groups, '--remaining')
    done = call('apply_norm.py', config, second, *options, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout
    done = call('train.py', second, *run, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout
    assert 'batch norms' not in done.stdout
    saved = torch.load(tmp_path / 'run/iter_2.pth', weights_only=False)
    layer = ws_mm.BCN(8, 4)
    state = {
        name.removeprefix('backbone.1.'): value
        for name, value in saved['state_dict'].items()
        if name.startswith('backbone.1.')
    }
    layer.load_state_dict(state)
    assert layer.running_mean.any()


def test_a_batch_norm_of_one_value_is_named_with_the_mend(tmp_path):
    extra = (
        "model['decode_head'] |= dict(type='PSPHead', pool_scales=(1,))\n"
        "model['decode_head'].pop('num_convs')\n"
    )
    data = write_data(tmp_path / 'data')
    config = write_config(data, without_ws(SEG), extra)
    done = call('train.py', config, '--work-dir', tmp_path / 'run')
    assert done.returncode == 1
    said = done.stdout[done.stdout.index('error: ') :]
    assert 'decode_head.psp_modules.0.1.bn' in said
    assert '--remaining' in said
    assert 'train_dataloader.batch_size' in said
    assert 'Traceback' not in done.stdout


@pytest.mark.parametrize(
    'extra',
    ['auto_scale_lr = None\n', 'custom_hooks = None\nconv_cfg = None\n'],
)
def test_keys_that_are_none_in_the_base_are_replaced(extra, script, tmp_path):
    config = write_config(tmp_path, without_ws(SEG), extra)
    out = tmp_path / 'out.py'
    assert script('apply_norm', config, out, '--images-per-step', 4) == 0
    cfg = loaded(out)
    assert cfg.model.backbone.conv_cfg == WS
    assert cfg.custom_hooks == [HOOK]
    if 'auto' in extra:
        assert cfg.auto_scale_lr == dict(base_batch_size=4)


def test_nothing_to_change_writes_nothing(script, tmp_path, capsys):
    config = write_config(tmp_path, without_ws(SEG))
    first, second = tmp_path / 'first.py', tmp_path / 'second.py'
    assert script('apply_norm', config, first) == 0
    assert script('apply_norm', first, second) == 0
    assert 'Nothing to change' in capsys.readouterr().out
    assert not second.exists()


def test_layers_with_options_are_written_as_asked(script, tmp_path):
    config = write_config(tmp_path, without_ws(SEG))
    out = tmp_path / 'out.py'
    options = ['--conv-options', 'eps_mode=inside', '--parts', 'heads']
    options += ['--norm-options', 'num_groups=4', 'outer_affine=channel']
    assert script('apply_norm', config, out, *options) == 0
    head = Config.fromfile(out).model.decode_head
    assert head.conv_cfg == dict(type='ws_mm.WSConv2d', eps_mode='inside')
    assert head.norm_cfg == dict(
        type='ws_mm.BCN', num_groups=4, outer_affine='channel'
    )


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['none.py', 'OUT'], r'No config file none\.py'),
        (
            ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coc.py', 'OUT'],
            r'Did you mean mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco\.py',
        ),
        (
            ['mmyolo::yolov5/yolov5_s.py', 'OUT'],
            'the package mmyolo is not installed',
        ),
        (
            ['CONFIG', 'OUT', '--conv', 'WSConv'],
            "conv='WSConv' must be one of 'WSConv2d', 'keep', .*--conv",
        ),
        (
            ['CONFIG', 'OUT', '--norm', 'bcn'],
            "norm='bcn' must be one of 'BCN', 'GN', 'BN', .*--norm",
        ),
        (
            ['CONFIG', 'OUT', '--norm', 'WSConv2d'],
            "norm='WSConv2d' must be one of",
        ),
        (['CONFIG', 'OUT', '--norm', 'BN1d'], "norm='BN1d' must be one of"),
        (
            ['CONFIG', 'OUT', '--conv', 'ws_mm.WSConv1d'],
            "conv='ws_mm.WSConv1d' must be one of",
        ),
        (
            ['CONFIG', 'OUT', '--norm-options', 'groups=4'],
            "argument 'groups'.*--norm-options",
        ),
        (
            ['CONFIG', 'OUT', '--norm-options', 'momentum=3'],
            'momentum=3 .*--norm-options',
        ),
        (
            ['CONFIG', 'OUT', '--conv', 'keep', '--conv-options', 'eps=1'],
            'takes none',
        ),
        (
            ['CONFIG', 'OUT', '--parts', 'neck'],
            r"parts='neck' selects nothing: .* backbone, heads",
        ),
        (['CONFIG', 'OUT', '--images-per-step', '0'], 'must be at least 1'),
        (
            ['CONFIG', 'OUT', '--norm', 'GN', '--remaining'],
            '--remaining goes with --norm BCN',
        ),
        (['CONFIG', 'CONFIG'], 'exists. Give another name'),
        (['CONFIG', 'CONFIG', '--overwrite'], 'inherit from itself'),
        (['CONFIG', 'out.txt'], 'is called NAME.py'),
    ],
)
def test_bad_arguments_write_nothing(arguments, message, refuses, tmp_path):
    config = write_config(tmp_path, without_ws(SEG))
    before = config.read_text()
    places = {'CONFIG': config, 'OUT': tmp_path / 'out.py'}
    arguments = [places.get(argument, argument) for argument in arguments]
    refuses(message, 'apply_norm', *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ['tiny.py']
    assert config.read_text() == before


@pytest.mark.parametrize(
    ('extra', 'message'),
    [
        (
            "custom_imports = dict(imports=['no_such_module'], "
            'allow_failed_imports=False)',
            'custom_imports do not import .*no_such_module.* on PYTHONPATH',
        ),
        ('model = 1 / 0', 'cannot be loaded as a config: ZeroDivisionError'),
        ('model = None', 'has no model'),
        ("model['type'] = 'Segmenter'", 'Segmenter'),
        ("model['backbone']['depth'] = 19", 'does not build as it is.*19'),
        ('if False:\n    read_base()', 'pure Python config'),
    ],
)
def test_bad_configs_write_nothing(extra, message, refuses, tmp_path):
    config = write_config(tmp_path, without_ws(SEG), extra + '\n')
    refuses(message, 'apply_norm', config, tmp_path / 'out.py')
    assert [path.name for path in tmp_path.iterdir()] == ['tiny.py']


def test_an_unwritten_config_leaves_no_traces(monkeypatch, tmp_path):
    config = write_config(tmp_path, without_ws(SEG))
    module = load('apply_norm')
    monkeypatch.setattr(
        module, 'child_source', lambda *_: f'_base_ = {str(config)!r}\n'
    )
    monkeypatch.setattr('sys.argv', ['x', str(config), str(tmp_path / 'o.py')])
    with pytest.raises(module.SetupError, match='another model than it shou'):
        module.main()
    assert [path.name for path in tmp_path.iterdir()] == ['tiny.py']


# -------------------------------------------------------------------- sweep


@pytest.fixture
def package(monkeypatch, tmp_path):
    """An installed package of three configs, one of which is broken."""
    root = tmp_path / 'tiny_package' / '.mim' / 'configs' / 'tiny'
    root.mkdir(parents=True)
    (root.parents[2] / '__init__.py').write_text('')
    text = without_ws(SEG)
    (root / 'a.py').write_text(text)
    # The same layers.
    (root / 'b.py').write_text(
        text + "model['decode_head']['num_classes'] = 5\n"
    )
    (root / 'c.py').write_text(
        "custom_imports = dict(imports=['no_such_package.models'])\n"
    )
    (root / 'd.py').write_text('max_epochs = 3\n')
    (root / 'metafile.yml').write_text('')
    monkeypatch.syspath_prepend(str(tmp_path))
    return 'tiny_package'


def test_the_sweep_counts_and_continues(package, tmp_path, script, capsys):
    out = tmp_path / 'records'
    arguments = [out, '--packages', package, '--processes', 1]
    publish = ['--publish', tmp_path / 'docs']
    assert script('sweep_configs', *arguments) == 0
    printed = capsys.readouterr().out
    assert '1 distinct models, 1 to convert' in printed
    path = out / 'records.jsonl'
    whole = path.read_text()
    # A kill in the middle of the last line.
    path.write_text(whole[:-30])
    assert script('sweep_configs', *arguments, *publish) == 0
    printed = capsys.readouterr().out
    assert '4 configs, 0 to load' in printed
    assert '1 distinct models, 1 to convert' in printed
    summary = json.loads((tmp_path / 'docs' / 'sweep.json').read_text())
    assert summary['packages'][package]['by_outcome'] == {
        'converted': 2,
        'failed': 1,
        'no model': 1,
    }
    page = (tmp_path / 'docs' / 'sweep.md').read_text()
    assert '66.7 %' in page
    # The broken line did not spoil what was written after it.
    assert script('sweep_configs', *arguments) == 0
    assert '1 distinct models, 0 to convert' in capsys.readouterr().out
    assert 'needs no_such_package, which is not installed | 1 |' in page


def test_mistakes_from_before_are_not_the_converters(
    package, tmp_path, script, capsys
):
    folder = tmp_path / package / '.mim' / 'configs' / 'tiny'
    for path in folder.iterdir():
        path.unlink()
    bare = "model['decode_head'] |= dict(norm_cfg=None, conv_cfg=dict("
    (folder / 'a.py').write_text(without_ws(SEG) + bare + "type='ConvWS'))\n")
    arguments = ['--packages', package, '--processes', 1, '--norm', 'keep']
    assert script('sweep_configs', tmp_path / 'records', *arguments) == 0
    assert '| models: converted | 1 |' in capsys.readouterr().out


def test_another_sweep_is_not_mixed_in(package, tmp_path, script, refuses):
    out = tmp_path / 'records'
    arguments = [out, '--packages', package, '--processes', 1]
    assert script('sweep_configs', *arguments) == 0
    refuses('another sweep', 'sweep_configs', *arguments, '--norm', 'GN')
    refuses('not installed', 'sweep_configs', out, '--packages', 'no_such')
    refuses('at least 1', 'sweep_configs', out, '--processes', 0)


def test_the_published_page_shows_its_numbers():
    summary = json.loads((ROOT / 'docs' / 'sweep.json').read_text())
    report = load('sweep_report')
    page = (ROOT / 'docs' / 'sweep.md').read_text()
    assert page == report.page(summary)
    good, able = report.share(summary)
    assert good >= 0.95 * able
