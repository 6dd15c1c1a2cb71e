"""Checks of a bare machine, and commands whose output goes to a log.

For tools/bootstrap.py: standard library only, readable by Python 3.6.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence

RECENT = ((3, 11), (3, 12), (3, 10))


class Stop(Exception):
    """Setting up cannot go on; the message is for the user."""


def say(line: str) -> None:
    """Print a line of our own, apart from what the command prints."""
    print('bootstrap: ' + line, file=sys.stderr, flush=True)


# Checks: each returns the line to show, empty if all is well.


def check_python(
    version: Sequence[Any], command_line: str, pythons: Sequence[Any] = RECENT
) -> str:
    """Check an interpreter's version, given as in sys.version_info."""
    if tuple(version[:2]) in pythons:
        return ''
    age = 'old' if tuple(version[:2]) < min(pythons) else 'new'
    fix = 'install it' if len(pythons) == 1 else 'install one of them'
    for wanted in pythons:
        python = 'python%d.%d' % wanted
        # A pyenv shim can be on PATH for a Python that is not there.
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            devnull = subprocess.DEVNULL
            subprocess.check_call([python, '-c', ''], stderr=devnull)
            fix = f'run: {python} {command_line}'
            break
    found = '%d.%d.%d' % tuple(version[:3])
    names = ['%d.%d' % wanted for wanted in sorted(pythons)]
    needed = ' or '.join(filter(None, [', '.join(names[:-1]), names[-1]]))
    return f'Python {found} is too {age} ({needed} is needed): {fix}'


def compiler() -> List[str]:
    """Return the command of the C++ compiler, or an empty list."""
    if os.environ.get('CXX'):
        command = shlex.split(os.environ['CXX'])
        return command if shutil.which(command[0]) else []
    return [n for n in ('c++', 'g++', 'clang++') if shutil.which(n)][:1]


def check_compiler() -> str:
    """Check for a compiler of mmcv's operators."""
    cxx = compiler()
    if not cxx:
        tried = os.environ.get('CXX') or 'c++, g++, clang++'
        return (
            f"no C++ compiler on PATH (looked for {tried}): mmcv's operators "
            'need GCC 9 or newer, for example from: apt-get install g++'
        )
    return ''


# Running long commands.


def error_lines(text: str) -> List[str]:
    """Return the last lines of a log that say what went wrong."""
    lines = [line.strip()[:300] for line in text.splitlines() if line.strip()]
    # What pip adds around the error of a command that it ran.
    frame = 'note:|hint:|.*(-with-error|-failed$|status .error|Encountered)'
    bad = re.compile(rf'(?!{frame}).*(\berror\b|Error:)', re.IGNORECASE)
    return ([line for line in lines if bad.match(line)] or lines)[-5:]


def captured(command: Sequence[str], environ: Dict[str, str]) -> str:
    """Return what a short command prints."""
    result = subprocess.run(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        env=environ,
    )
    if result.returncode:
        why = ' '.join(error_lines(result.stderr)[-1:])
        raise Stop(f'{command[0]} failed: {why}')
    return result.stdout


def run_logged(
    title: str,
    command: Sequence[str],
    log: Path,
    environ: Dict[str, str],
) -> None:
    """Run a command with all of its output in a log."""
    say(f'{title}: output in {log}')
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('w') as file:
        process = subprocess.Popen(
            list(command),
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environ,
            start_new_session=True,
        )
        try:
            process.wait()
        finally:
            end_group(process)
    if process.returncode:
        shown = '\n  '.join(error_lines(log.read_text(errors='replace')))
        raise Stop(f'{title} failed (all output: {log})\n  {shown}')


def end_group(process: 'subprocess.Popen[bytes]') -> None:
    """End a command that is still running, with all that it started."""
    # Pip undoes a half-done installation when it is interrupted.
    for number, seconds in ((signal.SIGINT, 10), (signal.SIGKILL, 10)):
        if process.poll() is None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(seconds)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, waiting for it if need be.

    The kernel drops it with the process, so no lock is ever left behind.
    """
    import fcntl  # Windows has none, and must get as far as its own line

    with path.open('a') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f'waiting for another bootstrap, at work on {path.parent}')
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cache_dir() -> Path:
    """Return the folder that keeps built wheels, downloads and logs."""
    root = os.environ.get('XDG_CACHE_HOME', '')
    base = Path(root) if os.path.isabs(root) else Path.home() / '.cache'
    return base / 'ws_mm'
