"""One contract for every norm and filter of ws_mm/zoo.

Each has its formula in tests/oracles; nothing here names one of them.
"""

import copy
import io
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracles
import pytest
import torch
from comparison import disagreements, relative_error
from mmengine.registry import HOOKS, MODELS
from oracles import Case
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import ws_mm
from ws_mm.running_statistics import RunningStatistics

CASES = oracles.cases()
EXACT = 1e-10  # in float64, through inversions of covariances, too
WRONG = 1e-3  # what a wrong variant differs by at least
STEPS = 3


def named(cases: list[Case]) -> Any:
    return pytest.mark.parametrize('case', cases, ids=lambda case: case.name)


NORMS = [case for case in CASES if not case.is_conv]
CONVS = [case for case in CASES if case.is_conv]
RUNNING = [
    case
    for case in NORMS
    if issubclass(MODELS.get(f'ws_mm.{case.name}'), RunningStatistics)
]
norms, convs, both = named(NORMS), named(CONVS), named(CASES)


def new(case: Case, channels: int | None = None, **options: Any) -> Any:
    """A layer as built, by its registered name."""
    number = channels or case.channels
    counts = dict(num_features=number)
    if case.is_conv:
        counts = dict(in_channels=number, out_channels=number, kernel_size=3)
    return MODELS.build(
        dict(type=f'ws_mm.{case.name}') | counts | {**case.options, **options}
    )


@torch.no_grad()
def random_state(case: Case, model: nn.Module, seed: int = 0) -> None:
    """Parameters and statistics as of a trained network."""
    generator = torch.Generator().manual_seed(seed)
    for name, values in model.state_dict().items():
        own = name.rpartition('.')[2]
        if own in case.values:
            values.copy_(case.values[own](values))
        elif not values.is_floating_point():
            continue
        elif 'mean' in own or 'bias' in own or values.dim() > 2:
            values.normal_(generator=generator)
        else:
            values.uniform_(0.5, 2, generator=generator)


def network(case: Case, seed: int = 0, **options: Any) -> nn.Module:
    """The layer, within what it needs around it, in float64."""
    torch.manual_seed(seed)
    model = case.within(new(case, **options)).double()
    random_state(case, model, seed)
    return model


def images(
    case: Case, number: int = 2, seed: int = 0, size: tuple[int, ...] = (5, 4)
) -> Tensor:
    """Images whose channels have means and scales of their own."""
    generator = torch.Generator().manual_seed(seed)
    shape = number, case.channels, *size
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.5, 3, case.channels, dtype=x.dtype)
    return x * scale.view(-1, *[1] * len(size)) + scale.flip(0).view(
        -1, *[1] * len(size)
    )


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def step(
    model: nn.Module,
    x: Tensor,
    seed: int = 0,
    run: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Output, gradients under a random cotangent, and buffers after it."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = (run or model)(x)
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    y.backward(direction.to(y.dtype))
    return {
        'output': y.detach(),
        'dx': x.grad,
        **{f'd{n}': p.grad for n, p in model.named_parameters()},
        **{n: b.clone() for n, b in model.named_buffers()},
    }


def expected_step(
    case: Case,
    state: dict[str, Tensor],
    names: dict[str, list[str]],
    x: Tensor,
    seed: int,
    training: bool,
    **wrong: Any,
) -> dict[str, Tensor]:
    """The same by the oracle; it changes the buffers in state."""
    x = x.detach().clone().requires_grad_()
    leaves = {n: state[n].clone().requires_grad_() for n in names['parameter']}
    y, after = case.oracle(x, {**state, **leaves}, training, **wrong)
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad(
        y, [x, *leaves.values()], direction, materialize_grads=True
    )
    state.update({name: v.detach() for name, v in after.items()})
    dx, *others = grads
    return {
        'output': y.detach(),
        'dx': dx,
        **{f'd{n}': g for n, g in zip(leaves, others, strict=True)},
        **{n: state[n] for n in names['buffer']},
    }


def compare(case: Case, **wrong: Any) -> dict[str, float]:
    """Errors over steps of training with moving weights, then evaluation."""
    model = network(case)
    state = state_of(model)
    names = dict(
        parameter=[n for n, _ in model.named_parameters()],
        buffer=[n for n, _ in model.named_buffers()],
    )
    errors: dict[str, float] = {}
    for number in range(STEPS + 1):
        training = number < STEPS
        model.train(training)
        x = images(case, seed=number)
        actual = step(model, x, number)
        with warnings.catch_warnings():
            expected = expected_step(
                case, state, names, x, number, training, **wrong
            )
        assert actual.keys() == expected.keys()
        for name, values in expected.items():
            error = relative_error(actual[name], values)
            key = f'{"step" if training else "eval"} {number}: {name}'
            errors[key] = error
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.rpartition('.')[2] not in case.values:
                    generator = torch.Generator().manual_seed(number)
                    change = torch.randn(
                        parameter.shape, generator=generator
                    ).double()
                    parameter.add_(change, alpha=0.05)
                state[name] = parameter.detach().clone()
    return errors


@norms
@pytest.mark.parametrize('kernels', ['plain', 'fused'])
def test_norm_is_its_formula(case, kernels, monkeypatch):
    monkeypatch.setenv('WS_MM_KERNELS', kernels)
    errors = compare(case)
    assert not {k: e for k, e in errors.items() if not e <= EXACT}


@pytest.mark.parametrize(
    ('case', 'wrong'),
    [
        pytest.param(case, wrong, id=f'{case.name} {"-".join(wrong)}')
        for case in NORMS
        for wrong in case.wrong
    ],
)
def test_wrong_norms_are_rejected(case, wrong):
    assert max(compare(case, **wrong).values()) > WRONG


def test_every_method_has_a_case_with_a_wrong_variant_and_is_on_the_page():
    methods = {
        name for name, x in vars(ws_mm.zoo).items() if isinstance(x, type)
    }
    # mmcv's operator has no float64 oracle here: test_zoo_deformable.py.
    tested = {case.name for case in CASES}
    assert {name for name in methods - tested if 'Deform' not in name} == set()
    assert [case.name for case in CASES if not case.wrong] == []
    page = (Path(__file__).parents[1] / 'docs/zoo.md').read_text()
    assert [name for name in methods if f'`{name}' not in page] == []


@convs
def test_filters_are_their_formula(case):
    layer = network(case)
    weights = dict(layer.named_parameters())
    names = [n for n in weights if n != 'bias']
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(layer.weight.shape, generator=generator).double()

    def results(filters: Tensor, leaves: list[Tensor]) -> dict[str, Tensor]:
        grads = torch.autograd.grad(filters, leaves, direction)
        return {
            'filters': filters.detach(),
            **{f'd{n}': g for n, g in zip(names, grads, strict=True)},
        }

    actual = results(
        layer.standardized_weight(), [weights[name] for name in names]
    )
    state = {n: v.clone() for n, v in state_of(layer).items()}
    leaves = [state[name].requires_grad_() for name in names]

    def oracle(**wrong: Any) -> dict[str, Tensor]:
        return results(case.oracle(state['weight'], state, **wrong), leaves)

    assert not disagreements(actual, oracle(), EXACT)
    for wrong in case.wrong:
        assert disagreements(actual, oracle(**wrong), WRONG), wrong
    x = images(case)
    y = nn.functional.conv2d(x, case.oracle(state['weight'], state))
    y = y + layer.bias.view(-1, 1, 1)
    assert relative_error(layer(x), y) <= EXACT


@both
def test_half_precision_is_close(case):
    model = network(case).float()
    exact = copy.deepcopy(model).double()
    if case.is_conv:
        model.eval()
        exact.eval()
    x = images(case).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        y = model(x)
    assert y.isfinite().all()
    assert relative_error(y.double(), exact(x.double())) < 5e-2
    for name, buffer in model.named_buffers():
        assert buffer.dtype != torch.bfloat16, name


@both
def test_half_of_a_model_keeps_its_statistics(case):
    model = network(case).float()
    before = dict(model.named_buffers())
    model.bfloat16()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    y = model(images(case).bfloat16())
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


@both
def test_no_image(case):
    model = network(case)
    before = state_of(model)
    result = step(model, images(case, 0))
    assert result['output'].shape[0] == 0
    assert all(torch.equal(v, before[k]) for k, v in state_of(model).items())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@norms
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_one_image_of_one_value(case, training):
    model = network(case).train(training)
    x = images(case, 1, size=(1, 1))
    if training and case.one_value:
        before = state_of(model)
        with pytest.raises(ValueError, match=case.one_value):
            model(x)
        after = state_of(model)
        assert all(torch.equal(v, before[k]) for k, v in after.items())
        return
    assert all(v.isfinite().all() for v in step(model, x).values())


@named([case for case in NORMS if case.one_image])
def test_one_image_is_refused(case):
    model = network(case)
    with pytest.raises(ValueError, match=case.one_image):
        model(images(case, 1))
    assert model.eval()(images(case, 1)).isfinite().all()


@norms
@pytest.mark.parametrize('size', [(), (7,), (3, 2, 2)], ids=len)
def test_other_dimensions_run_or_are_refused(case, size):
    model = new(case).double()
    x = images(case, 3, size=size)
    if len(size) in case.refuses:
        with pytest.raises(ValueError, match=case.name):
            model(x)
        return
    assert all(v.isfinite().all() for v in step(model, x).values())


@both
@pytest.mark.parametrize('channels', [2, 5, 48, 96])
def test_channels_of_real_networks(case, channels):
    model = case.within(new(case, channels))
    x = torch.randn(2, channels, 6, 6, requires_grad=True)
    model(x).square().mean().backward()
    assert x.grad.isfinite().all()
    shape = 2, channels + 1, 6, 6
    with pytest.raises((ValueError, RuntimeError), match=str(channels)):
        model(torch.randn(shape))


@norms
@pytest.mark.parametrize('bad', [float('inf'), float('nan')])
def test_what_is_not_finite_is_forgotten(case, bad):
    model = network(case)
    step(model, images(case))
    x = images(case, seed=1)
    x[0, 1] = bad
    step(model, x)
    for number in range(2, 4):
        result = step(model, images(case, seed=number))
        broken = [n for n, v in result.items() if not v.isfinite().all()]
        assert not broken


@norms
def test_evaluation_takes_each_image_alone_and_changes_nothing(case):
    model = network(case)
    step(model, images(case))
    model.eval()
    before = state_of(model)
    x = images(case, 3, seed=1)
    together = model(x)
    alone = torch.cat([model(one[None]) for one in x])
    assert relative_error(together, alone) <= EXACT
    assert all(torch.equal(v, before[k]) for k, v in state_of(model).items())


@both
def test_copies_train_on_as_the_original(case):
    model = network(case)
    for number in range(2):
        step(model, images(case, seed=number))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = network(case, seed=1)
    loaded.load_state_dict(model.state_dict())
    twins = [
        copy.deepcopy(model),
        torch.load(file, weights_only=False),
        *([] if case.forgets else [loaded]),
    ]
    x = images(case, seed=3)
    expected = step(model, x)
    for twin in twins:
        found = step(twin, x)
        assert all(torch.equal(found[k], v) for k, v in expected.items())


@both
def test_reset_restores_what_was_built(case):
    torch.manual_seed(3)
    fresh = new(case).double()
    other = network(case)
    layer = next(m for m in other.modules() if type(m) is type(fresh))
    with torch.no_grad():
        for values in (*layer.parameters(), *layer.buffers()):
            values.fill_(7)
    if case.is_conv:
        layer.reset_parameters()
        for name, _ in fresh.named_parameters():
            assert not (layer.get_parameter(name) == 7).any(), name
        return
    for module in layer.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    expected = state_of(fresh)
    for name, values in state_of(layer).items():
        # As built: in float32.
        assert torch.equal(values.float(), expected[name].float()), name


@both
def test_wrong_arguments_are_named(case):
    with pytest.raises(TypeError, match=f'{case.name}.*epps'):
        new(case, epps=1e-3)
    if not case.is_conv:
        with pytest.raises(ValueError, match='eps=-1'):
            new(case, eps=-1)
    if 'momentum' in ws_mm.running_statistics.legal_arguments(type(new(case))):
        with pytest.raises(ValueError, match='momentum=2'):
            new(case, momentum=2)


@norms
def test_without_affine(case):
    layer = new(case, affine=False)
    assert layer.weight is None
    assert layer.bias is None
    result = step(case.within(layer).double(), images(case))
    assert all(v.isfinite().all() for v in result.values())


@norms
@pytest.mark.skipif(
    not oracles.RECENT_COMPILER, reason='older versions of torch save more'
)
def test_saves_what_it_says(case, monkeypatch):
    monkeypatch.setenv('WS_MM_KERNELS', 'fused')
    layer = new(case)
    x = torch.randn(2, case.channels, 64, 64, requires_grad=True)
    layer(x)  # what a first forward makes
    kept = {}

    def pack(values: Tensor) -> Tensor:
        storage = values.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return values

    with saved_tensors_hooks(pack, lambda values: values):
        y = layer(x)
    assert y.requires_grad
    assert round(sum(kept.values()) / x.nbytes, 1) == case.saves


@both
def test_recomputed_activations_give_the_same(case):
    plain, recomputed = network(case), network(case)
    for number in range(STEPS):
        x = images(case, seed=number)
        expected = step(plain, x, number)
        run = partial(checkpoint, recomputed, use_reentrant=False)
        found = step(recomputed, x, number, run)
        assert not disagreements(found, expected, EXACT)


@both
@pytest.mark.parametrize(
    'recomputed',
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                not hasattr(torch.compiler, 'is_exporting'),
                reason='not before torch 2.7',
            ),
        ),
    ],
)
def test_compiled_is_the_same(case, recomputed):
    reason = case.not_compiled or (recomputed and case.not_recomputed)
    if reason:
        pytest.skip(reason)
    torch._dynamo.reset()  # it counts the cases as compilations of one frame
    plain, other = network(case), network(case)
    # Dynamo skips the frames of torch.nn, so that a function calls it.
    run = partial(checkpoint, other, use_reentrant=False)
    compiled = torch.compile(
        lambda x: run(x) if recomputed else other(x),
        backend='aot_eager',
        fullgraph=True,
    )
    for number in range(2):
        x = images(case, seed=number)
        found = step(other, x, number, compiled)
        assert not disagreements(found, step(plain, x, number), EXACT)


@both
def test_exported_is_the_same(case):
    model = network(case)
    step(model, images(case))
    model.eval().requires_grad_(False)
    x = images(case, seed=1)
    expected = model(x)
    program = torch.export.export(model, (x,))
    module = program.module() if callable(program.module) else program
    assert relative_error(module(x), expected) <= EXACT
    traced = torch.jit.trace(model, x)
    other = images(case, 3, seed=2)
    assert relative_error(traced(other), model(other)) <= EXACT


@both
def test_frozen_parameters_get_no_gradient(case):
    model = network(case).requires_grad_(False)
    x = images(case).requires_grad_()
    y = model(x)
    y.backward(torch.randn_like(y))
    assert x.grad.isfinite().all()
    assert all(p.grad is None for p in model.parameters())


def train_rank(rank: int, name: str, sizes: tuple[int, ...]) -> Any:
    case = next(case for case in oracles.cases() if case.name == name)
    model = DistributedDataParallel(network(case), broadcast_buffers=False)
    runner = SimpleNamespace(model=model)
    hook = HOOKS.build(dict(type='ws_mm.SyncEstimatesHook'))
    hook.before_train(runner)
    for number in range(STEPS):
        x = images(case, sum(sizes), number).split(sizes)[rank]
        result = step(model, x, number)
        hook.after_train_iter(runner, number)
    layers = [
        m
        for m in model.modules()
        if isinstance(m, RunningStatistics) and m.estimating
    ]
    statistics = {
        f'{i} {k}': getattr(m, k).clone()
        for i, m in enumerate(layers)
        for k in m.statistics
    }
    grads = {k: v for k, v in result.items() if k.startswith('dmodule')}
    return statistics, grads


@both
@pytest.mark.parametrize('sizes', [(3, 1), (2, 0)], ids=str)
def test_ranks_stay_equal(case, sizes, world):
    if case.one_image and 1 in sizes:
        pytest.skip(case.one_image)
    first, second = world(2).run(train_rank, case.name, sizes)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(other[k], v) for k, v in one.items())
        assert all(v.isfinite().all() for v in one.values())


@named(RUNNING)
def test_update_estimates_measures_it(case):
    model = network(case)
    before = state_of(model)
    sizes = 2, 0, 2  # a head may get no RoI
    ws_mm.update_estimates(model, map(partial(images, case), sizes, range(3)))
    after = state_of(model)
    changed = {
        name.rpartition('.')[2]
        for name, values in after.items()
        if not torch.equal(values, before[name])
    }
    measured = set(new(case).double().batch_statistics(images(case)))
    assert changed == measured
    assert all(v.isfinite().all() for v in after.values())


@named([c for c in [*CONVS, *RUNNING] if not c.keeps])
def test_bake_gives_plain_layers(case):
    first = nn.Conv2d(3, case.channels, 1)
    model = nn.Sequential(first, new(case)).double()
    if case.is_conv:
        model.append(nn.BatchNorm2d(case.channels).double())
    random_state(case, model)
    model.eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    baked = ws_mm.bake(model, x, fold_estimates=True)
    assert relative_error(baked(x), model(x)) <= EXACT
    kinds = {type(m).__module__.partition('.')[0] for m in baked.modules()}
    assert kinds == {'torch'}
