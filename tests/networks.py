"""Networks of others: random states, kinds of layers, a step of training."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ws_mm import BCN, conversion

BOTH = dict(conv={}, norm={})


@torch.no_grad()
def randomized(model: nn.Module) -> nn.Module:
    """A network with the norms of a trained one, in eval mode."""
    for module in model.modules():
        if not conversion._looks_like_norm(module):
            continue
        for name, values in module.named_parameters(recurse=False):
            values.copy_(torch.randn(values.shape))
            if name == 'weight':
                values.add_(values.sign() * 0.3)
        for values in module.buffers(recurse=False):
            if values.is_floating_point():
                values.copy_(torch.rand(values.shape) + 0.2)
    return model.eval()


def image(size: int = 32, **options: Any) -> Tensor:
    return torch.randn(1, 3, size, size, **options)


def kinds(model: nn.Module) -> Counter:
    return Counter(type(module).__name__ for module in model.modules())


def batch_norms(model: nn.Module) -> list[str]:
    """Names of what still wants a batch."""
    return [
        name
        for name, module in model.named_modules()
        if {'running_mean', 'running_var'} <= module._buffers.keys()
        and not isinstance(module, BCN)
    ]


def tensors_of(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors_of(value)]


def trains(model: nn.Module, run: Callable[[nn.Module], Any]) -> None:
    """One step of one image, with random cotangents; all is finite."""
    model.train()
    outputs = [t for t in tensors_of(run(model)) if t.requires_grad]
    assert outputs
    torch.autograd.backward(outputs, [torch.randn_like(t) for t in outputs])
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(t.isfinite().all() for t in (*outputs, *grads))
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@pytest.fixture(name='said')
def log_of_convert(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the lines that convert logs."""
    lines: list[str] = []
    monkeypatch.setattr(
        conversion, 'print_log', lambda line, **_: lines.append(line)
    )
    return lines
