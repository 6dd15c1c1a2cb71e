"""Rows of the host contract: runs of mmseg's train.py that are killed.

Each row trains a tiny segmentor with BN on a CPU, in a temporary folder.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from proofs.peers.rows import main
from proofs.tiny import SEG, write_config, write_data
from support.files import read_scalars

# mmseg's train.py; a disk that takes half a second for a checkpoint.
TRAIN = """
import os, runpy, sys, time
import mmseg
from mmengine.fileio import LocalBackend
def put(self, obj, path):
    with open(path, 'wb') as file:
        for start in range(0, len(obj), len(obj) // 10 + 1):
            file.write(obj[start:start + len(obj) // 10 + 1])
            file.flush()
            time.sleep(SECONDS)
if SECONDS:
    LocalBackend.put = put
script = os.path.join(os.path.dirname(mmseg.__file__), '.mim/tools/train.py')
sys.argv[0] = script
runpy.run_path(script, run_name='__main__')
"""


def in_folder(row: Callable[[Path], str]) -> Callable[[], str]:
    """Give a row a folder in which tiny.py is a config."""

    @wraps(row)
    def run() -> str:
        with tempfile.TemporaryDirectory() as name:
            folder = write_data(Path(name) / 'data', images=5)
            text = SEG.replace(
                "dict(type='ws_mm.BCN', num_groups=4)", "dict(type='BN')"
            ).replace("dict(type='ws_mm.WSConv2d')", 'None')
            write_config(
                folder,
                text,
                "model['decode_head']['dropout_ratio'] = 0.1\n"
                'train_dataloader.update(batch_size=2)\n'
                "dataset['pipeline'].insert("
                "-1, dict(type='RandomFlip', prob=0.5))\n",
            )
            return row(folder)

    return run


def start(
    folder: Path,
    work_dir: Path,
    *options: str,
    seconds: float = 0,
    arguments: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
) -> subprocess.Popen:
    """Start mmseg's train.py.

    Args:
        folder: Folder of the config.
        work_dir: Work dir of the run; its output goes beside it.
        *options: Values of --cfg-options.
        seconds: that a tenth of a checkpoint takes to write.
        arguments: others of train.py.
        environment: added to that of this process.
    """
    with Path(f'{work_dir}.log').open('w') as log:
        return subprocess.Popen(
            [
                *(sys.executable, '-c', f'SECONDS = {seconds}\n{TRAIN}'),
                *(str(folder / 'tiny.py'), '--work-dir', str(work_dir)),
                *arguments,
                *(('--cfg-options', *options) if options else ()),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ
            | {'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}
            | (environment or {}),
        )


def outcome(run: subprocess.Popen, work_dir: Path) -> str:
    """Return the iteration that a run reached, or its last line."""
    code = run.wait(300)
    lines = Path(f'{work_dir}.log').read_text().strip().splitlines()
    if code == 0:
        resumed = re.findall(r'resumed epoch: 0, iter: (\d+)', str(lines))
        return f'continues from {resumed[0]}' if resumed else 'trains anew'
    errors = [line for line in lines if re.match(r'\w+(\.\w+)*Error\b', line)]
    return f'fails with {(errors or lines)[-1][:150]}'


def wait_for(run: subprocess.Popen, path: Path) -> None:
    """Wait until a file appears."""
    while not path.exists():
        if run.poll() is not None:
            raise RuntimeError(f'ended without {path.name}')
        time.sleep(0.002)


def files(work_dir: Path) -> str:
    """Checkpoints and whether they are whole, and what is named as last."""
    found = []
    for path in sorted(work_dir.glob('*.pth*')):
        try:
            torch.load(path, weights_only=False)
            found.append(path.name)
        except Exception:
            found.append(f'{path.name} (broken)')
    named = work_dir / 'last_checkpoint'
    last = Path(named.read_text()).name if named.exists() else 'absent'
    return (
        f'left {" ".join(found) or "no checkpoint"}, last_checkpoint '
        f'{last or "empty"}'
    )


def _killed_while_saving(folder: Path, *options: str) -> str:
    work_dir = folder / 'run'
    options = ('train_cfg.max_iters=5', *options)
    run = start(folder, work_dir, *options, seconds=0.05)
    wait_for(run, work_dir / 'iter_3.pth')
    time.sleep(0.1)
    run.send_signal(signal.SIGKILL)
    run.wait()
    left = files(work_dir)
    again = start(folder, work_dir, *options, arguments=('--resume',))
    return f'{left}; --resume {outcome(again, work_dir)}'


@in_folder
def killed_while_saving(folder: Path) -> str:
    """SIGKILL while iter_3.pth is written."""
    return _killed_while_saving(folder)


@in_folder
def killed_with_max_keep_1(folder: Path) -> str:
    """The same where one checkpoint is kept."""
    return _killed_while_saving(
        folder, 'default_hooks.checkpoint.max_keep_ckpts=1'
    )


@in_folder
def truncated_newest(folder: Path) -> str:
    """The file that last_checkpoint names has lost its end."""
    work_dir = folder / 'run'
    start(folder, work_dir).wait()
    newest = work_dir / 'iter_2.pth'
    os.truncate(newest, newest.stat().st_size // 2)
    again = start(folder, work_dir, arguments=('--resume',))
    return f'--resume {outcome(again, work_dir)}'


def _losses(work_dir: Path) -> dict[int, float]:
    return {
        line['step']: line['loss']
        for line in read_scalars(work_dir)
        if 'loss' in line
    }


def _continued(folder: Path, *options: str) -> str:
    options = (
        'train_cfg.max_iters=6',
        'default_hooks.checkpoint.interval=3',
        *options,
    )
    whole, broken = folder / 'whole', folder / 'broken'
    start(folder, whole, *options).wait()
    # Slow only so that it is killed before it has saved again.
    run = start(folder, broken, *options, seconds=0.05)
    wait_for(run, broken / 'last_checkpoint')
    run.send_signal(signal.SIGKILL)
    run.wait()
    again = start(folder, broken, *options, arguments=('--resume',))
    ended = outcome(again, broken)
    ours, theirs = _losses(whole), _losses(broken)
    differ = [step for step in ours if ours[step] != theirs.get(step)]
    states = [
        torch.load(run / 'iter_6.pth', weights_only=False)['state_dict']
        for run in (whole, broken)
    ]
    tensors = sum(
        not torch.equal(states[0][name], states[1][name]) for name in states[0]
    )
    return (
        f'{ended}; of 6 losses those of iterations {differ} differ, in the '
        f'end {tensors} of {len(states[0])} tensors'
    )


@in_folder
def resumed_numbers(folder: Path) -> str:
    """Resumed at 3 of 6 iterations, compared with the unbroken run."""
    return _continued(folder)


@in_folder
def resumed_with_workers(folder: Path) -> str:
    """The same with a worker that stays."""
    return _continued(
        folder,
        'train_dataloader.num_workers=1',
        'train_dataloader.persistent_workers=True',
    )


def _disk(folder: Path, size: int) -> Path:
    disk = folder / 'disk'
    disk.mkdir()
    subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'test', disk],
        check=True,
    )
    return disk


@in_folder
def disk_full(folder: Path) -> str:
    """A disk on which two checkpoints have room and the third has not."""
    sizes = folder / 'sizes'
    start(folder, sizes).wait()
    room = sum(path.stat().st_size for path in sizes.glob('*.pth')) * 5 // 4
    disk = _disk(folder, room)
    try:
        work_dir = disk / 'run'
        options = 'train_cfg.max_iters=5'
        with (folder / 'log').open('w') as log:
            run = subprocess.run(
                [
                    *(sys.executable, '-c', f'SECONDS = 0\n{TRAIN}'),
                    *(str(folder / 'tiny.py'), '--work-dir', str(work_dir)),
                    *('--cfg-options', options),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {'CUDA_VISIBLE_DEVICES': ''},
                check=False,
            )
        assert run.returncode != 0
        error = (folder / 'log').read_text().strip().splitlines()[-1]
        return f'fails with {error}; {files(work_dir)}'
    finally:
        subprocess.run(['umount', '-l', disk], check=True)


@in_folder
def read_only(folder: Path) -> str:
    """A work dir on a file system that is mounted read-only."""
    disk = _disk(folder, 1 << 20)
    try:
        subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
        log = folder / 'log'
        with log.open('w') as file:
            subprocess.run(
                [
                    *(sys.executable, '-c', f'SECONDS = 0\n{TRAIN}'),
                    *(str(folder / 'tiny.py'), '--work-dir', str(disk)),
                ],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {'CUDA_VISIBLE_DEVICES': ''},
                check=False,
            )
        lines = log.read_text().strip().splitlines()
        return f'fails after {len(lines)} lines with {lines[-1]}'
    finally:
        subprocess.run(['umount', '-l', disk], check=True)


@in_folder
def several_processes(folder: Path) -> str:
    """Two processes without a GPU, of which one would be killed."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = str(server.getsockname()[1])
    runs = []
    for rank in range(2):
        work_dir = folder / f'rank{rank}'
        ranks = dict(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE='2',
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=port,
        )
        options = 'env_cfg.dist_cfg.backend=gloo'
        pytorch = ('--launcher', 'pytorch')
        runs.append(
            start(
                folder,
                work_dir,
                options,
                arguments=pytorch,
                environment=ranks,
            )
        )
    said = outcome(runs[0], folder / 'rank0')
    runs[1].kill()
    runs[1].wait()
    return said


ROWS = {
    row.__name__: row
    for row in (
        killed_while_saving,
        killed_with_max_keep_1,
        truncated_newest,
        resumed_numbers,
        resumed_with_workers,
        disk_full,
        read_only,
        several_processes,
    )
}

if __name__ == '__main__':
    main(ROWS)
