"""One progress line over the commands that tools/demo.py runs."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

START_SECONDS = 15  # until a command's imports are done
LINE_SECONDS = 15  # between two lines where there is no terminal


class Progress:
    """One bar over the whole demo, in expected seconds.

    Between two reports of a child it moves with the clock, up to what the
    next report will confirm.
    """

    def __init__(self, total: float) -> None:
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            file=sys.stderr if terminal else _Lines(sys.stderr),
            mininterval=0.5 if terminal else LINE_SECONDS,
            miniters=0,
            smoothing=0,
            dynamic_ncols=terminal,
            bar_format='{percentage:3.0f}% {elapsed} gone, {remaining} to '
            'go: {desc}',
        )
        self.begin('', 0)

    def begin(self, title: str, seconds: float) -> None:
        """Start a stage expected to last ``seconds``."""
        self.base, self.seconds = self.bar.n, seconds
        self.report(title, 0, START_SECONDS)

    def report(self, title: str, position: float, ahead: float) -> None:
        """Say where the stage is, and how far the next report will be."""
        self.position, self.ahead, self.since = position, ahead, time.time()
        self.bar.set_description_str(title, refresh=False)
        self.tick()

    def tick(self) -> None:
        """Let the bar follow the clock."""
        waited = min(time.time() - self.since, self.ahead)
        position = min(self.position + waited, self.seconds)
        self.bar.update(max(self.base + position - self.bar.n, 0))

    def end(self) -> None:
        """The stage is over, however long it took."""
        self.bar.update(self.base + self.seconds - self.bar.n)

    def skip(self, seconds: float) -> None:
        """Take ``seconds`` of work off the total."""
        self.bar.total -= seconds


class _Lines:
    """A stream that is no terminal, for which a new state is a new line."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self.stream.write(text.strip() + '\n')

    def flush(self) -> None:
        self.stream.flush()


def run_child(
    command: list[str],
    log: Path,
    lock: TextIO,
    each: Callable[[str], None],
    tick: Callable[[], None],
) -> int:
    """Print and run a command, its output going to a file.

    Args:
        command: program and arguments.
        log: file that takes everything the command says.
        lock: inherited, so that a child that outlives us keeps it.
        each: called with each line of the output.
        tick: called a few times per second.

    Returns:
        Its exit status.
    """
    tqdm.write(f'$ {shlex.join(command)}')
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('w') as output, log.open(errors='replace') as lines:
        child = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, 'PYTHONUNBUFFERED': '1'},
            pass_fds=[lock.fileno()],
        )
        try:
            running, rest = True, ''
            while running:
                running = child.poll() is None
                *whole, rest = (rest + lines.read()).split('\n')
                for line in whole:
                    each(line)
                tick()
                if running:
                    time.sleep(0.3)
        finally:
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
    return child.returncode
