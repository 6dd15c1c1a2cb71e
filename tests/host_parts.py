"""Backbones of mmdet with our layers, and their outputs."""

import pytest
import torch
from torch import Tensor, nn

from ws_mm import BCN

mmdet = pytest.importorskip('mmdet.models', exc_type=ImportError)

WS = dict(type='ws_mm.WSConv2d')
BCN4 = dict(type='ws_mm.BCN', num_groups=4)
BN = dict(type='BN')


def resnet(depth: int = 18, **options) -> nn.Module:
    """mmdet's ResNet, an eighth as wide."""
    options = dict(base_channels=8, norm_eval=False) | options
    return mmdet.ResNet(depth, **options)


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """A model in eval mode, its norms with the state of a trained one's."""
    for name, values in model.named_buffers():
        if name.endswith('running_mean'):
            values.normal_()
        elif name.endswith('running_var'):
            values.uniform_(0.2, 3)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, BCN)):
            for parameter in module.parameters():
                parameter.normal_().add_(parameter.sign() * 0.2)
    # mmdet's train() returns nothing.
    model.eval()
    return model


def image(size: int = 32, images: int = 1) -> Tensor:
    return torch.randn(images, 3, size, size)


def features(model: nn.Module, x: Tensor | list[Tensor]) -> Tensor:
    """All outputs of a model as one vector."""
    levels = model(x)
    levels = [levels] if isinstance(levels, Tensor) else levels
    return torch.cat([level.flatten() for level in levels])
