"""Gloo processes that are started once and serve many tests."""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Imported once, by the process that the others are forked from. Nothing of
# this repository: it could be found elsewhere than the tests find it.
PRELOAD = [
    'pytest',
    'torch._dynamo.testing',
    'torch._functorch.aot_autograd',
    'mmengine.runner',
]
LIMIT = 100  # seconds for one call


class World:
    """The processes of one group: each calls what it is given, in order.

    Args:
        size: number of processes.
        folder: where they find each other.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        self.folder = folder
        self.connections: list[Connection] = []
        self.processes: list[Any] = []

    def run(
        self, function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> list[Any]:
        """Call function(rank, *args, **kwargs) on every rank.

        The ranks have the environment of the caller, not that of the test
        which happened to start them.

        Returns:
            what each rank returned.

        Raises:
            AssertionError: with the traceback of the first rank to fail; the
                next call starts fresh processes.
        """
        if not self.processes:
            self._start()
        message = pickle.dumps((function, args, kwargs, dict(os.environ)))
        for connection in self.connections:
            connection.send_bytes(message)
        results: dict[int, Any] = {}
        end = time.monotonic() + LIMIT
        try:
            while len(results) < self.size:
                missing = set(range(self.size)) - set(results)
                ready = wait(
                    [self.connections[rank] for rank in missing],
                    end - time.monotonic(),
                )
                assert ready, f'ranks {missing} did not end in {LIMIT} s'
                for connection in ready:
                    rank = self.connections.index(connection)
                    error, results[rank] = self._receive(rank)
                    assert not error, f'rank {rank} of {self.size}:\n{error}'
        except BaseException:
            self.stop()
            raise
        return [results[rank] for rank in range(self.size)]

    def _receive(self, rank: int) -> Any:
        try:
            return pickle.loads(self.connections[rank].recv_bytes())
        except (EOFError, ConnectionError):
            self.processes[rank].join()
            return f'exit code {self.processes[rank].exitcode}', None

    def _start(self) -> None:
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(PRELOAD)
        meeting = self.folder / f'meeting-{time.monotonic_ns()}'
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, rank, self.size, meeting),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def stop(self) -> None:
        """End the processes at once."""
        for process in self.processes:
            process.kill()
            process.join()
        self.connections.clear()
        self.processes.clear()


def _serve(
    connection: Connection, rank: int, size: int, meeting: Path
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo',
        init_method=f'file://{meeting}',
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=LIMIT),
    )
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        error, result = '', None
        try:
            function, args, kwargs, environ = pickle.loads(message)
            os.environ.clear()
            os.environ.update(environ)
            torch.manual_seed(0)
            torch._dynamo.reset()
            result = function(rank, *args, **kwargs)
        except BaseException:
            error = traceback.format_exc()
        connection.send_bytes(pickle.dumps((error, result)))
