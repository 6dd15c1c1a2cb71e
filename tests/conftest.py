"""Fixtures for all tests."""

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from forks import Forks
from gloo import World
from mmengine.registry import DefaultScope

with contextlib.suppress(ImportError):  # environments without cv2
    from in_process import (  # noqa: F401
        config,
        process,
        reaches,
        refuses,
        script,
        weights,
    )

if not torch.cuda.is_available():
    # Triton reads this when it is imported, which torch does late: without a
    # GPU its kernels are interpreted, on CPU tensors.
    os.environ.setdefault('TRITON_INTERPRET', '1')
if 'PYTEST_XDIST_WORKER' in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # of what tests start


@pytest.fixture(autouse=True)
def seed() -> None:
    """Make the inputs of every test the same in every run."""
    torch.manual_seed(0)


def keep_scopes(patch: pytest.MonkeyPatch) -> None:
    """Have the default scopes of now again when the patch ends."""
    scopes = DefaultScope._instance_dict.copy()
    patch.setattr(DefaultScope, '_instance_dict', scopes)


@pytest.fixture(autouse=True)
def scope(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back the default scope that a Runner leaves."""
    keep_scopes(monkeypatch)


@pytest.fixture(autouse=True, scope='module')
def scope_of_module() -> Iterator[None]:
    """Take back the one of a Runner in a fixture of a module."""
    with pytest.MonkeyPatch.context() as patch:
        keep_scopes(patch)
        yield


@pytest.fixture(params=['auto', 'fused'])
def kernels(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Run a test as users do, and with closed forms at any size.

    A CPU's small inputs get the composed operations in 'auto'.
    """
    monkeypatch.setenv('WS_MM_KERNELS', request.param)
    return request.param


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


@pytest.fixture(scope='session')
def forks() -> Iterator[Forks]:
    """Start scripts of tools/ without the seconds of their imports."""
    forks = Forks()
    yield forks
    forks.stop()
