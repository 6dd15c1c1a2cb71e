"""Run a function in several processes of one group."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_ranks(
    function: Callable[..., Any],
    *args: Any,
    size: int = 2,
    start_method: str = 'fork',
    backend: str = 'gloo',
    seconds: float = 1800,
) -> list[Any]:
    """Return what ``function(rank, *args)`` returns in each process.

    Their output is dropped.

    Args:
        function: Function to call; defined in a module unless the start
            method is ``'fork'``.
        *args: Its arguments after the rank.
        size: Number of processes.
        start_method: How they start, see :mod:`multiprocessing`.
        backend: Backend of the group; with ``'nccl'`` each has a GPU.
        seconds: Longest wait of one for the other.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _start,
            (size, backend, seconds, Path(folder), function, args),
            size,
            start_method=start_method,
        )
        return [
            torch.load(Path(folder, f'{rank}.pt'), weights_only=False)
            for rank in range(size)
        ]


def _start(
    rank: int,
    size: int,
    backend: str,
    seconds: float,
    folder: Path,
    function: Callable,
    args: tuple,
) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    if backend == 'nccl':
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f'file://{folder}/meeting',
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=seconds),
    )
    result = function(rank, *args)
    dist.barrier()
    torch.save(result, folder / f'{rank}.pt')
    dist.destroy_process_group()
