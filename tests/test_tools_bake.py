"""check_model.py and bake.py on tiny models of both hosts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import shipped
import torch
from in_process import load, tools  # noqa: F401
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from shipped import write_shipped
from tiny_runs import DET, SEG, without_ws

import ws_mm

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

GN = "type='GN', num_groups=4"
BCN = "type='ws_mm.BCN', num_groups=4"


def write(folder: Path, text: str, extra: str = '') -> tuple[Path, Path]:
    """A config and a random checkpoint of it."""
    config, weights = folder / 'tiny.py', folder / 'tiny.pth'
    config.write_text(text + extra)
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    state = MODELS.build(cfg.model).state_dict()
    for values in state.values():
        if values.is_floating_point():
            values.uniform_(0.1, 0.3)
    meta = dict(dataset_meta=dict(classes=('square',)), epoch=3)
    torch.save(dict(state_dict=state, meta=meta, optimizer={}), weights)
    return config, weights


@pytest.mark.parametrize('text', [DET, SEG], ids=['mmdet', 'mmseg'])
def test_every_convolution_is_listed_and_proven(
    text, script, tmp_path, capsys
):
    config, _ = write(tmp_path, text)
    assert script('check_model', config) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if 'Conv' in line]
    assert sum('WSConv2d' in row for row in rows) >= 20
    assert all(row.endswith('proven') for row in rows)
    assert 'bn1 (BCN)' in out


AUXILIARY = """
model['auxiliary_head'] = dict(
    type='FCNHead',
    in_channels=32,
    in_index=2,
    channels=8,
    num_convs=1,
    num_classes=2,
    conv_cfg=dict(type='ws_mm.WSConv2d'),
)
"""


def test_auxiliary_heads_are_run_too(script, tmp_path, capsys):
    config, _ = write(tmp_path, SEG, AUXILIARY)
    assert script('check_model', config) == 1
    first, second = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith('mistake: ')
    ]
    assert 'auxiliary_head.convs.0.conv' in first
    assert 'auxiliary_head.conv_cat.conv' in second
    assert '(proven)' in first


def test_mistake_is_named_with_its_key(script, tmp_path, capsys):
    bad = 'model["roi_head"]["mask_head"]["conv_cfg"] = conv_cfg\n'
    config, _ = write(tmp_path, DET, bad)
    assert script('check_model', config) == 1
    out = capsys.readouterr().out
    assert 'mistake: roi_head.mask_head.convs.0.conv (WSConv2d)' in out
    assert 'model.roi_head.mask_head.conv_cfg=None' in out


def test_frozen_batch_norms_are_not_called_poor(script, tmp_path, capsys):
    text = without_ws(SEG)
    config, _ = write(tmp_path, text, 'model["backbone"]["norm_eval"]=True\n')
    assert script('check_model', config) == 0
    out = capsys.readouterr().out
    poor, frozen = re.findall(r'^\d+ batch norms.*', out, re.M)
    assert re.match('2 batch norms: decode_head.[^,]*, decode_head.', poor)
    assert frozen.startswith('22 batch norms normalize by their running')
    assert 'wrong here, since the config loads no checkpoint' in frozen
    for line in (
        'load_from = "a.pth"\n',
        'model["backbone"]["init_cfg"] = dict(\n'
        '    type="Pretrained", checkpoint="a.pth")\n',
        'model["pretrained"] = "a.pth"\n',
    ):
        cfg = Config.fromfile(config)
        cfg.merge_from_dict(Config.fromstring(text + line, '.py').to_dict())
        assert load('check_model').loads_weights(cfg)


def test_a_model_that_does_not_run_is_judged_by_names(
    script, tmp_path, capsys
):
    config, _ = write(tmp_path, SEG, MISFIT)
    assert script('check_model', config) == 0
    assert 'judged by names' in capsys.readouterr().out


MISFIT = 'model["decode_head"]["in_channels"] = 5\n'
OWN = [name for name in ws_mm.__all__ if name[0].isupper()]
OWN_HOOKS = [name for name in OWN if name.endswith('Hook')]
EXTRA = f"""
custom_imports = dict(imports=['ws_mm', 'ws_mm.hooks'])
custom_hooks = [dict(type=name) for name in {OWN_HOOKS}]
custom_hooks += [dict(type='ws_mm.SyncEstimatesHook')]
default_hooks['measured'] = dict(type='UpdateEstimatesHook')
model['backbone']['init_cfg'] = [
    dict(type='Kaiming', layer='Conv2d'),
    dict(type='PretrainedGN', checkpoint='none.pth'),
]
load_from = 'elsewhere.pth'
resume = True
"""
WITHOUT_WS_MM = """
import sys, torch
sys.modules['ws_mm'] = None
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
cfg = Config.fromfile(sys.argv[1])
assert not cfg.load_from
init_default_scope(cfg.default_scope)
model = MODELS.build(cfg.model)
weights = torch.load(sys.argv[2], weights_only=True)
assert weights['meta']['dataset_meta'] == dict(classes=('square',))
assert cfg.custom_hooks == []
assert 'rate' not in cfg.default_hooks
assert cfg.model.backbone.init_cfg == [dict(type='Kaiming', layer='Conv2d')]
for text in (weights['meta']['cfg'], open(sys.argv[1]).read()):
    assert not [name for name in sys.argv[4:] if name in text]
assert 'optimizer' not in weights
print(model.load_state_dict(weights['state_dict']))
x = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
torch.save(model.eval().extract_feat(x), sys.argv[3])
"""


@pytest.mark.parametrize(
    ('text', 'norm'),
    [(DET, GN), (SEG, "type='BN'")],
    ids=['mmdet-gn', 'mmseg-bn'],
)
def test_baked_model_needs_no_ws_mm(text, norm, script, tmp_path):
    config, weights = write(tmp_path, text.replace(BCN, norm), EXTRA)
    out = tmp_path / 'baked'
    assert script('bake', config, weights, out) == 0
    assert sorted(p.name for p in out.iterdir()) == ['tiny.pth', 'tiny.py']
    assert Config.fromfile(out / 'tiny.py').resume is False
    command = [sys.executable, '-c', WITHOUT_WS_MM, out / 'tiny.py']
    command += [out / 'tiny.pth', tmp_path / 'features.pt']
    command += ['ws_mm', *OWN]
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': ''}
    subprocess.run([*map(str, command)], check=True, env=env, cwd=tmp_path)
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model).eval()
    model.load_state_dict(torch.load(weights)['state_dict'])
    x = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.extract_feat(x)
    actual = torch.load(tmp_path / 'features.pt')
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


FAMILIES = {
    # Their heads are given a tensor of class weights and defaults.
    'DETR': 'mmdet::detr/detr_r50_8xb2-150e_coco.py',
    'SOLOV2': 'mmdet::solov2/solov2_r50_fpn_1x_coco.py',
    # Their heads want annotations.
    'SPARSE': 'mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
    'YOLACT': 'mmdet::yolact/yolact_r50_1xb8-55e_coco.py',
    # Its head draws random numbers as it predicts.
    'SEGNEXT': 'mmseg::segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-'
    '512x512.py',
    # Their heads want what the head before them computed.
    'OCRNET': 'mmseg::ocrnet/ocrnet_hr18s_4xb2-40k_cityscapes-512x1024.py',
    'POINTREND': 'mmseg::point_rend/pointrend_r50_4xb2-80k_cityscapes-'
    '512x1024.py',
}


def plain_text(node):
    """Return a config with plain convolutions in place of those of ws_mm."""
    if isinstance(node, dict):
        kind = str(node.get('type'))
        if kind.startswith('ws_mm.WSConv'):
            return dict(type='Conv1d') if kind.endswith('1d') else None
        return {key: plain_text(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [plain_text(value) for value in node]
    return node


@pytest.mark.usefixtures('tools')
@pytest.mark.parametrize('family', FAMILIES)
def test_families_are_proven_and_baked(family, script, tmp_path):
    changes = getattr(shipped, family)
    config, weights, model = write_shipped(tmp_path, FAMILIES[family], changes)
    run = load('models').forward_of(Config.fromfile(config), model)
    report = ws_mm.check(model, run)
    assert {conv.how for conv in report if conv.standardized} == {'proven'}
    assert script('bake', config, weights, tmp_path / 'out') == 0
    old, new = (
        Config.fromfile(config),
        Config.fromfile(tmp_path / 'out/tiny.py'),
    )
    # No key that the host wrote into what it was built from.
    assert plain_text(new.to_dict()['model']) == plain_text(
        old.to_dict()['model']
    )


PURE_BASE = """
from mmseg.models import ResNetV1c
from ws_mm import WSConv2d
conv_cfg = dict(type=WSConv2d)
"""
PURE = """
from mmengine.config import read_base
with read_base():
    from .base import *
from mmengine.model import KaimingInit
from mmseg.models import EncoderDecoder, FCNHead, SegDataPreProcessor
from ws_mm import PretrainedGN, UpdateEstimatesHook
from ws_mm.hooks import SyncEstimatesHook
default_scope = 'mmseg'
norm_cfg = dict(type='GN', num_groups=4)
model = dict(
    type=EncoderDecoder,
    data_preprocessor=dict(type=SegDataPreProcessor, size=(64, 64)),
    backbone=dict(
        type=ResNetV1c, depth=18, base_channels=8, stem_channels=8,
        conv_cfg=conv_cfg, norm_cfg=norm_cfg,
        init_cfg=[dict(type=PretrainedGN, checkpoint='none.pth')],
    ),
    decode_head=dict(
        type=FCNHead, in_channels=64, in_index=3, channels=8, num_convs=1,
        num_classes=2, conv_cfg=conv_cfg, norm_cfg=norm_cfg,
    ),
    test_cfg=dict(mode='whole'),
)
custom_hooks = [dict(type=SyncEstimatesHook), dict(type=UpdateEstimatesHook)]
"""


def test_a_pure_python_config_is_baked(script, tmp_path):
    (tmp_path / 'base.py').write_text(PURE_BASE)
    config, weights = write(tmp_path, PURE)
    out = tmp_path / 'out'
    assert script('bake', config, weights, out) == 0
    text = (out / 'tiny.py').read_text()
    assert 'ws_mm' not in text
    assert not [name for name in OWN if name in text]
    cfg = Config.fromfile(out / 'tiny.py')
    new = MODELS.build(cfg.model)
    new.load_state_dict(torch.load(out / 'tiny.pth')['state_dict'])


@pytest.mark.usefixtures('tools')
def test_a_base_of_ws_mm_leaves_no_scope(tmp_path):
    config = tmp_path / 'tiny.py'
    config.write_text(
        "_base_ = 'ws_mm::mask_rcnn/"
        "mask-rcnn_r50_fpn_gn-ws-all_8xb2-2x_coco.py'\n"
    )
    cfg = Config.fromfile(config)
    assert "_scope_='ws_mm'" in cfg.pretty_text
    assert 'ws_mm' not in load('bake').stock_config(cfg).pretty_text


@pytest.mark.usefixtures('tools')
@pytest.mark.parametrize('name', ['ws_mm.CenteredConv2d', 'CenteredConv2d'])
def test_other_filters_are_plain_once_baked(name, tmp_path):
    text = SEG.replace(BCN, GN).replace('ws_mm.WSConv2d', name)
    imports = "custom_imports = dict(imports='ws_mm')\n"
    config, _ = write(tmp_path, text, imports)
    cfg = load('bake').stock_config(Config.fromfile(config))
    assert 'custom_imports' not in cfg
    assert cfg.model.backbone.conv_cfg is None
    assert 'Centered' not in cfg.pretty_text


def test_deformable_convolutions_are_checked_and_baked(script, tmp_path):
    pytest.importorskip('mmcv.ops', exc_type=ImportError)
    dcn = (
        "type='ws_mm.Converted', of='ResNetV1c', conv=dict(eps=1e-6), "
        "dcn=dict(type='ws_mm.WSModulatedDeformConv2dPack', "
        "deform_groups=2, eps=1e-6, eps_mode='inside'), "
        'stage_with_dcn=(False, True, True, True), depth=50'
    )
    text = SEG.replace(BCN, GN).replace('in_channels=64', 'in_channels=256')
    text = text.replace("type='ResNetV1c',\n        depth=18", dcn)
    conv = "        conv_cfg=dict(type='ws_mm.WSConv2d'),\n"
    assert conv in text
    config, weights = write(tmp_path, text.replace(conv, ''))
    assert script('check_model', config) == 0
    out = tmp_path / 'out'
    assert script('bake', config, weights, out) == 0
    text = (out / 'tiny.py').read_text()
    assert 'ws_mm' not in text
    cfg = Config.fromfile(out / 'tiny.py')
    assert cfg.model.backbone.dcn == dict(type='DCNv2', deform_groups=2)
    new = MODELS.build(cfg.model)
    new.load_state_dict(torch.load(out / 'tiny.pth')['state_dict'])


@pytest.mark.usefixtures('tools')
def test_a_part_whose_norms_are_frozen_is_plain_once_baked(tmp_path):
    for kind, kept in (('ERFNet', None), ('ResNetV1c', True)):
        config, _ = write(tmp_path, SEG.replace(BCN, GN))
        cfg = Config.fromfile(config)
        cfg.model.backbone = dict(
            type='ws_mm.Converted', of=kind, norm_eval=True
        )
        stock = load('bake').stock_config(cfg).model.backbone
        assert stock.type == kind
        assert stock.get('norm_eval') is kept


@pytest.mark.usefixtures('tools')
def test_another_layer_of_the_host_is_named(tmp_path):
    config, _ = write(tmp_path, SEG.replace(BCN, GN))
    bake, models = load('bake'), load('models')
    cfg = Config.fromfile(config)
    baked = ws_mm.bake(models.build_model(cfg))
    cfg.model.backbone.strides = (1, 2, 2, 1)
    host = models.build_model(bake.stock_config(cfg))
    match = r'layer4.0.conv1 it has Conv2d\(.*, not Conv2d\(.*stride=\(2, 2\)'
    with pytest.raises(bake.SetupError, match=match):
        bake.load_into(host, baked)


@pytest.mark.usefixtures('tools')
def test_what_one_model_does_not_compute_is_a_difference():
    difference = load('bake').largest_difference
    one = torch.ones(2)
    assert difference([one], [one]) == 0
    assert difference([one, one], [one]) == float('inf')
    assert difference([one], [one, one]) == float('inf')
    assert difference([one], [one.view(2, 1)]) == float('inf')
    assert difference([one], [one * float('nan')]) == float('inf')


def test_a_model_that_does_not_run_is_said(refuses, tmp_path):
    config, weights = write(tmp_path, SEG.replace(BCN, GN), MISFIT)
    out = tmp_path / 'out'
    match = 'EncoderDecoder does not run.*5 channels.*nothing was written'
    refuses(match, 'bake', config, weights, out)
    assert not out.exists()


def test_images_may_have_any_channels(script, tmp_path):
    four = "model['backbone']['in_channels'] = 4\n"
    config, weights = write(tmp_path, DET.replace(BCN, GN), four)
    assert script('bake', config, weights, tmp_path / 'out') == 0


def test_bcn_is_refused(refuses, tmp_path):
    config, weights = write(tmp_path, SEG)
    refuses('BCN .*ONNX', 'bake', config, weights, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_a_norm_of_ws_mm_is_refused(refuses, tmp_path):
    frn = SEG.replace(BCN, "type='ws_mm.FRN'")
    config, weights = write(tmp_path, frn)
    match = r'still needs ws_mm: .*norm_cfg.type = ws_mm.FRN'
    refuses(match, 'bake', config, weights, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_half_matching_checkpoint_is_refused(refuses, tmp_path):
    config, weights = write(tmp_path, SEG.replace(BCN, GN))
    content = torch.load(weights)
    content['state_dict'].pop('backbone.layer1.0.conv1.weight')
    torch.save(content, weights)
    out = tmp_path / 'out'
    refuses('not of this config.*layer1', 'bake', config, weights, out)
    assert not out.exists()


@pytest.mark.parametrize('moved', ['tiny.py', 'tiny.pth'])
def test_inputs_are_not_replaced(moved, refuses, tmp_path):
    config, weights = write(tmp_path, SEG.replace(BCN, GN))
    # In another folder is the one that would not be replaced.
    other = tmp_path / 'other'
    other.mkdir()
    (tmp_path / moved).rename(other / moved)
    config, weights = (
        other / path.name if path.name == moved else path
        for path in (config, weights)
    )
    content = {p: p.read_bytes() for p in (config, weights)}
    refuses('would replace', 'bake', config, weights, tmp_path)
    assert content == {p: p.read_bytes() for p in tmp_path.rglob('tiny.*')}


def test_a_difference_is_refused(refuses, tmp_path, monkeypatch):
    def wrong(model):
        baked = ws_mm.baking.bake(model)
        weight = baked.backbone.layer2[0].conv1.weight
        weight.data = weight.flip(0)
        return baked

    monkeypatch.setattr(ws_mm, 'bake', wrong)
    config, weights = write(tmp_path, SEG.replace(BCN, GN))
    content = torch.load(weights)
    for name, values in content['state_dict'].items():
        if name.endswith('conv1.weight'):
            values.normal_()
    torch.save(content, weights)
    out = tmp_path / 'out'
    refuses('computes something else', 'bake', config, weights, out)
    assert not out.exists()


def test_what_is_left_of_ws_mm_is_named(refuses, tmp_path):
    left = "optim_wrapper['constructor'] = dict(type='ws_mm.Other')\n"
    config, weights = write(tmp_path, SEG.replace(BCN, GN), left)
    message = 'optim_wrapper.constructor.type = ws_mm.Other'
    refuses(message, 'bake', config, weights, tmp_path / 'out')


@pytest.mark.usefixtures('tools')
def test_files_are_written_all_or_none(tmp_path):
    def fails(path):
        Path(path).write_text('half')
        raise OSError('disk is full')

    write_together = load('files').write_together
    writers = {'a': lambda path: Path(path).write_text('1'), 'b': fails}
    for folder in tmp_path, tmp_path / 'new/folder':
        with pytest.raises(OSError, match='full'):
            write_together(folder, writers)
    assert not list(tmp_path.iterdir())
    (tmp_path / 'b').mkdir()
    writers['b'] = writers['a']
    with pytest.raises(load('files').SetupError, match='b is a folder'):
        write_together(tmp_path, writers)
    with (
        pytest.raises(load('files').SetupError, match='b is a folder'),
        load('files').replacing(tmp_path / 'b') as part,
    ):
        part.touch()
    assert [path.name for path in tmp_path.iterdir()] == ['b']
