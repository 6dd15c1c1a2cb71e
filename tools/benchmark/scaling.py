"""Time norms over pixels, channels, images and ranks.

    python tools/benchmark/scaling.py OUT_DIR [--rounds 7] [--seed 0]

Writes OUT_DIR/scaling--<device>.json and its plot. The slope of a sweep is
that of a straight line through log time over log size: 1 is cost in
proportion, less means that a fixed cost per call still shows. Ranks train a
ResNet-18 under DistributedDataParallel, each on one image; with gloo they
share the cores of this machine, so compare the contenders there, not the
sizes. Collectives are those of the norms; DDP's own are not counted.
"""

import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.layers import time_norms
from benchmark.race import Row, race
from benchmark.result import Suite, arguments, run
from support.ranks import in_ranks

import ws_mm
from ws_mm.hooks import average_estimates, estimating_layers

SWEEPS: dict[str, dict[str, tuple[int, ...]]] = {
    'pixels': {
        f'{edge}x{edge}': (1, 256, edge, edge) for edge in (8, 32, 128, 256)
    },
    'channels': {str(c): (1, c, 64, 64) for c in (64, 256, 1024, 2048)},
    'images': {str(n): (n, 256, 56, 56) for n in (1, 2, 4, 16)},
}
WORLDS = (1, 2, 4)
IMAGE = (1, 3, 128, 128)


def collectives() -> tuple[str, ...]:
    """The collectives that a norm could call from Python."""
    return (
        'all_reduce',
        'all_gather',
        'all_gather_into_tensor',
        'reduce_scatter_tensor',
        'broadcast',
    )


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the collectives of a block."""
    count = [0]

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            return function(*args, **kwargs)

        return call

    patches = [
        mock.patch.object(dist, name, counting(getattr(dist, name)))
        for name in collectives()
    ]
    for patch in patches:
        patch.start()
    try:
        yield count
    finally:
        for patch in patches:
            patch.stop()


NORMS: dict[str, Callable[[int], nn.Module]] = {
    'GroupNorm': partial(nn.GroupNorm, 32),
    'BatchNorm2d': nn.BatchNorm2d,
    'SyncBatchNorm': nn.SyncBatchNorm,
    'BCN estimate': ws_mm.BCN,
    'BCN sync_batch': partial(ws_mm.BCN, mode='sync_batch'),
}


def rank_steps(device: str) -> dict[str, Callable[[], None]]:
    """One training step of each contender, as one rank does it."""
    import torchvision

    x = torch.randn(IMAGE, device=device)
    models: dict[str, nn.Module] = {}

    def build(name: str) -> nn.Module:
        torch.manual_seed(0)
        model = torchvision.models.resnet18(norm_layer=NORMS[name])
        model = nn.parallel.DistributedDataParallel(
            model.to(device), broadcast_buffers=False
        )
        for layer in estimating_layers(model):
            layer.count_values()
        return model

    def step(name: str) -> Callable[[], None]:
        def run_once() -> None:
            if name not in models:
                models[name] = build(name)
            output: Tensor = models[name](x)
            output.square().mean().backward()
            # What SyncEstimatesHook does after each iteration.
            average_estimates(estimating_layers(models[name]))

        return run_once

    return {name: step(name) for name in NORMS}


def race_ranks(rank: int, rounds: int, seed: int) -> list[Row]:
    """Race the same contenders in the same order on every rank."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    random.seed(seed)
    steps = rank_steps(device)
    rows = race(steps, 'GroupNorm', rounds, device)
    for row in rows:
        if 'error' not in row:
            with counted() as count:
                steps[row['contender']]()
            row['collectives'] = count[0]
    return rows


def time_ranks(world: int, rounds: int, seed: int) -> list[Row]:
    """Training steps over several processes, as rank 0 sees them."""
    if torch.cuda.is_available() and torch.cuda.device_count() < world:
        return [
            {'contender': name, 'error': f'needs {world} GPUs'}
            for name in NORMS
        ]
    rows: list[Row] = in_ranks(
        *(race_ranks, rounds, seed),
        size=world,
        start_method='spawn',
        backend='nccl' if torch.cuda.is_available() else 'gloo',
    )[0]
    return rows


def slopes(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The slope of each contender over the points of each sweep."""
    found: dict[str, dict[str, float]] = {}
    for sweep, points in SWEEPS.items():
        sizes = {
            f'{sweep} {name}': math.prod(shape)
            for name, shape in points.items()
        }
        times: dict[str, list[tuple[float, float]]] = {}
        for case in cases:
            for row in case['rows'] if case['name'] in sizes else ():
                if 'ms' in row:
                    point = math.log(sizes[case['name']]), math.log(row['ms'])
                    times.setdefault(row['contender'], []).append(point)
        found[sweep] = {
            name: slope(pairs)
            for name, pairs in times.items()
            if len(pairs) > 1
        }
    return {'slopes': found}


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares: the slope of a line through points."""
    x = sum(p[0] for p in points) / len(points)
    y = sum(p[1] for p in points) / len(points)
    over = sum((p[0] - x) * (p[1] - y) for p in points)
    return over / sum((p[0] - x) ** 2 for p in points)


def plot(result: dict[str, Any], path: Path) -> None:
    """Time over size, one panel for each sweep."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    sweeps = [*SWEEPS, 'ranks']
    figure, axes = plt.subplots(
        1, len(sweeps), figsize=(4 * len(sweeps), 3.6), layout='constrained'
    )
    for axis, sweep in zip(axes, sweeps, strict=True):
        lines: dict[str, list[tuple[str, float]]] = {}
        for case in result['cases']:
            kind, size = case['name'].split(' ', 1)
            for row in case['rows'] if kind == sweep else ():
                if 'ms' in row:
                    points = lines.setdefault(row['contender'], [])
                    points.append((size, row['ms']))
        for name, line in lines.items():
            ours = name.startswith('BCN')
            axis.plot(
                *zip(*line, strict=True),
                label=name,
                marker='o',
                linewidth=2 if ours else 1,
                linestyle='-' if ours else '--',
            )
        axis.set_yscale('log')
        axis.set_xlabel(sweep)
        axis.legend(fontsize=6)
    axes[0].set_ylabel('milliseconds, forward and backward')
    figure.suptitle(result['environment']['device'], size=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run the suite."""
    options = arguments(__doc__, rounds=7)
    rounds, device = options.rounds, options.device
    suite: Suite = {}
    for sweep, points in SWEEPS.items():
        for name, shape in points.items():
            suite[f'{sweep} {name}'] = (
                'GroupNorm',
                lambda shape=shape: time_norms(shape, rounds, device),
            )
    for world in WORLDS:
        suite[f'ranks {world}'] = (
            'GroupNorm',
            lambda world=world: time_ranks(world, rounds, options.seed),
        )
    what = 'forward + backward in training, float32, NCHW'
    run('scaling', what, suite, options, derive=slopes, draw=plot)


if __name__ == '__main__':
    main()
