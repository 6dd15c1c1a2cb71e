"""Files that appear whole or not at all, and the hosts' log of scalars."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from support.checks import SetupError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; the file moves to ``path`` at the end.

    Args:
        path: Final place; its folder is made if missing. The file has the
            same name while it is written, in a hidden folder beside it.

    Raises:
        SetupError: a folder has the name; nothing was written.
    """
    path = Path(path).absolute()
    _refuse_folder(path)
    with _beside(path.parent) as new:
        part = Path(new, path.name)
        yield part
        os.replace(part, path)


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise SetupError(f'{path} is a folder; remove it')


@contextmanager
def _beside(folder: Path) -> Iterator[str]:
    """Yield a hidden folder in a folder, which is made if missing.

    What was made goes again if an error leaves it empty.
    """
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(
            dir=folder, prefix='.writing-'
        ) as new:
            yield new
    except BaseException:
        with suppress(OSError):
            for one in made:
                one.rmdir()
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as part:
        part.write_text(text)


def write_together(
    folder: str | Path, writers: dict[str, Callable[[str], Any]]
) -> list[Path]:
    """Write several files, all of them or none.

    Args:
        folder: Folder of the files; made if missing.
        writers: Function for each file name that writes to a given path.

    Returns:
        The paths written.

    Raises:
        SetupError: a folder has one of the names; nothing was written.
    """
    folder = Path(folder)
    with _beside(folder) as new:
        for name, write in writers.items():
            write(os.path.join(new, name))
        for name in writers:
            _refuse_folder(folder / name)
        for name in writers:
            os.replace(os.path.join(new, name), folder / name)
    return [folder / name for name in writers]


def read_scalars(work_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of the hosts' ``scalars.json`` files, oldest first.

    Each start of a training writes a file of its own.
    """
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        yield from read_lines(path)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file that has a JSON object in each.

    A line that a kill cut short is left out.
    """
    for line in path.read_text(errors='replace').splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict):
            yield values
