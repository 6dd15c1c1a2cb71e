"""A norm defined here gets all that ws_mm does for its own, unchanged.

The page for those who add a norm, docs/add_a_norm.md, holds it; nothing in
ws_mm names it.
"""

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from comparison import TOLERANCE, disagreements
from experiments import norms
from mmengine.registry import HOOKS, MODELS
from shipped import apply_norm
from test_zoo import EXACT, WRONG, compare
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import ws_mm
from ws_mm import hooks, running_statistics
from ws_mm.config_layers import has_same_weights
from ws_mm.running_statistics import RunningStatistics
from ws_mm.shapes import build_without_memory

ROOT = Path(__file__).resolve().parents[1]
CHANNELS = 6
MOMENTUM = 0.3
WIDE = TOLERANCE[torch.float64]


def of_the_page() -> dict[str, Any]:
    """The blocks of docs/add_a_norm.md: a module, its oracle, its row."""
    page = (ROOT / 'docs/add_a_norm.md').read_text()
    norm, oracle, row = re.findall(r'^```python\n(.*?)^```', page, re.M | re.S)
    # Pickle finds the class in this module.
    names: dict[str, Any] = {'__name__': __name__, 'WS': norms.WS}
    exec(norm + oracle, names)
    return names | {'row': eval(f'{{{row}}}', names)}


PAGE = of_the_page()
RunningRMS: Any = PAGE['RunningRMS']


def layer() -> Any:
    return RunningRMS(CHANNELS, momentum=MOMENTUM).double()


def images(number: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = number, CHANNELS, 5, 4
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x * torch.linspace(0.5, 3, CHANNELS).view(-1, 1, 1) + 1


def large(number: int, seed: int = 0) -> Tensor:
    return images(number, seed).repeat(1, 1, 2, 3)


def square(x: Tensor) -> Tensor:
    """The mean square of each channel, from its definition."""
    values = x.transpose(0, 1).flatten(1)
    return torch.stack([(row * row).sum() / row.numel() for row in values])


def state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def train_rank(rank: int, sizes: tuple[int, ...]) -> dict[str, Tensor]:
    model = DistributedDataParallel(layer(), broadcast_buffers=False)
    runner = SimpleNamespace(model=model)
    hook = HOOKS.build(dict(type='ws_mm.SyncEstimatesHook'))
    hook.before_train(runner)
    for step in range(3):
        model(images(sum(sizes), step).split(sizes)[rank]).sum().backward()
        hook.after_train_iter(runner, step)
    return dict(model.module.named_buffers())


@pytest.mark.parametrize('sizes', [(3, 1), (2, 0)])
def test_ranks_have_the_statistics_of_one_process(sizes, world):
    first, second = world(2).run(train_rank, sizes)
    expected = layer()
    for step in range(3):
        expected(images(sum(sizes), step))
    assert torch.equal(first['running_square'], second['running_square'])
    assert not disagreements(first, dict(expected.named_buffers()), WIDE)
    # Ranks alike, whatever they saw, would differ from that.
    unweighted = layer()
    for step in range(3):
        parts = images(sum(sizes), step).split(sizes)
        mean = torch.stack([square(x) for x in parts if len(x)]).mean(0)
        unweighted.move_statistics({'running_square': mean}, MOMENTUM)
    if 0 not in sizes:
        wrong = dict(unweighted.named_buffers())
        assert disagreements(first, wrong, 1e-3)


def missing_hook_rank(rank: int) -> list[str]:
    from ws_mm import running_statistics

    running_statistics._reported.clear()
    layer()(images(1))
    return running_statistics._reported


def test_a_missing_hook_is_reported_with_the_name_of_the_class(world):
    (line,), nothing = world(2).run(missing_hook_rank)
    assert line.startswith('RunningRMS layers train')
    assert not nothing


def test_frozen_as_built_is_reported(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(hooks, '_warn_once', lines.append)
    model = nn.ModuleDict(dict(fresh=layer(), learned=layer()))
    model['learned'](images(2))
    model.eval()
    hooks.report_frozen(model)
    assert 'fresh' in lines[0]
    assert 'learned' not in lines[0].split('estimates: ')[1]


@pytest.mark.parametrize('name', ['running_square', 'weight'])
def test_what_was_learned_or_measured_is_not_as_built(name: str) -> None:
    model = layer()
    assert model.is_as_built()
    with torch.no_grad():
        getattr(model, name).normal_()
    assert not model.is_as_built()


@pytest.mark.parametrize(
    ('given', 'arguments', 'eps'),
    [
        (1e-3, {}, 1e-3),
        (1e-3, {'eps': 1e-2}, 1e-2),
        (0.0, {}, 1e-5),
        (None, {}, 1e-5),
    ],
)
def test_eps_is_that_of_the_norm_before(
    given: float | None, arguments: dict[str, float], eps: float
) -> None:
    norm = nn.BatchNorm2d(CHANNELS)
    if given is None:
        del norm.eps
    else:
        norm.eps = given
    made, _ = RunningRMS.from_norm(norm, arguments)
    assert made.eps == eps


@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16])
def test_half_keeps_the_statistics_in_float32(dtype):
    model = RunningRMS(CHANNELS)
    model.running_square.fill_(1.001)
    before = model.running_square.clone()
    model.to(dtype)
    assert model.weight.dtype == dtype
    assert torch.equal(model.running_square, before)
    model.running_square = before.to(dtype)  # as FSDP's buffer_dtype does
    model(images(1).to(dtype))
    assert model.running_square.dtype == torch.float32


def test_a_subclass_keeps_its_own_statistics_in_float32() -> None:
    class Two(RunningRMS):
        statistics: ClassVar = {
            **RunningRMS.statistics,
            'running_peak': 0.0,
        }

    model = Two(CHANNELS)
    for name in Two.statistics:  # as FSDP's buffer_dtype does
        setattr(model, name, model.get_buffer(name).half())
    model(images(1).float())
    for values in model.buffers():
        assert values.dtype == torch.float32


def test_statistics_move_once_where_activations_are_recomputed():
    model = layer()
    x = images(2).requires_grad_()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    expected = (1 - MOMENTUM) + MOMENTUM * square(x)
    assert not disagreements(
        {'square': model.running_square}, {'square': expected}, WIDE
    )


class Attached(RunningRMS):
    """One whose statistics of a batch have a graph."""

    def batch_statistics(self, input: Tensor) -> dict[str, Tensor]:
        return {'running_square': input.square().mean((0, 2, 3))}


def test_buffers_do_not_hold_the_graph_of_a_batch() -> None:
    model, expected = Attached(CHANNELS).double(), RunningRMS(CHANNELS)
    x = images(2).requires_grad_()
    for _ in range(2):  # a second backward through the first would fail
        model(x).backward(torch.randn_like(x))
        expected.double()(x.detach())
    assert not model.running_square.requires_grad
    assert not disagreements(
        dict(model.named_buffers()), dict(expected.named_buffers()), WIDE
    )


def test_nothing_and_what_is_not_finite_move_no_statistics():
    model = layer()
    model(images(0))
    assert torch.equal(model.running_square, layer().running_square)
    x = images(2)
    x[0, 1, 0, 0] = float('inf')
    x[0, 2, 0, 0] = float('nan')
    model(x)
    expected = (1 - MOMENTUM) + MOMENTUM * square(x)
    expected[1:3] = 1
    assert not disagreements(
        {'square': model.running_square}, {'square': expected}, WIDE
    )


def test_registered_names_build_it():
    for name in ('RunningRMS', 'ws_mm.RunningRMS'):
        built = MODELS.build(dict(type=name, num_features=3, momentum=0.5))
        assert isinstance(built, RunningRMS)
        assert ws_mm.running_statistics.norm_class(name) is RunningRMS
    assert ws_mm.running_statistics.norm_class('Sequential') is None


def network(*norms: nn.Module) -> nn.Sequential:
    layers: list[nn.Module] = []
    for norm in norms:
        conv = nn.Conv2d(CHANNELS, CHANNELS, 3, bias=not layers)
        layers += [conv, norm, nn.ReLU()]
    return nn.Sequential(*layers).double()


def converted(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    plain = network(nn.BatchNorm2d(CHANNELS), nn.GroupNorm(2, CHANNELS))
    nn.init.uniform_(plain[1].weight, 0.5, 2)
    new = ws_mm.convert(
        plain,
        conv={},
        norm=dict(type='ws_mm.RunningRMS', **options),
        inputs=large(1),
    )
    assert torch.equal(new[1].weight, plain[1].weight)
    return new


def test_convert_puts_it_in_the_place_of_other_norms():
    new = converted(momentum=0.5)
    kinds = [type(m).__name__ for m in new]
    assert kinds == ['WSConv2d', 'RunningRMS', 'ReLU'] * 2
    assert new[1].momentum == 0.5
    assert new[1].running_square.dtype == torch.float64
    with pytest.raises(TypeError, match="RunningRMS has no argument 'groups'"):
        converted(groups=2)
    with pytest.raises(ValueError, match=r'LayerNorm.*makes BCN, or'):
        ws_mm.convert(new, norm=dict(type=nn.LayerNorm))
    with pytest.raises(ValueError, match='nothing to convert'):
        ws_mm.convert(new, norm=dict(type=RunningRMS))


@pytest.mark.parametrize('inputs', [None, large(1)], ids=['names', 'run'])
def test_check_knows_it_as_a_norm(inputs):
    model = nn.Sequential(ws_mm.WSConv2d(CHANNELS, CHANNELS, 3), layer())
    assert not ws_mm.check(model.double(), inputs).mistakes
    del model[1]
    assert ws_mm.check(model, inputs).mistakes


def test_update_estimates_measures_all_values():
    model = nn.Sequential(layer(), layer())
    batches = [images(1, 1), images(3, 2)[..., :2], images(0)]
    ws_mm.update_estimates(model, batches)
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in batches], 1)
    expected = (values * values).sum(1) / values.shape[1]
    found = {'square': model[0].running_square}
    assert not disagreements(found, {'square': expected}, WIDE)
    alike = torch.stack([square(x) for x in batches[:2]]).mean(0)
    assert disagreements(found, {'square': alike}, 1e-3)


def test_statistics_that_nothing_has_are_not_asked_for() -> None:
    class Peaks(RunningRMS):
        def batch_statistics(self, input: Tensor) -> dict[str, Tensor]:
            # torch knows no maximum of no value.
            return {'running_square': input.amax((0, 2, 3))}

    model = nn.Sequential(Peaks(CHANNELS)).double()
    x = images(2)
    ws_mm.update_estimates(model, [images(0), x])
    assert torch.equal(model[0].running_square, x.amax((0, 2, 3)))


def test_arguments_that_a_class_hands_on_are_no_names() -> None:
    class Open(RunningStatistics):
        def __init__(self, num_features: int, *more: Any, **others: Any):
            super().__init__(*more, **others)

    assert running_statistics.legal_arguments(Open) == ('num_features',)


def test_bake_folds_it():
    model = converted()
    model(large(4))
    model.eval()
    x = large(2, 5)
    baked = ws_mm.bake(model, x, fold_estimates=True)
    kinds = [type(m).__name__ for m in baked]
    assert kinds == ['Conv2d', 'Identity', 'ReLU'] * 2
    assert not disagreements({'y': baked(x)}, {'y': model(x)}, WIDE)


class Unfolded(RunningRMS):
    """One that declares no fold."""

    folded = RunningStatistics.folded

    def forward(self, input: Tensor) -> Tensor:
        return input


def test_one_without_a_fold_is_rejected_by_name():
    model = network(Unfolded(CHANNELS)).eval()
    with pytest.raises(ValueError, match='1 is a Unfolded, which has no fold'):
        ws_mm.bake(model, large(1), fold_estimates=True)


def test_symbolic_trace_records_it_as_a_leaf():
    traced = fx.symbolic_trace(nn.Sequential(layer()))
    assert [n.op for n in traced.graph.nodes] == [
        'placeholder',
        'call_module',
        'output',
    ]


def test_norm_and_activation_in_one_are_copied_and_pickled(tmp_path):
    timm = pytest.importorskip('timm.layers')
    old = network(timm.BatchNormAct2d(CHANNELS))
    new = ws_mm.convert(old, norm=dict(type='ws_mm.RunningRMS'))
    assert type(new[1]).__name__ == 'RunningRMSAct'
    assert new[1](large(2)).min() == 0  # timm's activation is a ReLU
    torch.save(new, tmp_path / 'whole.pth')
    x = large(2)
    for twin in (
        copy.deepcopy(new),
        torch.load(tmp_path / 'whole.pth', weights_only=False),
    ):
        assert type(twin[1]) is type(new[1])
        assert torch.equal(twin.eval()(x), new.eval()(x))


def test_one_row_puts_it_into_the_benchmark(monkeypatch):
    pytest.importorskip('mmcv')
    zoo = pytest.importorskip('benchmark.zoo')
    name = 'RunningRMS+WS'
    monkeypatch.setitem(norms.NORMS, name, PAGE['row'][name])
    rows = zoo.time_blocks([name, 'GN'], (2, 32, 4, 4), 1, 'cpu')
    (row,) = (row for row in rows if row['contender'] == name)
    assert row['ms'] > 0
    assert row['ratio'] > 0
    assert row['saved_bytes'] > 0


def test_one_row_puts_it_into_the_experiments(monkeypatch):
    name = 'RunningRMS+WS'
    monkeypatch.setitem(norms.NORMS, name, PAGE['row'][name])
    cfg: dict[str, Any] = dict(backbone=dict(norm_cfg=dict(type='BN')))
    assert norms.apply(cfg, name, momentum=0.02) == 1
    layer = MODELS.build(cfg['backbone']['norm_cfg'] | dict(num_features=8))
    assert isinstance(layer, RunningRMS)
    assert layer.momentum == 0.02


def test_oracle_of_the_page():
    (case,) = PAGE['CASES']
    assert max(compare(case).values()) <= EXACT
    for wrong in case.wrong:
        assert max(compare(case, **wrong).values()) > WRONG


@MODELS.register_module()
class Halved(ws_mm.WSConv2d):
    """A convolution that the package does not know."""


@MODELS.register_module()
class Centered(ws_mm.WSConv2d):
    """One with another formula, to which other filters belong."""

    def standardized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return weight.to(dtype or weight.dtype)


def test_pretrained_filters_belong_to_one_formula():
    pytest.importorskip('mmcv.cnn')
    kinds = (
        dict(type='Conv2d'),
        dict(type='ConvWS'),
        dict(type='Halved'),
        dict(type='Centered'),
    )
    same = [[has_same_weights(a, b, 'mmengine') for b in kinds] for a in kinds]
    assert same == [
        [True, False, False, False],
        [False, True, True, False],
        [False, True, True, False],
        [False, False, False, True],
    ]


@pytest.mark.parametrize(
    ('pattern', 'prefix', 'changed', 'shared'),
    [
        (
            'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
            '',
            ['backbone', 'neck'],
            'bbox_head',
        ),
        (
            'mmseg::pspnet/pspnet_r18b-d8_*-512x1024.py',
            'ws_mm.',
            ['backbone', 'decode_head', 'auxiliary_head'],
            None,
        ),
    ],
)
def test_apply_norm_puts_it_into_a_config(pattern, prefix, changed, shared):
    package = pattern.partition('::')[0]
    pytest.importorskip(f'{package}.models', exc_type=ImportError)
    from shipped import read

    cfg = read(pattern)
    norm = dict(type=f'{prefix}RunningRMS', momentum=0.02)
    conv = f'{prefix}Halved'
    _, left = apply_norm(cfg, conv, norm)
    built = build_without_memory(cfg.model, cfg.default_scope)
    assert ws_mm.check(built).mistakes == []
    assert cfg.custom_hooks == [dict(type='ws_mm.SyncEstimatesHook')]
    for part in changed:
        assert cfg.model[part].norm_cfg == norm
        assert cfg.model[part].conv_cfg == dict(type=conv)
        kinds = {type(layer) for layer in built.get_submodule(part).modules()}
        assert kinds >= {RunningRMS, Halved}
        assert not kinds & {nn.BatchNorm2d, nn.SyncBatchNorm, ws_mm.WSConv2d}
    if shared:
        # Levels would mix its statistics, as they do BCN's.
        assert cfg.model[shared].norm_cfg == dict(type='GN', num_groups=32)
        assert 'GN instead of RunningRMS' in str(left)
    assert apply_norm(cfg, conv, norm)[0] == []
    with pytest.raises(ValueError, match='momentun.*--norm-options'):
        apply_norm(cfg, conv, norm | dict(momentun=0.02))
