"""Time every norm and filter of the grid zoo.py, as a layer of a ResNet.

    python tools/benchmark/zoo.py OUT_DIR [--rounds 15] [--seed 0]

Writes OUT_DIR/zoo--<device>.json, which describes itself, and a plot of it.
A contender is a 3x3 convolution, its norm and its activation, forward and
backward in training mode. saved_bytes is what autograd keeps of one forward.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.race import Row, race
from benchmark.result import Suite, arguments, run
from experiments.grid import load
from experiments.norms import parts_of
from mmcv.cnn import build_conv_layer, build_norm_layer
from support.tensors import saved_bytes

GRID = Path(__file__).resolve().parents[1] / 'experiments/grids/zoo.py'
SHAPES = {
    'layer1 1x64x200x336': (1, 64, 200, 336),
    'layer3 1x256x50x84': (1, 256, 50, 84),
    'layer3 16x256x16x16': (16, 256, 16, 16),
}


def block(norm: str, channels: int) -> nn.Module:
    """A convolution, its norm and its activation."""
    conv_cfg, norm_cfg = parts_of(norm)
    return nn.Sequential(
        build_conv_layer(
            conv_cfg, channels, channels, 3, padding=1, bias=False
        ),
        build_norm_layer(norm_cfg, channels)[1],
        nn.ReLU(),
    )


def time_blocks(
    norms: list[str], shape: tuple[int, ...], rounds: int, device: str
) -> list[Row]:
    """Each norm on one activation; GN is among them."""
    x = torch.randn(shape, device=device, requires_grad=True)
    cotangent = torch.randn_like(x)
    blocks = {norm: block(norm, shape[1]).to(device) for norm in norms}

    def step(model: nn.Module) -> Callable[[], None]:
        def run_once() -> None:
            model.zero_grad()
            x.grad = None
            model(x).backward(cotangent)

        return run_once

    steps = {norm: step(model) for norm, model in blocks.items()}
    rows = race(steps, 'GN', rounds, device)
    for row in rows:
        model = blocks[row['contender']]
        if 'error' not in row:
            row['saved_bytes'] = saved_bytes(lambda model=model: model(x))
    return rows


def main() -> None:
    """Run the suite."""
    options = arguments(__doc__, rounds=15)
    norms = list(dict.fromkeys(cell.norm for cell in load(GRID).cells))
    suite: Suite = {
        name: (
            'GN',
            lambda shape=shape: time_blocks(
                norms, shape, options.rounds, options.device
            ),
        )
        for name, shape in SHAPES.items()
    }
    run('zoo', '3x3 convolution, norm, activation; training', suite, options)


if __name__ == '__main__':
    main()
