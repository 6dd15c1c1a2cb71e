"""Filters of the zoo: checkpoints of plain ones, and other packages' twins."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from comparison import relative_error
from mmengine.model import initialize
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor, nn

from ws_mm.config_layers import has_same_weights

KEEPING = ['WNConv2d', 'AdaptiveWSConv2d']
EXACT = 1e-12


@pytest.fixture(name='said')
def warnings_of_loading(monkeypatch) -> list[str]:
    """Collect the warnings of loading a checkpoint."""
    lines: list[str] = []
    monkeypatch.setattr(
        'ws_mm.conv.print_log', lambda text, **_: lines.append(text)
    )
    return lines


def build(name: str, *args: Any, **options: Any) -> Any:
    cfg = dict(type=f'ws_mm.{name}') | options
    shape = args or (6, 8, 3)
    names = 'in_channels', 'out_channels', 'kernel_size'
    layer = MODELS.build(cfg | dict(zip(names, shape, strict=True)))
    return layer.double()


@torch.no_grad()
def filters() -> nn.Conv2d:
    """Plain ones, one of zeros, one constant, one tiny, one huge."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3).double()
    conv.weight += torch.linspace(-1, 1, 8).view(-1, 1, 1, 1)
    conv.weight[0], conv.weight[1] = 0, 0.3
    conv.weight[2] *= 1e-6
    conv.weight[3] *= 1e6
    return conv


def image(channels: int = 6, size: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = 2, channels, size, size
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def by_torch(model: nn.Module, state: Any) -> None:
    model.load_state_dict(state)


def by_the_host(model: nn.Module, state: Any) -> None:
    load_state_dict(model, state, strict=True)


def assigned(model: nn.Module, state: Any) -> None:
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize('load', [by_torch, by_the_host, assigned])
@pytest.mark.parametrize('name', KEEPING)
def test_plain_checkpoints_keep_their_function(name, load, said):
    plain = nn.Sequential(nn.Identity(), filters())
    layer = nn.Sequential(nn.Identity(), build(name))
    given = plain.state_dict()
    names = [*given]
    load(layer, copy.copy(given))
    kept = layer[1].standardized_weight()
    # Filter by filter: they differ by a factor of 1e12.
    torch.testing.assert_close(kept, plain[1].weight, rtol=EXACT, atol=1e-17)
    assert relative_error(layer(image()), plain(image())) <= EXACT
    assert [*given] == names
    assert not said
    # Its own checkpoint is not that of a plain one.
    with torch.no_grad():
        for values in (*layer.parameters(), *layer.buffers()):
            values.mul_(1.5)
    second = nn.Sequential(nn.Identity(), build(name))
    load(second, layer.state_dict())
    assert torch.equal(second(image()), layer(image()))


@pytest.mark.parametrize('name', KEEPING)
def test_a_layer_keeps_the_gradient_of_plain_filters(name):
    plain, layer = filters(), build(name)
    layer.load_state_dict(plain.state_dict())
    y = layer(image())
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    plain(image()).sum().backward()
    if name == 'WNConv2d':  # a filter of zeros can leave them
        assert torch.allclose(layer.weight.grad[0], plain.weight.grad[0])


@pytest.mark.parametrize('old', ['WSConv2d', 'CenteredConv2d'])
@pytest.mark.parametrize('name', KEEPING)
def test_checkpoints_of_other_filters_keep_their_function(name, old, said):
    old, layer = build(old), build(name)
    old.weight.data += 1
    state = old.state_dict()
    layer.load_state_dict(state)
    assert relative_error(layer(image()), old(image())) <= EXACT
    assert not said
    # As mmengine hands on the part of a checkpoint that has a prefix.
    layer.load_state_dict({**state})
    assert 'without a prefix' in said[0]


@pytest.mark.parametrize(
    ('old', 'new', 'text'),
    [
        ('CenteredConv2d', 'WSConv2d', 'trained standardized'),
        ('WSConv2d', 'CenteredConv2d', 'trained centered'),
        ('Conv2d', 'CenteredConv2d', 'trained centered'),
        ('CenteredConv2d', 'CenteredConv2d', None),
    ],
)
def test_filters_of_another_kind_warn(old, new, text, said):
    old = filters() if old == 'Conv2d' else build(old)
    build(new).load_state_dict(old.state_dict())
    assert [text in line for line in said] == ([True] if text else [])


def test_centered_filters_may_be_scaled():
    layer = build('CenteredConv2d')
    before = layer(image()) - layer.bias.view(-1, 1, 1)
    layer.weight = nn.Parameter(2 * layer.weight.detach())
    after = layer(image()) - layer.bias.view(-1, 1, 1)
    assert relative_error(after, 2 * before) <= EXACT


def test_scaled_ws_reports_what_a_checkpoint_lacks(said):
    layer = build('ScaledWSConv2d')
    with pytest.raises(RuntimeError, match=r'Missing key.*gain'):
        layer.load_state_dict(filters().state_dict())
    assert 'does not say' in said[0]


def test_pretrained_filters_fit_where_their_function_stays():
    pytest.importorskip('mmcv.cnn')
    plain, ws = dict(type='Conv2d'), dict(type='ConvWS')
    news = [*KEEPING, 'ScaledWSConv2d']
    found = [
        [
            has_same_weights(old, dict(type=f'ws_mm.{new}'), 'mmengine')
            for old in (None, plain, ws)
        ]
        for new in news
    ]
    keeps, not_kept = [True, True, False], [False, False, False]
    assert found == [keeps, keeps, not_kept]


@pytest.mark.parametrize('name', [*KEEPING, 'ScaledWSConv2d'])
def test_initializers_of_the_host_know_a_convolution(name):
    model = nn.Sequential(build(name))
    initialize(model, dict(type='Constant', layer='Conv2d', val=3.0))
    assert model[0].weight.eq(3).all()


@pytest.mark.parametrize('name', [*KEEPING, 'ScaledWSConv2d'])
def test_decay_of_gains_is_set_by_their_name(name):
    model = nn.Sequential(build(name))
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='SGD', lr=0.1, weight_decay=0.5),
            paramwise_cfg=dict(custom_keys={'.gain': dict(decay_mult=0)}),
        ),
    )
    decay = {
        id(group['params'][0]): group['weight_decay']
        for group in wrapper.optimizer.param_groups
    }
    for key, parameter in model[0].named_parameters():
        assert decay[id(parameter)] == (0 if key == 'gain' else 0.5), key


def test_weight_norm_of_zeros_learns_as_plain_filters():
    plain, layer = filters(), build('WNConv2d')
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(plain.weight)
    direction = image(8, 5)
    for conv in (plain, layer):
        conv(image()).backward(direction)
    assert relative_error(layer.weight.grad, plain.weight.grad) <= EXACT


def test_weight_norm_starts_as_he_whatever_fills_the_weight():
    layer = build('WNConv2d')
    nn.init.normal_(layer.weight, std=7)
    norms = layer.standardized_weight().flatten(1).norm(dim=1)
    assert torch.allclose(norms, torch.full_like(norms, 2**0.5))


@pytest.mark.parametrize('options', [{}, dict(gamma=1.7, eps=1e-2)], ids=len)
def test_scaled_ws_is_that_of_timm(options):
    timm = pytest.importorskip('timm.layers')
    layer = build('ScaledWSConv2d', **options)
    twin = timm.ScaledStdConv2d(6, 8, 3, padding=0, **options).double()
    nn.init.normal_(twin.gain)
    layer.load_state_dict(twin.state_dict())
    assert relative_error(layer(image()), twin(image())) <= EXACT
    other = timm.ScaledStdConv2d(6, 8, 3, padding=0, gamma=1.1).double()
    other.load_state_dict(twin.state_dict())
    assert relative_error(layer(image()), other(image())) > 1e-3


def test_adaptive_ws_is_that_of_mmcv():
    mmcv = pytest.importorskip('mmcv.cnn')
    twin, layer = mmcv.ConvAWS2d(6, 8, 3).double(), build('AdaptiveWSConv2d')
    # Small, so that it shows where eps stands.
    small = {k: v / 10 for k, v in nn.Conv2d(6, 8, 3).state_dict().items()}
    twin.load_state_dict(small)
    layer.load_state_dict(small)
    assert torch.allclose(layer.weight_gamma, twin.weight_gamma)
    assert torch.allclose(layer.weight_beta, twin.weight_beta)
    with torch.no_grad():
        twin.weight += 0.01 * torch.randn(8, 6, 3, 3)
    layer.load_state_dict(twin.state_dict())
    assert relative_error(layer(image()), twin(image())) <= EXACT
    outside = build('AdaptiveWSConv2d', eps_mode='outside')
    outside.load_state_dict(twin.state_dict())
    assert relative_error(outside(image()), twin(image())) > 1e-3


def test_import_needs_neither_timm_nor_mmcv():
    code = (
        'import sys, ws_mm; '
        'print({"timm", "mmcv"} & {n.partition(".")[0] for n in sys.modules})'
    )
    command = [sys.executable, '-c', code]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == 'set()'
