"""Norms of batch statistics in ws_mm/zoo, beyond the contract."""

import copy
from typing import Any

import pytest
import torch
from comparison import TOLERANCE, disagreements, relative_error
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ws_mm
from ws_mm.zoo import set_condition

CHANNELS = 6
WIDE = TOLERANCE[torch.float64]


def build(name: str, channels: int = CHANNELS, **options: Any) -> Any:
    cfg = dict(type=f'ws_mm.{name}', num_features=channels, **options)
    return MODELS.build(cfg).double()


def images(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (3, CHANNELS, 5, 4)
    return torch.randn(shape, generator=generator, dtype=torch.float64) + 1


def trained_bn() -> nn.BatchNorm2d:
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(CHANNELS).double()
    nn.init.uniform_(bn.weight, 0.5, 2)
    nn.init.normal_(bn.bias)
    bn(images(seed=9))
    return bn


AS_BN = {
    'BNET': {},
    'BNET ': dict(kernel_size=1),
    'SandwichBN': dict(num_conditions=2),
    'BatchInstanceNorm': {},
    'BatchGroupNorm': dict(num_groups=CHANNELS),
}


@pytest.mark.parametrize('name', AS_BN)
def test_it_takes_over_a_batch_norm(name):
    bn = trained_bn()
    norm = dict(type=f'ws_mm.{name.strip()}', **AS_BN[name])
    model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), bn)
    model = model.double()
    new = ws_mm.convert(model, norm=norm)
    assert type(new[1]).__name__ == name.strip()
    for training in (True, False):
        x = images(seed=1)
        model.train(training)
        new.train(training)
        assert relative_error(new(x), model(x)) < WIDE
        for part in ('running_mean', 'running_var'):
            found, expected = (getattr(m[1], part) for m in (new, model))
            assert relative_error(found, expected) < WIDE


def train_gates(
    gates: Tensor, loss_of: Any, rate: float, after: Any
) -> list[Tensor]:
    optimizer = torch.optim.SGD([gates], lr=rate, momentum=0.9)
    found = []
    for number in range(40):
        optimizer.zero_grad()
        loss, used = loss_of(number)
        loss.backward()
        found.append(used.detach().clone())
        optimizer.step()
        after()
    return found


def test_gates_move_as_those_of_the_authors():
    """Ten times the rate, clamped after each step."""
    layer = build('BatchInstanceNorm', affine=False)
    gate = torch.ones(CHANNELS, dtype=torch.float64, requires_grad=True)

    def target(number: int) -> Tensor:
        return images(seed=100 + number) * (1 if number < 20 else -1)

    def formula(number: int) -> tuple[Tensor, Tensor]:
        x, used = images(seed=number), gate.view(-1, 1, 1)
        parts = []
        for dims in ((0, 2, 3), (2, 3)):
            var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
            parts.append((x - mean) / (var + 1e-5).sqrt())
        y = used * parts[0] + (1 - used) * parts[1]
        return (y * target(number)).sum(), gate

    def ours(number: int) -> tuple[Tensor, Tensor]:
        loss = (layer(images(seed=number)) * target(number)).sum()
        return loss, 1 + 10**0.5 * layer.gate_offset

    def clamp() -> None:
        with torch.no_grad():
            gate.clamp_(0, 1)

    expected = torch.stack(train_gates(gate, formula, 0.1, clamp))
    found = torch.stack(
        train_gates(layer.gate_offset, ours, 0.01, lambda: None)
    )
    assert relative_error(found, expected) < 1e-9
    # The run visits both bounds and leaves them.
    at_zero, at_one = expected.eq(0).any(1), expected.eq(1).any(1)
    assert at_zero.any()
    assert at_one[1:].any()
    assert ((expected > 0) & (expected < 1)).any()


@pytest.mark.parametrize('compiled', [False, True])
def test_gates_beyond_a_bound_run_twice_before_a_backward(compiled):
    layer, other = (build('BatchInstanceNorm') for _ in range(2))
    for one in (layer, other):
        with torch.no_grad():
            one.gate_offset.copy_(torch.linspace(-0.4, 0.1, CHANNELS))

    def run(x: Tensor) -> Tensor:
        return layer(x)

    if compiled:
        # Other backends than the default one do not keep parameters.
        run = torch.compile(run, fullgraph=True)
    x, second = images(), images(seed=1)
    (run(x).sin().sum() + run(second).sin().sum()).backward()
    other(x).sin().sum().backward()
    other(second).sin().sum().backward()
    assert layer.gate_offset.grad.all()
    assert (
        relative_error(layer.gate_offset.grad, other.gate_offset.grad) < 1e-9
    )
    assert layer.gate_offset.max() == 0


@pytest.mark.parametrize('reentrant', [False, True])
def test_gates_are_clamped_where_activations_are_recomputed(reentrant):
    layer = build('BatchInstanceNorm')
    with torch.no_grad():
        layer.gate_offset.fill_(1)
    x = images().requires_grad_()
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert not layer.gate_offset.any()
    with torch.no_grad():
        layer.gate_offset.fill_(1)
        layer(x)
    assert layer.gate_offset.eq(1).all()


def test_switchable_norm_without_bn_takes_each_image_alone():
    layer = build('SwitchableNorm', using_bn=False)
    x = images()
    alone = torch.cat([layer(one[None]) for one in x])
    assert relative_error(layer(x), alone) < WIDE
    assert relative_error(layer.eval()(x), alone) < WIDE
    with_bn = build('SwitchableNorm')
    assert relative_error(with_bn(x), alone) > 1e-2


def test_switchable_norm_runs_where_other_channels_have_values():
    pixel = images(1, CHANNELS, 1, 1)
    assert build('SwitchableNorm')(pixel).std() > 0
    with pytest.raises(ValueError, match='SwitchableNorm needs more than one'):
        build('SwitchableNorm', 1)(images(1, 1, 1, 1))


def test_pixels_of_several_images_have_no_instance_norm():
    layer = build('BatchInstanceNorm')
    x = images(3, CHANNELS, 1, 1)
    with torch.no_grad():
        layer.gate_offset.fill_(-0.5 / 10**0.5)
    assert relative_error(2 * layer(x), trained_like(x)) < WIDE


def trained_like(x: Tensor) -> Tensor:
    return nn.functional.batch_norm(x, None, None, training=True)


def test_groups_must_divide_the_channels():
    for wrong in (4, 0, -1, 7, 2.5):
        with pytest.raises(ValueError, match=f'num_groups={wrong} must div'):
            build('BatchGroupNorm', num_groups=wrong)
    assert build('BatchGroupNorm', 256).num_groups == 32
    assert build('BatchGroupNorm', 48).num_groups == 24
    one = images(1, CHANNELS, 1, 1)
    assert build('BatchGroupNorm')(one).isfinite().all()
    with pytest.raises(ValueError, match=r'more than one value.*type=.GN'):
        build('BatchGroupNorm', num_groups=CHANNELS)(one)


def test_positions_need_two_channels():
    with pytest.raises(ValueError, match=r'num_features=1 .*type=.GN'):
        build('PositionalNorm', 1)


def conditional() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(CHANNELS, CHANNELS, 1),
        build('SandwichBN', num_conditions=3),
    ).double()
    nn.init.normal_(model[1].condition_weight)
    nn.init.normal_(model[1].condition_bias)
    return model


def test_each_image_has_its_condition():
    model, x = conditional().eval(), images()
    expected = []
    for image, condition in zip(x, (2, 0, 2), strict=True):
        set_condition(model, condition)
        expected.append(model(image[None]))
    set_condition(model, torch.tensor([2, 0, 2]))
    twin = copy.deepcopy(model)
    for each in (model, twin):
        assert relative_error(each(x), torch.cat(expected)) < WIDE
    set_condition(model, 0)
    assert relative_error(model(x), torch.cat(expected)) > 1e-2
    with pytest.raises(ValueError, match='3 conditions, and .* got 2 images'):
        twin(x[:2])
    with pytest.raises(ValueError, match='which has no fold'):
        ws_mm.bake(twin, x, fold_estimates=True)
    set_condition(model, 2)
    baked = ws_mm.bake(model, x, fold_estimates=True)
    assert relative_error(baked(x), model(x)) < WIDE


@pytest.mark.parametrize('wrong', [3, -1, torch.tensor([0, 3])], ids=str)
def test_conditions_that_no_layer_has_are_named(wrong):
    model = conditional()
    with pytest.raises(ValueError, match=r'must be in \[0, 3\).*num_cond'):
        set_condition(model, wrong)
    assert model[1].condition == 0
    with pytest.raises(ValueError, match='num_conditions=0'):
        build('SandwichBN', num_conditions=0)


def test_the_kernel_is_no_convolution_to_anyone():
    model = nn.Sequential(
        nn.Conv2d(CHANNELS, CHANNELS, 3), build('BNET', kernel_size=5)
    ).double()
    assert not [m for m in model[1].modules() if isinstance(m, nn.Conv2d)]
    x = images(2, CHANNELS, 9, 9)
    kinds = [type(m) for m in ws_mm.convert(model, conv={}, inputs=x)]
    assert kinds == [ws_mm.WSConv2d, type(model[1])]
    # As hosts do with every norm, and with the last one of a block.
    nn.init.constant_(model[1].weight, 0)
    assert not model(x).any()
    model[1].around.data.normal_()
    nn.init.constant_(model[1].weight, 1)
    model.eval()
    baked = ws_mm.bake(model, x, fold_estimates=True)
    assert not disagreements({'y': baked(x)}, {'y': model(x)}, WIDE)


@pytest.mark.parametrize('size', [0, 2, -3, 3.0])
def test_kernels_have_a_middle(size):
    with pytest.raises(ValueError, match=f'kernel_size={size} must be an odd'):
        build('BNET', kernel_size=size)
