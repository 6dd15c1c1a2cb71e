"""Norms of ws_mm/zoo in the place of norm and activation, in any network."""

import copy
import io
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from comparison import relative_error
from mmengine.registry import MODELS
from oracles import Case
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import ws_mm
from ws_mm import zoo
from ws_mm.compat import COMPILES_SUBCLASSES

EXACT = 1e-10
CASES = [case for case in oracles.cases() if case.activates]
ACTS = {
    'ReLU': nn.ReLU(),
    'ReLU in place': nn.ReLU(inplace=True),
    'ReLU6': nn.ReLU6(inplace=True),
    'LeakyReLU': nn.LeakyReLU(0.1),
    'SiLU': nn.SiLU(),
    'Hardswish': nn.Hardswish(),
    'F.relu': F.relu,
    'torch.relu': torch.relu,
    'torch.relu_': torch.relu_,
    'Tensor.relu': Tensor.relu,
    'Tensor.relu_': Tensor.relu_,
    'F.relu in place': partial(F.relu, inplace=True),
    'torch.relu by keyword': lambda x: torch.relu(input=x),
}
cases = pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)


def options_of(case: Case, **more: Any) -> dict[str, Any]:
    return dict(type=f'ws_mm.{case.name}', **case.options, **more)


@torch.no_grad()
def randomized(model: nn.Module) -> nn.Module:
    """In float64, with norms whose thresholds and slopes all differ."""
    generator = torch.Generator().manual_seed(0)
    for module in model.double().modules():
        if getattr(module, 'activates', False):
            for values in module.parameters():
                values.uniform_(-1, 1, generator=generator)
            for values in module.buffers():
                values.uniform_(0.5, 2, generator=generator)
    return model


def step(
    model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor
) -> dict[str, Tensor]:
    """Output, gradients and buffers; every parameter has a gradient."""
    model.zero_grad()
    y = run(x)
    generator = torch.Generator().manual_seed(0)
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    return {
        'output': y.detach(),
        **{n: p.grad.clone() for n, p in model.named_parameters()},
        **{n: b.clone() for n, b in model.named_buffers()},
    }


def differences(
    found: dict[str, Tensor], expected: dict[str, Tensor]
) -> dict[str, float]:
    assert found.keys() == expected.keys()
    errors = {k: relative_error(found[k], v) for k, v in expected.items()}
    return {k: e for k, e in errors.items() if not e <= EXACT}


class Block(nn.Module):
    """The block of a ResNet, with any activation."""

    def __init__(self, case: Case, act: Any = None, **options: Any) -> None:
        super().__init__()
        self.act = act or nn.ReLU(inplace=True)
        norm = options_of(case, num_features=6, **options)
        self.conv1, self.norm1 = nn.Conv2d(6, 6, 3, 1, 1), MODELS.build(norm)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 1), MODELS.build(norm)

    def between(self) -> None:
        """Run between a norm and its activation."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm1(self.conv1(x))
        self.between()
        out = self.norm2(self.conv2(self.act(out)))
        self.between()
        out += x
        return self.act(out)


class ByHand(Block):
    """The same, written out; its norms activate themselves."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm1(self.conv1(x))
        return self.act(self.norm2.linear(self.conv2(out)) + x)


def blocks(case: Case, *act: Any, kind: Any = Block) -> tuple[Block, ByHand]:
    torch.manual_seed(0)
    block = randomized(kind(case, *act, replaces_act=True))
    by_hand = ByHand(case, *act).double()
    by_hand.load_state_dict(block.state_dict())
    return block, by_hand


def image(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 6, 5, 4, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


def test_some_case_activates():
    assert {case.name for case in CASES} >= {'FRN', 'EvoNormS0', 'EvoNormB0'}
    for case in oracles.cases():
        layer = getattr(zoo, case.name)
        assert getattr(layer, 'activates', False) == case.activates


@cases
@pytest.mark.parametrize('act', ACTS.values(), ids=ACTS)
def test_activations_of_a_block(case, act):
    block, by_hand = blocks(case, act)
    for number in range(3):
        x = image(number)
        found, expected = step(block, block, x), step(by_hand, by_hand, x)
        assert not differences(found, expected)
    with torch.inference_mode():
        y = block.eval()(image())
        assert type(y) is Tensor
        assert relative_error(y, by_hand.eval()(image())) <= EXACT


@cases
def test_without_the_argument_a_block_computes_something_else(case):
    _, by_hand = blocks(case)
    doubled = Block(case).double()
    doubled.load_state_dict(by_hand.state_dict())
    assert relative_error(doubled(image()), by_hand(image())) > 1e-3


@cases
def test_changed_values_are_no_longer_those_of_the_norm(case):
    layer = randomized(MODELS.build(options_of(case, num_features=6)))
    layer.replaces_act = True
    x, other = image().detach(), image(1).detach()
    for change in ('add_', 'mul_', '__iadd__', '__setitem__'):
        y = layer(x)
        if change == '__setitem__':
            y[:, 0] = 3
        else:
            getattr(y, change)(other)
        expected = layer.linear(x)
        if change == '__setitem__':
            expected[:, 0] = 3
        elif change == 'mul_':
            expected = expected * other
        else:
            expected = expected + other
        assert relative_error(F.relu(y), expected.relu()) <= EXACT
    y = layer(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    y.requires_grad_()
    assert relative_error(F.relu(y), layer.activated(x)) <= EXACT


@cases
def test_everything_else_gets_plain_values(case):
    layer = randomized(MODELS.build(options_of(case, num_features=6)))
    layer.replaces_act = True
    x = image()
    y, expected = layer(x), layer.linear(x)
    results = {
        'sum': (y + 1, expected + 1),
        'from the right': (1 - y, 1 - expected),
        'in a list': (torch.cat([y, y]), torch.cat([expected, expected])),
        'by keyword': (F.pad(input=y, pad=(1, 1)), F.pad(expected, (1, 1))),
        'in a list, by keyword': (
            torch.cat(tensors=[y, y]),
            torch.cat([expected, expected]),
        ),
        'sliced': (y[1:, ..., 0], expected[1:, ..., 0]),
        'moved': (y.to(torch.float32), expected.to(torch.float32)),
        'detached': (y.detach(), expected.detach()),
        'convolved': (
            F.conv2d(y, torch.ones_like(y[:1])),
            F.conv2d(expected, torch.ones_like(expected[:1])),
        ),
    }
    for name, (found, wanted) in results.items():
        assert type(found) is Tensor, name
        assert relative_error(found, wanted) <= EXACT, name
    file = io.BytesIO()
    torch.save(layer(x.detach()), file)

    class Twice(torch.autograd.Function):
        """A function that the override does not see."""

        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 2

    (found,) = torch.autograd.grad(Twice.apply(y).square().sum(), x)
    (wanted,) = torch.autograd.grad((expected * 2).square().sum(), x)
    assert relative_error(found, wanted) <= EXACT


class Broken(Block):
    """One that a compiler leaves and enters again at each norm."""

    def between(self) -> None:
        torch._dynamo.graph_break()


@cases
@pytest.mark.parametrize('kind', [Block, Broken])
def test_compiled(case, kind):
    block, by_hand = blocks(case, kind=kind)
    whole = kind is Block and COMPILES_SUBCLASSES
    compiled = torch.compile(
        lambda x: block(x), backend='aot_eager', fullgraph=whole
    )
    for number in range(2):
        x = image(number)
        expected = step(by_hand, by_hand, x)
        assert not differences(step(block, compiled, x), expected)


@cases
def test_exported(case):
    block, by_hand = blocks(case)
    block.eval().requires_grad_(False)
    by_hand.eval()
    x = image().detach()
    traced = torch.jit.trace(block, x)
    other = torch.cat([x, x + 1])
    assert relative_error(traced(other), by_hand(other)) <= EXACT
    if not COMPILES_SUBCLASSES:
        return
    program = torch.export.export(block, (x,), strict=True).module()
    assert relative_error(program(x), by_hand(x)) <= EXACT
    with pytest.raises(TypeError, match='strict=True'):
        torch.export.export(block, (x,), strict=False)


@cases
@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpoints(case, reentrant):
    block, by_hand = blocks(case)
    kept = partial(checkpoint, use_reentrant=reentrant)
    expected = step(by_hand, by_hand, image())
    assert not differences(
        step(block, partial(kept, block), image()), expected
    )

    def first(x: Tensor) -> Tensor:
        return block.norm1(block.conv1(x))

    def second(y: Tensor) -> Tensor:
        return block.norm2(block.conv2(block.act(y)))

    # Each holds one side of an activation alone.
    runs = [
        lambda x: block.act(second(kept(first, x)) + x),
        lambda x: block.act(kept(second, first(x)) + x),
    ]
    for run in runs:
        block, by_hand = blocks(case)
        if reentrant:
            with pytest.raises(RuntimeError, match='use_reentrant=False'):
                step(block, run, image())
        else:
            assert not differences(step(block, run, image()), expected)


@cases
def test_copies_and_files(case):
    block, by_hand = blocks(case)
    expected = step(by_hand, by_hand, image())
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for twin in (copy.deepcopy(block), torch.load(file, weights_only=False)):
        assert not differences(step(twin, twin, image()), expected)


@cases
def test_half_precision(case):
    block, by_hand = blocks(case)
    x = image().float()
    with torch.autocast('cpu', torch.bfloat16):
        y = block.float()(x)
    assert y.isfinite().all()
    assert relative_error(y.double(), by_hand(x.double())) < 5e-2


@cases
def test_no_image(case):
    layer = MODELS.build(options_of(case, num_features=6, replaces_act=True))
    y = torch.relu(layer(torch.randn(0, 6, 4, 4)))
    y.sum().backward()
    assert y.shape == (0, 6, 4, 4)
    assert all(p.grad is not None for p in layer.parameters())


@cases
def test_proven_as_the_norm_of_its_convolution(case):
    conv = ws_mm.WSConv2d(6, 6, 3)
    norm = MODELS.build(options_of(case, num_features=6, replaces_act=True))
    model = nn.Sequential(conv, norm, nn.ReLU())
    (report,) = ws_mm.check(model, image().float())
    assert report.how == 'proven'
    assert report.norms == ('1',)
    assert not report.mistake


def train_rank(rank: int, name: str) -> dict[str, Tensor]:
    case = next(case for case in CASES if case.name == name)
    block, _ = blocks(case)
    model = DistributedDataParallel(block, broadcast_buffers=False)
    for number in range(2):  # the second step fails without a gradient
        found = step(model, model, image(2 * number + rank))
    return {n: found[n] for n, _ in model.named_parameters()}


@cases
def test_ranks(case, world):
    first, second = world(2).run(train_rank, case.name)
    assert first
    assert all(torch.equal(second[name], v) for name, v in first.items())


def test_the_argument_is_checked():
    with pytest.raises(ValueError, match="replaces_act='yes'.*norm_cfg"):
        zoo.FRN(6, replaces_act='yes')


# In backbones of the host


def by_hand(model: Any, x: Tensor) -> Tensor:
    """A ResNet of mmdet, written out; its norms activate themselves."""
    x = model.maxpool(model.norm1(model.conv1(x)))
    for name in model.res_layers:
        for block in getattr(model, name):
            out = block.norm1(block.conv1(x))
            last = block.conv2, block.norm2
            if hasattr(block, 'conv3'):
                out = block.norm2(block.conv2(out))
                last = block.conv3, block.norm3
            out = last[1].linear(last[0](out))
            if block.downsample is not None:
                conv, norm = block.downsample
                x = norm.linear(conv(x))
            x = torch.relu(out + x)
    return x


@cases
@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('depth', [18, 50])
def test_resnet(case, depth, with_cp, monkeypatch):
    resnet = pytest.importorskip('host_parts').resnet
    parts = dict(out_indices=(3,), with_cp=with_cp)
    model = resnet(
        depth, norm_cfg=options_of(case, replaces_act=True), **parts
    )
    randomized(model.train() or model)
    other = resnet(depth, norm_cfg=options_of(case), **parts).double()
    plain = resnet(depth, norm_cfg=dict(type='BN'), **parts)
    assert [*model.state_dict()] == [*other.state_dict()]
    assert {*model.state_dict()} >= {
        name
        for name in plain.state_dict()
        if 'running' not in name and 'num_batches' not in name
    }
    other.load_state_dict(model.state_dict())
    other.train()

    calls: Counter[str] = Counter()
    names = {module: name for name, module in model.named_modules()}
    kind = getattr(zoo, case.name)
    activated = kind.activated

    def counted(layer: Any, *args: Any) -> Tensor:
        if layer in names and torch._C._current_graph_task_id() == -1:
            calls[names[layer]] += 1
        return activated(layer, *args)

    monkeypatch.setattr(kind, 'activated', counted)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)
    found = step(model, lambda x: model(x)[0], x.requires_grad_())
    expected = step(other, partial(by_hand, other), x)
    assert not differences(found, expected)
    last = 'bn2' if depth == 18 else 'bn3'
    assert calls == {
        name: 1
        for module, name in names.items()
        if type(module) is kind
        and not name.endswith(last)
        and 'downsample' not in name
    }
    assert relative_error(other(x)[0], expected['output']) > 1e-3


@cases
def test_conv_modules(case):
    ConvModule = pytest.importorskip('mmcv.cnn').ConvModule
    torch.manual_seed(0)
    relu = ConvModule(6, 6, 1, norm_cfg=options_of(case, replaces_act=True))
    alone = ConvModule(6, 6, 1, norm_cfg=options_of(case), act_cfg=None)
    alone.double().load_state_dict(randomized(relu).state_dict())
    x = image()
    assert relative_error(relu(x), alone(x)) <= EXACT


# Against the layers of timm


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('act', [True, False])
@pytest.mark.parametrize(
    ('ours', 'theirs', 'options'),
    [
        (zoo.FRN, 'FilterResponseNormTlu2d', dict(eps=1e-5)),
        (zoo.EvoNormS0, 'EvoNorm2dS0', dict(groups=3, eps=1e-5)),
        (zoo.EvoNormB0, 'EvoNorm2dB0', dict(eps=1e-5)),
    ],
    ids=['FRN', 'S0', 'B0'],
)
def test_equals_timm(ours, theirs, options, act, training):
    layers = pytest.importorskip('timm.layers')
    layer = randomized(ours(6)).float().train(training)
    other = getattr(layers, theirs)(6, apply_act=act, **options)
    other.load_state_dict(layer.state_dict(), strict=act)
    other.train(training)
    x = image().float()
    y = layer(x) if act else layer.linear(x)
    assert relative_error(y, other(x).double()) < 1e-5


def test_group_norm1_is_that_of_timm_and_torch():
    layers = pytest.importorskip('timm.layers')
    layer = zoo.GroupNorm1(6)
    for values in layer.parameters():
        nn.init.uniform_(values)
    x = image().float()
    for other in (layers.GroupNorm1(6), nn.GroupNorm(1, 6)):
        other.load_state_dict(layer.state_dict())
        assert relative_error(layer(x), other(x).double()) < 1e-6
