"""Tracing, counting and differentiating the layers, as torch and hosts do."""

import copy
import inspect
import warnings

import pytest
import reference
import torch
from comparison import TOLERANCE, disagreements
from mmengine.analysis import get_model_complexity_info
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

import ws_mm
from ws_mm import BCN, WSConv2d, WSConvTranspose2d

MODES = ('estimate', 'batch', 'sync_batch')
CONVS = [
    getattr(ws_mm, f'WSConv{kind}{dims}d')
    for kind in ('', 'Transpose')
    for dims in (1, 2, 3)
]


def pair(**kwargs) -> nn.Sequential:
    """A convolution and a norm whose state is not as built."""
    torch.manual_seed(3)
    model = nn.Sequential(WSConv2d(4, 8, 3, padding=1), BCN(8, 4, **kwargs))
    with torch.no_grad():
        for values in (*model[1].parameters(), *model[1].buffers()):
            values.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize('kind', [*CONVS, BCN])
def test_skip_init(kind):
    arguments = (8,) if kind is BCN else (4, 8, 3)
    layer = nn.utils.skip_init(kind, *arguments, device='cpu')
    expected = kind(*arguments)
    assert layer.state_dict().keys() == expected.state_dict().keys()
    assert all(v.device.type == 'cpu' for v in layer.state_dict().values())
    layer.reset_parameters()
    dims = 4 if kind is BCN else layer.weight.dim()
    channels = 8 if kind is BCN else 4
    assert layer(torch.randn(2, channels, *[4] * (dims - 2))).isfinite().all()


class Named(WSConv2d):
    """A layer of a user, with a signature of its own."""

    def __init__(self, channels: int, device=None) -> None:
        super().__init__(channels, channels, 3, device=device)


class Renamed(Named):
    """Its constructor is that of its base."""


@pytest.mark.parametrize('kind', [Named, Renamed])
def test_skip_init_of_a_subclass(kind):
    assert [*inspect.signature(kind).parameters] == ['channels', 'device']
    layer = nn.utils.skip_init(kind, 4)
    assert layer.weight.shape == (4, 4, 3, 3)
    with pytest.raises(TypeError, match='kernel_size'):
        nn.utils.skip_init(kind, 4, kernel_size=3)


class Doubled(WSConv2d):
    """A layer of a user, with one argument more."""

    def __init__(self, *args, gain: float = 2.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)


def test_arguments_of_a_subclass_are_known_by_name():
    names = [*inspect.signature(nn.Conv2d).parameters, 'gain']
    assert [*inspect.signature(Doubled).parameters] == names
    assert nn.utils.skip_init(Doubled, 4, 4, 1).weight.shape == (4, 4, 1, 1)
    with pytest.raises(TypeError, match=r'Doubled has .*did you mean .gain.'):
        Doubled(4, 4, 1, gian=1.0)


def jvp_oracle(function, inputs: tuple[Tensor, ...], tangents) -> Tensor:
    """By two backward passes, of a formula in float64."""
    _, derivative = torch.autograd.functional.jvp(function, inputs, tangents)
    return derivative


def dual(function, inputs: tuple[Tensor, ...], tangents) -> Tensor:
    with forward_ad.dual_level():
        output = function(*map(forward_ad.make_dual, inputs, tangents))
        return forward_ad.unpack_dual(output).tangent


def functional(function, inputs: tuple[Tensor, ...], tangents) -> Tensor:
    return torch.func.jvp(function, inputs, tangents)[1]


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('derive', [dual, functional])
@pytest.mark.parametrize('eps_mode', ['outside', 'inside'])
def test_forward_derivative_of_filters(kernels, derive, eps_mode):
    inputs = (torch.randn(5, 3, 2, 3, dtype=torch.float64),)
    tangents = (torch.randn_like(inputs[0]),)
    actual, expected = (
        method(lambda w, f=f: f(w, eps_mode=eps_mode), inputs, tangents)
        for method, f in (
            (derive, ws_mm.standardize_weight),
            (jvp_oracle, reference.standardize_weight),
        )
    )
    assert not disagreements(
        {'jvp': actual}, {'jvp': expected}, TOLERANCE[torch.float64]
    )


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('derive', [dual, functional])
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('mode', MODES)
def test_forward_derivative_of_a_norm(kernels, mode, training, derive):
    if training and derive is functional:
        pytest.skip('of BatchNorm either: torch.func lets no buffer change')
    layer = pair(mode=mode)[1].double().train(training)
    names = ['x', *(name for name, _ in layer.named_parameters())]
    state = {k: v.clone().detach() for k, v in layer.state_dict().items()}
    inputs = (
        torch.randn(2, 8, 3, 4, dtype=torch.float64) * 2 + 1,
        *(state[name] for name in names[1:]),
    )
    tangents = tuple(torch.randn_like(x) for x in inputs)

    def ours(x, *affines):
        affines = dict(zip(names[1:], affines, strict=True))
        return torch.func.functional_call(layer, affines, x)

    def oracle(x, *affines):
        affines = dict(zip(names[1:], affines, strict=True))
        return reference.batch_channel_norm(
            x,
            {**state, **affines},
            4,
            training=training,
            momentum=layer.momentum,
            mode='batch' if mode == 'sync_batch' else mode,
        )[0]

    actual = derive(ours, inputs, tangents)
    expected = jvp_oracle(oracle, inputs, tangents)
    assert not disagreements({'jvp': actual}, {'jvp': expected}, 1e-11)
    for values in layer.buffers():  # no tangent stays in them
        with forward_ad.dual_level():
            assert forward_ad.unpack_dual(values).tangent is None


def test_buffers_have_no_tangents():
    for mode in MODES:
        layer = pair(mode=mode)[1]
        with forward_ad.dual_level():
            x = torch.randn(2, 8, 3, 4)
            layer(forward_ad.make_dual(x, torch.randn_like(x)))
            for values in layer.buffers():
                assert forward_ad.unpack_dual(values).tangent is None


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('mode', MODES)
def test_traced_by_torch_jit(mode, training):
    model = pair(mode=mode).train(training)
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    x = torch.randn(2, 4, 5, 6)
    traced = torch.jit.trace(model, x, check_trace=False)
    model.load_state_dict(third.state_dict())  # tracing runs it
    other = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(traced(other), twin(other))
    torch.testing.assert_close(dict(model.named_buffers()), buffers(twin))


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers())


def flops(model: nn.Module) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return get_model_complexity_info(model, (4, 5, 6))['flops']


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_mmengine_counts_a_model_in_training(mode):
    model = pair(mode=mode)
    convolution = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1))
    norms = nn.Sequential(nn.BatchNorm2d(8), nn.GroupNorm(4, 8))
    norms[0].train(mode == 'batch')
    model.train()
    count = flops(nn.Sequential(convolution, norms))
    assert flops(model) == count
    model.eval()
    norms.eval()
    assert flops(model) == flops(nn.Sequential(convolution, norms))


def test_mmcv_counts_a_baked_model():
    cnn = pytest.importorskip('mmcv.cnn')

    def count(model: nn.Module) -> float:
        return cnn.get_model_complexity_info(
            model, (4, 5, 6), print_per_layer_stat=False, as_strings=False
        )[0]

    model = pair().eval()
    plain = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(4, 8)
    ).eval()
    x = torch.randn(1, 4, 5, 6)
    assert count(ws_mm.bake(model, x, fold_estimates=True)) == count(plain)


class Residual(nn.Module):
    """Layers with other operations between them."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.body = pair(**kwargs)
        self.up = WSConvTranspose2d(8, 8, 2, stride=2)
        self.norm = BCN(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return torch.relu(self.norm(self.up(y + x.mean())))


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_symbolic_trace_records_layers_as_those_of_torch(mode):
    model = Residual(mode=mode)
    twin = copy.deepcopy(model)
    graph = fx.symbolic_trace(model)
    called = {n.target for n in graph.graph.nodes if n.op == 'call_module'}
    assert called == {'body.0', 'body.1', 'up', 'norm'}
    for _ in range(2):
        x = torch.randn(2, 4, 5, 6)
        assert torch.equal(graph(x), twin(x))
    for name, values in graph.named_buffers():
        assert torch.equal(values, twin.get_buffer(name))
    with pytest.raises(TypeError, match=r'nn\.Sequential\(layer\)'):
        fx.symbolic_trace(BCN(8, 4))


def test_feature_extractor_of_torchvision():
    torchvision = pytest.importorskip('torchvision')
    from torchvision.models.feature_extraction import create_feature_extractor

    x = torch.randn(1, 3, 32, 32)
    model = torchvision.models.resnet18(norm_layer=BCN).eval()
    model = ws_mm.convert(model, conv={}, inputs=x)
    nodes = {'layer1.0.conv1': 'conv', 'layer2.1.bn2': 'norm', 'layer4': 'top'}
    features = create_feature_extractor(model, nodes)(x)
    seen = {}
    for node, name in nodes.items():
        model.get_submodule(node).register_forward_hook(
            lambda _m, _x, y, name=name: seen.update({name: y.clone()})
        )
    model(x)
    for name in nodes.values():
        torch.testing.assert_close(features[name], seen[name])


@pytest.mark.parametrize(
    ('padding', 'norm'), [('', {}), ('same', {}), ('same', None)]
)
def test_feature_extractor_of_timm(padding, norm):
    timm = pytest.importorskip('timm')
    from timm.models._features_fx import create_feature_extractor

    x = torch.randn(1, 3, 32, 32)
    # Its norms have a SiLU, which is another function applied twice.
    model = timm.create_model('test_efficientnet', pad_type=padding).eval()
    model = ws_mm.convert(model, {}, norm, inputs=x)
    expected = []
    model.blocks.register_forward_hook(lambda _m, _x, y: expected.append(y))
    model(x)
    found = create_feature_extractor(model, {'blocks': 'end'})(x)['end']
    torch.testing.assert_close(found, expected[0])


@pytest.mark.filterwarnings('ignore')
def test_fx_quantization_takes_a_baked_model():
    quantize_fx = pytest.importorskip('torch.ao.quantization.quantize_fx')
    from torch.ao.quantization import get_default_qconfig_mapping

    def quantized(model: nn.Module) -> nn.Module:
        mapping = get_default_qconfig_mapping()
        prepared = quantize_fx.prepare_fx(model, mapping, (x,))
        prepared(x)
        return quantize_fx.convert_fx(prepared)

    x = torch.randn(2, 4, 5, 6)
    model = pair().eval()
    expected = model(x)
    whole = quantized(copy.deepcopy(model))
    # Standardized convolutions stay as they are: right, but not in integers.
    assert isinstance(whole.get_submodule('0'), WSConv2d)
    assert (whole(x) - expected).abs().max() < 0.05 * expected.abs().max()
    baked = quantized(ws_mm.bake(model, x, fold_estimates=True))
    assert 'quantized' in type(baked.get_submodule('0')).__module__
    assert (baked(x) - expected).abs().max() < 0.1 * expected.abs().max()
