"""Time contenders side by side, in one process.

In each round every contender runs once, in a new random order, so that a
machine that slows down slows all of them. Figures are medians over the rounds
with their 20th and 80th percentile; a ratio is the median of the ratios to
the baseline of the same round. A contender that fails becomes an error row.
"""

import os
import random
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

Row = dict[str, Any]
WARM_UP = 2
# How long a GPU sleeps before timed work; what waits for it needs no more.
SLEEP_MS, MOST_SLEEP_MS, CYCLES_PER_MS = 2, 30, 2_000_000
VARIABLE = 'WS_MM_KERNELS'


def race(
    contenders: dict[str, Callable[[], object]],
    baseline: str,
    rounds: int,
    device: str,
    warm_up: int = WARM_UP,
) -> list[Row]:
    """Run all contenders in every round; one row for each.

    A contender whose name ends in ' plain' runs with the plain
    implementation, others with what the environment names; on a GPU 'auto'
    is forced, so that kernels that cannot run are an error row.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, int] = {}
    hosts: dict[str, float] = {}
    errors: dict[str, str] = {}
    own = os.environ.get(VARIABLE, 'auto')
    chosen = own
    if own == 'auto' and device == 'cuda':
        chosen = forced(True)
    for turn in range(rounds + warm_up):
        order = [name for name in contenders if name not in errors]
        random.shuffle(order)
        for name in order:
            plain = name.endswith(' plain')
            os.environ[VARIABLE] = 'plain' if plain else chosen
            try:
                if turn == 0 and device == 'cuda':
                    peaks[name] = peak_bytes(contenders[name])
                    hosts[name] = host_ms(contenders[name])
                took = clock(contenders[name], device)
            except Exception as error:
                first = (str(error).splitlines() or [''])[0]
                errors[name] = f'{type(error).__name__}: {first}'
                continue
            if turn >= warm_up:
                times[name].append(took)
    os.environ[VARIABLE] = own
    rows = []
    for name, values in times.items():
        row: Row = {'contender': name}
        if name in errors:
            row['error'] = errors[name]
        else:
            row |= spread('ms', values)
            if baseline not in errors:
                pairs = zip(values, times[baseline], strict=True)
                row |= spread('ratio', [a / b for a, b in pairs])
        if name in peaks:
            row['peak_bytes'] = peaks[name]
            row['host_ms'] = hosts.get(name)
        rows.append(row)
    return rows


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(values)
    edge = len(ordered) // 5
    return {
        name: median(ordered),
        f'{name}_p20': ordered[edge],
        f'{name}_p80': ordered[-1 - edge],
    }


def forced(gpu: bool) -> str:
    """The choice that takes fused kernels, or raises on a GPU."""
    return 'triton' if gpu else 'fused'


def clock(contender: Callable[[], object], device: str) -> float:
    """Milliseconds of one run, on a GPU of the device alone.

    The device sleeps until the host has handed over all work. Else small
    work would be timed by how fast the host is; see :func:`host_ms`.
    """
    if device != 'cuda':
        start = time.perf_counter()
        contender()
        return (time.perf_counter() - start) * 1e3
    start_event = torch.cuda.Event(enable_timing=True)
    end_event = torch.cuda.Event(enable_timing=True)
    ahead = SLEEP_MS
    while True:
        torch.cuda.synchronize()
        torch.cuda._sleep(int(ahead * CYCLES_PER_MS))
        start_event.record()
        contender()
        end_event.record()
        behind = start_event.query()  # the device has not waited for us
        torch.cuda.synchronize()
        if not behind or ahead > MOST_SLEEP_MS:
            return start_event.elapsed_time(end_event)
        ahead *= 4


def host_ms(contender: Callable[[], object]) -> float:
    """Milliseconds until the host has handed all work to a GPU."""
    found = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        contender()
        found.append((time.perf_counter() - start) * 1e3)
    torch.cuda.synchronize()
    return median(found)


def peak_bytes(contender: Callable[[], object]) -> int:
    """The most that one run allocates on a GPU beyond what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contender()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(function: Callable[[], Tensor]) -> int:
    """Bytes kept for backward, every storage once, parameters excluded."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = function()
    del output
    return sum(storages.values())
