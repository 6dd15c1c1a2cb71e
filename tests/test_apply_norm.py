"""Configs of both hosts get our layers, and nothing else changes."""

import pytest
import torch
from in_process import load, tools  # noqa: F401
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from shipped import apply_norm, build, by_key, counts, find, read
from tiny_runs import ROOT
from torch import nn

import ws_mm
from ws_mm import norm as bcn
from ws_mm.configs import ConfigError, convert_config
from ws_mm.shapes import batch_norms

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

WS, BCN = dict(type='ws_mm.WSConv2d'), dict(type='ws_mm.BCN')
HOOK = dict(type='ws_mm.SyncEstimatesHook')
MASK = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
RETINA = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
GN_ALL = 'mmdet::gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py'
PLUS = 'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_*-512x1024.py'
PSP = 'mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'
FAST = 'mmseg::fastscnn/fast_scnn_8xb4-160k_*'
PIDNET = 'mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py'

# Convolutions: standardized, plain under a norm, plain without one. One config
# for each kind of network; docs/sweep.md has hundreds.
SHIPPED = {
    'mmdet::mask_rcnn/mask-rcnn_r18_*': (32, 0, 5),
    'mmdet::cascade_rcnn/cascade-rcnn_r18_*': (28, 0, 3),
    'mmdet::retinanet/retinanet_r18_fpn_1x_*': (36, 0, 2),
    'mmdet::fcos/fcos_r18_*': (36, 0, 3),
    'mmdet::yolo/yolov3_d53_8xb8-320-*': (72, 0, 3),
    'mmdet::yolox/yolox_s_*': (74, 0, 9),
    'mmdet::ssd/ssd300_*': (8, 0, 27),
    'mmdet::detr/detr_r50_8xb2-150e_*': (54, 0, 0),
    'mmdet::dyhead/atss_r50_fpn_dyhead_1x_*': (61, 0, 27),
    'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_*': (72, 0, 6),
    'mmdet::mask2former/mask2former_r50_8xb2-*-panoptic.py': (53, 5, 1),
    'mmdet::res2net/cascade-rcnn_*': (8, 73, 102),
    'mmdet::regnet/faster-rcnn_regnetx-800MF_*': (61, 0, 3),
    'mmdet::soft_teacher/*_180k_semi-0.01-*': (122, 0, 6),
    'mmdet::centernet/centernet_r18-*': (20, 3, 9),
    'mmdet::point_rend/point-rend_r50-caffe_fpn_ms-1x_*': (62, 0, 7),
    'mmdet::dcn/cascade-rcnn_r50-*': (8, 40, 16),
    'mmdet::efficientnet/retinanet_*': (8, 82, 57),
    'mmdet::htc/htc-*': (75, 0, 9),
    # Levels share convolutions, and each has norms of its own.
    'mmdet::rtmdet/rtmdet_tiny_*': (57, 11, 10),
    'mmseg::deeplabv3plus/deeplabv3plus_r18b-d8_*-512x1024.py': (25, 10, 2),
    'mmseg::pspnet/pspnet_r18b-d8_*-512x1024.py': (26, 0, 2),
    'mmseg::upernet/upernet_r18_4xb2-40k_*': (35, 0, 2),
    'mmseg::unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-*': (20, 4, 2),
    'mmseg::bisenetv1/bisenetv1_r18-d32-in1k-pre_4xb8-*': (23, 13, 3),
    'mmseg::bisenetv2/bisenetv2_fcn_4xb4-160k_*': (9, 52, 7),
    'mmseg::fastscnn/fast_*': (11, 35, 3),
    'mmseg::icnet/icnet_r18-d8-in1k-pre_4xb2-160k_*': (39, 0, 3),
    'mmseg::mobilenet_v2/mobilenet-v2-d8_fcn_4xb2-*': (55, 0, 2),
    'mmseg::mobilenet_v3/mobilenet-v3-d8-s_*': (29, 8, 23),
    'mmseg::pidnet/pidnet-m_*': (0, 65, 14),
    'mmseg::segnext/segnext_mscan-s_*': (2, 6, 132),
    'mmseg::point_rend/pointrend_r50_4xb2-*': (70, 0, 5),
    'mmseg::ocrnet/ocrnet_hr18s_4xb2-40k_*': (153, 0, 2),
    'mmseg::segformer/segformer_mit-b0_8xb1-*': (0, 15, 25),
}


@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_configs_convert_build_and_stay(name):
    cfg = read(name)
    changes, _ = apply_norm(cfg)
    assert counts(cfg) == SHIPPED[name]
    assert changes
    again, _ = apply_norm(cfg)
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
    changes, _ = apply_norm(cfg, images_per_step=None)
    assert changes == []
    assert cfg.to_dict() == before


def test_exactly_what_must_change_changes():
    cfg = read(MASK)
    before = cfg.to_dict()
    changes, left = apply_norm(cfg, images_per_step=8)
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
    cfg = read(PLUS)
    _, left = apply_norm(cfg, images_per_step=4)
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
    cfg = read(MASK)
    changes, left = apply_norm(cfg, norm='GN', parts=parts)
    if 'backbone' not in changed:  # its batch norms are nobody's concern
        assert not any('remain' in one.why for one in left)
    of_model = {c.key[1] for c in changes if c.key[0] == 'model'}
    assert of_model == changed
    # The weights of a backbone that stays still fit.
    kept = cfg.model.backbone.get('init_cfg') is not None
    assert kept == ('backbone' not in changed)


def test_other_parts_are_not_judged_as_if_changed():
    # It has no layer that could change: no hook is needed, either.
    changes, _ = apply_norm(read(MASK), parts=['roi_head.bbox_head'])
    assert changes == []
    cfg = read(MASK)
    *_, built = convert_config(cfg, norm='BCN', parts=['neck'])
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
        cfg = read(RETINA)
        cfg.model.backbone = dict(type=cls.__name__, depth=18, frozen_stages=1)
        if cls is Closed:
            cfg.model.backbone.pop('frozen_stages')
        changes, left = apply_norm(cfg, parts=['backbone'])
        said[cls] = by_key(changes), [str(one) for one in left]
    changes, left = said[Closed]
    assert changes == {}
    assert left[0] == 'model.backbone: Closed takes no norm_cfg'
    assert left[1].startswith('model.backbone: 20 batch norms remain')
    changes, left = said[Open]
    # What freezes nothing is the default of the class itself.
    assert changes['model.backbone.frozen_stages'] == 0
    assert changes['model.backbone.norm_cfg'] == BCN
    (rate,) = left
    assert rate.startswith('optim_wrapper.optimizer.lr: 0.01 is for 16 images')


@pytest.mark.parametrize(('norm', 'stages'), [('BN', 1), ('keep', 0)])
def test_norms_that_were_frozen_at_lost_weights_train(norm, stages):
    cfg = read('mmdet::faster_rcnn/faster-rcnn_r50-caffe_fpn_1x_coco.py')
    assert cfg.model.backbone.norm_cfg.requires_grad is False
    cfg.model.backbone.frozen_stages = stages  # 0 freezes the stem
    changes, _ = apply_norm(cfg, 'WSConv2d', norm, backbone='convert')
    assert 'model.backbone.init_cfg' in by_key(changes)
    model = MODELS.build({**cfg.model.backbone, '_scope_': 'mmdet'})
    model.train()
    assert all(weight.requires_grad for weight in model.parameters())
    again, _ = apply_norm(cfg, 'WSConv2d', norm, backbone='convert')
    assert again == []


@pytest.mark.parametrize(
    ('norm', 'why'),
    [
        ('GN', 'the new norms are trained'),
        ('keep', 'the statistics belong to other convolutions'),
    ],
)
def test_norms_leave_eval_mode_for_a_reason(norm: str, why: str) -> None:
    cfg = read(RETINA)
    assert cfg.model.backbone.norm_eval
    changes, _ = apply_norm(cfg, 'WSConv2d', norm, ['backbone'])
    said = {'.'.join(map(str, change.key)): change.why for change in changes}
    assert said['model.backbone.norm_eval'] == why
    assert said['model.backbone.conv_cfg'] == ''  # asked for


@pytest.mark.parametrize('kind', ['BN', 'GN'])
def test_norms_that_shall_be_frozen_are(kind):
    cfg = read('mmdet::faster_rcnn/faster-rcnn_r50-caffe_fpn_1x_coco.py')
    norm = dict(type=kind, requires_grad=False)
    for expected in (True, False):
        changes, _ = apply_norm(cfg, 'WSConv2d', norm, backbone='convert')
        assert bool(changes) == expected
        assert cfg.model.backbone.norm_cfg.requires_grad is False


@pytest.mark.parametrize(
    ('images', 'batch', 'lr', 'share', 'inverse'),
    [(3, 1, 0.00375, '0.1875', '5.33333'), (12, 4, 0.015, '0.75', '1.33333')],
)
def test_the_batch_of_a_process_divides_the_batch_asked(
    images, batch, lr, share, inverse
):
    cfg = read(MASK)
    cfg.train_dataloader.batch_size = 8
    changes, left = apply_norm(cfg, parts=['neck'], images_per_step=images)
    assert cfg.train_dataloader.batch_size == batch
    assert cfg.optim_wrapper.optimizer.lr == lr
    said = ' '.join(map(str, [*changes, *left]))
    assert f'rule: {images} images per step instead of 16' in said
    assert f'{images} images are 3 processes of this many' in said
    assert f'{share} times the images' in said
    assert f'multiply them by {inverse}' in said


def test_rates_of_schedulers_are_scaled_with_the_other() -> None:
    cfg = read('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py')
    cosine = next(s for s in cfg.param_scheduler if 'eta_min' in s)
    assert cosine.eta_min == 0.0005
    cfg.param_scheduler += [
        dict(type='OneCycleLR', eta_max=[0.01, 0.1], total_steps=9),
        dict(type='CosineAnnealingMomentum', eta_min=0.85),
    ]
    before = cfg.to_dict()
    apply_norm(cfg, parts=['neck'], images_per_step=8)  # of 64
    assert cosine.eta_min == 0.0000625
    assert cfg.param_scheduler[-2].eta_max == [0.00125, 0.0125]
    for old, new in zip(
        before['param_scheduler'], cfg.param_scheduler, strict=True
    ):
        if old['type'] not in ('CosineAnnealingLR', 'OneCycleLR'):
            assert new == old
    cfg = read(PLUS)
    (poly,) = cfg.param_scheduler
    cfg.param_scheduler = poly
    given = dict(images_per_step=2, base_batch_size=16)
    apply_norm(cfg, parts=['decode_head'], **given)
    assert cfg.param_scheduler == {**poly, 'eta_min': 0.0000125}


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('auto_scale_lr.base_batch_size', '16'),
        ('auto_scale_lr.base_batch_size', 0.5),
        ('optim_wrapper.accumulative_counts', '2'),
        ('optim_wrapper.accumulative_counts', 2.0),
    ],
)
def test_a_count_of_the_config_that_is_none_is_named(key, value) -> None:
    cfg = read(MASK)
    cfg.merge_from_dict({key: value})
    match = f'{key}={value!r} must be a whole number of at least 1 .in the'
    with pytest.raises(ConfigError, match=match):
        apply_norm(cfg, parts=['neck'], images_per_step=8)


def test_a_class_is_a_layer_as_its_name_is() -> None:
    named, given = read(MASK), read(MASK)
    apply_norm(named, 'WSConv2d', 'BCN')
    apply_norm(given, ws_mm.WSConv2d, ws_mm.BCN)
    assert given.to_dict() == named.to_dict()
    for wrong in (3, nn.Linear, [ws_mm.BCN]):
        with pytest.raises(ConfigError, match=r'norm=.* must be one of'):
            apply_norm(given, norm=wrong)


def test_the_name_of_a_file_speaks_not_of_its_folder(tmp_path) -> None:
    cfg = read(MASK)
    path = tmp_path / 'runs_3xb7' / 'mask-rcnn_8xb2.py'
    path.parent.mkdir()
    cfg.dump(path)
    cfg = Config.fromfile(path)
    cfg.auto_scale_lr.base_batch_size = None
    apply_norm(cfg, parts=['neck'], images_per_step=8)
    assert cfg.optim_wrapper.optimizer.lr == 0.01


@pytest.mark.parametrize('counts', [1, 2])
def test_the_images_that_a_sampler_draws_together_stay(counts: int) -> None:
    """One labeled image and four without labels make a batch."""
    cfg = read('mmdet::soft_teacher/*_180k_semi-0.1-coco.py')
    assert cfg.train_dataloader.batch_size == 5
    assert cfg.train_dataloader.sampler.source_ratio == [1, 4]
    cfg.optim_wrapper.accumulative_counts = counts
    before = cfg.to_dict()
    options = dict(parts=['neck'], base_batch_size=40)
    match = rf'=8 must be a multiple of {5 * counts}: .*sampler\.batch_size'
    with pytest.raises(ConfigError, match=match):
        apply_norm(cfg, images_per_step=8, **options)
    assert cfg.to_dict() == before
    apply_norm(cfg, images_per_step=10, **options)
    assert cfg.optim_wrapper.optimizer.lr == 0.0025
    assert cfg.train_dataloader == before['train_dataloader']


def test_a_base_without_images_is_refused() -> None:
    with pytest.raises(ConfigError, match='images_per_step=None must be a wh'):
        apply_norm(read(MASK), parts=['neck'], base_batch_size=16)


def test_dicts_that_are_none_hold_nothing() -> None:
    cfg = read(MASK)
    cfg.auto_scale_lr = cfg.train_dataloader = None
    apply_norm(cfg, parts=['neck'], images_per_step=8, base_batch_size=16)
    assert cfg.optim_wrapper.optimizer.lr == 0.01
    assert cfg.auto_scale_lr == dict(base_batch_size=8)
    assert cfg.train_dataloader is None
    cfg.optim_wrapper.optimizer = None
    changes, left = apply_norm(
        cfg, parts=['neck'], images_per_step=16, base_batch_size=8
    )
    assert changes == []
    assert 'the rate cannot be scaled' in ' '.join(map(str, left))


@pytest.mark.parametrize(
    ('name', 'base', 'says'),
    [
        # Its base is that of the schedule, its name that of its authors.
        (
            'mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py',
            256,
            r'base_batch_size=16 and its name \(8xb32\) do not agree on',
        ),
        (
            'mmseg::san/san-vit-b16_voc12aug-640x640.py',
            16,
            'nothing in the config says',
        ),
    ],
)
def test_the_batch_of_a_learning_rate_is_not_guessed(name, base, says):
    cfg = load('apply_norm').read_config(name)
    before, lr = cfg.to_dict(), cfg.optim_wrapper.optimizer.lr
    why = f'{says} how many images .* lr={lr:g} is for: .*--base-batch-size'
    with pytest.raises(ConfigError, match=why):
        apply_norm(cfg, parts=['heads'], images_per_step=8)
    assert cfg.to_dict() == before
    apply_norm(cfg, parts=['heads'], images_per_step=8, base_batch_size=base)
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(lr * 8 / base)
    assert cfg.auto_scale_lr.base_batch_size == 8


@pytest.mark.parametrize('base', [8, 16])
def test_iterations_that_make_a_step_are_counted(base):
    # 4xb2; whether its authors would have counted two iterations is unknown.
    cfg = read(PSP)
    assert '4xb2' in cfg.filename
    cfg.optim_wrapper.accumulative_counts = 2
    cfg.train_dataloader.batch_size = 4
    before, lr = cfg.to_dict(), cfg.optim_wrapper.optimizer.lr
    match = r'its name \(4xb2\) with .*accumulative_counts=2 does not say how'
    with pytest.raises(ConfigError, match=match):
        apply_norm(cfg, parts=['decode_head'], images_per_step=4)
    cfg.auto_scale_lr = dict(base_batch_size=base)
    match = 'images_per_step=3 must be a multiple of 2, '
    with pytest.raises(ConfigError, match=match):
        apply_norm(cfg, parts=['decode_head'], images_per_step=3)
    assert cfg.to_dict() == before | dict(
        auto_scale_lr=dict(base_batch_size=base)
    )
    apply_norm(cfg, parts=['decode_head'], images_per_step=4)
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(lr * 4 / base)
    # One process, and two images in each of its two iterations.
    assert cfg.train_dataloader.batch_size == 2
    cfg.auto_scale_lr.base_batch_size = 3
    with pytest.raises(ConfigError, match='do not agree on'):
        apply_norm(cfg, parts=['decode_head'], images_per_step=4)
    apply_norm(
        cfg, parts=['decode_head'], images_per_step=3, base_batch_size=3
    )


def test_groups_of_gn_divide_all_channels_of_a_part():
    cfg = read(PLUS)
    _, left = apply_norm(cfg, norm='GN')
    assert cfg.model.decode_head.norm_cfg == dict(type='GN', num_groups=16)
    assert cfg.model.backbone.norm_cfg == dict(type='GN', num_groups=16)
    why = {'.'.join(map(str, one.key)): one.why for one in reversed(left)}
    assert why['model.backbone'].startswith('16 groups instead of 32')
    # 32 of them would have one channel each.
    assert why['model.backbone'].endswith('of its 32 channels')
    assert why['model.decode_head'].endswith('of its 48, 560 channels')
    assert 'custom_hooks' not in cfg
    assert counts(cfg)[0] == 60


@pytest.mark.parametrize(
    ('name', 'norm'),
    [(MASK, 'BN'), (MASK, 'keep'), (GN_ALL, 'GN'), (PSP, 'BN'), (PSP, 'keep')],
)
def test_weights_of_plain_convolutions_do_not_start_standardized(name, norm):
    cfg = read(name)
    backbone = cfg.model.backbone
    given = backbone.get('init_cfg') or cfg.model.get('pretrained')
    assert given
    apply_norm(cfg, norm=norm)
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
    cfg = read(PSP)
    before = cfg.model.pretrained
    apply_norm(cfg, parts=['decode_head'])
    assert cfg.model.decode_head.conv_cfg == WS
    assert cfg.model.pretrained == before
    # Batch normalization over all processes reads the same checkpoint.
    cfg = read(MASK)
    changes, _ = apply_norm(cfg, 'keep', 'SyncBN', ['backbone'])
    assert set(by_key(changes)) == {
        'model.backbone.norm_cfg',
        'model.backbone.norm_eval',
    }


@pytest.mark.parametrize(('name', 'norm'), [(GN_ALL, 'BN'), (MASK, 'BCN')])
def test_weights_of_other_norms_are_dropped(name: str, norm: str) -> None:
    cfg = read(name)
    assert cfg.model.backbone.init_cfg.checkpoint
    apply_norm(cfg, 'keep', norm, ['backbone'])
    assert 'conv_cfg' not in cfg.model.backbone
    assert cfg.model.backbone.init_cfg is None


def test_batch_norms_that_were_asked_for_do_not_remain() -> None:
    _, left = apply_norm(read(PIDNET), norm='BN')
    assert not any('remain' in one.why for one in left)


def test_weights_of_the_whole_model_go_with_one_part() -> None:
    cfg = read(MASK)
    before = cfg.model.backbone.to_dict()
    cfg.model.init_cfg = dict(type='Pretrained', checkpoint='whole.pth')
    apply_norm(cfg, parts=['neck'])
    assert cfg.model.init_cfg is None
    assert cfg.model.backbone.to_dict() == before


def test_a_norm_cfg_without_a_type_above_it_is_found():
    cfg = read('mmdet::condinst/condinst_r50_fpn_ms-poly-90k_*')
    _, left = apply_norm(cfg)
    assert cfg.model.mask_head.mask_feature_head.norm_cfg == BCN
    assert not batch_norms(build(cfg))
    assert 'batch norms remain' not in ' '.join(map(str, left))


@pytest.mark.parametrize(
    ('name', 'before'),
    [
        ('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_*', 'GN'),
        ('mmdet::tood/tood_r50_fpn_1x_coco.py', 'GN'),
        ('mmdet::solo/solo_r50_fpn_1x_coco.py', 'GN'),
        (RETINA, None),
        # It has norms of its own on each level.
        ('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py', 'own'),
    ],
)
def test_heads_that_levels_share_get_no_estimates(name, before):
    cfg = read(name)
    key = 'mask_head' if 'solo' in name else 'bbox_head'
    _, left = apply_norm(cfg)
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
    apply_norm(cfg, parts=[key])
    assert cfg.model[key].norm_cfg == BCN


def test_groups_of_a_head_that_levels_share_stay() -> None:
    cfg = read(RETINA)
    norm_cfg = dict(type='GN', num_groups=16)
    cfg.model.bbox_head.norm_cfg = norm_cfg
    apply_norm(cfg)
    assert cfg.model.bbox_head.conv_cfg == WS
    assert cfg.model.bbox_head.norm_cfg == norm_cfg


def test_norms_of_a_head_that_reads_its_weights_are_replaced() -> None:
    cfg = read('mmdet::tood/tood_r50_fpn_1x_*')
    changes, _ = apply_norm(cfg, 'keep', 'BCN', ['bbox_head'])
    assert by_key(changes)['model.bbox_head.norm_cfg'] == BCN


@pytest.mark.parametrize('channels', [1, 4])
def test_maps_are_measured_on_images_of_any_channels(channels):
    cfg = read(RETINA)
    cfg.model.backbone.in_channels = channels
    apply_norm(cfg)
    assert cfg.model.bbox_head.norm_cfg.type == 'GN'


@pytest.mark.parametrize(
    ('name', 'part', 'why'),
    [
        (
            'mmdet::dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_*',
            'backbone',
            'conv_cfg must be None for DCN',
        ),
        (
            'mmdet::hrnet/faster-rcnn_hrnetv2p-w18-1x_*',
            'neck',
            'would have no norm after it',
        ),
        # It multiplies the weight itself, and calls no forward.
        (
            'mmdet::tood/tood_r50_fpn_1x_*',
            'bbox_head',
            'cls_decomp.reduction_conv.conv is not called',
        ),
    ],
)
def test_a_part_that_cannot_be_standardized_stays_plain(name, part, why):
    cfg = read(name)
    _, left = apply_norm(cfg)
    assert 'conv_cfg' not in cfg.model[part]
    assert why in ' '.join(map(str, left))
    built = build(cfg)
    standardized = [
        name.partition('.')[0]
        for name, module in built.named_modules()
        if isinstance(module, ws_mm.WSConv2d)
    ]
    assert standardized
    assert part not in standardized


def test_convolutions_of_another_kind_stay() -> None:
    cfg = read('mmdet::detectors/cascade-rcnn_r50-sac_1x_coco.py')
    cfg.model.backbone.pop('sac')
    before = cfg.model.backbone.conv_cfg.to_dict()
    changes, left = apply_norm(cfg, norm='GN', parts=['backbone'])
    assert 'model.backbone.norm_cfg' in by_key(changes)
    assert cfg.model.backbone.conv_cfg == before == dict(type='ConvAWS')
    why = 'model.backbone: its convolutions stay ConvAWS (conv_cfg)'
    assert why in map(str, left)


def test_norms_of_channels_that_come_last_stay() -> None:
    pytest.importorskip('mmpretrain', exc_type=ImportError)
    cfg = read(RETINA)
    cfg.model.backbone = dict(
        type='ConvNeXt',
        _scope_='mmpretrain',
        arch='atto',
        out_indices=(0, 1, 2, 3),
        gap_before_final_norm=False,
        norm_cfg=dict(type='LN2d', eps=1e-6),
    )
    cfg.model.neck.in_channels = [40, 80, 160, 320]
    before = cfg.model.backbone.to_dict()
    _, left = apply_norm(cfg, norm='GN')
    assert cfg.model.backbone.to_dict() == before
    why = 'model.backbone: its norm LN2d is not one of channels of a map'
    assert why in map(str, left)


def test_a_norm_that_wants_a_process_group_is_replaced() -> None:
    cfg = read(RETINA)
    cfg.model.backbone.norm_cfg = dict(type='MMSyncBN')
    apply_norm(cfg, parts=['backbone'])
    assert cfg.model.backbone.conv_cfg == WS
    assert cfg.model.backbone.norm_cfg == BCN
    with pytest.raises(ConfigError, match="'MMSyncBN': .*process group"):
        apply_norm(cfg, norm='MMSyncBN')


def test_a_part_without_norms_has_one_reason() -> None:
    cfg = read('mmdet::carafe/faster-rcnn_r50_fpn-carafe_1x_coco.py')
    _, left = apply_norm(cfg, norm='GN')
    (why,) = (one.why for one in left if one.key == ('model', 'neck'))
    # Not that its class takes no conv_cfg either.
    assert why.startswith('has no norm that could be replaced; --parts')


def test_a_mistake_of_another_part_stays_its_own() -> None:
    cfg = read(RETINA)
    cfg.model.neck.conv_cfg = WS  # and no norm
    apply_norm(cfg, parts=['backbone'])
    assert cfg.model.backbone.conv_cfg == WS
    assert cfg.model.backbone.norm_cfg == BCN


def test_a_part_without_norm_gets_one_by_its_key():
    cfg = read(MASK)
    changes, _ = apply_norm(cfg, 'keep', 'GN', ['neck'])
    assert by_key(changes) == {
        'model.neck.norm_cfg': dict(type='GN', num_groups=32)
    }


def test_defaults_of_a_class_count_as_written() -> None:
    cfg = read(RETINA)
    cfg.model.backbone = dict(type='ResNet', depth=18)
    # It has batch norms, in eval mode, by default.
    changes, _ = apply_norm(cfg, 'keep', 'GN', ['backbone'])
    assert by_key(changes) == {
        'model.backbone.norm_cfg': dict(type='GN', num_groups=32),
        'model.backbone.norm_eval': False,
    }


def test_a_part_of_another_scope_is_converted() -> None:
    cfg = read(RETINA)
    cfg.model.backbone = dict(
        type='ResNetV1c', depth=18, num_stages=4, _scope_='mmseg'
    )
    changes, _ = apply_norm(cfg, norm='GN', parts=['backbone'])
    assert by_key(changes)['model.backbone.conv_cfg'] == WS
    assert counts(cfg)[0] == 22


def test_a_head_of_a_list_of_heads_is_no_part_of_its_own() -> None:
    _, left = apply_norm(read('mmdet::cascade_rcnn/cascade-rcnn_r18_*'))
    keys = {'.'.join(map(str, one.key)) for one in left}
    assert 'model.roi_head.bbox_head.2' in keys
    assert 'model.roi_head' not in keys


def test_norms_alone_go_where_norms_were() -> None:
    cfg = read(MASK)
    changes, left = apply_norm(cfg, 'keep', 'GN')
    assert {change.key[1] for change in changes} == {'backbone'}
    why = {'.'.join(map(str, one.key)): one.why for one in left}
    assert 'its key gives it one' in why['model.neck']


def test_a_norm_cfg_that_builds_no_norm_is_not_written():
    """The norms in Mask2Former's head are those of its pixel decoder."""
    cfg = read('mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-*')
    before = cfg.model.to_dict()
    changes, _ = apply_norm(cfg, norm='GN', parts=['heads'])
    assert changes == []
    assert cfg.model.to_dict() == before


def test_only_layers_that_are_asked_for_say_something(monkeypatch):
    said = []
    monkeypatch.setattr(bcn, '_report_fallback', lambda *of: said.append(of))
    apply_norm(read(FAST), norm='GN')
    assert said == []


def test_a_group_has_more_than_one_value_on_a_map_of_one_pixel():
    """Behind its pooling pyramid 32 channels meet one pixel."""
    cfg = read(FAST)
    _, left = apply_norm(cfg, norm='GN')
    # Its own are separable in depth.
    why = 'model.decode_head: builds no convolution from conv_cfg'
    assert why in map(str, left)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model).train()
    assert all(
        layer.num_groups < layer.num_channels
        for layer in model.modules()
        if isinstance(layer, nn.GroupNorm)
    )
    model.extract_feat(torch.randn(1, 3, 64, 64))
    deeplab = 'mmseg::deeplabv3/deeplabv3_r18b-d8_*-512x1024.py'
    for name, norm, groups in ((FAST, 'BCN', 32), (deeplab, 'GN', 128)):
        with pytest.raises(
            ConfigError,
            match=f'num_groups={groups}: .* maps of one pixel.* at most '
            f'{groups // 2}',
        ):
            apply_norm(
                read(name),
                'keep',
                dict(type=norm, num_groups=groups),
                ['heads'] if norm == 'GN' else None,
            )


def test_groups_that_were_not_asked_for_are_not_judged() -> None:
    cfg = read('mmseg::deeplabv3/deeplabv3_r18b-d8_*-512x1024.py')
    cfg.model.decode_head.norm_cfg = dict(type='GN', num_groups=128)
    norm = dict(type='GN', num_groups=32)
    apply_norm(cfg, norm=norm, parts=['backbone'])
    assert cfg.model.backbone.norm_cfg == norm
    assert cfg.model.decode_head.norm_cfg.num_groups == 128


def test_weights_of_the_same_layers_are_kept():
    cfg = read('mmdet::gn+ws/mask-rcnn_r50_fpn_gn-ws-all_2x_coco.py')
    changes, _ = apply_norm(cfg, norm='GN')
    assert {c.key[-1] for c in changes} == {'conv_cfg'}
    changes, _ = apply_norm(cfg, norm='BCN')
    assert cfg.model.backbone.init_cfg is None


def test_a_type_that_nothing_imports_is_named() -> None:
    cfg = read(MASK)
    cfg.model.neck.type = 'MyFPN'
    match = (
        r"Import the module that registers model\.neck\.type = 'MyFPN': "
        r"custom_imports=dict\(imports=\['MODULE'\]\)"
    )
    with pytest.raises(ConfigError, match=match):
        apply_norm(cfg)


@pytest.mark.parametrize(
    ('key', 'value', 'note'),
    [
        ('auto_scale_lr', dict(base_batch_size=16), '0.02 is for 16 images'),
        ('auto_scale_lr', None, ''),
        ('optim_wrapper', None, ''),
        ('optim_wrapper.accumulative_counts', '2', ''),
    ],
)
def test_what_the_learning_rate_is_for_is_noted(key, value, note) -> None:
    cfg = read(MASK)
    cfg.merge_from_dict({key: value})
    changes, left = apply_norm(cfg, parts=['neck'])
    assert changes
    said = ' '.join(map(str, left))
    assert (note in said) if note else ('images in one step' not in said)
    _, left = apply_norm(cfg, parts=['neck'])  # nothing changes
    assert 'images in one step' not in ' '.join(map(str, left))


class Lacking(nn.Module):
    """A part whose package is not installed."""

    def __init__(self, conv_cfg=None, norm_cfg=None, **more):
        raise ImportError('no module named extra')


def test_other_parts_are_converted_where_a_package_is_missing(monkeypatch):
    from mmdet.registry import MODELS

    monkeypatch.setitem(MODELS._module_dict, 'Lacking', Lacking)
    cfg = read(MASK)
    norm = dict(type='BN')
    cfg.model.rpn_head = dict(type='Lacking', norm_cfg=norm)
    changes, left = apply_norm(cfg)
    for key in ('backbone', 'neck'):
        assert {f'model.{key}.conv_cfg', f'model.{key}.norm_cfg'} <= set(
            by_key(changes)
        )
    assert cfg.model.rpn_head == dict(type='Lacking', norm_cfg=norm)
    why = {'.'.join(map(str, one.key)): one.why for one in left}
    assert why['model'].startswith('each changed part was built alone')
    stays = 'stays as it is: ImportError: no module named extra'
    assert why['model.rpn_head'] == stays


def test_parts_of_a_part_that_does_not_build_are_fitted(monkeypatch):
    from mmdet.registry import MODELS

    monkeypatch.setitem(MODELS._module_dict, 'Lacking', Lacking)
    cfg = read('mmdet::soft_teacher/*_180k_semi-0.1-coco.py')
    cfg.model.detector.rpn_head = dict(type='Lacking')
    cfg.model.detector.backbone.base_channels = 32
    apply_norm(cfg, norm='GN')
    for part, groups in (('backbone', 16), ('neck', 32)):
        assert cfg.model.detector[part].conv_cfg == WS
        norm_cfg = dict(type='GN', num_groups=groups)
        assert cfg.model.detector[part].norm_cfg == norm_cfg


def test_a_tracker_without_its_package_is_no_part_to_convert(monkeypatch):
    monkeypatch.setattr('mmdet.models.trackers.byte_tracker.lap', None)
    name = 'mmdet::bytetrack/*_x_8xb4-80e_*_test-mot20test.py'
    cfg = read(name)
    cfg.model.detector = read(MASK).model
    block = dict(type='NonLocal2d', norm_cfg=dict(type='BN'))
    plugins = [dict(cfg=block, position='after_conv3')]
    cfg.model.detector.backbone.plugins = plugins
    _, left = apply_norm(cfg)
    backbone = cfg.model.detector.backbone
    assert backbone.norm_cfg == backbone.plugins[0].cfg.norm_cfg == BCN
    assert 'lap is not installed' in ' '.join(map(str, left))
    # There is nothing to build alone.
    with pytest.raises(ConfigError, match='as it is: .*lap is not installed'):
        apply_norm(read(name), 'keep', 'keep')


def test_maps_are_measured_in_a_tracker_without_its_package(monkeypatch):
    monkeypatch.setattr('mmdet.models.trackers.byte_tracker.lap', None)
    cfg = read('mmdet::bytetrack/*_x_8xb4-80e_*_test-mot20test.py')
    cfg.model.detector = read(RETINA).model
    apply_norm(cfg)
    assert cfg.model.detector.backbone.norm_cfg == BCN
    assert cfg.model.detector.bbox_head.norm_cfg == dict(
        type='GN', num_groups=32
    )


def test_hooks_and_checkpoints_of_the_config(tmp_path):
    cfg = read(MASK)
    cfg.custom_hooks = [dict(type='NumClassCheckHook')]
    cfg.load_from = 'somewhere.pth'
    apply_norm(cfg, norm=dict(type='BCN', mode='estimate'))
    assert cfg.custom_hooks == [dict(type='NumClassCheckHook'), HOOK]
    assert cfg.load_from is None
    # Statistics of the batch need no hook.
    cfg = read(MASK)
    apply_norm(cfg, norm=dict(type='BCN', mode='sync_batch'))
    assert 'custom_hooks' not in cfg


def test_the_hook_is_added_once_and_weights_of_a_list_are_dropped() -> None:
    cfg = read(MASK)
    own = dict(type='ws_mm.SyncEstimatesHook', priority='LOW')
    cfg.custom_hooks = [own]
    weights = cfg.model.backbone.init_cfg.to_dict()
    kaiming = dict(type='Kaiming', layer='Conv2d')
    cfg.model.backbone.init_cfg = [weights, kaiming]
    cfg.model.neck.init_cfg = kaiming
    apply_norm(cfg)
    assert cfg.custom_hooks == [own]
    assert cfg.model.backbone.init_cfg is None
    assert cfg.model.neck.init_cfg == kaiming


def test_a_teacher_in_a_config_of_its_own_is_named() -> None:
    cfg = read('mmdet::ld/ld_r18-gflv1-r101_fpn_1x_coco.py')
    teacher = str(find('mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py'))
    # No weights are looked for.
    cfg.model.update(teacher_config=teacher, teacher_ckpt='gone.pth')
    changes, left = apply_norm(cfg)
    assert 'model.backbone.norm_cfg' in by_key(changes)
    said = [str(one) for one in left]
    why = f'{teacher} is a config of its own: convert that'
    assert f'model.teacher_config: {why}' in said
    assert cfg.model.teacher_ckpt == 'gone.pth'


def test_one_part_may_be_named_without_a_list():
    found = []
    # Named twice, it is one part all the same.
    for parts in ('backbone', ['backbone'], ['backbone', 'model.backbone']):
        cfg = read(PIDNET)
        _, left = apply_norm(cfg, parts=parts)
        assert left
        found.append((cfg.to_dict(), list(map(str, left))))
    assert found[0] == found[1] == found[2]
    assert found[0][0] != read(PIDNET).to_dict()


def test_keys_may_be_written_from_the_top_of_the_config() -> None:
    found = []
    # Asked for by its key, a head that levels share gets the norm itself.
    for parts in (['bbox_head', 'neck'], ['model.bbox_head', 'model.neck']):
        cfg = read(RETINA)
        apply_norm(cfg, parts=parts)
        found.append(cfg.to_dict())
    assert found[0] == found[1]
    assert found[0]['model']['bbox_head']['norm_cfg'] == BCN


def test_a_teacher_gets_the_estimates_of_its_student():
    cfg = read('mmdet::soft_teacher/*_180k_semi-0.01-*')
    assert [hook.type for hook in cfg.custom_hooks] == ['MeanTeacherHook']
    apply_norm(cfg)
    assert cfg.custom_hooks[0].skip_buffer is False
    assert cfg.custom_hooks[1] == HOOK
    cfg = read('mmdet::soft_teacher/*_180k_semi-0.01-*')
    apply_norm(cfg, norm='GN')
    assert 'skip_buffer' not in cfg.custom_hooks[0]


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        ('mmdet::soft_teacher/*_180k_semi-0.01-*', 'SemiBaseDetector'),
        ('mmdet::bytetrack/*_x_8xb4-80e_*_test-mot20test.py', 'ByteTrack'),
    ],
)
def test_a_detector_in_another_is_measured(name, kind):
    cfg = read(name)
    cfg.model.type = kind
    if kind == 'ByteTrack':  # its own tracker needs the package lap
        cfg.model.tracker = dict(type='QuasiDenseTracker')
    cfg.model.detector = read(RETINA).model
    apply_norm(cfg)
    norm_cfg = cfg.model.detector.bbox_head.norm_cfg
    assert norm_cfg == dict(type='GN', num_groups=32)
    assert build(cfg)


def test_what_a_detector_in_another_reads_itself_stays_plain() -> None:
    cfg = read('mmdet::soft_teacher/*_180k_semi-0.01-*')
    cfg.model.type = 'SemiBaseDetector'
    cfg.model.detector = read('mmdet::tood/tood_r50_fpn_1x_coco.py').model
    apply_norm(cfg, norm='GN', parts=['detector.bbox_head'])
    assert 'conv_cfg' not in cfg.model.detector.bbox_head


# As the pure Python configs of mmdet: types are classes. One of the modules
# has the name of a function that its package exports.
PURE = """
from mmdet.models.backbones.resnet import ResNet
from mmdet.models.data_preprocessors.data_preprocessor import (
    DetDataPreprocessor)
from mmdet.models.dense_heads.retina_head import RetinaHead
from mmdet.models.detectors.retinanet import RetinaNet
from mmdet.models.losses.focal_loss import FocalLoss
from mmdet.models.losses.smooth_l1_loss import L1Loss
from mmdet.models.necks.fpn import FPN
from mmdet.models.task_modules.coders.delta_xywh_bbox_coder import (
    DeltaXYWHBBoxCoder)
from mmdet.models.task_modules.prior_generators.anchor_generator import (
    AnchorGenerator)

default_scope = SCOPE
model = dict(
    type=RetinaNet,
    data_preprocessor=dict(type=DetDataPreprocessor),
    backbone=dict(
        type=ResNet, depth=18, base_channels=8, stem_channels=8,
        norm_cfg=dict(type='BN')),
    neck=dict(
        type=FPN, in_channels=[8, 16, 32, 64], out_channels=16, num_outs=5),
    bbox_head=dict(
        type=RetinaHead, num_classes=3, in_channels=16, feat_channels=16,
        norm_cfg=dict(type='BN'),
        anchor_generator=dict(
            type=AnchorGenerator, octave_base_scale=4, scales_per_octave=3,
            ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128]),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder),
        loss_cls=dict(type=FocalLoss), loss_bbox=dict(type=L1Loss)))
"""


@pytest.mark.parametrize('scope', [None, 'mmdet'])
def test_a_pure_python_config_keeps_its_classes(scope, tmp_path):
    path = tmp_path / 'pure.py'
    path.write_text(PURE.replace('SCOPE', repr(scope)))
    cfg = Config.fromfile(path)
    apply_norm(cfg)
    model = MODELS.build(cfg.model)
    assert type(model.backbone.bn1) is ws_mm.BCN
    assert type(model.bbox_head.cls_convs[0].norm) is nn.GroupNorm


def test_a_config_that_fails_is_left_as_it_was():
    cfg = read(MASK)
    before = cfg.to_dict()
    with pytest.raises(ConfigError, match="must be one of 'WSConv2d'"):
        apply_norm(cfg, conv='WSConv')
    # The beginning of a name is none.
    match = "'roi_head.mask' selects nothing: .* roi_head.mask_head"
    with pytest.raises(ConfigError, match=match):
        apply_norm(cfg, parts=['roi_head.mask'])
    for wrong in (0, '16'):
        match = f'images_per_step={wrong!r} must be a whole number'
        with pytest.raises(ConfigError, match=match):
            apply_norm(cfg, images_per_step=wrong)
    cfg.model.neck.out_channels = 'many'
    with pytest.raises(ConfigError, match='does not build as it is'):
        apply_norm(cfg)
    cfg.model.neck.out_channels = 256
    assert cfg.to_dict() == before
