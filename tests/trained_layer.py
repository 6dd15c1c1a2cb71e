"""A BCN layer as a training leaves it, and inputs of it."""

import torch
from torch import Tensor, nn

from ws_mm import BCN

CHANNELS, GROUPS = 8, 4


MODES = ('estimate', 'batch', 'sync_batch')


EPS_MODES = ('outside', 'inside')


def make_layer(**kwargs) -> BCN:
    """A layer whose affines and estimates are not their defaults."""
    torch.manual_seed(1)
    layer = BCN(CHANNELS, GROUPS, momentum=0.3, **kwargs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(mean=0.5)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.2, 3)
    return layer


def make_input(samples: int = 2, seed: int = 2, **kwargs) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, CHANNELS, 5, 6, generator=generator)
    return (x * torch.linspace(0.2, 3, CHANNELS).view(-1, 1, 1) + 1).to(
        **kwargs
    )


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in layer.named_buffers()}
