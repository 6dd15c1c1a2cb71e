"""Run a grid of experiments, and go on where it was interrupted.

    python tools/experiments/run.py GRID.py OUT_DIR [--processes 2]

Each run is tools/train.py on a config that is written to OUT_DIR/configs, in
OUT_DIR/runs; what came out is one file of OUT_DIR/records, written when the
run has ended. A run without a whole record is done again, from its last
checkpoint. A loss that is no number ends a run as "diverged"; a norm that
cannot normalize what it gets ends it as "impossible"; any other failure
leaves no record, and the next call tries again.
"""

import argparse
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOOLS))

from experiments import records  # noqa: E402
from experiments.grid import Cell, Grid, GridError, config_of  # noqa: E402
from experiments.grid import load as load_grid  # noqa: E402
from experiments.hooks import DIVERGED, IMPOSSIBLE  # noqa: E402
from support import environment  # noqa: E402
from support.files import read_scalars, write_text  # noqa: E402

from ws_mm.singularities import FILE as SINGULARITIES  # noqa: E402

# In a traceback, or in a message of train.py.
FAILURE = re.compile(
    rf'(?:ValueError: |error: |Training stopped \()({IMPOSSIBLE.pattern})'
)
TASK = 'task.json'  # of a run: what trained it
# mmdet's words where it gives no AP; it is 0.
NOTHING = 'The testing results of the whole dataset is empty'


def main(argv: Sequence[str] | None = None) -> None:
    """Run what has no record yet."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('grid', help='grid file, see grid.py')
    parser.add_argument('out_dir', type=Path)
    parser.add_argument(
        '--processes', type=int, default=1, help='runs at a time'
    )
    parser.add_argument(
        '--only', default='', help='runs whose name contains this'
    )
    parser.add_argument(
        '--list', action='store_true', help='say what would run'
    )
    options = parser.parse_args(argv)
    if options.processes < 1:
        parser.error(f'--processes={options.processes} must be at least 1')
    try:
        grid = load_grid(options.grid)
    except GridError as error:
        sys.exit(f'error: {error}')
    cells = [cell for cell in grid.cells if options.only in cell.key]
    if not cells:
        names = '\n  '.join(cell.key for cell in grid.cells)
        parser.error(f'--only={options.only!r} names no run of\n  {names}')
    waiting = [
        cell
        for cell in cells
        if not has_record(cell, grid.tasks[cell.task], options.out_dir)
    ]
    if options.list:
        for cell in cells:
            state = 'waits' if cell in waiting else 'done'
            print(f'{state:5} {cell.key}')
        return
    options.out_dir.mkdir(parents=True, exist_ok=True)
    with alone(options.out_dir) as lock:
        for cell in waiting:
            check_task(cell, grid.tasks[cell.task], options.out_dir)
        try:
            check_configs(grid, waiting)
        except GridError as error:
            sys.exit(f'error: {error}')
        failed = run_all(grid, waiting, len(cells), options, lock)
    if failed:
        sys.exit(f'error: {failed} of {len(waiting)} runs failed, see above')


@contextmanager
def alone(folder: Path) -> Any:
    """Keep a second call out of the same folder."""
    with open(folder / '.lock', 'w') as lock:
        # A training that is being killed holds it a moment longer.
        for _ in range(50):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.1)
        else:
            sys.exit(
                f'error: another call is at work in {folder}, or a training '
                'that a killed one has left'
            )
        yield lock.fileno()


def has_record(cell: Cell, task: dict[str, Any], out_dir: Path) -> bool:
    """Return whether a run is done; a record must be whole to count.

    Raises:
        SystemExit: the record is of a task with other settings.
    """
    path = out_dir / 'records' / f'{cell.key}.json'
    if not path.exists():
        return False
    try:
        found = records.read(path)
    except ValueError as error:
        print(f'{error}; the run is done again', flush=True)
        return False
    if found['task'] != task:
        sys.exit(
            f'error: {path} is of tasks.{cell.task}={found["task"]}, the '
            f'grid has {task}: give another OUT_DIR'
        )
    return True


def check_task(cell: Cell, task: dict[str, Any], out_dir: Path) -> None:
    """Keep a run that was begun from going on as one of another task.

    Raises:
        SystemExit: its checkpoints are of a task with other settings.
    """
    path, wanted = out_dir / 'runs' / cell.key / TASK, trained_by(task)
    if path.exists() and (found := json.loads(path.read_text())) != wanted:
        sys.exit(
            f'error: {path.parent} was begun as tasks.{cell.task}={found}, '
            f'the grid has {wanted}: give another OUT_DIR'
        )


def trained_by(task: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a task that its training depends on."""
    return {key: value for key, value in task.items() if key != 'metric'}


def check_configs(grid: Grid, waiting: list[Cell]) -> None:
    """Make a config of each task, and of each cell that has options.

    Raises:
        GridError: one cannot be made.
    """
    seen = set()
    for cell in waiting:
        if cell.options or cell.task not in seen:
            config_of(cell, grid.tasks[cell.task])
        seen.add(cell.task)


def run_all(
    grid: Grid,
    waiting: list[Cell],
    total: int,
    options: argparse.Namespace,
    lock: int,
) -> int:
    """Run the cells, several at a time; return how many failed.

    Trainings hold the lock, too: they may survive this process.
    """
    started, failed, done = time.monotonic(), 0, 0
    stop = threading.Event()
    with ThreadPoolExecutor(options.processes) as pool:
        threads = max(1, (os.cpu_count() or 1) // options.processes)
        jobs = {
            pool.submit(
                run_cell,
                cell,
                grid.tasks[cell.task],
                options.out_dir,
                threads,
                stop,
                lock,
            ): cell
            for cell in waiting
        }
        try:
            for job in as_completed(jobs):
                done += 1
                try:
                    outcome = job.result()
                # Whatever a cell's config may raise; the others go on.
                except Exception as error:
                    print(f'{jobs[job].key}: {error}', flush=True)
                    outcome = None
                failed += outcome is None
                spent = time.monotonic() - started
                left = spent / done * (len(waiting) - done)
                print(
                    f'[{total - len(waiting) + done}/{total}] '
                    f'{jobs[job].key}: {brief(outcome)}; '
                    f'{clock(spent)} spent, about {clock(left)} left',
                    flush=True,
                )
        except KeyboardInterrupt:
            stop.set()
            for job in jobs:
                job.cancel()
            sys.exit('interrupted; call again to go on')
    return failed


def brief(record: dict[str, Any] | None) -> str:
    """Describe the result of a run in a few words."""
    if record is None:
        return 'failed'
    if record['status'] == 'done':
        return f'{record["metric"]:.4g} in {clock(record["seconds"])}'
    return f'{record["status"]} ({record["reason"]})'


def clock(seconds: float) -> str:
    """A duration as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}'


def run_cell(
    cell: Cell,
    task: dict[str, Any],
    out_dir: Path,
    threads: int,
    stop: threading.Event,
    lock: int,
) -> dict[str, Any] | None:
    """Train one cell to its end and write its record."""
    if stop.is_set():
        return None
    config = out_dir.resolve() / 'configs' / f'{cell.key}.py'
    work_dir = out_dir.resolve() / 'runs' / cell.key
    config.parent.mkdir(parents=True, exist_ok=True)
    work_dir.mkdir(parents=True, exist_ok=True)
    (work_dir / DIVERGED).unlink(missing_ok=True)
    write_text(work_dir / TASK, json.dumps(trained_by(task)))
    config_of(cell, task).dump(config)
    log = work_dir / 'output.log'
    with log.open('a') as file:
        attempts = [*attempts_of(work_dir), {'started': time.time()}]
        write_attempts(work_dir, attempts)
        started = time.monotonic()
        process = subprocess.Popen(
            [
                *(sys.executable, TOOLS / 'train.py', config),
                *('--work-dir', work_dir, '--resume'),
            ],
            cwd=TOOLS.parent,
            env={**os.environ, 'OMP_NUM_THREADS': str(threads)},
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    attempts[-1] |= {
        'seconds': time.monotonic() - started,
        'peak_bytes': usage.ru_maxrss * 1024,
    }
    write_attempts(work_dir, attempts)
    record = outcome(cell, task, work_dir, process.returncode)
    if record is None:
        tail = log.read_text(errors='replace').splitlines()[-12:]
        print(f'{cell.key} failed, see {log}:', *tail, sep='\n  ', flush=True)
        return None
    records.write(out_dir / 'records' / f'{cell.key}.json', record)
    for checkpoint in work_dir.glob('*.pth'):
        checkpoint.unlink()
    return record


def attempts_of(work_dir: Path) -> list[dict[str, float]]:
    """Time and memory of every call so far that trained this cell.

    A call that was killed could not write its end; its training lasted at
    least until it last said something.
    """
    path = work_dir / 'attempts.jsonl'
    if not path.exists():
        return []
    attempts = [json.loads(line) for line in path.read_text().splitlines()]
    for attempt in attempts:
        if 'seconds' not in attempt:
            said = (work_dir / 'output.log').stat().st_mtime
            attempt['seconds'] = max(0.0, said - attempt['started'])
            attempt['peak_bytes'] = 0
    return attempts


def write_attempts(work_dir: Path, attempts: list[dict[str, float]]) -> None:
    """Write the file that :func:`attempts_of` reads."""
    lines = ''.join(json.dumps(attempt) + '\n' for attempt in attempts)
    write_text(work_dir / 'attempts.jsonl', lines)


def outcome(
    cell: Cell, task: dict[str, Any], work_dir: Path, code: int
) -> dict[str, Any] | None:
    """The record of a run that has ended, None if it simply failed."""
    curve, metrics = read_curves(work_dir)
    status, reason, metric = 'done', '', None
    said = (work_dir / 'output.log').read_text(errors='replace')
    if (
        metrics
        and task['metric'].startswith('coco/')
        and NOTHING in said.rpartition('Iter(train)')[2]
    ):
        metrics[-1].setdefault(task['metric'], 0.0)
    if code != 0:
        diverged = work_dir / DIVERGED
        found = FAILURE.findall(said)
        if diverged.exists():
            iteration = json.loads(diverged.read_text())['iteration']
            status, reason = 'diverged', f'at iteration {iteration}'
        elif found:
            status, reason = 'impossible', found[-1]
        else:
            return None
    elif not metrics or task['metric'] not in metrics[-1]:
        known = ', '.join(metrics[-1]) if metrics else 'none'
        print(
            f'{cell.key}: no metric {task["metric"]!r} among {known}: fix '
            f'tasks.{cell.task}.metric of the grid',
            flush=True,
        )
        return None
    else:
        metric = metrics[-1][task['metric']]
    attempts = attempts_of(work_dir)
    return {
        'schema': records.SCHEMA,
        'task': task,
        'cell': {**asdict(cell), 'label': cell.label},
        'status': status,
        'reason': reason,
        'versions': versions(),
        'curve': curve,
        'metrics': metrics,
        'layers': last_layers(work_dir),
        'metric': metric,
        'seconds': sum(a['seconds'] for a in attempts),
        'peak_bytes': max(a['peak_bytes'] for a in attempts),
    }


def read_curves(
    work_dir: Path,
) -> tuple[list[list[float]], list[dict[str, float]]]:
    """Loss over iterations, and the metrics of every validation.

    A run that was resumed has one file for each attempt; where two say
    something of an iteration, the later one counts.
    """
    losses: dict[int, float] = {}
    metrics: dict[int, dict[str, float]] = {}
    for entry in read_scalars(work_dir):
        if 'loss' in entry:
            losses[entry['step']] = entry['loss']
        else:
            metrics.setdefault(entry['step'], {}).update(entry)
    return [[i, losses[i]] for i in sorted(losses)], [
        metrics[i] for i in sorted(metrics)
    ]


def last_layers(work_dir: Path) -> dict[str, dict[str, float]]:
    """Return the last measurement of SingularitiesHook, by layer."""
    path = work_dir / SINGULARITIES
    if not path.exists():
        return {}
    return json.loads(path.read_text().splitlines()[-1])['layers']


def versions() -> dict[str, str]:
    """Return commit and versions, to repeat a run."""
    git = shutil.which('git')
    commit = ''
    if git:
        done = subprocess.run(
            [git, 'rev-parse', '--short', 'HEAD'],
            cwd=TOOLS,
            capture_output=True,
            text=True,
        )
        commit = done.stdout.strip()
    return {
        'commit': commit,
        **environment.versions('torch', 'mmcv', 'mmdet', 'mmseg', 'ws_mm'),
    }


if __name__ == '__main__':
    main()
