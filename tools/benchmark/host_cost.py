"""Measure what a layer costs the host before a GPU has anything to do.

    python tools/benchmark/host_cost.py

Needs no GPU: CPU tensors go through the launch path of a GPU, whose driver is
a stand-in that drops the launch. Prints microseconds of process time, forward
and backward, above those of a multiplication by 1 in the same run: what
autograd takes for any function. `Empty` is an autograd function of as many
tensors as BCN has, which only makes its results. All take turns and the
fastest call counts, but other work on the machine still slows its caches. The
driver's own share of a launch, 2 to 3 microseconds on a GPU, is in none of
the figures. The last one is all that SyncEstimatesHook takes once per
iteration.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmark import stand_in
from torch import Tensor, nn

import ws_mm
from ws_mm import hooks, kernels
from ws_mm.kernels import cuda, plain

ROUNDS, CALLS = 100, 8
LAYERS = 69  # norms of a Mask R-CNN with ResNet-50
# Filters of ResNet-50 and how many of each.
BLOCKS = ((64, 3), (128, 4), (256, 6), (512, 3))

Step = Callable[[], None]


def filters() -> list[tuple[int, ...]]:
    """Shapes of the 53 filters of ResNet-50."""
    found, inputs = [(64, 3, 7, 7)], 64
    for width, count in BLOCKS:
        found.append((4 * width, inputs, 1, 1))
        for _ in range(count):
            found.append((width, inputs, 1, 1))
            found.append((width, width, 3, 3))
            found.append((4 * width, width, 1, 1))
            inputs = 4 * width
    return found


def least(steps: dict[str, Step]) -> list[float]:
    """Microseconds of the fastest call of each, of many."""
    found = {name: float('inf') for name in steps}
    gc.collect()
    gc.disable()
    for _ in range(ROUNDS):
        for name, step in steps.items():
            for _ in range(CALLS):
                start = time.process_time()
                step()
                took = time.process_time() - start
                found[name] = min(found[name], took)
    gc.enable()
    return [took * 1e6 for took in found.values()]


def both_ways(
    function: Callable[[Tensor], Tensor],
    leaf: Tensor,
    parameters: Sequence[Tensor] = (),
) -> Step:
    """Forward and backward, with gradients in new tensors each time."""
    leaf = leaf.requires_grad_()
    cotangent = torch.ones_like(function(leaf))

    def step() -> None:
        for values in (leaf, *parameters):
            values.grad = None
        function(leaf).backward(cotangent)

    return step


class Empty(torch.autograd.Function):
    """As many tensors as BCN takes, saves and makes; computes nothing."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, *affines: Tensor) -> Tensor:
        """Return a new tensor like input."""
        ctx.save_for_backward(input, *affines)
        return torch.empty_like(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Return new tensors like all that forward got."""
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def layers() -> dict[str, float]:
    """Each layer alone, above the floor."""
    x = torch.randn(1, 256, 2, 2)
    weight = torch.randn(64, 64, 1, 1)
    conv = ws_mm.WSConv2d(64, 64, 1)
    steps = {
        'floor': both_ways(lambda leaf: leaf * 1, x),
        'WSConv2d': both_ways(
            lambda leaf: conv.standardized_weight(), weight, [conv.weight]
        ),
    }
    bcn = ws_mm.BCN(256)
    affines = [*bcn.parameters()]
    steps['Empty'] = both_ways(
        lambda leaf: Empty.apply(leaf, *affines), x, affines
    )
    for layer in (bcn, nn.GroupNorm(32, 256), nn.BatchNorm2d(256)):
        step = both_ways(layer, x, [*layer.parameters()])
        steps[type(layer).__name__] = step
    floor, *rest = least(steps)
    names = list(steps)[1:]
    return {
        'floor': floor,
        **{name: took - floor for name, took in zip(names, rest, strict=True)},
    }


def resnet(norm: Callable[[int], nn.Module], standardized: bool) -> Step:
    """The 53 norms of ResNet-50, with the standardization of its filters."""
    pairs = []
    for shape in filters():
        conv = ws_mm.WSConv2d(shape[1], shape[0], shape[2:], bias=False)
        x = torch.randn(1, shape[0], 2, 2, requires_grad=True)
        pairs.append((x, norm(shape[0]), conv))
    learned = [
        values
        for x, layer, conv in pairs
        for values in (x, *layer.parameters(), conv.weight)
    ]

    def outputs() -> list[Tensor]:
        found = [layer(x) for x, layer, _ in pairs]
        if standardized:
            found += [conv.standardized_weight() for *_, conv in pairs]
        return found

    cotangents = [torch.ones_like(x) for x in outputs()]

    def step() -> None:
        for values in learned:
            values.grad = None
        torch.autograd.backward(outputs(), cotangents)

    return step


def hook() -> Step:
    """SyncEstimatesHook after an iteration of two ranks, or as good as that.

    Its collective is dropped. Layers have 8 channels: a CPU would take
    longer for the arithmetic of more.
    """
    hooks.world_size = lambda: 2
    hooks.dist.all_reduce = lambda values: None
    norms = [ws_mm.BCN(8, 4) for _ in range(LAYERS)]
    for layer in norms:
        layer.count_values()
    return partial(hooks.average_estimates, norms)


def composed() -> dict[str, float]:
    """Layers alone in composed operations, with those of a CUDA device.

    They compute, on a thousand values: that is in the figures.
    """
    choice = mock.patch.dict(os.environ, WS_MM_KERNELS='plain')
    # Only the norm of a CPU needs it.
    centered = mock.patch.object(plain, '_centered', lambda x, _: x)
    with choice, centered:
        found = layers()
    return {name: found[name] for name in ('WSConv2d', 'BCN')}


def main() -> None:
    """Print all figures."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    stand_in.install()
    # As without the variable on a GPU.
    del os.environ[kernels.VARIABLE]
    kernels.cpu = SimpleNamespace(**vars(cuda), is_faster=lambda _: True)
    print(f'load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores')
    for name, took in layers().items():
        print(f'{name:12} {took:6.1f} us')
    for name, took in composed().items():
        print(f'{name:12} {took:6.1f} us composed')
    steps = {
        'GroupNorm': resnet(
            lambda channels: nn.GroupNorm(32, channels), False
        ),
        'GroupNorm + WS': resnet(
            lambda channels: nn.GroupNorm(32, channels), True
        ),
        'BCN': resnet(ws_mm.BCN, False),
        'BCN + WS': resnet(ws_mm.BCN, True),
    }
    for name, took in zip(steps, least(steps), strict=True):
        print(f'{name:14} {took / 1e3:5.1f} ms for 53 of ResNet-50')
    (took,) = least({'hook': hook()})
    print(f'SyncEstimatesHook {took / 1e3:.2f} ms for {LAYERS} layers')


if __name__ == '__main__':
    main()
