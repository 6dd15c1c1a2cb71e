"""Layers under the operations of mmengine and torch, in one process."""

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import reference
import torch
from comparison import (
    TOLERANCE,
    disagreements,
    values_and_gradients,
)
from mmengine.model import ExponentialMovingAverage
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from trained_layer import (
    CHANNELS,
    EPS_MODES,
    GROUPS,
    MODES,
    buffers,
    make_input,
    make_layer,
)

from ws_mm import BCN, SyncEstimatesHook, WSConv2d, standardize_weight


@pytest.mark.parametrize('eps_mode', EPS_MODES)
@pytest.mark.parametrize('fill', [0.0, 0.5, 0.1, 1 / 3, 1e-8, 1e8])
def test_constant_filters(kernels, fill, eps_mode):
    weight = torch.full((2, 7, 3, 3), fill, requires_grad=True)
    output = standardize_weight(weight, eps_mode=eps_mode)
    cotangent = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, weight, cotangent)
    assert output.isfinite().all()
    assert gradient.isfinite().all()
    if fill in (0.0, 0.5):  # their sums are exact: the limit of the formula
        centered = cotangent - cotangent.mean((1, 2, 3), keepdim=True)
        eps = 1e-5 if eps_mode == 'outside' else 1e-5**0.5
        assert not output.any()
        assert not disagreements(
            {'dweight': gradient}, {'dweight': centered / eps}, 1e-5
        )


@pytest.mark.parametrize('eps_mode', EPS_MODES)
@pytest.mark.parametrize('scale', [1e-8, 1e8])
def test_filters_of_extreme_magnitude(kernels, scale, eps_mode):
    weight = {'weight': (torch.randn(4, 7, 3, 3) + 0.3) * scale}
    actual, expected = (
        values_and_gradients(
            lambda weight, function=function: function(
                weight, eps_mode=eps_mode
            ),
            {'weight': weight['weight'].to(dtype)},
            'extreme',
        )
        for function, dtype in (
            (standardize_weight, torch.float32),
            (reference.standardize_weight, torch.float64),
        )
    )
    assert not disagreements(actual, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
@pytest.mark.parametrize('scale', [0.0, 1e-8, 1e8])
def test_inputs_of_extreme_magnitude(kernels, scale, mode):
    layer, x = make_layer(mode=mode), make_input() * scale
    state = {k: v.detach().double() for k, v in layer.state_dict().items()}
    expected_running = {}

    def oracle(input: Tensor) -> Tensor:
        output, running = reference.batch_channel_norm(
            input, state, GROUPS, training=True, momentum=0.3, mode=mode
        )
        expected_running.update(running)
        return output

    actual = values_and_gradients(layer, {'input': x}, 'extreme')
    actual |= buffers(layer)
    expected = values_and_gradients(oracle, {'input': x.double()}, 'extreme')
    expected |= expected_running
    assert not disagreements(actual, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize('bad', [torch.inf, -torch.inf, torch.nan, 1e30])
@pytest.mark.parametrize('mode', MODES)
def test_non_finite_values_do_not_stay(kernels, mode, bad):
    layer, twin = make_layer(mode=mode), make_layer(mode=mode)
    clean, dirty = make_input(), make_input()
    dirty[1, 3, 2, 2] = bad
    before = buffers(layer)
    output = layer(dirty)
    twin(clean)
    if bad != 1e30:  # whose square alone is infinite
        assert not output[1, 2:4].isfinite().any()
    kept = torch.arange(CHANNELS) == 3
    for name, values in layer.named_buffers():
        assert torch.equal(values[kept], before[name][kept])
        torch.testing.assert_close(values[~kept], twin.get_buffer(name)[~kept])
        assert not torch.equal(values[~kept], before[name][~kept])
    after = make_input(seed=3).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(after), after, clean)
    assert gradient.isfinite().all()
    for values in buffers(layer).values():
        assert values.isfinite().all()


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
@pytest.mark.parametrize('bad', [torch.inf, torch.nan])
def test_kernels_agree_on_non_finite_values(monkeypatch, bad, mode):
    dirty = make_input()
    dirty[1, 3, 2, 2] = bad
    outputs = []
    for choice in ('fused', 'plain'):
        monkeypatch.setenv('WS_MM_KERNELS', choice)
        layer = make_layer(mode=mode)
        outputs.append({'output': layer(dirty), **buffers(layer)})
    torch.testing.assert_close(*outputs, equal_nan=True)
    assert not outputs[0]['output'].isfinite().all()


def overflowing_rank(rank: int) -> dict[str, Tensor]:
    layer = make_layer()
    hook = SyncEstimatesHook()
    runner = SimpleNamespace(model=layer)
    hook.before_train(runner)
    x = make_input(seed=rank)
    if rank == 1:
        x[0, 3] = torch.inf
    layer(x)
    hook.after_train_iter(runner, 0)
    return buffers(layer)


def test_a_rank_whose_values_are_not_finite_keeps_the_average_finite(world):
    ranks = world(2).run(overflowing_rank)
    before, expected = buffers(make_layer()), []
    for rank in range(2):
        layer = make_layer()
        layer(make_input(seed=rank))
        expected.append(buffers(layer))
    for name, old in before.items():
        expected[1][name][3] = old[3]
        average = (expected[0][name] + expected[1][name]) / 2
        torch.testing.assert_close(ranks[0][name], average)
        assert torch.equal(ranks[0][name], ranks[1][name])


def test_a_first_batch_far_from_the_initial_estimates(kernels):
    layer = BCN(CHANNELS, GROUPS, momentum=0.1)
    for step in range(150):
        x = torch.randn(1, CHANNELS, 16, 16) * 100 + 1000
        x.requires_grad_()
        output = layer(x)
        (gradient,) = torch.autograd.grad(output, x, torch.randn(output.shape))
        assert output.isfinite().all(), step
        assert gradient.isfinite().all(), step
        assert output.abs().max() < 10
    mean, var = layer.running_mean, layer.running_var
    torch.testing.assert_close(
        mean, torch.full_like(mean, 1000), rtol=0.02, atol=0
    )
    torch.testing.assert_close(
        var, torch.full_like(var, 100**2), rtol=0.15, atol=0
    )


def block() -> nn.Sequential:
    torch.manual_seed(4)
    conv = WSConv2d(CHANNELS, CHANNELS, 3, bias=False)
    return nn.Sequential(conv, make_layer())


def train_step(model: nn.Module, run=None, seed: int = 2) -> dict[str, Tensor]:
    """Output, gradients and buffers of one step."""
    x = make_input(seed=seed).requires_grad_()
    output = (run or model)(x)
    cotangent = torch.randn(
        output.shape, generator=torch.Generator().manual_seed(7)
    )
    leaves = {'x': x, **dict(model.named_parameters())}
    gradients = torch.autograd.grad(output, list(leaves.values()), cotangent)
    return {
        'output': output.detach(),
        **{f'd{k}': g for k, g in zip(leaves, gradients, strict=True)},
        **buffers(model),
    }


def test_gradient_accumulation_moves_the_estimates_per_forward():
    layer, x, dy = make_layer().double(), make_input(), make_input(seed=5)
    state = {k: v.detach().clone() for k, v in layer.state_dict().items()}
    expected = torch.zeros(CHANNELS, dtype=torch.float64)
    for one, cotangent in zip(
        x.double().split(1), dy.double().split(1), strict=True
    ):
        layer(one).backward(cotangent)  # gradients add up, no step between
        bn_weight = state['bn_weight'].clone().requires_grad_()
        output, running = reference.batch_channel_norm(
            one,
            {**state, 'bn_weight': bn_weight},
            GROUPS,
            training=True,
            momentum=layer.momentum,
        )
        expected += torch.autograd.grad(output, bn_weight, cotangent)[0]
        state |= running
    assert not disagreements(
        {**buffers(layer), 'dbn_weight': layer.bn_weight.grad},
        {**running, 'dbn_weight': expected},
        TOLERANCE[torch.float64],
    )


@pytest.mark.parametrize('counting', [False, True])
@pytest.mark.parametrize('update_buffers', [False, True])
def test_moving_average_of_a_model(update_buffers, counting):
    model = block()
    average = ExponentialMovingAverage(
        model, momentum=0.25, update_buffers=update_buffers
    )
    if counting:  # as SyncEstimatesHook does before training
        model[1].count_values()
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    for step in range(3):
        train_step(model, seed=step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        average.update_parameters(model)
        for name, values in model.state_dict().items():
            copied = step == 0 or ('running' in name and not update_buffers)
            expected[name] = (
                values.clone() if copied else expected[name].lerp(values, 0.25)
            )
    assert not disagreements(dict(average.module.state_dict()), expected, 1e-6)
    average.eval()(make_input())


def test_copies_while_values_are_counted():
    model = block()
    model[1].count_values()
    train_step(model)
    file = io.BytesIO()
    pickle.dump(model, file)
    file.seek(0)
    twins = [copy.deepcopy(model), pickle.load(file)]
    seen = model[1].values_seen.on_host
    assert seen > 0
    expected = train_step(model)
    for twin in twins:
        assert twin[1].values_seen.on_host == seen  # and not shared
        actual = train_step(twin)
        for name, values in expected.items():
            assert torch.equal(actual[name], values), name
        assert twin.state_dict().keys() == block().state_dict().keys()


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_compiled_once_for_all_steps(mode):
    torch._dynamo.reset()
    eager, model = block(), block()
    eager[1].mode = model[1].mode = mode
    counter = CompileCounterWithBackend('aot_eager')
    run = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(4):
        actual = train_step(model, run, seed=step)
        expected = train_step(eager, seed=step)
        assert not disagreements(actual, expected, 5e-5)
        for each in (model, eager):  # nor after a step without the compiler
            train_step(each, seed=step)
    assert counter.frame_count == 1


def test_functional_call_moves_the_buffers_it_is_given():
    layer, other = make_layer(), make_layer()
    with torch.no_grad():
        for values in other.state_dict().values():
            values.add_(0.5)
    before = buffers(layer)
    given = {k: v.detach().clone() for k, v in other.state_dict().items()}
    x = make_input()
    output = torch.func.functional_call(layer, given, x)
    assert torch.equal(output, other(x))
    for name, values in layer.named_buffers():
        assert torch.equal(values, before[name])
        assert torch.equal(given[name], other.get_buffer(name))


def strided(x: Tensor) -> Tensor:
    wide = torch.randn(*x.shape[:3], 2 * x.shape[3])
    wide[..., ::2] = x
    return wide[..., ::2]


LAYOUTS = {
    'channels_last': lambda x: x.to(memory_format=torch.channels_last),
    'transposed': lambda x: x.mT.contiguous().mT,
    'strided': strided,
    'offset': lambda x: torch.cat([x, x])[x.shape[0] :],
    'expanded': lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize('samples', [1, 2])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts_of_the_input(kernels, layout, samples):
    results = []
    x = make_input(samples)
    if layout == 'expanded':
        x = x[:1].repeat(samples, 1, 1, 1)
    for change in (LAYOUTS[layout], torch.Tensor.contiguous):
        for model in (block(), make_layer()):
            leaf = change(x.clone()).detach().requires_grad_()
            output = model(leaf)
            cotangent = torch.ones(output.shape).cumsum(3).sin()
            output.backward(cotangent)
            results.append(
                {
                    'output': output,
                    'dx': leaf.grad,
                    **{k: p.grad for k, p in model.named_parameters()},
                    **{f'b {k}': v for k, v in model.named_buffers()},
                }
            )
    for actual, expected in zip(results[:2], results[2:], strict=True):
        assert not disagreements(actual, expected, 5e-5)


def test_deterministic_algorithms(kernels):
    try:
        torch.use_deterministic_algorithms(True)
        first, second = (train_step(block()) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, values in first.items():
        assert torch.equal(values, second[name]), name


@pytest.mark.parametrize('separate', [True, False])
def test_estimates_of_a_head_over_pyramid_levels(separate):
    heads = pytest.importorskip('mmdet.models', exc_type=ImportError)
    kind = heads.RetinaSepBNHead if separate else heads.RetinaHead
    head = kind(
        num_classes=2,
        in_channels=CHANNELS,
        feat_channels=CHANNELS,
        stacked_convs=1,
        conv_cfg=dict(type='ws_mm.WSConv2d'),
        norm_cfg=dict(type='ws_mm.BCN', num_groups=GROUPS),
        **(dict(num_ins=5) if separate else {}),
    )
    levels = [make_input(seed=level) * (level + 1) for level in range(5)]
    scores, boxes = head(levels)
    sum((y * torch.randn_like(y)).sum() for y in scores + boxes).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())
    means = [m.running_mean for m in head.modules() if isinstance(m, BCN)]
    # Two branches, and either their own estimates per level or one of all.
    assert len(means) == (10 if separate else 2)
    assert len({tuple(mean.tolist()) for mean in means}) == len(means)
