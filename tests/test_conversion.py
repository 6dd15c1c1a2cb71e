"""ws_mm.convert on networks of timm and torchvision."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import relative_error
from networks import (  # noqa: F401
    BOTH,
    batch_norms,
    image,
    kinds,
    log_of_convert,
    randomized,
    trains,
)
from torch import Tensor, nn

from ws_mm import BCN, WSConv2d, bake, check, convert

timm = pytest.importorskip('timm')
torchvision = pytest.importorskip('torchvision')


class Formula(nn.Module):
    """A norm of timm as the BCN that was made of it, written out."""

    def __init__(self, norm: nn.Module, bcn: BCN) -> None:
        super().__init__()
        self.norm, self.groups, self.eps = norm, bcn.num_groups, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        shape = 1, -1, 1, 1
        deviation = (norm.running_var + self.eps).sqrt().view(shape)
        y = (x - norm.running_mean.view(shape)) / deviation
        y = y * norm.weight.view(shape) + norm.bias.view(shape)
        y = F.group_norm(y, self.groups, eps=self.eps)
        for name in ('drop', 'act'):  # of timm's
            y = getattr(norm, name, nn.Identity())(y)
        return y


def written_out(source: nn.Module, new: nn.Module) -> nn.Module:
    """The source with filters and norms by their formulas.

    Its own convolutions pad.
    """
    oracle = copy.deepcopy(source)
    for name, layer in new.named_modules():
        parent, _, key = name.rpartition('.')
        if isinstance(layer, WSConv2d):
            weight = oracle.get_submodule(name).weight
            flat = weight.detach().flatten(1)
            var, mean = torch.var_mean(flat, 1, keepdim=True)
            flat = (flat - mean) / (var.sqrt() + 1e-5)
            weight.data.copy_(flat.view_as(weight))
        elif isinstance(layer, BCN):
            norm = Formula(oracle.get_submodule(name), layer)
            setattr(oracle.get_submodule(parent), key, norm)
    return oracle


def equal(new: nn.Module, oracle: nn.Module, x: Tensor) -> Tensor:
    """Compare outputs and gradients; return the output that is expected."""
    x.requires_grad_()
    expected, actual = oracle(x), new(x)
    assert relative_error(actual, expected) < 1e-10
    cotangent = torch.randn_like(actual)
    (a,) = torch.autograd.grad(actual, x, cotangent)
    (b,) = torch.autograd.grad(expected, x, cotangent)
    assert relative_error(a, b) < 1e-8
    return expected


EFFICIENTNETS = {
    'EfficientNet': lambda: timm.create_model('test_efficientnet'),
    'padded as needed': lambda: timm.create_model(
        'test_efficientnet', pad_type='same'
    ),
    'MobileNetV3': lambda: timm.create_model(
        'mobilenetv3_small_050', num_classes=4, pad_type='same'
    ),
}


@pytest.mark.parametrize('name', EFFICIENTNETS)
def test_networks_with_norm_and_activation_in_one(name: str) -> None:
    source = randomized(EFFICIENTNETS[name]()).double()
    x = image(33, dtype=torch.float64)
    new = convert(source, **BOTH, inputs=x)
    assert not batch_norms(new)
    assert not check(new, x).mistakes
    found, before = kinds(new), kinds(source)
    assert found['BCNAct'] == before['BatchNormAct2d'] > 0
    assert found['WSConv2dSame'] == before['Conv2dSame']
    assert (before['Conv2dSame'] > 0) == (name != 'EfficientNet')
    # Activations are those of the source, and so are the names.
    acts = {'ReLU', 'SiLU', 'Swish', 'Hardswish', 'HardswishMe', 'Identity'}
    assert all(found[act] == before[act] for act in acts)
    own = {'weight', 'bias', 'running_mean', 'running_var', 'bn_weight'}
    assert {k for k in new.state_dict() if k.rpartition('.')[2] in own} >= {
        k for k in source.state_dict() if 'num_batches' not in k
    }
    oracle = written_out(source, new)
    expected = equal(new, oracle, x)
    # Baked, it is the network of timm again; folded, it needs no ws_mm.
    baked = bake(new)
    assert kinds(baked)['Conv2dSame'] == before['Conv2dSame']
    assert relative_error(baked(x), expected) < 1e-10
    folded = bake(new, x.detach(), fold_estimates=True)
    assert relative_error(folded(x), expected) < 1e-10
    modules = {type(module).__module__ for module in folded.modules()}
    assert not any(module.startswith('ws_mm') for module in modules)
    trains(new.float(), lambda model: model(image(33)))


def test_padding_of_mmcv() -> None:
    bricks = pytest.importorskip('mmcv.cnn')
    layers = dict(
        conv_cfg=dict(type='Conv2dAdaptivePadding'), norm_cfg=dict(type='BN')
    )
    source = [
        bricks.ConvModule(3, 8, (3, 3), 2, **layers),
        bricks.ConvModule(3, 8, (5, 2), (3, 1), dilation=(1, 2), **layers),
        # Filters that strides leap over need padding at few sizes.
        bricks.ConvModule(3, 8, (2, 3), (3, 4), **layers),
    ]
    for block in source:
        block = randomized(block).double()
        x = torch.randn(1, 3, 12, 17, dtype=torch.float64)
        new = convert(block, **BOTH, inputs=x)
        assert kinds(new)['WSConv2dSame'] == 1
        oracle = copy.deepcopy(block)
        flat = oracle.conv.weight.data.flatten(1)
        var, mean = torch.var_mean(flat, 1, keepdim=True)
        flat.sub_(mean).div_(var.sqrt() + 1e-5)
        oracle.bn = Formula(oracle.bn, new.bn)
        assert relative_error(new(x), oracle(x)) < 1e-12
        assert kinds(bake(new))['Conv2dAdaptivePadding'] == 1


class HoldingConv2d(nn.Conv2d):
    """A convolution that holds its norm and its activation."""

    def __init__(
        self, *args: Any, norm: Any = None, activation: Any = None, **more: Any
    ) -> None:
        super().__init__(*args, **more)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for function in (self.norm, self.activation):
            x = x if function is None else function(x)
        return x


class LeakyFirst(HoldingConv2d):
    """Another order, which is no contract that convert knows."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.activation(nn.Conv2d.forward(self, x)))


def holding(conv: Any) -> nn.Module:
    """A network of such convolutions, of which the last has no norm."""
    return nn.Sequential(
        conv(3, 8, 3, bias=False, norm=nn.BatchNorm2d(8), activation=F.relu),
        conv(8, 8, 3, groups=2, norm=nn.BatchNorm2d(8), activation=nn.SiLU()),
        conv(8, 8, 1, activation=F.relu),
        nn.BatchNorm2d(8),
        conv(8, 8, 1, activation=torch.tanh),
        nn.BatchNorm2d(8),
        conv(8, 4, 1),
    )


@pytest.mark.parametrize('host', ['here', 'detectron2'])
def test_convolutions_that_hold_their_norm(host: str) -> None:
    kind: Any = HoldingConv2d
    if host == 'detectron2':
        kind = pytest.importorskip('detectron2.layers').Conv2d
    source = randomized(holding(kind)).double()
    x = image(33, dtype=torch.float64)
    new = convert(source, **BOTH, inputs=x)
    # The norm behind tanh does not take the scale out of its convolution.
    standardized = [f'{i}' for i in (0, 1, 2)]
    assert kinds(new)['WSConv2dNormAct'] == 3
    assert kinds(new)['BCN'] == 4
    report = check(new, x)
    assert not report.mistakes
    assert [conv.name for conv in report if conv.standardized] == standardized
    assert all(conv.how == 'proven' for conv in report)
    for found in (report, check(new)):
        norms = [conv.norms for conv in found]
        assert norms[:3] == [('0.norm',), ('1.norm',), ('3',)]
    oracle = written_out(source, new)
    expected = equal(new, oracle, x)
    baked = bake(new)
    assert kinds(baked)[kind.__name__] == 5
    assert relative_error(baked(x), expected) < 1e-10
    again = pickle.loads(pickle.dumps(new))
    assert relative_error(again(x), expected) < 1e-10
    trains(new.float(), lambda model: model(image(33)))


def test_folding_into_a_convolution_that_holds_its_norm() -> None:
    source = randomized(holding(HoldingConv2d)[:2]).double()
    x = image(33, dtype=torch.float64)
    new = convert(source, **BOTH, inputs=x)
    folded = bake(new, x, fold_estimates=True)
    assert kinds(folded)['HoldingConv2d'] == kinds(folded)['GroupNorm'] == 2
    assert relative_error(folded(x), new(x)) < 1e-10


@pytest.mark.parametrize('norm', ['BN', 'GN', 'FrozenBN', 'SyncBN'])
def test_a_network_of_detectron2(norm: str) -> None:
    pytest.importorskip('detectron2')
    from detectron2.modeling.backbone.fpn import FPN
    from detectron2.modeling.backbone.resnet import BasicStem, ResNet

    maps = ['res2', 'res3', 'res4', 'res5']
    stages = ResNet.make_default_stages(18, norm=norm)
    resnet = ResNet(BasicStem(norm=norm), stages, out_features=maps)
    source = FPN(resnet, maps, 64, norm='GN')
    x = torch.randn(1, 3, 64, 96)
    new = convert(source, **BOTH, inputs=x).eval()
    assert kinds(new)['WSConv2dNormAct'] == kinds(new)['BCN'] == 28
    assert not check(new, x).mistakes
    folded = bake(new, x, fold_estimates=True)
    modules = {type(module).__module__ for module in folded.modules()}
    assert not any(module.startswith('ws_mm') for module in modules)
    expected, found = new(x), folded(x)
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-4
    trains(new, lambda model: model(x))


def test_another_order_within_a_convolution_stays(said: list[str]) -> None:
    norm = nn.BatchNorm2d(8)
    source = nn.Sequential(
        LeakyFirst(3, 8, 3, norm=norm, activation=F.leaky_relu),
        HoldingConv2d(8, 8, 3, norm=nn.BatchNorm2d(8)),
    )
    new = convert(source, **BOTH, inputs=image())
    assert type(new[0]) is LeakyFirst
    assert type(new[1]) is not HoldingConv2d
    assert 'LeakyFirst is more than its torch namesake: 1 layer (0)' in said[0]


def test_a_converted_network_is_copied_pickled_and_loaded() -> None:
    source = EFFICIENTNETS['padded as needed']()
    x = image()
    new = convert(source, **BOTH, inputs=x)
    trains(new, lambda model: model(x))
    expected = new.eval()(x)
    assert torch.equal(copy.deepcopy(new)(x), expected)
    loaded = pickle.loads(pickle.dumps(new))
    assert torch.equal(loaded(x), expected)
    assert {*map(type, loaded.modules())} == {*map(type, new.modules())}
    again = convert(EFFICIENTNETS['padded as needed'](), **BOTH, inputs=x)
    again.load_state_dict(new.state_dict())
    assert torch.equal(again.eval()(x), expected)


def split_batch_norm() -> nn.Module:
    return timm.layers.convert_splitbn_model(timm.create_model('test_resnet'))


@pytest.mark.parametrize(
    ('build', 'why'),
    [
        (
            lambda: timm.create_model('test_efficientnet_evos'),
            'nothing to convert.*EvoNorm2dS0 is no BatchNorm or GroupNorm',
        ),
        (
            lambda: timm.create_model('test_efficientnet_ln'),
            'nothing to convert.*LayerNormAct2d is no BatchNorm or GroupNorm',
        ),
        (
            lambda: timm.layers.EvoNorm2dB0(3),
            'cannot convert: EvoNorm2dB0 is no BatchNorm or GroupNorm',
        ),
        (
            split_batch_norm,
            r'cannot convert: SplitBatchNorm2d has layers of its own '
            r'\(aux_bn\).*Leave these layers as they are: skip=\[',
        ),
    ],
)
def test_other_norms_are_rejected_by_name(
    build: Callable[[], nn.Module], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        convert(build(), norm={}, inputs=image())


def bit() -> nn.Module:
    """A BiT of timm, two blocks of few channels."""
    layers = timm.layers
    return timm.models.resnetv2.ResNetV2(
        layers=[1, 1],
        channels=[32, 64],
        stem_chs=8,
        num_classes=4,
        stem_type='fixed',
        conv_layer=layers.StdConv2d,
        norm_layer=lambda *args, **kwargs: layers.GroupNormAct(
            *args, **{**kwargs, 'num_groups': 4}
        ),
    )


def hybrid() -> nn.Module:
    return timm.create_model(
        'vit_tiny_r_s16_p8_224', img_size=32, depth=1, num_classes=4
    )


@pytest.mark.parametrize('build', [bit, hybrid])
def test_networks_that_standardize_by_themselves(
    build: Callable[[], nn.Module], said: list[str]
) -> None:
    source = randomized(build()).double()
    x = image(dtype=torch.float64)
    with pytest.raises(ValueError, match=r'StdConv2d\w* standardizes its fil'):
        convert(source, {}, inputs=x)
    before = kinds(source)
    for options in (dict(norm={}), BOTH):
        new = convert(source, **options, inputs=x)
        found = kinds(new)
        assert found['BCNAct'] == before['GroupNormAct'] > 0
        for kind in ('StdConv2d', 'StdConv2dSame', 'LayerNorm', 'WSConv2d'):
            assert found[kind] == before[kind]
        # Of a GroupNorm alone, the BCN is the same function.
        assert relative_error(new(x), source(x)) < 1e-4
    assert ('LayerNorm is no BatchNorm' in said[0]) == (build is hybrid)
    trains(new.float(), lambda model: model(image()))


@pytest.mark.parametrize('kind', ['ConvWS2d', 'ConvAWS2d'])
def test_convolutions_of_mmcv_that_standardize(kind: str) -> None:
    conv = getattr(pytest.importorskip('mmcv.cnn'), kind)(3, 8, 3)
    model = nn.Sequential(conv, nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match=f'{kind} standardizes its filters'):
        convert(model, {}, inputs=image())


def densenet() -> nn.Module:
    return torchvision.models.DenseNet(8, (2, 2), 16, num_classes=4)


@pytest.mark.parametrize(
    'build', [densenet, lambda: timm.create_model('test_resnet')]
)
def test_no_batch_norm_stays_behind(build: Callable[[], nn.Module]) -> None:
    source, x = randomized(build()), image(64)
    convs = sum(isinstance(m, nn.Conv2d) for m in source.modules())
    norms = len(batch_norms(source))
    for options in (dict(norm={}), BOTH):
        new = convert(source, **options, inputs=x)
        assert sum(isinstance(m, BCN) for m in new.modules()) == norms
        trains(new, lambda model: model(x))
    new = convert(source, {}, inputs=x)
    assert len(batch_norms(new)) == norms
    # In DenseNet all but the last of each block is read by several norms.
    assert kinds(new)['WSConv2d'] == convs
    assert not check(new, x).mistakes


def fcos() -> nn.Module:
    """FCOS as people fine-tune it: its backbone's norms are frozen."""
    detection = torchvision.models.detection
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name='resnet18', weights=None
    )
    return detection.FCOS(backbone, 2, min_size=32, max_size=32)


def test_a_detector_of_torchvision(said: list[str]) -> None:
    model = randomized(fcos()).double()
    pixels = torch.rand(3, 32, 32, dtype=torch.float64)

    def run(model: nn.Module) -> Any:
        if not model.training:
            return model([pixels])
        boxes = torch.tensor([[4.0, 4.0, 30.0, 30.0]], dtype=torch.float64)
        target = dict(boxes=boxes, labels=torch.ones(1).long())
        return model([pixels], [target])

    def head(model: nn.Module) -> Tensor:
        levels = [torch.ones(1, 256, 8, 8), torch.ones(1, 256, 4, 4)]
        levels = [level.cumsum(2).double() for level in levels]
        return torch.cat([t.flatten() for t in model.head(levels).values()])

    source = kinds(model)
    assert source['GroupNorm'] == 8
    assert source['FrozenBatchNorm2d'] == 20
    new = convert(model, **BOTH, inputs=run)
    found = kinds(new)
    assert found['BCN'] == 28
    assert found['WSConv2d'] == 28
    assert not batch_norms(new)
    assert not check(new, run).mistakes
    bn, bcn = model.backbone.body.bn1, new.backbone.body.bn1
    y = torch.randn(1, 64, 4, 4, dtype=torch.float64)
    inner = F.batch_norm(
        y, bcn.running_mean, bcn.running_var, bcn.bn_weight, bcn.bn_bias,
        eps=bcn.eps,
    )  # fmt: skip
    assert relative_error(inner, bn(y)) < 1e-12
    assert bcn.bn_weight.requires_grad
    assert 'one estimate for maps of several sizes: 8 layers' in said[0]
    trains(new, run)
    new = convert(model, norm={}, parts=['head'])
    assert len(batch_norms(new)) == 20
    assert relative_error(head(new), head(model)) < 1e-4
    # Frozen, a norm takes no scale out of a filter.
    with pytest.raises(ValueError, match=r'nothing.*FrozenBatch.*norm={}'):
        convert(model, {}, inputs=run, parts=['backbone'])


def test_a_frozen_norm_of_eps_zero_gives_no_nan() -> None:
    # torchvision sets it for the weights that were trained so.
    frozen = torchvision.ops.misc.FrozenBatchNorm2d(8, eps=0.0)
    new = convert(nn.Sequential(frozen), norm={})
    assert new(torch.zeros(1, 8, 4, 4)).isfinite().all()
