"""Run rows of docs/host_contract.md on the layers of others.

Each script of this folder gives its rows as functions that provoke one trap
and return, in a few words, what happened.
"""

import argparse
import warnings
from collections.abc import Callable, Mapping


def observe(row: Callable[[], str]) -> str:
    """Return the report of a row, or the first line of its error."""
    try:
        return row()
    except Exception as error:
        lines = str(error).strip().splitlines() or ['']
        return f'raises {type(error).__name__}: {lines[0]}'


def main(rows: Mapping[str, Callable[[], str]]) -> None:
    """Run the rows named on the command line, or all, and print them."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        'rows', nargs='*', metavar='ROW', help=f'of {", ".join(rows)}'
    )
    asked = parser.parse_args().rows
    unknown = [name for name in asked if name not in rows]
    if unknown:
        parser.error(f'no row {unknown[0]!r}: use {", ".join(rows)}')
    warnings.filterwarnings('ignore')
    for name in asked or rows:
        print(f'{name}: {observe(rows[name])}', flush=True)
