"""WS transposed convolutions in networks of the hosts."""

import io

import pytest
import reference
import torch
import torch.nn.functional as F
from comparison import disagreements
from torch import Tensor, nn

import ws_mm
from ws_mm import BCN, WSConv2d, WSConvTranspose2d

TYPE = 'ws_mm.WSConvTranspose2d'


def computes(layer: nn.Module, x: Tensor, **options) -> bool:
    """Compare with the transposed convolution of standardized filters."""
    weight = reference.standardize_transposed_weight(
        layer.weight, layer.groups
    )
    bias = None if layer.bias is None else layer.bias.double()
    expected = F.conv_transpose2d(x.double(), weight, bias, **options)
    return not disagreements({'y': layer(x)}, {'y': expected}, 1e-5)


def test_builders_of_mmcv():
    cnn = pytest.importorskip('mmcv.cnn')
    x = torch.randn(2, 4, 5, 6)
    arguments = dict(in_channels=4, out_channels=6, kernel_size=4)
    options = dict(stride=2, padding=1)
    cfg = dict(type=TYPE, groups=2)
    layer = cnn.build_upsample_layer(cfg, **arguments, **options)
    assert type(layer) is WSConvTranspose2d
    assert computes(layer, x, groups=2, **options)
    layer = cnn.build_conv_layer(
        dict(type=WSConvTranspose2d), **arguments, **options
    )
    assert computes(layer, x, **options)
    block = cnn.ConvModule(
        *arguments.values(),
        **options,
        conv_cfg=dict(type=TYPE),
        norm_cfg=dict(type='ws_mm.BCN', num_groups=2),
    )
    assert block.transposed
    assert not block.conv.bias
    assert computes(block.conv, x, **options)
    assert block(x).shape == (2, 6, 10, 12)


@pytest.fixture(scope='module')
def unet() -> nn.Module:
    """MMSegmentation's U-Net with transposed convolutions, of BN."""
    backbones = pytest.importorskip('mmseg.models', exc_type=ImportError)
    torch.manual_seed(0)
    model = backbones.UNet(
        base_channels=4,
        num_stages=2,
        strides=(1, 1),
        enc_num_convs=(1, 1),
        dec_num_convs=(1,),
        downsamples=(True,),
        enc_dilations=(1, 1),
        dec_dilations=(1,),
        upsample_cfg=dict(type='mmseg.DeconvModule'),
    )
    with torch.no_grad():
        for values in model.buffers():
            if values.is_floating_point():
                values.uniform_(0.5, 2)
    model.double().eval()  # whose own train() returns nothing
    return model


def test_a_u_net_is_converted_checked_baked_and_folded(unet):
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    converted = ws_mm.convert(unet, conv={}, norm={'num_groups': 2}, inputs=x)
    kinds = [type(m) for m in converted.modules()]
    assert kinds.count(WSConvTranspose2d) == 1
    assert kinds.count(WSConv2d) == 3
    assert nn.Conv2d not in kinds
    report = ws_mm.check(converted, x)
    assert not report.mistakes
    (row,) = (r for r in report if r.kind == 'WSConvTranspose2d')
    assert row.norm_kinds == ('BCN',)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    expected = converted(x)
    for folded in (False, True):
        baked = ws_mm.bake(converted, x, fold_estimates=folded)
        kinds = {type(m) for m in baked.modules()}
        assert nn.ConvTranspose2d in kinds
        assert not kinds & {WSConv2d, WSConvTranspose2d, *[BCN] * folded}
        for actual, wanted in zip(baked(x), expected, strict=True):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize('groups', [1, 2])
def test_folding_scales_the_filters_of_each_output(groups):
    conv = WSConvTranspose2d(4, 4, 3, groups=groups, dtype=torch.float64)
    model = nn.Sequential(conv, BCN(4, 2, dtype=torch.float64)).eval()
    with torch.no_grad():
        for values in (*model[1].parameters(), *model[1].buffers()):
            values.uniform_(0.5, 2)
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    folded = ws_mm.bake(model, x, fold_estimates=True)
    torch.testing.assert_close(folded(x), model(x))


def test_a_transposed_convolution_without_a_norm_is_a_mistake():
    model = nn.Sequential(WSConvTranspose2d(4, 4, 2), nn.ReLU())
    for inputs in (None, torch.randn(1, 4, 3, 3)):
        (mistake,) = ws_mm.check(model, inputs).mistakes
        assert 'WSConvTranspose2d' in mistake


def test_layout_is_that_of_torch():
    plain = nn.ConvTranspose2d(4, 6, 3, groups=2)
    layer = WSConvTranspose2d(4, 6, 3, groups=2)
    layer.load_state_dict(plain.state_dict())
    own = layer.state_dict()
    assert own.keys() == plain.state_dict().keys()
    plain.load_state_dict(own)
    assert torch.equal(plain.weight, layer.weight)


def test_exported():
    model = nn.Sequential(
        WSConvTranspose2d(4, 4, 2, stride=2, groups=2), BCN(4, 2)
    ).eval()
    x = torch.randn(1, 4, 3, 3)
    program = torch.export.export(model, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    program = torch.export.load(file)
    run = program.module() if hasattr(program, 'module') else program
    torch.testing.assert_close(run(x), model(x))
