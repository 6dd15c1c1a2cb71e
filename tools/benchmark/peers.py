"""The contenders: norms of activations, standardizations of weights.

Peers are imported where a package has them: torch's norms, mmcv's ConvWS,
timm's StdConv2d and, on a GPU, Liger's GroupNorm. The authors' estimate-based
BCN was published as text only: tools/peers/authors.py.
"""

from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

from result import ROOT
from torch import Tensor, nn

import sys  # isort: skip

# Last: that folder has a layers.py, too.
sys.path.append(str(ROOT / 'tools/peers'))
from authors import BCNorm

import ws_mm


def norms(channels: int, device: str) -> dict[str, Callable[[], nn.Module]]:
    """The contenders that normalize activations."""
    contenders: dict[str, Callable[[], nn.Module]] = {
        'GroupNorm': lambda: nn.GroupNorm(32, channels),
        'BatchNorm2d': lambda: nn.BatchNorm2d(channels),
        # At our rate: theirs has no published one.
        'authors BCN': lambda: BCNorm(channels, rate=0.01),
        'BCN estimate': lambda: ws_mm.BCN(channels),
        'BCN batch': lambda: ws_mm.BCN(channels, mode='batch'),
        'BCN plain': lambda: ws_mm.BCN(channels),
    }
    if device == 'cuda':
        contenders |= {
            'compiled GroupNorm': lambda: compiled(nn.GroupNorm(32, channels)),
            'BCN compiled': lambda: compiled(ws_mm.BCN(channels)),
            'Liger GroupNorm': lambda: liger_group_norm(channels),
        }
    return contenders


def compiled(module: nn.Module) -> nn.Module:
    """The module through torch.compile."""
    module.compile()
    return module


def liger_group_norm(channels: int) -> nn.Module:
    """Liger's Triton GroupNorm, for (N, C, *) inputs."""
    from liger_kernel.transformers import LigerGroupNorm

    return LigerGroupNorm(channels, 32)


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
