"""Generated configs: each computes its formula or is refused by name."""

import functools
import math
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

bricks = pytest.importorskip('mmcv.cnn')

GENERATED = functools.partial(
    settings,
    derandomize=True,
    deadline=None,
    database=None,
    # Shrinking would run for minutes; what is generated is small already.
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
# For the output of each layer given its input, which is of order 1; where
# a group is constant, it is 0 and of no size to compare with.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}
DTYPES = [torch.float64] * 3 + [torch.float32, torch.bfloat16]
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    """A convolution and a norm as a config has them, and an input shape."""

    def pick(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    dims = pick(2, 2, 2, 1, 3)
    groups = pick(1, 1, 1, 2, 3)
    kernel = tuple(draw(st.lists(st.integers(1, 3), min_size=3, max_size=3)))
    conv = dict(
        in_channels=groups * draw(st.integers(1, 4)),
        out_channels=groups * draw(st.integers(1, 6)),
        kernel_size=kernel[:dims],
        stride=pick(1, 1, 2),
        padding=pick(0, 1, 2),
        dilation=pick(1, 1, 2),
        groups=groups,
        bias=pick(True, False),
    )
    conv_cfg = dict(
        type=f'ws_mm.WSConv{dims}d',
        eps=pick(1e-5, 1e-3),
        eps_mode=pick('outside', 'inside'),
    )
    norm_cfg = dict(
        type='ws_mm.BCN',
        num_groups=draw(st.integers(1, 40)),
        eps=pick(1e-5, 1e-2),
        momentum=pick(1, 0.5, 0.01),
        affine=pick(True, True, False),
        mode=pick('estimate', 'estimate', 'batch', 'sync_batch'),
        outer_affine=pick('group', 'channel'),
        requires_grad=pick(True, True, False),
    )
    # Arguments left out are part of what a config can say.
    for cfg in (conv_cfg, norm_cfg):
        for name in draw(st.sets(st.sampled_from(sorted(cfg)))) - {'type'}:
            del cfg[name]
    shape = (
        pick(0, 1, 1, 2, 3),
        conv['in_channels'],
        *(pick(1, 1, 2, 3, 5) for _ in range(dims)),
    )
    return dict(
        conv=conv,
        conv_cfg=conv_cfg,
        norm_cfg=norm_cfg,
        shape=shape,
        dtype=pick(*DTYPES),
        training=pick(True, True, False),
        as_module=pick(True, False),
    )


def build(layer: dict[str, Any]) -> nn.Sequential:
    """Both layers, through the builders of the host."""
    conv, cfgs = layer['conv'], (layer['conv_cfg'], layer['norm_cfg'])
    if layer['as_module']:
        module = bricks.ConvModule(
            **conv, conv_cfg=cfgs[0], norm_cfg=cfgs[1], act_cfg=None
        )
        pair = (module.conv, module.norm)
    else:
        pair = (
            bricks.build_conv_layer(cfgs[0], **conv),
            bricks.build_norm_layer(cfgs[1], conv['out_channels'])[1],
        )
    return nn.Sequential(*pair).to(layer['dtype']).train(layer['training'])


def error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.abs().max().clamp_min(1))


def randomized(net: nn.Module) -> nn.Module:
    for name, values in net.state_dict().items():
        if name.endswith('running_var'):
            values.uniform_(0.5, 2)
        else:
            values.normal_(0.1)
    return net


def why_refused(layer: dict[str, Any], shape: torch.Size | None) -> str | None:
    """Names that the message has to hold, by the rules and not the code."""
    conv, norm = layer['conv'], layer['norm_cfg']
    fan_in = conv['in_channels'] // conv['groups']
    if fan_in * math.prod(conv['kernel_size']) < 2:
        return r'conv_cfg=None'
    if shape is None:
        return None
    count = groups_of(layer)
    if math.prod(shape[1:]) == count:
        return r'norm_cfg=(None|dict\(num_groups=)'
    one_value = shape[0] * math.prod(shape[2:]) == 1
    if one_value and layer['training'] and is_batch(norm):
        return r"norm_cfg=dict\(mode='estimate'\)"
    return None


def is_batch(norm_cfg: dict[str, Any]) -> bool:
    return norm_cfg.get('mode', 'estimate') != 'estimate'


def groups_of(layer: dict[str, Any]) -> int:
    channels = layer['conv']['out_channels']
    asked = layer['norm_cfg'].get('num_groups')
    if asked == channels:
        return channels
    return max(
        d
        for d in range(1, channels + 1)
        if channels % d == 0
        and d <= (asked or 32)
        and (2 * d <= channels or d == 1)
    )


def spatial(layer: dict[str, Any]) -> tuple[int, ...]:
    """Size of the convolution's output."""
    conv = layer['conv']
    return tuple(
        (size + 2 * conv['padding'] - conv['dilation'] * (k - 1) - 1)
        // conv['stride']
        + 1
        for size, k in zip(
            layer['shape'][2:], conv['kernel_size'], strict=True
        )
    )


def conv_oracle(layer: dict[str, Any], x: Tensor, conv: nn.Module) -> Tensor:
    weight = reference.standardize_weight(
        conv.weight,
        layer['conv_cfg'].get('eps', 1e-5),
        layer['conv_cfg'].get('eps_mode', 'outside'),
    )
    bias = None if conv.bias is None else conv.bias.double()
    rest = {
        name: layer['conv'][name]
        for name in ('stride', 'padding', 'dilation', 'groups')
    }
    return CONVOLVE[x.dim() - 2](x.double(), weight, bias, **rest)


def norm_oracle(
    layer: dict[str, Any], x: Tensor, norm: nn.Module
) -> tuple[Tensor, dict[str, Tensor]]:
    channels, cfg = x.shape[1], layer['norm_cfg']
    state = {
        'weight': torch.ones(channels),
        'bias': torch.zeros(channels),
        'bn_weight': torch.ones(channels),
        'bn_bias': torch.zeros(channels),
    }
    state |= dict(norm.named_parameters()) | dict(norm.named_buffers())
    y, buffers = reference.batch_channel_norm(
        x.reshape(*x.shape[:2], -1, 1),
        {name: values.clone() for name, values in state.items()},
        groups_of(layer),
        training=layer['training'],
        momentum=cfg.get('momentum', 0.01),
        eps=cfg.get('eps', 1e-5),
        mode='batch' if is_batch(cfg) else 'estimate',
    )
    return y.reshape(x.shape), buffers


@GENERATED(max_examples=500)
@given(layers())
def test_generated_layer_computes_its_formula(layer: dict[str, Any]) -> None:
    assume(all(size > 0 for size in spatial(layer)))
    torch.manual_seed(0)
    reason = why_refused(layer, None)
    if reason:
        event('refused when built')
        with pytest.raises(ValueError, match=reason):
            build(layer)
        return
    net = randomized(build(layer))
    conv, norm = net
    assert norm.num_groups == groups_of(layer)
    learns = layer['norm_cfg'].get('requires_grad', True)
    assert all(p.requires_grad == learns for p in norm.parameters())
    x = torch.randn(layer['shape'], dtype=layer['dtype'], requires_grad=True)
    y = conv(x)
    assert y.shape == (x.shape[0], norm.num_features, *spatial(layer))
    before = {name: b.clone() for name, b in norm.named_buffers()}
    reason = why_refused(layer, y.shape)
    if reason:
        event('refused when run')
        with pytest.raises(ValueError, match=reason):
            norm(y)
        torch.testing.assert_close(dict(norm.named_buffers()), before)
        return
    if y.numel():
        z_expected, buffers = norm_oracle(layer, y, norm)
    z = norm(y)
    assert z.dtype == layer['dtype']
    direction = torch.randn_like(z)
    wanted = [x, *(p for p in net.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(z, wanted, direction)
    for gradient in gradients:
        assert gradient.isfinite().all()
    after = dict(norm.named_buffers())
    if not y.numel():
        event('no image')
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert all(not gradient.any() for gradient in gradients)
    else:
        event(f'{layer["dtype"]}, compared')
        tolerance = TOLERANCE[layer['dtype']]
        y_expected = conv_oracle(layer, x, conv)
        assert error(y, y_expected) < tolerance
        assert error(z, z_expected) < tolerance
        for name, values in buffers.items():
            assert error(after[name], values) < max(tolerance, 1e-5)
        if layer['dtype'] == torch.float64:
            # Moved already: the oracle starts from what was there before.
            norm.load_state_dict(before, strict=False)
            expected, _ = norm_oracle(layer, conv_oracle(layer, x, conv), norm)
            oracle = torch.autograd.grad(expected, wanted, direction)
            scale = max(float(g.abs().max()) for g in oracle)
            for gradient, right in zip(gradients, oracle, strict=True):
                assert (gradient - right).abs().max() <= 1e-7 * (1 + scale)
    copy = build(layer)
    copy.load_state_dict(net.state_dict())
    if not (is_batch(layer['norm_cfg']) and layer['training']):
        copy.eval(), net.eval()
    torch.testing.assert_close(copy(x), net(x), rtol=0, atol=0)


NAN = float('nan')
BAD_NORM = dict(
    num_groups=['32', 4.5, 4.0, True, 0, -1, [4], NAN],
    eps=['1e-5', None, -1e-5, True, NAN, float('inf'), [1e-5]],
    momentum=['0.1', None, 0, -0.1, 1.5, NAN, True, [0.1]],
    mode=['Estimate', 'estimat', 'sync', None, 1, ['batch']],
    outer_affine=['channels', None, True, ['group']],
)
BAD_CONV = dict(
    eps=BAD_NORM['eps'],
    eps_mode=['in', 'Outside', None, 0, ['inside']],
    padding_mode=['zero', None, 3],
    dtype=['float32', 32],
    device=['gpu', 1.5],
)
# The host takes these out before the layer is built.
OF_THE_HOST = {'type', 'requires_grad'}


@st.composite
def malformed(draw: st.DrawFn) -> tuple[str, str, Any, bool]:
    """A key of a config, the argument in it, its value, whether it exists."""
    key = draw(st.sampled_from(['norm_cfg', 'conv_cfg']))
    bad = BAD_NORM if key == 'norm_cfg' else BAD_CONV
    name = draw(st.sampled_from(sorted(bad)))
    if draw(st.booleans()):
        return key, name, draw(st.sampled_from(bad[name])), True
    cut = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from('aeos_'))
    typo = draw(
        st.sampled_from(
            [
                name[:cut] + name[cut + 1 :],
                name[:cut] + letter + name[cut:],
                name + 's',
            ]
        )
    )
    legal = {*bad, *OF_THE_HOST, 'groups', 'bias', 'stride', 'padding'}
    assume(typo not in legal | {'num_features', ''})
    return key, typo, draw(st.sampled_from([0.1, 'batch', None, 32])), False


@GENERATED(max_examples=200)
@given(malformed(), st.booleans())
def test_malformed_layer_is_refused_by_name(
    wrong: tuple[str, str, Any, bool], as_module: bool
) -> None:
    key, name, value, exists = wrong
    layer = dict(
        conv=dict(in_channels=4, out_channels=8, kernel_size=3),
        conv_cfg=dict(type='ws_mm.WSConv2d'),
        norm_cfg=dict(type='ws_mm.BCN'),
        dtype=torch.float32,
        training=True,
        as_module=as_module,
    )
    layer[key][name] = value
    with pytest.raises((TypeError, ValueError)) as raised:
        build(layer)
    message = str(raised.value)
    assert name in message
    assert key in message
    if not exists and len(name) > 4:
        assert 'did you mean' in message


def test_every_wrong_value_is_refused_by_name() -> None:
    for key, kind, bad in (
        ('norm_cfg', 'ws_mm.BCN', BAD_NORM),
        ('conv_cfg', 'ws_mm.WSConv2d', BAD_CONV),
    ):
        for name, value in ((n, v) for n in bad for v in bad[n]):
            cfgs = {key: {'type': kind, name: value}}
            with pytest.raises((TypeError, ValueError), match=name) as raised:
                bricks.ConvModule(4, 8, 3, **cfgs)
            assert key in str(raised.value)


def test_a_typo_is_answered_with_the_argument() -> None:
    for key, typo, meant in (
        ('norm_cfg', 'momentun', 'momentum'),
        ('norm_cfg', 'group', 'num_groups'),
        ('conv_cfg', 'eps_mod', 'eps_mode'),
        ('conv_cfg', 'num_groups', 'groups'),
    ):
        cfg = dict(type='ws_mm.WSConv2d' if key == 'conv_cfg' else 'ws_mm.BCN')
        cfg[typo] = 3
        match = rf'no argument {typo!r}; did you mean {meant!r}\?.*{key}='
        cfgs = {key: cfg}
        with pytest.raises(TypeError, match=match):
            bricks.ConvModule(4, 8, 3, **cfgs)


def test_conv_and_norm_mistaken_for_each_other() -> None:
    conv, norm = dict(type='ws_mm.WSConv2d'), dict(type='ws_mm.BCN')
    with pytest.raises(TypeError, match='BCN has no argument .stride.*norm_c'):
        bricks.ConvModule(4, 8, 3, conv_cfg=norm)
    with pytest.raises(TypeError, match=r"conv_cfg=dict\(type='ws_mm.WSConv"):
        bricks.ConvModule(4, 8, 3, norm_cfg=conv)


@pytest.mark.parametrize(
    ('arguments', 'match'),
    [
        (dict(groups=3), 'conv_cfg.*divisible by groups'),
        (dict(out_channels=0), 'out_channels=0.*conv_cfg'),
        (dict(out_channels=-1), 'conv_cfg.*negative'),
        (dict(padding='sam'), 'conv_cfg.*padding'),
        (dict(in_channels=1, kernel_size=1), 'conv_cfg=None'),
    ],
)
def test_convolution_that_cannot_exist(
    arguments: dict[str, Any], match: str
) -> None:
    conv = dict(in_channels=4, out_channels=8, kernel_size=3) | arguments
    with pytest.raises(ValueError, match=match):
        bricks.build_conv_layer(dict(type='ws_mm.WSConv2d'), **conv)


@pytest.mark.parametrize(
    ('key', 'kind', 'argument'),
    [
        ('norm_cfg', 'ws_mm.BCN', dict(mode='sync')),
        ('norm_cfg', 'ws_mm.BCN', dict(momentum=0)),
        ('norm_cfg', 'ws_mm.IterNorm', dict(iterations=0)),
        ('conv_cfg', 'ws_mm.WSConv2d', dict(eps_mode='in')),
        ('conv_cfg', 'ws_mm.WSConv2d', dict(eps=-1)),
    ],
)
def test_an_illegal_value_is_answered_with_the_line_to_set(
    key: str, kind: str, argument: dict[str, Any]
) -> None:
    (name,) = argument
    cfgs = {key: dict(type=kind, **argument)}
    match = rf'{name}=.* must be .*\({key}=dict\({name}=\.\.\.\)\)$'
    with pytest.raises(ValueError, match=match):
        bricks.ConvModule(4, 8, 3, **cfgs)


def test_an_argument_like_no_other_is_answered_with_all() -> None:
    match = "no argument 'zzz'; it takes .*eps, .*mode, momentum, .*Fix or rem"
    with pytest.raises(TypeError, match=match):
        bricks.ConvModule(4, 8, 3, norm_cfg=dict(type='ws_mm.BCN', zzz=1))
