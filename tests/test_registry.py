"""A type in a config is enough; nothing of the host changes its meaning."""

import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import ws_mm

NAMES = (
    *('WSConv1d', 'WSConv2d', 'WSConv3d', 'BCN'),
    *('WSConvTranspose1d', 'WSConvTranspose2d', 'WSConvTranspose3d'),
)


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_torch_and_mmengine_alone():
    # The package is called onedl-mmengine or mmengine, and imports OpenCV.
    code = (
        'import sys\n'
        'for name in ("mmcv", "mmdet", "mmseg", "torchvision"):\n'
        '    sys.modules[name] = None\n'
        'import torch, ws_mm\n'
        'print(ws_mm.BCN(64)(torch.zeros(1, 64, 2, 2)).shape)'
    )
    assert 'torch.Size([1, 64, 2, 2])' in run_python(code)


def test_import_without_mmengine_says_what_to_install():
    code = (
        'import sys\n'
        'sys.modules["mmengine"] = None\n'
        'try:\n'
        '    import ws_mm\n'
        'except ImportError as error:\n'
        '    print(error)'
    )
    printed = run_python(code)
    assert "Run: pip install '" in printed
    assert 'mmengine' in printed.split('Run: ')[1]


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_dotted_type_needs_no_import_line(scope):
    pytest.importorskip(scope)
    code = (
        f'from mmengine.registry import DefaultScope\n'
        f'DefaultScope.get_instance("test", scope_name="{scope}")\n'
        f'import {scope}.models\n'
        'from mmcv.cnn import ConvModule\n'
        'print(ConvModule(8, 16, 3, conv_cfg=dict(type="ws_mm.WSConv2d"),\n'
        '                 norm_cfg=dict(type="ws_mm.BCN")))'
    )
    printed = run_python(code)
    assert '(conv): WSConv2d(8, 16' in printed
    assert '(bn): BCN(16, num_groups=8' in printed


def test_short_names_work_with_custom_imports(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text("custom_imports = dict(imports=['ws_mm'])\n")
    Config.fromfile(path)
    for name in NAMES:
        assert MODELS.get(name) is getattr(ws_mm, name)
        assert MODELS.get(f'ws_mm.{name}') is getattr(ws_mm, name)


def test_a_class_of_the_host_with_our_name_is_not_taken_for_ours():
    registry = pytest.importorskip('mmdet.registry').MODELS
    registry.register_module('BCN', module=nn.Identity)
    try:
        with DefaultScope.overwrite_default_scope('mmdet'):
            assert MODELS.get('ws_mm.BCN') is ws_mm.BCN
    finally:
        registry._module_dict.pop('BCN')


def test_mmcv_keeps_its_names():
    bricks = pytest.importorskip('mmcv.cnn.bricks')
    for name in ('ConvWS', 'ConvAWS'):
        assert MODELS.get(name).__module__ == 'mmcv.cnn.bricks.conv_ws'
    assert bricks.is_norm(ws_mm.BCN(8))


def test_host_builders_pass_their_arguments():
    bricks = pytest.importorskip('mmcv.cnn.bricks')
    name, layer = bricks.build_norm_layer(
        dict(
            type='ws_mm.BCN', num_groups=4, momentum=0.3, requires_grad=False
        ),
        16,
        postfix=2,
    )
    assert name == 'bn2'
    assert (layer.num_groups, layer.momentum, layer.eps) == (4, 0.3, 1e-5)
    assert not any(p.requires_grad for p in layer.parameters())
    conv = bricks.build_conv_layer(
        dict(type='ws_mm.WSConv2d', eps_mode='inside'),
        4,
        8,
        3,
        stride=2,
        padding=1,
        bias=False,
    )
    assert isinstance(conv, nn.Conv2d)
    assert conv(torch.randn(1, 4, 8, 8)).shape == (1, 8, 4, 4)
    assert conv.eps_mode == 'inside'
