"""Rows of the host contract: averaged weights, and what looks into a model."""

import copy
import sys
from pathlib import Path

import torch
from mmcv.cnn import ConvWS2d, get_model_complexity_info
from mmengine.model import ExponentialMovingAverage
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from proofs.peers.authors import BCNorm
from proofs.peers.rows import main, observe


class Frozen(nn.Sequential):
    """A model whose first layer stays in eval mode, as frozen_stages."""

    def train(self, mode: bool = True) -> 'Frozen':
        """Keep the first layer."""
        super().train(mode)
        self[0].eval()
        return self


def batches() -> list[Tensor]:
    """Two batches of mean 5 and deviation 2."""
    torch.manual_seed(0)
    return [torch.randn(2, 32, 8, 8) * 2 + 5 for _ in range(2)]


def moved(model: nn.Module, loader: list[Tensor]) -> str:
    """The first mean of a model that began at 7, after update_bn."""
    norm = next(m for m in model.modules() if hasattr(m, 'running_mean'))
    norm.running_mean.fill_(7)
    try:
        update_bn(loader, model)
    except ValueError as error:
        return f'{error}: mean {norm.running_mean[0]:.1f}'
    return f'mean {norm.running_mean[0]:.1f}'


def update() -> str:
    """Measure what began at 7; the data are at 5."""
    rows = {
        'BN': moved(nn.Sequential(nn.BatchNorm2d(32)), batches()),
        "authors' BCN": moved(nn.Sequential(BCNorm(32)), batches()),
        'frozen BN': moved(Frozen(nn.BatchNorm2d(32)), batches()),
        'empty loader': moved(nn.Sequential(nn.BatchNorm2d(32)), []),
    }
    return '; '.join(f'{name}: {value}' for name, value in rows.items())


def ema() -> str:
    """Statistics of averaged weights, against those that they would have."""
    model = nn.Sequential(nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32, momentum=1))
    average = ExponentialMovingAverage(model, momentum=0.1)
    for step in range(3):
        with torch.no_grad():
            model[0].weight.mul_(2)
        model(batches()[step % 2])
        average.update_parameters(model)
    measured = copy.deepcopy(average.module)
    update_bn(batches(), measured)
    kept, right = (m[1].running_var for m in (average.module, measured))
    return f'BN: variance {float((kept / right).mean()):.0f} times the right'


def flops() -> str:
    """Count the operations of a standardized convolution with mmcv."""
    counts = {
        name: get_model_complexity_info(
            nn.Sequential(conv(3, 4, 3)),
            (3, 8, 8),
            print_per_layer_stat=False,
            as_strings=False,
        )[0]
        for name, conv in (('Conv2d', nn.Conv2d), ('ConvWS', ConvWS2d))
    }
    return str(counts)


def forward_derivative() -> str:
    """torch.func.jvp of a BatchNorm in training."""
    norm, x = nn.BatchNorm2d(32), batches()[0]
    return observe(lambda: str(torch.func.jvp(norm, (x,), (x,))[0].shape))


ROWS = {
    'update_bn': update,
    'ema': ema,
    'flops': flops,
    'jvp': forward_derivative,
}

if __name__ == '__main__':
    main(ROWS)
