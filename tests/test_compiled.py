"""BCN under ``torch.compile``; exporters get no part of that form.

The formula of the compiled form itself is tested in test_kernels.py, without
a compiler.
"""

import copy
from functools import partial
from itertools import product
from unittest import mock

import pytest
import reference
import torch
from benchmark.compiled_passes import BAR, passes
from comparison import TOLERANCE, disagreements
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from ws_mm import BCN, WSConv2d
from ws_mm.kernels import compiled, plain

HAS_FORM = hasattr(torch.compiler, 'is_exporting')
needs_form = pytest.mark.skipif(
    not HAS_FORM, reason='before torch 2.7 compilers get what exporters get'
)
CHANNELS, GROUPS = 16, 4


class Block(nn.Module):
    """A norm whose state is not as built, a sum and a ReLU."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.norm = BCN(CHANNELS, GROUPS, momentum=0.3, **kwargs)
        with torch.no_grad():
            for values in (*self.norm.parameters(), *self.norm.buffers()):
                values.uniform_(0.5, 2)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.relu(self.norm(x) + other)


def inputs_of(
    *shape: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    scale = torch.linspace(0.3, 3, shape[1]).view(-1, 1, 1)
    x = torch.randn(shape) * scale + 4 - scale
    return x.to(dtype), torch.randn(shape).to(dtype)


def results(model, run, inputs, cotangent) -> dict[str, Tensor]:
    """Output, all gradients and the buffers after one step."""
    model.zero_grad()
    inputs = [x.clone().requires_grad_() for x in inputs]
    output = run(*inputs)
    output.backward(cotangent)
    return {
        'output': output.detach(),
        **{f'd{number}': x.grad for number, x in enumerate(inputs)},
        **{name: p.grad.clone() for name, p in model.named_parameters()},
        **{name: values.clone() for name, values in model.named_buffers()},
    }


def expected_results(model, inputs, cotangent, mode) -> dict[str, Tensor]:
    """The same by the formula, in float64."""
    twin = copy.deepcopy(model).double()
    state = dict(twin.norm.state_dict(keep_vars=True))
    buffers = {}

    def run(x: Tensor, other: Tensor) -> Tensor:
        output, new = reference.batch_channel_norm(
            x,
            state,
            GROUPS,
            training=twin.training,
            momentum=twin.norm.momentum,
            mode=mode,
        )
        buffers.update({f'norm.{name}': value for name, value in new.items()})
        return torch.relu(output + other)

    found = results(twin, run, [x.double() for x in inputs], cotangent)
    return {**found, **buffers}


# All that compilers may do to the values: AOTAutograd, then Inductor.
@pytest.mark.parametrize('backend', ['aot_eager', 'inductor'])
@pytest.mark.parametrize('case', ['estimate', 'batch', 'eval'])
def test_compiled_equals_formula(case, backend):
    torch._dynamo.reset()
    mode = 'estimate' if case == 'eval' else case
    model = Block(mode=mode).train(case != 'eval')
    # Few samples: torch then computes their mean again in the backward.
    inputs = inputs_of(2, CHANNELS, 9, 11)
    cotangent = torch.randn(2, CHANNELS, 9, 11)
    expected = expected_results(model, inputs, cotangent, mode)
    run = torch.compile(model, backend=backend, fullgraph=True)
    actual = results(model, run, inputs, cotangent)
    assert not disagreements(actual, expected, TOLERANCE[torch.float32])


# Where a compiler meets what is computed again, and with it estimates that
# have moved: a region of its graph, all of it, and what costs little.
CHECKPOINTS = {
    'in the graph': lambda model, compiled: compiled(
        lambda *x: checkpoint(model, *x, use_reentrant=False)
    ),
    'of the graph': lambda model, compiled: (
        lambda *x: checkpoint(compiled(model), *x, use_reentrant=False)
    ),
    'none': lambda model, compiled: compiled(model),
}


@needs_form
@pytest.mark.parametrize(
    ('how', 'mode', 'maps', 'backend'),
    [
        *product(
            ['in the graph', 'of the graph'],
            ['estimate', 'batch'],
            [(9, 11), (1, 1)],
            ['aot_eager'],
        ),
        # Of small maps it computes more again.
        ('none', 'estimate', (1, 1), 'inductor'),
        ('in the graph', 'estimate', (9, 11), 'inductor'),
    ],
    ids=str,
)
def test_recomputed_in_a_compiled_backward(how, mode, maps, backend):
    torch._dynamo.reset()
    model = Block(mode=mode)
    shape = 3, CHANNELS, *maps
    inputs = inputs_of(*shape)
    cotangent = torch.randn(shape)
    expected = expected_results(model, inputs, cotangent, mode)
    run = CHECKPOINTS[how](
        model, partial(torch.compile, backend=backend, fullgraph=True)
    )
    actual = results(model, run, inputs, cotangent)
    assert not disagreements(actual, expected, TOLERANCE[torch.float32])


CASES = {
    'double': dict(dtype=torch.float64),
    'half': dict(dtype=torch.half),
    'bfloat16': dict(dtype=torch.bfloat16),
    'channels_last': dict(layout=torch.channels_last),
    'half channels_last': dict(dtype=torch.half, layout=torch.channels_last),
    'affine per channel': dict(outer_affine='channel'),
    'no affine': dict(affine=False),
    'ranks': dict(mode='sync_batch'),
}


@pytest.mark.parametrize('case', CASES)
def test_compiled_equals_eager(case):
    torch._dynamo.reset()
    kwargs = dict(CASES[case])
    dtype = kwargs.pop('dtype', torch.float32)
    layout = kwargs.pop('layout', torch.contiguous_format)
    model = Block(**kwargs)
    if dtype == torch.float64:
        model.double()
    inputs = [
        x.to(memory_format=layout)
        for x in inputs_of(2, CHANNELS, 9, 11, dtype=dtype)
    ]
    cotangent = torch.randn(2, CHANNELS, 9, 11).to(inputs[0])
    twin = copy.deepcopy(model)
    expected = results(twin, twin, inputs, cotangent)
    run = torch.compile(model, backend='aot_eager', fullgraph=True)
    actual = results(model, run, inputs, cotangent)
    assert actual['output'].dtype == dtype
    assert actual['output'].is_contiguous(memory_format=layout)
    assert not disagreements(actual, expected, TOLERANCE[dtype])


@needs_form
@pytest.mark.parametrize('marked', [False, True])
def test_compiled_once_for_all_sizes(marked):
    torch._dynamo.reset()
    model = Block()
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend('aot_eager')
    run = torch.compile(model, backend=counter, fullgraph=True)
    for height, width in ((9, 11), (13, 7), (8, 20), (5, 6)):
        inputs = inputs_of(2, CHANNELS, height, width)
        cotangent = torch.randn(2, CHANNELS, height, width)
        expected = results(twin, twin, inputs, cotangent)
        if marked:
            for x in inputs:
                for dim in (2, 3):
                    torch._dynamo.mark_dynamic(x, dim)
        model.zero_grad()
        output = run(*inputs)
        output.backward(cotangent)
        torch.testing.assert_close(output, expected['output'])
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name])
        for name, values in model.named_buffers():
            torch.testing.assert_close(values, expected[name])
    # One for the first size, unless it is known to change, and one for all.
    assert counter.frame_count == (1 if marked else 2)


def test_estimates_stay_where_a_batch_is_not_finite():
    torch._dynamo.reset()
    model = Block().norm
    run = torch.compile(model, backend='aot_eager', fullgraph=True)
    x = inputs_of(2, CHANNELS, 5, 6)[0]
    for channel, value in ((1, float('nan')), (5, float('inf')), (9, 1e30)):
        x[1, channel, 2, 3] = value
    before = {name: values.clone() for name, values in model.named_buffers()}
    run(x)
    kept = torch.zeros(CHANNELS, dtype=torch.bool)
    kept[[1, 5, 9]] = True
    for name, values in model.named_buffers():
        assert torch.equal(values == before[name], kept), name


EXPORTERS = {
    'export': lambda model, x: torch.export.export(model, (x,)),
    'strict export': lambda model, x: torch.export.export(
        model, (x,), strict=True
    ),
    'make_fx': lambda model, x: make_fx(model)(x),
    'trace': lambda model, x: torch.jit.trace(model, x, check_trace=False),
}


@needs_form
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('exporter', EXPORTERS)
def test_exporters_get_the_norms_of_torch(exporter, training):
    model = nn.Sequential(WSConv2d(3, CHANNELS, 3), BCN(CHANNELS, GROUPS))
    model.train(training)
    x = torch.randn(2, 3, 9, 11)
    # A compiler that ran before leaves nothing behind.
    torch.compile(model, backend='eager', fullgraph=True)(x)
    with torch.no_grad():
        found = EXPORTERS[exporter](model, x)
    graph = str(getattr(found, 'inlined_graph', found.graph))
    assert 'batch_norm' in graph
    assert 'group_norm' in graph
    assert 'var_mean' not in graph
    assert 'ops.ws_mm' not in graph  # no operator of ours for another runtime


@needs_form
def test_compilers_get_one_affine():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.graph))
        return graph

    torch.compile(Block(), backend=keep)(*inputs_of(2, CHANNELS, 9, 11))
    (graph,) = graphs
    assert 'var_mean' in graph
    assert 'group_norm' not in graph


@needs_form
@pytest.mark.skipif(
    not hasattr(torch._inductor.config, '_post_fusion_custom_pass'),
    reason='this Inductor shows nobody its schedule',
)
def test_passes_over_activations():
    found = {
        mode: passes(BCN(64, mode=mode), branches=branches)
        for mode, branches in (('estimate', 0), ('batch', 1))
    }
    bar = torch.tensor(BAR)
    assert (torch.tensor(found['estimate']) <= bar).all(), found
    # Another branch adds its own tensor, read and as a gradient written.
    others = torch.tensor((1.0, 1.75))
    assert (torch.tensor(found['batch']) <= bar + others).all(), found
    composed = plain.batch_channel_norm
    with mock.patch.object(compiled, 'batch_channel_norm', composed):
        assert (torch.tensor(passes(BCN(64))) > bar).all()
