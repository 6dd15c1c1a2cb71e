"""Run the scripts of tools/ on tiny data sets and configs."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from proofs.tiny import DET, SEG, write_config, write_data

__all__ = [
    'DET',
    'SEG',
    'call',
    'fake_commands',
    'free_port',
    'script_of',
    'write_config',
    'write_data',
]

ROOT = Path(__file__).resolve().parents[1]


def script_of(name: str) -> Path:
    """Return the file of that name in tools/."""
    (path,) = (ROOT / 'tools').rglob(name)
    return path


def call(
    *command: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """Run a script of tools/; output and errors come back as one text."""
    command = [str(part) for part in command]
    script = Path(command[0])
    if not script.is_absolute():
        script = script_of(command[0])
    run = [sys.executable] if script.suffix == '.py' else ['bash']
    env = os.environ | {
        'OMP_NUM_THREADS': '1',
        'CUDA_VISIBLE_DEVICES': '',
        'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
        # Not a ws_mm that happens to be installed from elsewhere.
        'PYTHONPATH': str(ROOT),
    }
    return subprocess.run(
        [*run, str(script), *command[1:]],
        cwd=cwd,
        env=env | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )


def fake_commands(folder: Path) -> str:
    """PATH on which python and srun only print what they are called with."""
    folder.mkdir()
    for name in ('python', 'srun'):
        path = folder / name
        path.write_text(
            '#!/usr/bin/env bash\n'
            f'[[ $1 != -c ]] || exec {shlex.quote(sys.executable)} "$@"\n'
            'printf "%s\\n" "$PYTHONPATH" "$@"\n'
        )
        path.chmod(0o755)
    return f'{folder}:{os.environ["PATH"]}'


def free_port() -> str:
    """A port that nothing listens on."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        return str(server.getsockname()[1])


def without_ws(text: str) -> str:
    """A tiny config with the layers that others have."""
    text = text.replace(
        "norm_cfg = dict(type='ws_mm.BCN', num_groups=4)",
        "norm_cfg = dict(type='BN', requires_grad=True)",
    )
    lines = text.splitlines(keepends=True)
    return ''.join(line for line in lines if 'conv_cfg' not in line)
