"""The host contract names rows, commands and tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / 'docs/host_contract.md').read_text()
ROWS = [
    [cell.strip() for cell in line.strip('|').split('|')]
    for line in TEXT.splitlines()
    if line.startswith('|') and not line.startswith(('|---', '| what '))
]


def functions_of(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize('row', ROWS, ids=lambda row: row[0])
def test_every_row_names_a_test_that_exists(row: list[str]) -> None:
    assert len(row) == 4, 'what, others, ws_mm, test'
    assert all(row), 'no empty cell: write "not applicable" or "not run"'
    tests = re.findall(r'`(test_\w+)\.py::(test_\w+)`', row[3])
    assert tests, 'the last column is `test_FILE.py::test_NAME`'
    for file, name in tests:
        assert name in functions_of(ROOT / f'tests/{file}.py')


@pytest.mark.parametrize('script', re.findall(r'tools/peers/\w+\.py', TEXT))
def test_every_command_exists(script: str) -> None:
    assert (ROOT / script).is_file()
