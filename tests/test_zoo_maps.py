"""The passes of norms that are an affine of each map."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ws_mm.zoo import _maps


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setenv('WS_MM_KERNELS', 'fused')


LAYOUTS = [torch.contiguous_format, torch.channels_last]


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.requires_grad_()


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('images', [1, 2])
def test_gradients_of_both_orders(images, layout):
    x = random(images, 3, 3, 2).detach().to(memory_format=layout)
    x.requires_grad_()
    numbers = [random(1, 3, 1, 1), random(images, 3, 1, 1), random(3, 1, 1)]
    for check in (gradcheck, gradgradcheck):
        assert check(_maps.moments_of_maps, (x,))
        assert check(_maps.affine_of_maps, (x, *numbers))


@pytest.mark.parametrize('size', [(), (1, 1), (3, 2)])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_sums_around_one_center_of_all_maps(layout, size):
    x, grad = random(1, 8, *size).detach(), random(1, 8, *size).detach() + 1
    if size:
        x = x.to(memory_format=layout)
    center = torch.tensor(3.0, dtype=x.dtype)
    with torch.no_grad():
        found = _maps.sums_of_maps(
            grad, x, center.expand(1, 8, *[1] * len(size))
        )
    for sums, values in zip(found, (grad * (x - 3), grad), strict=True):
        right = values.reshape(1, 8, -1).sum(2)
        assert torch.allclose(sums.view(1, 8), right)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_moments_far_from_zero(layout):
    x = (random(1, 5, 40, 30).detach() + 1000).float()
    x = x.to(memory_format=layout)
    mean, var = _maps.moments_of_maps(x)
    right = torch.var_mean(x.double(), (2, 3), correction=0, keepdim=True)
    assert torch.allclose(var.double(), right[0], rtol=1e-4)
    assert torch.allclose(mean.double(), right[1], rtol=1e-6)
