"""Kill a training again and again, resume it, and compare what it becomes.

The training of a config runs once to its end. Then it runs in another folder,
where it is killed (SIGKILL) at random moments and continued with --resume.
Every second kill comes while a checkpoint is written; the writing is slowed
down for that. Losses of every logged iteration, weights, estimates, optimizer
and schedulers have to be equal to the last bit. One JSON line is printed; the
exit code is 1 where something differs or does not resume.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from mmengine.fileio import LocalBackend

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from support import checkpoints, checks, launch
from support.files import read_scalars

# Logged, but not a matter of the training.
CLOCK = {'time', 'data_time', 'memory'}
# A dataloader's workers see within this time that their parent was killed.
ORPHANS_S = 15
# What a checkpoint takes to write, at least.
WRITE_S = 0.2


def write_slowly(self: LocalBackend, obj: bytes, path: str) -> None:
    """Write a file in ten parts, so that a kill finds it half written."""
    step = len(obj) // 10 + 1
    with open(path, 'wb') as file:
        for start in range(0, len(obj), step):
            file.write(obj[start : start + step])
            file.flush()
            time.sleep(WRITE_S / 10)


def start(command: list[str], log: Path) -> int:
    """Fork a process that runs train.py.

    It starts with everything imported, in a session of its own.

    Args:
        command: arguments of train.py.
        log: gets what it prints.

    Returns:
        The process's id, which is its group's, too.
    """
    process = os.fork()
    if process:
        return process
    _train(command, log)


def _train(command: list[str], log: Path) -> NoReturn:
    code = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        LocalBackend.put = write_slowly
        sys.argv = ['train.py', *command]
        launch.run(train.main)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        # Else the parent's half-done cleaning up would be done here, too.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def kill(process: int, after: float, folder: Path, save: int = 0) -> str:
    """Kill a process unless it ends by itself before.

    Args:
        process: its id.
        after: seconds to wait first; of the save, if one is given.
        folder: Folder of its checkpoints.
        save: kill it while it writes its first, second, ... checkpoint;
            0 for any moment.

    Returns:
        'ended' where it had ended well, else 'killed', or 'saving' where
        that cut a checkpoint in half.

    Raises:
        RuntimeError: it failed.
    """
    # Halves that an earlier kill left are no sign of this process.
    old = {path: path.stat().st_mtime_ns for path in folder.glob('*.part')}
    begun: set[Path] = set()
    moment = None if save else time.monotonic() + after
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            if os.waitstatus_to_exitcode(status) != 0:
                raise RuntimeError('the training failed')
            return 'ended'
        begun |= fresh(folder, old)
        if moment is None and len(begun) == save:
            moment = time.monotonic() + after
        if moment is not None and time.monotonic() >= moment:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return 'saving' if fresh(folder, old) else 'killed'
        time.sleep(0.002)


def fresh(folder: Path, old: dict[Path, int]) -> set[Path]:
    """Checkpoints that are being written, without the old halves."""
    found = set()
    for path in folder.glob('*.part'):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime_ns != old.get(path):
                found.add(path)
    return found


def orphans(groups: list[int]) -> list[int]:
    """Groups of killed processes in which one is left after a while."""
    until = time.monotonic() + ORPHANS_S
    while groups and time.monotonic() < until:
        groups = [group for group in groups if _lives(group)]
        time.sleep(0.1)
    return groups


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def broken_files(work_dir: Path) -> list[str]:
    """List half checkpoints, and a last_checkpoint that names none."""
    _, broken = checkpoints.newest_checkpoint(str(work_dir))
    named = work_dir / 'last_checkpoint'
    # Empty where it was killed between opening and writing the file.
    if named.exists() and (path := named.read_text()):
        try:
            checkpoints.read_checkpoint(path)
        except checks.SetupError as error:
            broken.append(f'last_checkpoint: {error}')
    return broken


def logged(work_dir: Path) -> Iterator[tuple[int, dict]]:
    """Yield the logged values of each iteration, repeated ones too."""
    for values in read_scalars(work_dir):
        if 'loss' in values:
            yield (
                values['step'],
                {k: v for k, v in values.items() if k not in CLOCK},
            )


def final(work_dir: Path) -> dict[str, Any]:
    """Return the training state of the last checkpoint."""
    # A kill may leave last_checkpoint empty, and a run that resumes from its
    # last iteration writes it no more.
    path, _ = checkpoints.newest_checkpoint(str(work_dir))
    content = checkpoints.read_checkpoint(path)
    kept = ('state_dict', 'optimizer', 'param_schedulers')
    return {name: content[name] for name in kept if name in content}


def differences(ours: Any, theirs: Any, name: str = '') -> list[str]:
    """Names of what is not equal to the last bit in two nested things."""
    if type(ours) is not type(theirs):
        return [name]
    if isinstance(ours, dict) and ours.keys() == theirs.keys():
        pairs = [(key, ours[key], theirs[key]) for key in ours]
    elif isinstance(ours, (list, tuple)) and len(ours) == len(theirs):
        pairs = list(zip(range(len(ours)), ours, theirs, strict=True))
    elif isinstance(ours, torch.Tensor):
        same = ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        return [] if same else [name]
    else:
        return [] if ours == theirs else [name]
    return [
        line
        for key, *both in pairs
        for line in differences(*both, f'{name}.{key}'.lstrip('.'))
    ]


def compare(whole: Path, killed: Path) -> list[str]:
    """List the differences of an unbroken run and a resumed one."""
    curve = dict(logged(whole))
    again = list(logged(killed))
    wrong = [
        f'log of iteration {step}'
        for step, values in again
        if values != curve.get(step)
    ]
    lacking = curve.keys() - dict(again).keys()
    wrong += [f'no log of iteration {step}' for step in sorted(lacking)]
    return wrong + differences(final(whole), final(killed))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, kill, resume and compare."""
    moments = random.Random(0)
    whole, killed = args.work_dir / 'whole', args.work_dir / 'killed'
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    log = args.work_dir / 'output.log'
    command = [args.config, '--resume']
    if args.cfg_options:
        command += ['--cfg-options', *args.cfg_options]

    begun = time.monotonic()
    kill(start([*command, '--work-dir', str(whole)], log), 1e9, whole)
    took = time.monotonic() - begun

    kills, while_saving, compared = 0, 0, 0
    wrong: list[str] = []
    groups: list[int] = []
    resumed: list[str] = []
    while True:
        newest, broken = checkpoints.newest_checkpoint(str(killed))
        wrong += broken
        if newest:
            resumed.append(Path(newest).stem)
        process = start([*command, '--work-dir', str(killed)], log)
        if kills == args.kills:
            how = kill(process, 1e9, killed)
        elif kills % 2:
            how = kill(process, moments.uniform(0, took), killed)
        else:
            # Not the first at first, so that there is what to resume from.
            save = moments.randint(1, 3) if kills else 2
            # Early: a busy machine is late to see it, and to kill it.
            how = kill(process, moments.uniform(0, WRITE_S / 4), killed, save)
        if how != 'ended':
            kills += 1
            groups.append(process)
            while_saving += how == 'saving'
            wrong += broken_files(killed)
            continue
        compared += 1
        wrong += compare(whole, killed)
        if kills == args.kills:
            break
        if compared > args.kills + 3:
            wrong.append('it ended again and again before it could be killed')
            break
        # It ended before it could be killed: once more from the start.
        shutil.rmtree(killed)
        killed.mkdir()
    if not resumed:
        wrong.append('nothing was resumed: no kill came after a checkpoint')
    left = [str(path) for path in killed.glob('*.part')]
    return {
        'config': Path(args.config).name,
        'options': args.cfg_options,
        'kills': kills,
        'of_these_in_the_midst_of_a_save': while_saving,
        'resumed_from': resumed,
        'compared_runs': compared,
        'logged_iterations': len(dict(logged(whole))),
        'tensors': len(final(whole)['state_dict']),
        'differences': wrong,
        'left_behind': left,
        'processes_left': orphans(groups),
    }


def main() -> None:
    """Print the comparison; exit with 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file with randomness.seed')
    parser.add_argument('work_dir', type=Path, help='folder for both runs')
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], help='as of train.py'
    )
    args = parser.parse_args()
    try:
        result = run(args)
    except RuntimeError as error:
        tail = (args.work_dir / 'output.log').read_text()[-3000:]
        sys.exit(f'{tail}\nerror: {error}; its output is above')
    print(json.dumps(result))
    failed = ('differences', 'left_behind', 'processes_left')
    sys.exit(1 if any(result[name] for name in failed) else 0)


if __name__ == '__main__':
    main()
