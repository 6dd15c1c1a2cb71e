"""The whitening norms where a batch has directions without variance."""

import pytest
import torch

import ws_mm


def few(seed: int) -> torch.Tensor:
    """One image of six pixels, of eight channels; the first is constant."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 8, 3, 2, generator=generator)
    x[:, 0] = 1
    return x


@pytest.mark.parametrize('step', [1e-5, 0.1])
def test_swbn_stays_bounded_on_single_images(step):
    norm = ws_mm.zoo.StochasticWhiteningBN(8, step=step)
    for number in range(2000):
        norm(few(number))
    assert norm.whitening.abs().max() < 2
    assert torch.equal(norm.whitening, norm.whitening.T)


def test_rule_kl_grows_where_there_is_no_variance():
    norm = ws_mm.zoo.StochasticWhiteningBN(8, criterion='kl', step=0.01)
    for number in range(500):
        norm(few(number))
    grown = norm.whitening[0, 0].item()
    assert grown == pytest.approx(1.01**500, rel=1e-3)


def test_iter_norm_whitens():
    norm = ws_mm.zoo.IterNorm(80, affine=False, iterations=20).double()
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(80, 80, generator=generator).double() / 9
    x = torch.randn(4, 80, 20, 20, generator=generator).double()
    x = torch.einsum('ij,njhw->nihw', mix + torch.eye(80), x)
    rows = norm(x).transpose(0, 1).flatten(1)
    cov = rows @ rows.T / rows.shape[1]
    for half in (slice(40), slice(40, 80)):
        assert torch.allclose(
            cov[half, half], torch.eye(40).double(), atol=0.01
        )
    assert cov[:40, 40:].abs().max() > 0.05


@pytest.mark.parametrize('count', [2, 4, 32])
def test_iter_norm_of_fewer_values_than_channels_is_finite(count):
    norm = ws_mm.zoo.IterNorm(64)
    x = torch.randn(1, 64, 1, count, requires_grad=True)
    y = norm(x)
    (y * torch.randn_like(y)).sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert norm.eval()(x).isfinite().all()


@pytest.mark.parametrize(
    ('name', 'wrong'),
    [
        ('IterNorm', dict(channels_per_group=0)),
        ('IterNorm', dict(iterations=2.5)),
        ('StochasticWhiteningBN', dict(step=2)),
        ('StochasticWhiteningBN', dict(criterion='frob')),
    ],
)
def test_wrong_arguments_are_named_with_the_key(name, wrong):
    ((argument, value),) = wrong.items()
    with pytest.raises(
        ValueError, match=rf'{argument}={value!r} must.*norm_cfg'
    ):
        getattr(ws_mm.zoo, name)(8, **wrong)


def test_iter_norm_is_measured_exactly_under_autocast():
    torch.manual_seed(0)
    x = 1.5 * torch.randn(1, 8, 200, 200)
    layer = ws_mm.zoo.IterNorm(8)
    expected = layer.batch_statistics(x)
    with torch.autocast('cpu', torch.bfloat16):
        found = layer.batch_statistics(x)
    assert torch.equal(found['running_cov'], expected['running_cov'])
