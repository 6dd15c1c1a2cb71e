"""One file for each finished run: what it was and what came out."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

SCHEMA = 1
STATUSES = ('done', 'diverged', 'impossible')
KEYS = {
    'schema',
    'task',
    'cell',
    'status',
    'versions',
    'curve',
    'metrics',
    'metric',
    'seconds',
    'peak_bytes',
    'reason',
}


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        'w', dir=path.parent, suffix='.part', delete=False
    ) as file:
        json.dump(record, file, indent=1)
        file.write('\n')
    os.replace(file.name, path)
    path.chmod(0o644)


def read(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ValueError: it is not whole, or not one; the message says why.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f'{path} is not whole: {error}') from None
    missing = KEYS - set(record) if isinstance(record, dict) else KEYS
    if missing:
        raise ValueError(f'{path} lacks {", ".join(sorted(missing))}')
    if record['schema'] != SCHEMA or record['status'] not in STATUSES:
        raise ValueError(
            f'{path} has schema={record["schema"]!r} and '
            f'status={record["status"]!r}; wanted {SCHEMA} and one of '
            f'{", ".join(STATUSES)}'
        )
    return record


def read_all(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All records of a folder, and what is wrong with the others."""
    good, bad = [], []
    for path in sorted(folder.glob('*.json')):
        try:
            good.append(read(path))
        except ValueError as error:
            bad.append(str(error))
    return good, bad
