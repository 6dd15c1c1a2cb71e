"""When MABN's statistics of the backward move, and what it starts from."""

import copy

import pytest
import torch
from comparison import disagreements
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ws_mm
from ws_mm.zoo import MABN

CHANNELS = 3
MOVING = set(MABN.statistics)


def layer() -> MABN:
    torch.manual_seed(0)
    norm = MABN(CHANNELS, buffer_size=2, warmup_iters=2, renorm_iters=3)
    for _ in range(4):
        norm(images()).square().sum().backward()
    return norm.double()


def images(number: int = 2) -> Tensor:
    dtype = torch.get_default_dtype()
    return torch.randn(number, CHANNELS, 4, 4, dtype=dtype).requires_grad_()


def moved(norm: MABN, before: MABN) -> set[str]:
    old = dict(before.named_buffers())
    return {k for k, v in norm.named_buffers() if not torch.equal(v, old[k])}


def test_each_pass_moves_its_own_statistics_once():
    norm = layer()
    before = copy.deepcopy(norm)
    y = norm(images().double())
    assert moved(norm, before) == MOVING - {'gradients'}
    before = copy.deepcopy(norm)
    y.square().sum().backward()
    assert moved(norm, before) == {'gradients'}
    # Rows of two: a second move would have dropped it.
    assert torch.equal(norm.gradients[:, 0], before.gradients[:, 1])


@pytest.mark.parametrize('reentrant', [True, False])
def test_recomputation_moves_nothing(reentrant):
    plain, norm = layer(), layer()
    x = images().double().detach().requires_grad_()
    plain(x).square().sum().backward()
    expected, x.grad = x.grad, None
    y = checkpoint(norm, x, use_reentrant=reentrant)
    y.square().sum().backward()
    assert not moved(norm, plain)
    assert torch.equal(x.grad, expected)


def test_evaluation_and_no_image_move_nothing():
    norm = layer()
    before = copy.deepcopy(norm)
    norm(images(0).double()).sum().backward()
    norm.eval()
    norm(images().double()).square().sum().backward()
    assert not moved(norm, before)


@pytest.mark.parametrize('bad', [float('inf'), float('nan')])
def test_values_that_are_not_finite_move_nothing_of_their_channel(bad):
    norm = layer()
    before = copy.deepcopy(norm)
    x = images().double().detach()
    x[0, 1, 0, 0] = bad
    norm(x)
    for name in MOVING - {'gradients'}:
        one, other = (m.get_buffer(name).view(3, -1) for m in (norm, before))
        assert (one == other).all(1).tolist() == [False, True, False], name


@pytest.mark.parametrize('bad', [float('inf'), float('nan')])
def test_gradients_that_are_not_finite_are_not_kept(bad):
    norm = layer()
    before = copy.deepcopy(norm)
    direction = torch.ones(2, CHANNELS, 4, 4)
    direction[0, 1, 0, 0] = bad  # as a loss that a scaler has scaled
    norm(images().double()).backward(direction.double())
    same = (norm.gradients == before.gradients).all(1)
    assert same.tolist() == [False, True, False]


def test_second_derivatives_are_refused():
    x = images().double()
    y = layer()(x).square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


def test_a_batch_norm_gives_its_mean_square():
    x = images(64).double().detach() * 2 + 1
    old = nn.Sequential(nn.BatchNorm2d(CHANNELS, momentum=1.0)).double()
    old(x)
    new = ws_mm.convert(old, norm=dict(type='ws_mm.MABN'))
    square = x.square().mean((0, 2, 3))
    loaded = ws_mm.zoo.MABN(CHANNELS).double()
    loaded.load_state_dict(old[0].state_dict(), strict=False)
    for layer in (new[0], loaded):
        found = {'running_var': layer.running_var}
        assert not disagreements(found, {'running_var': square}, 1e-2)


@pytest.mark.parametrize(
    ('name', 'value', 'least'),
    [
        ('buffer_size', 0, 1),
        ('warmup_iters', -1, 0),
        ('renorm_iters', 99, 100),
        ('buffer_size', True, 1),
    ],
)
def test_wrong_counts_are_named(name, value, least):
    message = f'{name}={value} must be a whole number of at least {least}'
    with pytest.raises(ValueError, match=message):
        MABN(CHANNELS, **{name: value})
