"""Norms of ws_mm/zoo with a memory of their own: CBN, Batch Renorm, Online.

Their formulas are in tests/oracles, their contract in test_zoo.py.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from comparison import HALF_ON_CPU, disagreements, relative_error
from mmengine.runner.checkpoint import load_state_dict
from oracles import RECENT_COMPILER
from oracles.cross_iteration_bn import MOMENTUM, oracle, within
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ws_mm
from ws_mm import running_statistics
from ws_mm.zoo import BatchRenorm, CrossIterationBN, OnlineNorm
from ws_mm.zoo.online_norm import GUARDS

EXACT = 1e-10
C = 6


def images(
    number: int = 2, seed: int = 0, size: tuple[int, ...] = (5, 4)
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = number, C, *size
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def cross(**options) -> CrossIterationBN:
    return CrossIterationBN(C, **options).double()


def test_window_and_burn_in_over_many_iterations():
    burn_in, window = 2, 3
    torch.manual_seed(0)
    layer = cross(eps=1e-3, momentum=MOMENTUM, window=window, burn_in=burn_in)
    model = within(layer).double()
    errors = {}
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    for number in range(8):
        x = images(seed=number)
        with torch.no_grad():
            model[1].weight.normal_(1, 0.1)
            state['1.weight'] = model[1].weight.clone()
        if number == 6:  # resumed: burn-in is over, the window empty
            copy = within(cross(window=window, burn_in=burn_in, eps=1e-3))
            copy[2].momentum = MOMENTUM
            copy.double()(x)
            copy.load_state_dict(model.state_dict())
            copy[2]._window = []
            model = copy
            state = {k: v for k, v in state.items() if 'past' not in k}
        y, state = (
            oracle(x, state, True, window=window)[0],
            {
                **state,
                **oracle(x, state, True, window=window)[1],
            },
        )
        if number < burn_in:
            state = {k: v for k, v in state.items() if 'past' not in k}
        errors[number] = relative_error(model(x), y)
    assert max(errors.values()) < EXACT, errors
    assert len(model[2]._window) == 2


CONVS = {
    'plain': lambda: nn.Conv2d(C, C, 3),
    'grouped': lambda: nn.Conv2d(C, C, 3, groups=2),
    'line': lambda: nn.Conv1d(C, C, 3),
    'standardized': lambda: ws_mm.WSConv2d(C, C, 3),
    'centered': lambda: ws_mm.zoo.CenteredConv2d(C, C, 3),
    'transposed': lambda: nn.ConvTranspose2d(C, C, 3),
    'transposed groups': lambda: nn.ConvTranspose2d(C, C, 3, groups=2),
    'standardized transposed': lambda: ws_mm.WSConvTranspose2d(
        C, C, 3, groups=3
    ),
}


@pytest.mark.parametrize('kind', CONVS)
@pytest.mark.parametrize('hooked', [False, True], ids=['bare', 'hook'])
def test_slopes_are_those_of_each_channel(kind, hooked):
    torch.manual_seed(0)
    conv, layer = CONVS[kind]().double(), cross()
    if hooked:
        conv.register_full_backward_hook(lambda *_: None)
    size = (5,) if 'line' in kind else (5, 4)
    x = images(size=size).requires_grad_()
    layer(conv(x))
    (past,) = layer._window
    y = conv(x.detach()).transpose(0, 1).flatten(1)
    for statistic, slopes in (
        (y.mean(1), past.dmean),
        (y.var(1, correction=0), past.dvar),
    ):
        for channel in range(C):
            (slope,) = torch.autograd.grad(
                statistic[channel], conv.weight, retain_graph=True
            )
            own = slope[slope != 0]
            found = slopes[channel]
            assert relative_error(found.sort()[0], own.sort()[0]) < EXACT


@pytest.mark.skipif(not HALF_ON_CPU, reason='no float16 on this CPU')
def test_slopes_in_float16_are_not_rounded_to_zero():
    torch.manual_seed(0)
    conv, layer = nn.Conv2d(C, C, 1, bias=False), CrossIterationBN(C)
    x = 0.002 * torch.randn(2, C, 300, 300)
    layer(conv(x))
    expected = layer._window[0]
    with torch.autocast('cpu', torch.float16):
        layer(conv(x))
    assert relative_error(layer._window[0].dvar, expected.dvar) < 1e-2


def test_a_former_iteration_that_is_not_finite_does_not_count():
    torch.manual_seed(0)
    conv = nn.Conv2d(C, C, 1, groups=C, bias=False).double()
    layer, other = cross(), cross()
    bad = images(seed=1)
    bad[0, 1] = float('nan')
    for model, batches in (
        (layer, [images(), bad, images(seed=2)]),
        (other, [images(), images(seed=1), images(seed=2)]),
    ):
        for x in batches:
            y = model(conv(x))
        model.result = y.detach()
    third = cross()
    for x in (images(), images(seed=2)):
        y = third(conv(x))
    keep = torch.arange(C) != 1
    expected = other.result.clone()
    expected[:, 1] = y.detach()[:, 1]
    assert relative_error(layer.result, expected) < EXACT
    assert relative_error(layer.result[:, keep], y[:, keep]) > 1e-3


def reentrant(conv: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda x: layer(conv(x)), x, use_reentrant=True)


def without(conv: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(conv(x))


def frozen(conv: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    conv.weight.requires_grad_(False)
    try:
        return layer(conv(x))
    finally:
        conv.weight.requires_grad_()


def compiled(conv: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    model = nn.Sequential(conv, layer)
    run = torch.compile(
        lambda x: model(x), backend='aot_eager', fullgraph=True
    )
    return run(x)


def scaled(
    conv: nn.Module, layer: nn.Module, x: Tensor, shape: tuple[int, ...]
) -> Tensor:
    gain = torch.ones(shape, dtype=x.dtype, requires_grad=True)
    return layer(F.conv2d(x, conv.weight * gain))


def scaled_transposed(conv: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    gain = torch.ones(C, dtype=x.dtype, requires_grad=True)
    return layer(F.conv_transpose2d(x, conv.weight * gain.view(-1, 1, 1)))


@pytest.mark.parametrize(
    'run',
    [
        reentrant,
        without,
        frozen,
        pytest.param(
            compiled,
            marks=pytest.mark.skipif(
                not RECENT_COMPILER,
                reason='this compiler cannot take a layer that sets a list',
            ),
        ),
        lambda conv, layer, x: layer(conv(x).relu()),
        partial(scaled, shape=()),
        partial(scaled, shape=(1, C, 1, 1)),
        scaled_transposed,
    ],
    ids=[
        *('reentrant', 'no_grad', 'frozen', 'compiled', 'ReLU'),
        *('one gain', 'gains of inputs', 'gains of a transposed one'),
    ],
)
def test_without_a_weight_it_is_batch_norm_and_says_so(run, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(running_statistics, '_reported', lines)
    torch.manual_seed(0)
    conv, layer = nn.Conv2d(C, C, 1, bias=False).double(), cross()
    layer(conv(images()))
    assert not lines
    x = images(seed=1).requires_grad_()
    y = run(conv, layer, x)
    direction = images(seed=2)
    twin = x.detach().requires_grad_()
    plain = nn.BatchNorm2d(C).double()
    expected = run(conv, plain, twin)
    assert relative_error(y, expected) < EXACT
    if y.requires_grad:
        y.backward(direction)
        expected.backward(direction)
        assert relative_error(x.grad, twin.grad) < EXACT
    # Without gradients, as update_estimates runs it, all goes on.
    assert len(layer._window) == (run is without)
    for _ in range(2):
        y = run(conv, layer, x)
        if y.requires_grad:
            y.backward(direction)
    assert ['plain BN' in line for line in lines] == (run is not without) * [
        True
    ]


def test_a_loaded_state_begins_a_new_window():
    torch.manual_seed(0)
    conv, layer = nn.Conv2d(C, C, 1, bias=False).double(), cross()
    state = layer.state_dict()
    layer(conv(images()))
    layer.load_state_dict(state)
    layer(conv(images(seed=1)))
    assert len(layer._window) == 1
    conv, layer = conv.float(), layer.float()
    layer(conv(images(seed=2).float()))  # none of another dtype
    assert len(layer._window) == 1


def test_schedule_of_the_paper():
    layer = BatchRenorm(1).double()
    found = {}
    for step in (0, 5000, 15000, 25000, 40000, 90000):
        layer.num_forwards.fill_(step + 1)  # it is counted
        one = torch.ones(1, dtype=torch.float64)
        low = layer._correction(-1e9 * one, 1e-9 * one)
        high = layer._correction(1e9 * one, 1e9 * one)
        assert relative_error(low[0], 1 / high[0]) < EXACT
        assert torch.equal(low[1], -high[1])
        found[step] = high[0].item(), high[1].item()
    assert found == {
        0: (1, 0),
        5000: (1, 0),
        15000: (pytest.approx(1 + 2 * 10 / 35), 2.5),
        25000: (pytest.approx(1 + 2 * 20 / 35), 5),
        40000: (3, 5),
        90000: (3, 5),
    }


def test_batch_renorm_takes_the_place_of_a_batch_norm():
    model = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)).double()
    nn.init.uniform_(model[1].weight)
    for number in range(3):
        model(3 * images(seed=number) + 1)
    model.eval()
    new = ws_mm.convert(model, norm=dict(type='ws_mm.BatchRenorm'))
    assert type(new[1]) is BatchRenorm
    assert relative_error(new(images()), model(images())) < EXACT


# How far it may evaluate from the batch norm; five Newton iterations end
# before the root.
@pytest.mark.parametrize(
    ('name', 'within'), [('BatchRenorm', EXACT), ('IterNorm', 0.05)]
)
@pytest.mark.parametrize('load', [load_state_dict, nn.Module.load_state_dict])
def test_the_checkpoint_of_a_batch_norm_keeps_its_function(name, within, load):
    torch.manual_seed(0)
    old = nn.Sequential(nn.BatchNorm2d(C)).double()
    nn.init.uniform_(old[0].weight)
    for number in range(30):
        old(0.2 * images(seed=number) + 1)
    new = nn.Sequential(getattr(ws_mm.zoo, name)(C)).double()
    state = old.state_dict()
    load(new, state, strict=False)
    assert 'running_var' in ''.join(state)
    x = 0.2 * images() + 1
    assert relative_error(new.eval()(x), old.eval()(x)) < within
    # Its own is not taken for one.
    own = {k: 1.5 * v for k, v in new.state_dict().items()}
    new.load_state_dict(own)
    assert all(torch.equal(v, own[k]) for k, v in new.state_dict().items())


def online(**options) -> OnlineNorm:
    layer = OnlineNorm(C, momentum=0.1, control_momentum=0.1, **options)
    nn.init.uniform_(layer.weight)
    nn.init.uniform_(layer.bias)
    return layer.double()


@pytest.mark.parametrize('guard', ['clamp', 'none'])
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_other_guards_of_online_norm(guard, training):
    torch.manual_seed(0)
    layer = online(guard=guard, limit=0.5).train(training)
    x = images()
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    first = F.batch_norm(
        x[:1], mean, var, layer.weight, layer.bias, eps=layer.eps
    )
    if guard == 'clamp':
        first = first.clamp(-0.5, 0.5)
    assert relative_error(layer(x)[:1], first) < EXACT


@pytest.mark.parametrize('guard', GUARDS)
def test_a_relu_in_place_changes_no_gradient_of_online_norm(guard):
    found = []
    for inplace in (True, False):
        layer = OnlineNorm(C, affine=False, guard=guard).double()
        x = images().requires_grad_()
        nn.ReLU(inplace)(layer(x)).square().sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)


def test_online_norm_measures_the_variance_between_images():
    layer = online()
    batches = [images(seed=n) * (n + 1) + n for n in range(3)]
    ws_mm.update_estimates(nn.Sequential(layer), batches)
    values = torch.cat(batches).transpose(0, 1).flatten(1)
    var = values.var(1, correction=0)
    assert relative_error(layer.running_mean, values.mean(1)) < EXACT
    assert relative_error(layer.running_var, var) < EXACT


def test_online_norm_with_a_clamp_is_baked():
    torch.manual_seed(0)
    conv = ws_mm.WSConv2d(C, C, 1).double()
    model = nn.Sequential(conv, online(guard='clamp', limit=0.5))
    model(images())
    model.eval()
    baked = ws_mm.bake(model, images(), fold_estimates=True)
    assert type(baked[1]) is nn.Hardtanh
    assert relative_error(baked(images()), model(images())) < EXACT


def test_an_infinite_gradient_leaves_the_control_of_its_channel():
    found = []
    for first in (float('inf'), 0):  # by its first image
        layer = OnlineNorm(C, guard='none').double()
        y = layer(images().requires_grad_())
        direction = torch.ones_like(y)
        direction[0, 1] = first
        y.backward(direction)
        found.append(dict(layer.named_buffers()))
    assert not disagreements(*found, EXACT)
    assert found[0]['control_shift'].all()


def test_compiled_online_norm_moves_its_control():
    plain, layer = online(), online()
    layer.load_state_dict(plain.state_dict())
    run = torch.compile(lambda x: layer(x), backend='aot_eager')
    for number in range(2):
        x = images(seed=number).requires_grad_()
        for model in (plain, run):
            model(x).sin().sum().backward()
    expected = dict(plain.named_buffers())
    assert not disagreements(dict(layer.named_buffers()), expected, EXACT)
    assert expected['control_scale'].all()
