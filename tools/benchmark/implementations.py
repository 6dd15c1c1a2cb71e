"""The contenders: norms of activations, standardizations of weights.

Peers are imported where a package has them: torch's norms, mmcv's ConvWS,
timm's StdConv2d and, on a GPU, Liger's GroupNorm. The authors' estimate-based
BCN was published as text only: tools/proofs/peers/authors.py.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo
from proofs.peers.authors import BCNorm
from torch import Tensor, nn

import ws_mm

Norm = Callable[[int], nn.Module]
# One row for each norm, by the number of its channels.
NORMS: dict[str, Norm] = {
    'GroupNorm': lambda channels: nn.GroupNorm(32, channels),
    'BatchNorm2d': nn.BatchNorm2d,
    # At our rate: theirs has no published one.
    'authors BCN': lambda channels: BCNorm(channels, rate=0.01),
    'BCN estimate': ws_mm.BCN,
    'BCN batch': lambda channels: ws_mm.BCN(channels, mode='batch'),
    'BCN plain': ws_mm.BCN,
}
NORMS_ON_CUDA: dict[str, Norm] = {
    'compiled GroupNorm': lambda channels: compiled(
        nn.GroupNorm(32, channels)
    ),
    'BCN compiled': lambda channels: compiled(ws_mm.BCN(channels)),
    'Liger GroupNorm': lambda channels: liger_group_norm(channels),
}


def norms(channels: int, device: str) -> dict[str, Callable[[], nn.Module]]:
    """The contenders that normalize activations."""
    rows = NORMS | (NORMS_ON_CUDA if device == 'cuda' else {})
    return {name: partial(norm, channels) for name, norm in rows.items()}


class Framed(nn.Module):
    """A module in a frame of our own: dynamo skips those of torch.nn."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input: Tensor) -> Tensor:
        """Call it."""
        output: Tensor = self.inner(input)
        return output


def compiled(module: nn.Module, backend: str = 'inductor') -> nn.Module:
    """The module through torch.compile, for static shapes, or an error."""
    # Beyond a few shapes dynamo would silently run what is left as it is;
    # with fullgraph it says so, and both limits are far away.
    config = torch._dynamo.config
    for name in ('cache_size_limit', 'accumulated_cache_size_limit'):
        if hasattr(config, name):
            setattr(config, name, 10_000)
    framed = Framed(module)
    return torch.compile(
        framed, backend=backend, fullgraph=True, dynamic=False
    )


class Flat(nn.Module):
    """Liger's GroupNorm on maps.

    Its backward takes the third dimension for all values of a channel: with
    four it would write beyond its gradients.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input: Tensor) -> Tensor:
        """Call it with (N, C, L)."""
        output: Tensor = self.inner(input.flatten(2))
        return output.view(input.shape)


def liger_group_norm(channels: int) -> nn.Module:
    """Liger's Triton GroupNorm, for (N, C, *) inputs."""
    from liger_kernel.transformers import LigerGroupNorm

    return Flat(LigerGroupNorm(channels, 32))


def standardizers() -> dict[str, Callable[[Tensor], Tensor]]:
    """The contenders that standardize weights."""
    # mmcv and timm have no function for the weight alone: stop each at its
    # convolution, which then returns the weight.

    def mmcv_form(weight: Tensor) -> Tensor:
        from mmcv.cnn.bricks import conv_ws

        with mock.patch.object(conv_ws.F, 'conv2d', lambda x, w, *_: w):
            return conv_ws.conv_ws_2d(weight, weight)

    def timm_form(weight: Tensor) -> Tensor:
        from timm.layers import std_conv

        layer = SimpleNamespace(
            weight=weight,
            out_channels=weight.shape[0],
            eps=1e-6,
            bias=None,
            stride=1,
            padding=0,
            dilation=1,
            groups=1,
        )
        with mock.patch.object(std_conv.F, 'conv2d', lambda x, w, *_: w):
            return std_conv.StdConv2d.forward(layer, weight)

    return {
        'copy': lambda weight: weight.clone(),
        'mmcv ConvWS': mmcv_form,
        'timm StdConv2d': timm_form,
        'WS': ws_mm.standardize_weight,
        'WS plain': ws_mm.standardize_weight,
    }
