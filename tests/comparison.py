"""One way to compare a layer with its oracle, and one table of tolerances."""

from collections.abc import Callable

import torch
from support import tensors
from torch import Tensor

# Largest error accepted, relative to the largest value of the oracle.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}


def _half_on_cpu() -> bool:
    one = torch.ones(1, 1, 1, 1, dtype=torch.half)
    try:
        torch.nn.functional.conv2d(one, one)
    except RuntimeError:
        return False
    return True


# Convolutions and autocast in float16 on a CPU; torch 2.1 has neither.
HALF_ON_CPU = _half_on_cpu()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return tensors.relative_error(actual, expected)


def disagreements(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> dict[str, float]:
    """The entries whose error is above the tolerance, or not finite."""
    assert actual.keys() == expected.keys()
    errors = {
        name: relative_error(actual[name], expected[name]) for name in expected
    }
    return {
        name: error
        for name, error in errors.items()
        if not error <= tolerance  # also true for NaN
    }


def values_and_gradients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], cotangent: str
) -> dict[str, Tensor]:
    """Output of a function and its gradients under a random cotangent."""
    leaves = {
        name: values.detach().clone().requires_grad_()
        for name, values in inputs.items()
    }
    output = function(**leaves)
    generator = torch.Generator().manual_seed(sum(map(ord, cotangent)))
    direction = torch.randn(
        output.shape, generator=generator, dtype=torch.float64
    ).to(output.dtype)
    gradients = torch.autograd.grad(output, list(leaves.values()), direction)
    return {
        'output': output.detach(),
        **{
            f'd{name}': gradient
            for name, gradient in zip(leaves, gradients, strict=True)
        },
    }
