"""ws_mm.convert on networks of timm, torchvision, mmseg and mmdet."""

import copy
import importlib
import pickle
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import relative_error
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from ws_mm import BCN, WSConv2d, bake, check, conversion, convert

timm = pytest.importorskip('timm')
torchvision = pytest.importorskip('torchvision')
BOTH = dict(conv={}, norm={})


@torch.no_grad()
def randomized(model: nn.Module) -> nn.Module:
    """A network with the norms of a trained one, in eval mode."""
    for module in model.modules():
        if not conversion._looks_like_norm(module):
            continue
        for name, values in module.named_parameters(recurse=False):
            values.copy_(torch.randn(values.shape))
            if name == 'weight':
                values.add_(values.sign() * 0.3)
        for values in module.buffers(recurse=False):
            if values.is_floating_point():
                values.copy_(torch.rand(values.shape) + 0.2)
    return model.eval()


def image(size: int = 32, **options: Any) -> Tensor:
    return torch.randn(1, 3, size, size, **options)


def kinds(model: nn.Module) -> Counter:
    return Counter(type(module).__name__ for module in model.modules())


def batch_norms(model: nn.Module) -> list[str]:
    """Names of what still wants a batch."""
    return [
        name
        for name, module in model.named_modules()
        if {'running_mean', 'running_var'} <= module._buffers.keys()
        and not isinstance(module, BCN)
    ]


def tensors_of(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors_of(value)]


def trains(model: nn.Module, run: Callable[[nn.Module], Any]) -> None:
    """One step of one image, with random cotangents; all is finite."""
    model.train()
    outputs = [t for t in tensors_of(run(model)) if t.requires_grad]
    assert outputs
    torch.autograd.backward(outputs, [torch.randn_like(t) for t in outputs])
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(t.isfinite().all() for t in (*outputs, *grads))
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the lines that convert logs."""
    lines: list[str] = []
    monkeypatch.setattr(
        conversion, 'print_log', lambda line, **_: lines.append(line)
    )
    return lines


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
        return norm.act(norm.drop(y))


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
    x.requires_grad_()
    expected, actual = oracle(x), new(x)
    assert relative_error(actual, expected) < 1e-10
    cotangent = torch.randn_like(actual)
    (a,) = torch.autograd.grad(actual, x, cotangent)
    (b,) = torch.autograd.grad(expected, x, cotangent)
    assert relative_error(a, b) < 1e-8
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
        oracle.bn.norm.drop = oracle.bn.norm.act = nn.Identity()
        assert relative_error(new(x), oracle(x)) < 1e-12
        assert kinds(bake(new))['Conv2dAdaptivePadding'] == 1


def test_a_converted_network_is_copied_pickled_and_loaded() -> None:
    source = EFFICIENTNETS['padded as needed']()
    x = image()
    new = convert(source, **BOTH, inputs=x)
    trains(new, lambda model: model(x))
    expected = new.eval()(x)
    assert torch.equal(copy.deepcopy(new)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(new))(x), expected)
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


def host_model(host: str, pattern: str) -> nn.Module:
    """A network of a config that mmdet or mmseg ships, as it is built."""
    pytest.importorskip(f'{host}.models', exc_type=ImportError)
    package = importlib.import_module(host)
    configs = Path(package.__file__).parent / '.mim/configs'
    path = min(configs.glob(pattern))
    with DefaultScope.overwrite_default_scope(host):
        return MODELS.build(without_weights(Config.fromfile(path).model))


def without_weights(value: Any) -> Any:
    """A model that downloads nothing."""
    if isinstance(value, dict):
        return ConfigDict(
            {
                key: without_weights(inner)
                for key, inner in value.items()
                if key not in ('init_cfg', 'pretrained')
            }
        )
    if isinstance(value, list):
        return [without_weights(inner) for inner in value]
    return value


def all_heads(model: nn.Module) -> list[Any]:
    """Everything that mmseg runs in training, on one image."""
    features = model.extract_feat(image(64))
    heads = [model.decode_head, getattr(model, 'auxiliary_head', None) or []]
    if not isinstance(heads[1], nn.ModuleList):
        heads[1] = [heads[1]] if heads[1] else []
    return [head(features) for head in (heads[0], *heads[1])]


def bcns(model: nn.Module) -> list[BCN]:
    return [module for module in model.modules() if isinstance(module, BCN)]


SEGMENTORS = [
    'pidnet/pidnet-s_*',
    'bisenetv2/bisenetv2_fcn_4xb4-160k*',
    'ddrnet/ddrnet_23-slim_*',
    'erfnet/*.py',
    'stdc/stdc1_4xb12*',
    'cgnet/*512x1024.py',
]


@pytest.mark.parametrize('pattern', SEGMENTORS)
def test_a_segmentor_is_converted_as_it_was_built(
    pattern: str, said: list[str]
) -> None:
    model = host_model('mmseg', pattern)
    norms = len(batch_norms(model))
    new = convert(model, norm={})
    assert len(batch_norms(model)) == norms > 30
    assert not batch_norms(new)
    assert f' {norms} norms are now BCN' in said[0]
    new.init_weights()
    # PIDNet and DDRNet train norms on 1x1 maps, which BN cannot on one image.
    trains(new, all_heads)
    assert all(bcn.running_mean.any() for bcn in bcns(new))


def test_a_segmentor_gets_ws_too(said: list[str]) -> None:
    model = host_model('mmseg', SEGMENTORS[1])
    new = convert(model, **BOTH, inputs=all_heads)
    assert not batch_norms(new)
    assert not check(new, all_heads).mistakes
    assert kinds(new)['WSConv2d'] > 50
    assert 'on 1x1 maps: 2 layers (backbone.' in said[0]
    new.init_weights()
    trains(new, all_heads)


def test_pooled_maps_leave_two_channels_to_a_group(said: list[str]) -> None:
    model = host_model('mmseg', 'fastscnn/*.py')
    options = dict(norm=dict(num_groups=32), inputs=all_heads)
    new = convert(model, **options)
    (name,) = re.findall(r'on 1x1 maps: 1 layer \((\S*)\)', said[0])
    pooled = new.get_submodule(name)
    assert (pooled.num_features, pooled.num_groups) == (32, 16)
    trains(new, all_heads)
    # Of one channel there is nothing to normalize over.
    single = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1))
    both = nn.Sequential(nn.BatchNorm2d(1), single)
    x = image()[:, :1]
    kept = convert(both, norm={}, inputs=x)
    assert [type(kept[0]), type(kept[1][1])] == [BCN, nn.BatchNorm2d]
    assert 'a single channel on 1x1 maps: 1 layer (1.1)' in said[-1]


def test_a_detector_on_the_meta_device() -> None:
    model = host_model('mmdet', 'yolof/yolof_r50-c5_8xb8-1x_coco.py')
    model = model.to('meta')
    norms = len(batch_norms(model))
    inside = len(batch_norms(model.backbone))
    new = convert(model, norm={}, skip=['backbone'])
    assert len(bcns(new)) == norms - inside > 10
    assert len(batch_norms(new)) == inside
    assert all(t.is_meta for t in (*new.parameters(), *new.buffers()))


class Own(nn.Module):
    """A user's own backbone, with norms that no config names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8))
        self.body = timm.create_model('test_resnet', features_only=True)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.stem(x), *self.body(x)[-1:]]


def test_user_defined_backbone() -> None:
    pytest.importorskip('mmseg.models', exc_type=ImportError)
    MODELS.register_module(module=Own, force=True)
    channels = dict(in_channels=8, channels=8, num_classes=2, in_index=0)
    cfg = dict(
        type='EncoderDecoder',
        backbone=dict(type='mmengine.Own'),
        decode_head=dict(type='FCNHead', norm_cfg=dict(type='BN'), **channels),
    )
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg)
    new = convert(model, **BOTH, inputs=all_heads)
    assert not batch_norms(new)
    assert type(new.backbone.stem[0]) is WSConv2d
    assert not check(new, all_heads).mistakes
    trains(new, all_heads)
