"""Time contenders side by side, in one process.

In each round every contender runs once, in a new random order, so that a
machine that slows down slows all of them. Figures are medians over the rounds
with their 20th and 80th percentile; a ratio is the median of the ratios to
the baseline of the same round. A contender that fails becomes an error row. A
time on a GPU that holds time of the host says 'waits_for_host'; one on a CPU
has the median of 'page_faults', memory that the system had to map.
"""

import ctypes
import os
import random
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from statistics import median, quantiles
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

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
    faults: dict[str, list[int]] = {name: [] for name in contenders}
    peaks: dict[str, int] = {}
    hosts: dict[str, float] = {}
    errors: dict[str, str] = {}
    late: set[str] = set()
    for turn in range(rounds + warm_up):
        order = [name for name in contenders if name not in errors]
        random.shuffle(order)
        for name in order:
            try:
                with kernels_of(name, device):
                    if turn == 0 and device == 'cuda':
                        contenders[name]()  # what is built once, and .grad
                        peaks[name] = peak_bytes(contenders[name])
                        hosts[name] = host_ms(contenders[name])
                    mapped = page_faults()
                    took, ahead = clock(contenders[name], device)
                    mapped = page_faults() - mapped
            except Exception as error:
                errors[name] = said(error)
                continue
            if turn >= warm_up:
                times[name].append(took)
                faults[name].append(mapped)
                if not ahead:
                    late.add(name)
    rows = []
    for name, values in times.items():
        row: Row = {'contender': name}
        if name in errors:
            row['error'] = errors[name]
        else:
            row |= spread('ms', values)
            if device == 'cpu':
                row['page_faults'] = median(faults[name])
            if baseline not in errors:
                pairs = zip(values, times[baseline], strict=True)
                row |= spread('ratio', [a / b for a, b in pairs])
        if name in peaks:
            row['peak_bytes'] = peaks[name]
            row['host_ms'] = hosts.get(name)
        if name in late:
            row['waits_for_host'] = True
        rows.append(row)
    return rows


def once(contenders: dict[str, Callable[[], object]]) -> list[Row]:
    """Run each contender one time, for what it raises."""
    rows = []
    for name, contender in contenders.items():
        start = time.perf_counter()
        try:
            contender()
        except Exception as error:
            rows.append({'contender': name, 'error': said(error)})
            continue
        took = (time.perf_counter() - start) * 1e3
        rows.append({'contender': name, **spread('ms', [took])})
    return rows


def choose_pages(new: bool) -> None:
    """Let the system map each large tensor anew, or let it reuse memory.

    By itself glibc does one or the other, as the process happens to free its
    memory, and a step in new pages takes about twice as long. What was freed
    for reuse is taken before new pages are: those come first.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is None:
        return  # another C library
    # Of malloc.h: M_MMAP_THRESHOLD; M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD.
    reuse = (-4, 0), (-1, (1 << 31) - 1), (-2, 1 << 30)
    for name, value in ((-3, 1 << 20),) if new else reuse:
        mallopt(name, value)


def page_faults() -> int:
    """Pages that the system has mapped for this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def said(error: Exception) -> str:
    """The kind of an error and its first line."""
    first = (str(error).splitlines() or [''])[0]
    return f'{type(error).__name__}: {first}'


def kernels_of(contender: str, device: str) -> AbstractContextManager[Any]:
    """Choose the implementation that a name asks for, see :func:`race`."""
    choice = os.environ.get(VARIABLE, 'auto')
    if contender.endswith(' plain'):
        choice = 'plain'
    elif choice == 'auto' and device == 'cuda':
        choice = forced(True)
    return choosing(choice)


def choosing(choice: str) -> AbstractContextManager[Any]:
    """Let the environment name an implementation, within a block."""
    return mock.patch.dict(os.environ, {VARIABLE: choice})


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    middle = low = high = median(values)
    if len(values) > 1:
        low, *_, high = quantiles(values, n=5, method='inclusive')
    return {
        name: middle,
        # Interpolation may round them beyond it.
        f'{name}_p20': min(low, middle),
        f'{name}_p80': max(high, middle),
    }


def forced(gpu: bool) -> str:
    """The choice that takes fused kernels, or raises on a GPU."""
    return 'triton' if gpu else 'fused'


def clock(contender: Callable[[], object], device: str) -> tuple[float, bool]:
    """Milliseconds of one run, and whether they are of the device alone.

    A GPU sleeps until the host has handed over all work. Else small work
    would be timed by how fast the host is; see :func:`host_ms`. Several
    processes run it once, since each of them would choose another sleep.
    """
    if device != 'cuda':
        start = time.perf_counter()
        contender()
        return (time.perf_counter() - start) * 1e3, True
    together = dist.is_available() and dist.is_initialized()
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
        if not behind or ahead > MOST_SLEEP_MS or together:
            return start_event.elapsed_time(end_event), not behind
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
