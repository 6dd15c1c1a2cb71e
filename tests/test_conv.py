"""WS convolutions are torch's convolutions on standardized filters."""

import copy
import functools
import inspect
import io
import pickle

import pytest
import reference
import torch
from comparison import (
    HALF_ON_CPU,
    TOLERANCE,
    disagreements,
    values_and_gradients,
)
from torch import nn

import ws_mm

pytestmark = pytest.mark.usefixtures('kernels')

PAIRS = {
    '1d': (ws_mm.WSConv1d, nn.Conv1d, (2, 4, 11)),
    '2d': (ws_mm.WSConv2d, nn.Conv2d, (2, 4, 9, 8)),
    '3d': (ws_mm.WSConv3d, nn.Conv3d, (2, 4, 5, 6, 7)),
}
TRANSPOSED = {
    '1d': (ws_mm.WSConvTranspose1d, nn.ConvTranspose1d, (2, 4, 5)),
    '2d': (ws_mm.WSConvTranspose2d, nn.ConvTranspose2d, (2, 4, 4, 5)),
    '3d': (ws_mm.WSConvTranspose3d, nn.ConvTranspose3d, (2, 4, 3, 2, 3)),
}
OPTIONS = {
    'defaults': dict(kernel_size=3),
    'no bias': dict(kernel_size=3, bias=False),
    'pointwise': dict(kernel_size=1),
    'stride and padding': dict(kernel_size=3, stride=2, padding=1),
    'dilation': dict(kernel_size=2, dilation=3),
    'groups': dict(kernel_size=3, groups=2),
    'depthwise': dict(kernel_size=2, groups=4),
    'same': dict(kernel_size=3, padding='same'),
    'reflect': dict(kernel_size=3, padding=1, padding_mode='reflect'),
    'circular': dict(kernel_size=3, padding=2, padding_mode='circular'),
    'inside': dict(kernel_size=3, eps_mode='inside'),
    'eps': dict(kernel_size=3, eps=0.1),
}


def build(layer_type: type[nn.Module], **options) -> nn.Module:
    options = dict(out_channels=8) | options
    layer = layer_type(4, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.weight.mul_(0.05).add_(0.1)
    return layer


def wrong_values(layer, plain_type, options, shape, standardize):
    """Compare a layer with its plain twin on filters of a formula."""
    eps = {k: v for k, v in options.items() if k.startswith('eps')}
    plain = build(
        plain_type, **{k: v for k, v in options.items() if k not in eps}
    )
    tensors = {'x': torch.randn(shape, dtype=torch.float64)}
    tensors.update(layer.named_parameters())

    def ours(x, **parameters):
        return torch.func.functional_call(layer, parameters, x)

    def oracle(x, weight, **bias):
        weight = standardize(weight, **eps)
        return torch.func.functional_call(plain, {'weight': weight, **bias}, x)

    actual = values_and_gradients(ours, tensors, 'conv')
    expected = values_and_gradients(oracle, tensors, 'conv')
    return disagreements(actual, expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize('kind', PAIRS)
def test_equals_plain_convolution_of_standardized_filters(kind, options):
    ws_type, plain_type, shape = PAIRS[kind]
    layer = build(ws_type, **options)
    formula = reference.standardize_weight
    assert not wrong_values(layer, plain_type, options, shape, formula)


TRANSPOSED_OPTIONS = {
    'defaults': dict(kernel_size=3),
    'upsampling': dict(kernel_size=2, stride=2, bias=False),
    'padding': dict(kernel_size=4, stride=2, padding=1, output_padding=1),
    'groups': dict(kernel_size=3, groups=2, stride=2),
    'as many outputs': dict(kernel_size=2, groups=4, out_channels=4),
    'dilation': dict(kernel_size=2, dilation=3),
    'inside': dict(kernel_size=3, eps_mode='inside', groups=2),
    'eps': dict(kernel_size=3, eps=0.1),
}


@pytest.mark.parametrize('options', TRANSPOSED_OPTIONS.values(), ids=str)
@pytest.mark.parametrize('kind', TRANSPOSED)
def test_equals_transposed_convolution_of_standardized_filters(kind, options):
    ws_type, plain_type, shape = TRANSPOSED[kind]
    layer = build(ws_type, **options)
    for mixed in (False, True) if layer.groups > 1 else (False,):
        formula = functools.partial(
            reference.standardize_transposed_weight,
            groups=layer.groups,
            mixed=mixed,
        )
        wrong = wrong_values(layer, plain_type, options, shape, formula)
        assert bool(wrong) == mixed
    size = [2 * n + 2 for n in shape[2:]]
    if options == dict(kernel_size=3, groups=2, stride=2):
        x = torch.randn(shape, dtype=torch.float64)
        assert [*layer(x, size).shape[2:]] == size


def test_transposed_weight_is_not_that_of_a_convolution():
    layer = build(ws_mm.WSConvTranspose2d, kernel_size=3)
    actual = {'weight': layer.standardized_weight()}
    over_inputs = reference.standardize_weight(layer.weight)
    assert disagreements(actual, {'weight': over_inputs}, 1e-2)
    # Memory in channels_last, and a slice of a larger tensor.
    for change in (
        lambda w: w.to(memory_format=torch.channels_last),
        lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
    ):
        twin = build(ws_mm.WSConvTranspose2d, kernel_size=3)
        twin.weight = nn.Parameter(change(layer.weight.detach()))
        assert not disagreements(
            {'weight': twin.standardized_weight()}, actual, 1e-14
        )


@pytest.mark.parametrize('kind', [*PAIRS, *(f'T{k}' for k in TRANSPOSED)])
def test_signature_is_that_of_torch(kind):
    pairs = TRANSPOSED if kind[0] == 'T' else PAIRS
    ws_type, plain_type, _ = pairs[kind[-2:]]
    assert plain_type in ws_type.__bases__  # what host initializers look at
    every = (4, 8, 3, 2, 1, 2, 2, False, 'reflect', 'meta', torch.float16)
    if kind[0] == 'T':
        every = (4, 8, 3, 2, 1, 1, 2, False, 2, 'zeros', 'meta', torch.half)
    for arguments in ((4, 8, 3), every):
        ours, plain = ws_type(*arguments), plain_type(*arguments)
        for name in inspect.signature(plain_type).parameters:
            if name != 'bias' and hasattr(plain, name):
                assert getattr(ours, name) == getattr(plain, name)
        assert ours.weight.shape == plain.weight.shape
        assert ours.weight.dtype == plain.weight.dtype
        assert ours.weight.device == plain.weight.device
        assert ours.state_dict().keys() == plain.state_dict().keys()


def test_output_ignores_scale_and_shift_of_filters():
    layer = build(ws_mm.WSConv2d, kernel_size=3, eps=0.0)
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(7).add_(3)
    torch.testing.assert_close(layer(x), before)


def test_survives_copy_pickle_and_state_dict():
    layer = build(ws_mm.WSConv2d, kernel_size=3, eps_mode='inside')
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    expected = layer(x)
    file = io.BytesIO()
    pickle.dump(layer, file)
    file.seek(0)
    fresh = build(ws_mm.WSConv2d, kernel_size=3, eps_mode='inside')
    fresh.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.load(file), fresh):
        assert torch.equal(twin(x), expected)
    assert "eps=1e-05, eps_mode='inside'" in repr(layer)


def test_filters_of_one_entry_are_rejected():
    for arguments in (dict(groups=4), dict(in_channels=1)):
        arguments = dict(in_channels=4, out_channels=4) | arguments
        with pytest.raises(ValueError, match='1 entry .*conv_cfg=None'):
            ws_mm.WSConv2d(kernel_size=1, **arguments)
    with pytest.raises(ValueError, match="'middle'.*'outside', 'inside'"):
        ws_mm.WSConv2d(4, 8, 3, eps_mode='middle')


def test_foreign_weight_is_rejected():
    layer = build(ws_mm.WSConv2d, kernel_size=3)
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match='efficient_conv_bn_eval'):
        layer._conv_forward(x, layer.weight * 2, layer.bias)


def computes(layer: nn.Module, weight: torch.Tensor, bias=None) -> bool:
    """Return whether a layer convolves with this weight, standardized."""
    x = torch.randn(1, 4, 6, 6, dtype=weight.dtype)
    standard = reference.standardize_weight(weight).to(weight.dtype)
    bias = layer.bias if bias is None else bias
    expected = nn.functional.conv2d(x, standard, bias)
    error = (layer(x) - expected).abs().max() / expected.abs().max()
    return error.item() < TOLERANCE[x.dtype]


def scaled(weight: torch.Tensor, *factors: float) -> nn.Parameter:
    factor = torch.ones(len(weight), 1, 1, 1).to(weight)
    factor[: len(factors), 0, 0, 0] = torch.tensor(factors)
    return nn.Parameter(weight.detach() * factor)


@pytest.mark.parametrize(
    'factors', [(2.0,), (-1.0,), (0.0, 0.5), 8 * (1 - 5e-6,)], ids=str
)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_scaled_weight_and_new_bias_are_rejected(factors, dtype):
    layer = build(ws_mm.WSConv2d, kernel_size=3).to(dtype)
    weight = layer.weight
    with pytest.raises(
        RuntimeError, match=r'fuse_conv_bn.*tools/deployment/bake\.py'
    ):
        layer.weight = scaled(weight, *factors)
    assert layer.weight is weight
    bare = build(ws_mm.WSConv2d, kernel_size=3, bias=False)
    with pytest.raises(RuntimeError, match=r'new bias.*ws_mm\.bake.*reload'):
        bare.bias = nn.Parameter(torch.zeros(8))
    assert bare.bias is None


def test_scaled_transposed_weight_is_rejected():
    layer = build(ws_mm.WSConvTranspose2d, kernel_size=3, groups=2)
    weight = layer.weight.detach()
    by_output = weight * torch.linspace(0.5, 2, 8).view(2, 4)[0].view(-1, 1, 1)
    with pytest.raises(
        RuntimeError, match=r'fuse_conv_bn.*tools/deployment/bake\.py'
    ):
        layer.weight = nn.Parameter(by_output)
    by_input = weight * torch.linspace(0.5, 2, 4).view(-1, 1, 1, 1)
    layer.weight = nn.Parameter(by_input)  # another filter, no fusion
    with pytest.raises(ValueError, match='1 entry .*conv_cfg=None'):
        ws_mm.WSConvTranspose2d(4, 8, 1, groups=4)
    with pytest.raises(ValueError, match=r'WSConvTranspose2d.*zeros'):
        ws_mm.WSConvTranspose2d(4, 8, 1, padding_mode='reflect')
    with pytest.raises(TypeError, match="mean 'output_padding'"):
        ws_mm.WSConvTranspose2d(4, 8, 1, out_padding=1)


def test_other_weights_are_accepted():
    other = build(ws_mm.WSConv2d, kernel_size=3)
    layer = build(ws_mm.WSConv2d, kernel_size=3)
    layer.weight, layer.bias = other.weight, other.bias
    assert layer.weight is other.weight
    assert computes(layer, other.weight, other.bias)
    # A filter that is zero stays zero, and so does what it computes.
    for weight in (
        scaled(other.weight),
        scaled(other.weight, 0.0),
        scaled(other.weight, *[0.0] * 8),
        nn.Parameter(torch.randn(8, 4, 3, 3)),
        nn.Parameter(torch.randn(8, 4, 3, 3, dtype=torch.float64)),
        nn.Parameter(torch.randn(4, 4, 3, 3, dtype=torch.float64)),
        nn.Parameter(torch.randn(4, 4, 3, 3, device='meta')),
        nn.Parameter(torch.randn(4, 4, 3, 3, device='meta')),
    ):
        layer.weight = weight
        assert layer.weight is weight


def test_loads_scaled_weights_by_assignment():
    layer = build(ws_mm.WSConv2d, kernel_size=3)
    state = {k: v.detach() * 3 for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert computes(layer, state['weight'], state['bias'])
    with pytest.raises(RuntimeError, match='fuse_conv_bn'):
        layer.weight = scaled(layer.weight, 3.0)
    # An error while loading leaves the care in place.
    layer._register_load_state_dict_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match='fuse_conv_bn'):
        layer.weight = scaled(layer.weight, 3.0)


class Doubled(nn.Module):
    """A parametrization that no standardized weight should feel."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight + 1


def test_weight_may_be_parametrized():
    layer = build(ws_mm.WSConv2d, kernel_size=3)
    raw = layer.weight.detach().clone()
    nn.utils.parametrize.register_parametrization(layer, 'weight', Doubled())
    assert computes(layer, 2 * raw + 1)
    layer(torch.randn(1, 4, 6, 6, dtype=torch.float64)).mean().backward()
    assert layer.parametrizations.weight.original.grad.any()
    nn.utils.parametrize.remove_parametrizations(layer, 'weight')
    assert computes(layer, 2 * raw + 1)
    nn.utils.parametrizations.weight_norm(layer)
    assert computes(layer, 2 * raw + 1)
    layer = nn.utils.weight_norm(build(ws_mm.WSConv2d, kernel_size=3))
    assert computes(layer, layer.weight)


def test_weight_may_be_given_by_functional_call():
    layer = build(ws_mm.WSConv2d, kernel_size=3)
    weight = layer.weight.detach() * -3

    class Called:
        bias = layer.bias

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(layer, {'weight': weight}, x)

    assert computes(Called(), weight)


def test_meta_device_half_and_to_empty():
    layer = ws_mm.WSConv2d(4, 8, 3, device='meta').to_empty(device='cpu')
    layer.reset_parameters()
    assert computes(layer, layer.weight)
    meta = ws_mm.WSConv2d(4, 8, 3, device='meta')
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert computes(meta, layer.weight, layer.bias)
    half = copy.deepcopy(layer).half()
    assert half.weight.dtype == torch.half
    if not HALF_ON_CPU:
        pytest.skip('this torch has no float16 convolution on a CPU')
    assert half(torch.randn(1, 4, 6, 6).half()).isfinite().all()


def test_float64_stays_under_autocast():
    layer = ws_mm.WSConv2d(3, 8, 3, dtype=torch.float64)
    x = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    expected = layer(x)
    with torch.autocast('cpu', torch.bfloat16):
        actual = layer(x)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('change', ['a dead filter', 'rounded'])
def test_scaled_filters_are_noticed_beside(change):
    conv = ws_mm.WSConv2d(3, 4, 3)
    factors = torch.tensor([2.0, 3.0, 0.7, 1.5]).view(-1, 1, 1, 1)
    if change == 'a dead filter':
        nn.init.zeros_(conv.weight[1])
    scaled = conv.weight.detach() * factors
    scaled = scaled.bfloat16() if change == 'rounded' else scaled
    with pytest.raises(RuntimeError, match='its weight, scaled'):
        conv.weight = nn.Parameter(scaled)


def test_a_parameter_of_somebody_may_hold_anything():
    class Mine(nn.Parameter):
        pass

    conv = ws_mm.WSConv2d(3, 4, 3)
    conv.weight = Mine(conv.weight.detach() * 2)
