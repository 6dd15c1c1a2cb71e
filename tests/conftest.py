"""Fixtures for all tests."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from gloo import World

# Small inputs would get the composed operations, which here are what the fused
# ones are compared with.
os.environ.setdefault('WS_MM_KERNELS', 'fused')
if not torch.cuda.is_available():
    # Triton reads this when it is imported, which torch does late: without a
    # GPU its kernels are interpreted, on CPU tensors.
    os.environ.setdefault('TRITON_INTERPRET', '1')


@pytest.fixture(autouse=True)
def seed() -> None:
    """Make the inputs of every test the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def world(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[int], World]]:
    """Gloo processes by their number, kept until the last test."""
    worlds: dict[int, World] = {}

    def of_size(size: int) -> World:
        if size not in worlds:
            worlds[size] = World(size, tmp_path_factory.mktemp('gloo'))
        return worlds[size]

    yield of_size
    for each in worlds.values():
        each.stop()
