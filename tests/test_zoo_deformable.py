"""Modulated deformable convolution with standardized filters, in ResNet."""

import copy
import sys
from typing import Any

import pytest
import torch
from comparison import HALF_ON_CPU, relative_error
from mmengine.registry import MODELS
from torch import Tensor, nn

import ws_mm
from ws_mm.zoo import WSModulatedDeformConv2d, WSModulatedDeformConv2dPack

pytest.importorskip('mmcv.ops', exc_type=ImportError)

from host_parts import BCN4, image, resnet, trained
from mmcv import ops
from test_zoo_filters import warnings_of_loading  # noqa: F401

PACK = 'ws_mm.WSModulatedDeformConv2dPack'
DCN = dict(type=PACK, deform_groups=1)
# Blocks of ResNet-50 with the operator.
DEFORMED = 4 + 6 + 3
EXACT = 1e-12
GEOMETRY = [
    dict(padding=1),
    dict(stride=2, padding=1, groups=2, deform_groups=2),
    dict(padding=(2, 1), dilation=(2, 1), bias=False),
]


@torch.no_grad()
def pack(**options: Any) -> WSModulatedDeformConv2dPack:
    torch.manual_seed(0)
    layer = WSModulatedDeformConv2dPack(4, 6, 3, **options).double()
    for parameter in layer.conv_offset.parameters():
        parameter.normal_(std=0.3)
    return layer


def twin_of(layer: Any, **options: Any) -> nn.Module:
    """Mmcv's, with filters that were standardized by their definition."""
    twin = ops.ModulatedDeformConv2dPack(4, 6, 3, **options).double()
    state = layer.state_dict()
    rows = []
    for row in state['weight']:
        centered = row - row.sum() / row.numel()
        var = (centered**2).sum() / (row.numel() - 1)
        rows.append(centered / (var**0.5 + 1e-5))
    twin.load_state_dict({**state, 'weight': torch.stack(rows)})
    return twin


def maps(number: int = 2) -> Tensor:
    return torch.randn(number, 4, 6, 5, dtype=torch.float64)


@pytest.mark.parametrize('options', GEOMETRY, ids=lambda o: '-'.join(o))
def test_it_is_that_of_mmcv_with_standardized_filters(options):
    layer = pack(**options)
    twin = twin_of(layer, **options)
    x = maps()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [m(i) for m, i in zip((layer, twin), inputs, strict=True)]
    assert relative_error(*outputs) <= EXACT
    direction = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(direction)
    assert relative_error(inputs[0].grad, inputs[1].grad) <= EXACT
    offsets = [m.conv_offset.weight.grad for m in (layer, twin)]
    assert offsets[0].any()
    assert relative_error(*offsets) <= EXACT
    # The gradient of raw filters: that of the standardized ones, projected.
    weight = layer.weight.detach().clone().requires_grad_()
    ws_mm.standardize_weight(weight).backward(twin.weight.grad)
    assert relative_error(layer.weight.grad, weight.grad) <= EXACT
    twin.load_state_dict(layer.state_dict())
    assert relative_error(twin(x), outputs[0]) > 1e-3


def test_the_bare_layer_takes_offset_and_mask():
    layer = pack(padding=1)
    bare = WSModulatedDeformConv2d(4, 6, 3, padding=1).double()
    bare.load_state_dict(layer.state_dict(), strict=False)
    x = maps()
    one, two, mask = layer.conv_offset(x).chunk(3, 1)
    y = bare(x, torch.cat((one, two), 1), mask.sigmoid())
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize('of', ['input', 'filters', 'gradient'])
def test_other_layouts_give_the_same(of):
    layer = pack(padding=1)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(1)
        x = maps().requires_grad_()
        direction = torch.randn(2, 6, 6, 5, dtype=x.dtype)
        layer.zero_grad()
        if of == 'filters':
            layer.to(memory_format=layout)
        if of == 'gradient':
            direction = direction.contiguous(memory_format=layout)
        y = layer(x.contiguous(memory_format=layout) if of == 'input' else x)
        y.backward(direction)
        grads = [p.grad.contiguous() for p in layer.parameters()]
        found.append([y.detach(), x.grad, *grads])
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= EXACT


def test_no_image():
    layer = pack(stride=2, padding=1)
    x = maps(0).requires_grad_()
    y = layer(x)
    assert y.shape == (0, 6, 3, 3)
    y.sum().backward()
    assert all(not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    if dtype == torch.half and not HALF_ON_CPU:
        pytest.skip('no float16 on this CPU')
    layer = pack(padding=1).float()
    x = maps().float()
    with torch.autocast('cpu', dtype):
        y = layer(x)
        y.float().sum().backward()
    assert y.dtype == dtype
    assert relative_error(y.double(), layer.double()(x.double())) < 5e-2
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    layer.to(dtype)
    assert layer(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(deform_groups=3), r'deform_groups=3 must divide in_channels=4'),
        (dict(padding='same'), r"padding='same' must be a number"),
        (dict(eps_mode='in'), r'eps_mode=.in. must be one of'),
    ],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        pack(**options)


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r'Pack .*did you mean .deform_grou'):
        pack(deform_group=2)


def test_without_the_operators_of_mmcv(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmcv.ops', None)
    with pytest.raises(ImportError, match=r'Pack needs .* Install mmcv'):
        pack()


def test_filters_of_other_layers_are_told_apart(said):
    layer = pack()
    standardized = ws_mm.WSConv2d(4, 6, 3).state_dict()
    layer.load_state_dict(standardized, strict=False)
    layer.load_state_dict(layer.state_dict())
    assert not said
    layer.load_state_dict(twin_of(layer).state_dict())
    assert 'does not say' in said[0]


@pytest.mark.parametrize('fold', [False, True])
def test_bake_gives_the_layer_of_mmcv(fold):
    model = nn.Sequential(pack(padding=1), ws_mm.BCN(6, 2)).double().eval()
    nn.init.uniform_(model[1].running_mean)
    x = maps()
    baked = ws_mm.bake(model, x, fold_estimates=fold)
    assert type(baked[0]) is ops.ModulatedDeformConv2dPack
    assert relative_error(baked(x), model(x)) <= EXACT
    twin = ops.ModulatedDeformConv2dPack(4, 6, 3, padding=1).double()
    twin.load_state_dict(baked[0].state_dict())
    assert torch.equal(twin(x), baked[0](x))


def deformed(**options: Any) -> nn.Module:
    """ResNet-50 with the operator in stages 2 to 4, as a config builds it."""
    cfg = dict(
        type='ws_mm.Converted',
        of='mmdet.ResNet',
        conv={},
        depth=50,
        base_channels=8,
        norm_eval=False,
        norm_cfg=BCN4,
        dcn=copy.copy(DCN),
        stage_with_dcn=(False, True, True, True),
    )
    return MODELS.build(cfg | options)


def test_the_host_refuses_conv_cfg_beside_dcn():
    with pytest.raises(AssertionError, match='conv_cfg must be None for DCN'):
        resnet(
            50,
            dcn=copy.copy(DCN),
            stage_with_dcn=(False, True, True, True),
            conv_cfg=dict(type='ws_mm.WSConv2d'),
        )


def test_resnet_with_dcn_is_standardized_by_a_config():
    model = deformed(frozen_stages=1)
    report = ws_mm.check(model, image(64))
    assert not report.mistakes
    kinds = [one.kind for one in report if one.standardized]
    assert kinds.count('WSModulatedDeformConv2dPack') == DEFORMED
    # stem, downsamples, and three of each block but the deformed
    assert kinds.count('WSConv2d') == 1 + 4 + 3 * 16 - DEFORMED
    plain = [one.name for one in report if not one.standardized]
    assert len(plain) == DEFORMED
    assert all(name.endswith('.conv2.conv_offset') for name in plain)
    assert not any(p.requires_grad for p in model.layer1.parameters())
    assert all(p.requires_grad for p in model.layer2.parameters())


def test_resnet_with_dcn_trains_loads_and_is_baked():
    torch.manual_seed(0)
    model = deformed()
    model.init_weights()
    for name, parameter in model.named_parameters():
        if 'conv_offset' in name:  # after the host's own initializer
            assert not parameter.any()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss = sum(y.square().mean() for y in model(image(64)))
        loss.backward()
        optimizer.step()
    moved = model.layer3[0].conv2.conv_offset.weight
    assert moved.any()
    assert all(p.isfinite().all() for p in model.parameters())
    again = deformed()
    again.load_state_dict(model.state_dict())
    model, x = trained(model), image(64)
    again.load_state_dict(model.state_dict())
    again.eval()
    assert all(map(torch.equal, again(x), model(x)))
    baked = ws_mm.bake(model)
    for y, expected in zip(baked(x), model(x), strict=True):
        assert relative_error(y, expected) <= 1e-5
    stock = resnet(
        50,
        norm_cfg=BCN4,
        dcn=dict(type='DCNv2', deform_groups=1),
        stage_with_dcn=(False, True, True, True),
    )
    stock.load_state_dict(baked.state_dict())
    stock.eval()
    for y, expected in zip(stock(x), baked(x), strict=True):
        assert relative_error(y, expected) <= 1e-6


def test_what_cannot_be_standardized_is_named():
    with pytest.raises(TypeError, match=r'did you mean .eps_mode.'):
        deformed(conv=dict(eps_mod='inside'))
    with pytest.raises(ValueError, match='no plain convolution with a norm'):
        deformed(
            dcn=None,
            stage_with_dcn=(False,) * 4,
            conv_cfg=dict(type='ws_mm.WSConv2d'),
        )
    kept = deformed(conv=dict(eps_mode='inside'), norm_cfg=dict(type='BN'))
    assert kept.layer1[0].conv1.eps_mode == 'inside'
    assert isinstance(kept.bn1, nn.BatchNorm2d)
    both = deformed(norm_cfg=dict(type='BN'), norm=BCN4)
    assert isinstance(both.bn1, ws_mm.BCN)
    assert isinstance(both.conv1, ws_mm.WSConv2d)
