"""Rows of the host contract: tensors."""

import sys
from collections.abc import Callable
from pathlib import Path

import timm.layers
import torch
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from proofs.peers.authors import BCNorm
from proofs.peers.rows import main, observe
from support.tensors import relative_error

CONVS = {
    'mmcv ConvWS': ConvWS2d,
    'timm StdConv2d': timm.layers.StdConv2d,
    'timm ScaledStdConv2d': timm.layers.ScaledStdConv2d,
}
NORMS: dict[str, Callable[[], nn.Module]] = {
    'BN': lambda: nn.BatchNorm2d(8),
    'GN': lambda: nn.GroupNorm(4, 8),
    "authors' BCN": lambda: BCNorm(8, 4),
}


def together(rows: dict[str, Callable[[], str]]) -> str:
    """The observations of several layers in one line."""
    return '; '.join(f'{name}: {observe(row)}' for name, row in rows.items())


def kind(values: Tensor) -> str:
    """Finite, or what else is among the values."""
    if values.isnan().any():
        return 'NaN'
    return 'finite' if values.isfinite().all() else 'inf'


def buffers(layer: nn.Module) -> str:
    """Describe the values of the buffers."""
    values = [b for b in layer.buffers() if b.is_floating_point()]
    return kind(torch.cat(values)) if values else 'no buffers'


def constant_filters() -> str:
    """Gradients of filters that are all zero, or all one value."""

    def of(make: type[nn.Conv2d], fill: float) -> str:
        conv = make(4, 8, 3)
        nn.init.constant_(conv.weight, fill)
        torch.manual_seed(0)
        output = conv(torch.randn(1, 4, 8, 8))
        output.backward(torch.randn_like(output))
        gradient = conv.weight.grad
        return (
            f'output {kind(output)}, gradient {kind(gradient)} up to '
            f'{float(gradient.abs().max()):.1g}'
        )

    return together(
        {
            f'{name} of {fill}': lambda make=make, fill=fill: of(make, fill)
            for name, make in CONVS.items()
            for fill in (0.0, 0.5)
        }
    )


def magnitudes() -> str:
    """Error of filters and inputs of 1e-8 and 1e8, against float64."""

    def of(layer: nn.Module, scale: float, convolution: bool) -> str:
        torch.manual_seed(0)
        x = torch.randn(2, 8, 8, 8)
        with torch.no_grad():
            if convolution:
                layer.weight.mul_(scale)
            else:
                x = x * scale
            output = layer(x)
            for part in layer.modules():
                if hasattr(part, 'reset_running_stats'):
                    part.reset_running_stats()
                elif hasattr(part, 'running_mean'):
                    part.running_mean.zero_()
                    part.running_var.fill_(1)
            expected = layer.double()(x.double())
        error = relative_error(output, expected)
        return f'{kind(output)}, error {error:.0e}'

    return together(
        {
            f'{name} at {scale:.0e}': (
                lambda make=make, scale=scale, conv=conv: of(
                    make(), scale, conv
                )
            )
            for conv, makers in (
                (
                    True,
                    {
                        name: lambda make=make: make(8, 8, 3, bias=False)
                        for name, make in CONVS.items()
                    },
                ),
                (False, NORMS),
            )
            for name, make in makers.items()
            for scale in (1e-8, 1e8)
        }
    )


def not_finite() -> str:
    """One infinite value in one batch, then clean batches."""

    def of(make: Callable[[], nn.Module]) -> str:
        torch.manual_seed(0)
        layer = make()
        x = torch.randn(2, 8, 5, 6)
        x[1, 3, 2, 2] = torch.inf
        output = layer(x)
        for _ in range(100):
            later = layer(torch.randn(2, 8, 5, 6))
        return (
            f'output {kind(output)}; 100 clean batches later output '
            f'{kind(later)}, buffers {buffers(layer)}, in eval '
            f'{kind(layer.eval()(torch.randn(2, 8, 5, 6)))}'
        )

    return together(
        {k: lambda make=make: of(make) for k, make in NORMS.items()}
    )


def far_start() -> str:
    """A first batch of mean 1000 and standard deviation 100."""

    def of(make: Callable[[], nn.Module]) -> str:
        torch.manual_seed(0)
        layer = make()
        outputs = [
            layer(torch.randn(1, 8, 16, 16) * 100 + 1000) for _ in range(150)
        ]
        largest = max(float(y.abs().max()) for y in outputs)
        return f'{kind(torch.stack(outputs))}, up to {largest:.1f}'

    return together(
        {k: lambda make=make: of(make) for k, make in NORMS.items()}
    )


def dtypes() -> str:
    """Ten steps in half precision, against the same in float64."""

    def off(actual: Tensor, expected: Tensor) -> str:
        return f'{relative_error(actual, expected):.0e}'

    def of_norm(make: Callable[[], nn.Module], dtype: torch.dtype) -> str:
        torch.manual_seed(0)
        layer, exact = make().to(dtype), make().double()
        for _ in range(10):
            x = (torch.randn(2, 8, 9, 9) * 3 + 30).to(dtype)
            output, expected = layer(x), exact(x.double())
        said = f'output off by {off(output, expected)}'
        buffers = [b for b in layer.buffers() if b.is_floating_point()]
        if buffers:
            wanted = [b for b in exact.buffers() if b.is_floating_point()]
            error = off(torch.cat(buffers), torch.cat(wanted))
            kept = str(buffers[0].dtype).removeprefix('torch.')
            said += f', buffers {kept} off by {error}'
        return said

    def of_conv(make: type[nn.Conv2d], dtype: torch.dtype) -> str:
        torch.manual_seed(0)
        conv = make(8, 8, 3, bias=False)
        with torch.no_grad():
            conv.weight.mul_(0.1).add_(0.3)
        conv = conv.to(dtype)
        x = torch.randn(2, 8, 9, 9).to(dtype)
        output = conv(x)
        return f'output off by {off(output, conv.double()(x.double()))}'

    half = {'half()': torch.float16, 'bfloat16()': torch.bfloat16}
    rows = {}
    for call, dtype in half.items():
        for name, make in NORMS.items():
            rows[f'{name}.{call}'] = lambda m=make, d=dtype: of_norm(m, d)
        for name, kind in CONVS.items():
            rows[f'{name}.{call}'] = lambda m=kind, d=dtype: of_conv(m, d)
    return together(rows)


def compiled() -> str:
    """torch.compile of a training step as one graph."""

    def of(layer: nn.Module) -> str:
        torch._dynamo.reset()
        run = torch.compile(layer, backend='aot_eager', fullgraph=True)
        run(torch.randn(2, 8, 9, 9)).sin().sum().backward()
        return 'one graph'

    layers = {k: make for k, make in NORMS.items()}
    layers |= {k: lambda m=make: m(8, 8, 3) for k, make in CONVS.items()}
    return together({k: lambda m=m: of(m()) for k, m in layers.items()})


def called_twice() -> str:
    """Two calls in training before one backward."""

    def of(layer: nn.Module) -> str:
        torch.manual_seed(0)
        x = [torch.randn(2, 8, 5, 5, requires_grad=True) for _ in range(2)]
        (layer(x[0]).square() + layer(x[1]).sin()).sum().backward()
        return f'differentiates, gradients {kind(x[0].grad)}'

    return together({k: lambda m=m: of(m()) for k, m in NORMS.items()})


ROWS = {
    'called_twice': called_twice,
    'compiled': compiled,
    'dtypes': dtypes,
    'constant_filters': constant_filters,
    'magnitudes': magnitudes,
    'not_finite': not_finite,
    'far_start': far_start,
}

if __name__ == '__main__':
    main(ROWS)
