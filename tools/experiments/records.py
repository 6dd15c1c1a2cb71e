"""One file for each finished run: what it was and what came out."""

import json
from pathlib import Path
from typing import Any

from support.files import write_text

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
    'layers',
    'metric',
    'seconds',
    'peak_bytes',
    'reason',
}


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record whole or not at all."""
    write_text(path, json.dumps(record, indent=1) + '\n')


def read(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ValueError: it is not whole, or not one; the message says why.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f'{path} is not whole: {error}') from None
    check(record, str(path))
    return record


def check(record: Any, name: str) -> None:
    """Raise ValueError, with the name, where a record is not one."""
    missing = KEYS - set(record) if isinstance(record, dict) else KEYS
    if missing:
        raise ValueError(f'{name} lacks {", ".join(sorted(missing))}')
    if record['schema'] != SCHEMA or record['status'] not in STATUSES:
        raise ValueError(
            f'{name} has schema={record["schema"]!r} and '
            f'status={record["status"]!r}; wanted {SCHEMA} and one of '
            f'{", ".join(STATUSES)}'
        )


def read_all(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All records of a folder or a collection, and what is wrong with others.

    Args:
        path: a folder with one file for each, or what :func:`collect` wrote.
    """
    good, bad = [], []
    if path.is_file():
        for index, record in enumerate(json.loads(path.read_text())):
            check(record, f'{path}, record {index}')
            good.append(record)
        return good, bad
    for file in sorted(path.glob('*.json')):
        try:
            good.append(read(file))
        except ValueError as error:
            bad.append(str(error))
    return good, bad


def collect(records: list[dict[str, Any]], path: Path) -> None:
    """Write many records into one file, a line for each."""
    # A cell is found by its exact values.
    lines = ',\n'.join(
        json.dumps({**shorten(r), 'cell': r['cell'], 'task': r['task']})
        for r in records
    )
    write_text(path, f'[\n{lines}\n]\n')


def shorten(value: Any) -> Any:
    """Round every number to six digits."""
    if isinstance(value, float):
        return float(f'{value:.6g}')
    if isinstance(value, dict):
        return {key: shorten(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shorten(item) for item in value]
    return value
