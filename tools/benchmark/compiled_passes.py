"""Count the passes over activations that a compiled norm makes.

    python tools/benchmark/compiled_passes.py

Compiles each norm with a ReLU behind it, and with a sum and a ReLU, by
Inductor for a CPU, and adds up what the kernels of its schedule read and
write, forward and backward, in units of the input: bytes of activations over
bytes of the input. A boolean mask of float32 activations is 0.25. Nothing is
timed. Exits with 1 if BCN needs more than the bar.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import support  # noqa: F401
import torch
import torch._inductor.config
from torch import Tensor, nn

import ws_mm
from ws_mm.kernels import compiled, plain

# Of a norm and a ReLU, forward and backward.
BAR = 3.25, 7.0
SHAPE = 2, 64, 50, 84


class Block(nn.Module):
    """A norm, then a sum with another branch, if there is one, and a ReLU."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """Add the outputs of other branches."""
        return torch.relu(sum(others, start=self.norm(x)))


def passes(
    norm: nn.Module,
    shape: Sequence[int] = SHAPE,
    dtype: torch.dtype = torch.float32,
    branches: int = 0,
) -> tuple[float, float]:
    """Passes of a norm and a ReLU: forward and backward.

    Args:
        norm: layer of shape[1] channels.
        shape: of the input.
        dtype: of the input.
        branches: number of inputs of the same size that the sum adds.
    """
    inputs = [
        torch.randn(*shape).to(dtype).requires_grad_()
        for _ in range(1 + branches)
    ]
    size, found = inputs[0].numel(), []

    def count(kernels: list[Any]) -> list[Any]:
        total = 0
        for kernel in kernels:
            for ways in ((True, False), (False, True)):  # reads, writes
                accesses = kernel.get_read_write_buffer_accesses(*ways)
                # Those of statistics are far smaller.
                total += sum(n for n in accesses.values() if n >= size)
        found.append(total / inputs[0].nbytes)
        return kernels

    torch._dynamo.reset()
    options = {
        '_post_fusion_custom_pass': count,
        'force_disable_caches': True,  # what is cached is not scheduled
    }
    with torch._inductor.config.patch(options):
        output = torch.compile(Block(norm), fullgraph=True)(*inputs)
        output.backward(torch.randn_like(output))
    forward, backward = found
    return forward, backward


def contenders() -> dict[str, nn.Module]:
    """Norms by name."""
    channels = SHAPE[1]
    return {
        'BCN': ws_mm.BCN(channels),
        'BCN, batch statistics': ws_mm.BCN(channels, mode='batch'),
        'BCN, eval': ws_mm.BCN(channels).eval(),
        'GroupNorm': nn.GroupNorm(32, channels),
        'BatchNorm2d': nn.BatchNorm2d(channels),
    }


def main() -> int:
    """Print the table; 1 if BCN is above the bar."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print('| norm, passes forward + backward | ReLU | sum and ReLU |')
    print('|---|---|---|')
    above = []

    def row(name: str, norm: nn.Module) -> None:
        counts = [passes(norm, branches=n) for n in (0, 1)]
        cells = [f'{one:g} + {other:g}' for one, other in counts]
        print(f'| {name} | {" | ".join(cells)} |')
        if isinstance(norm, ws_mm.BCN):
            pairs = zip(counts[0], BAR, strict=True)
            above.append(any(n > bar for n, bar in pairs))

    for name, norm in contenders().items():
        row(name, norm)
    failed = any(above)
    composed = plain.batch_channel_norm
    with mock.patch.object(compiled, 'batch_channel_norm', composed):
        row('BCN as exported', ws_mm.BCN(SHAPE[1]))
    print(f'The bar of BCN and a ReLU is {BAR[0]:g} + {BAR[1]:g}.')
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
