"""The pins of the environments, and the script of the CI."""

import itertools
import json
import os
import subprocess
from pathlib import Path

import bootstrap
import pytest
from bootstrap import Stop
from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def test_pins_are_exact() -> None:
    with pytest.raises(Stop, match=r"'numpy>=2', which is no exact pin"):
        bootstrap.read_pins('# comment\ntorch==2.10.0\nnumpy>=2  # no\n')


def test_pins_fit_the_ranges_of_pyproject() -> None:
    path = ROOT / 'tools/requirements/maintained.txt'
    pins = bootstrap.read_pins(path.read_text())
    with (ROOT / 'pyproject.toml').open('rb') as file:
        pyproject = tomllib.load(file)
    project = pyproject['project']
    extras = project['optional-dependencies'].values()
    ranges = [project['dependencies'], *extras]
    ranges.append(pyproject['build-system']['requires'])
    for line in itertools.chain(*ranges):
        wanted = Requirement(line)
        if wanted.name == project['name']:  # an extra of extras
            continue
        assert wanted.specifier.contains(pins[wanted.name]), line
    assert project['requires-python'] == '>=3.10'
    assert all(
        min(line.pythons) == (3, 10) for line in bootstrap.LINES.values()
    )


def test_the_wheel_cannot_overwrite_an_openmmlab_environment() -> None:
    with (ROOT / 'pyproject.toml').open('rb') as file:
        project = tomllib.load(file)['project']
    names = [Requirement(line).name for line in project['dependencies']]
    assert names == ['torch', 'numpy']
    # As a dependency, mmcv is built without operators and nobody is told.
    extras = json.dumps(project['optional-dependencies'])
    assert 'mmcv' not in extras


@pytest.mark.parametrize(
    ('lint', 'site', 'failing', 'code'),
    [
        (0, 0, '', 0),
        (1, 0, '', 1),
        (0, 1, '', 1),
        (0, 0, 'maintained', 1),
        (0, 0, 'layers-newest', 1),
    ],
)
def test_ci_fails_if_any_part_fails(
    tmp_path: Path, lint: int, site: int, failing: str, code: int
) -> None:
    for name in ('python3.11', 'python3.10'):
        python = tmp_path / name
        python.write_text(
            '#!/bin/sh\n'
            'case "$*" in\n'
            '  -c*) exit 0 ;;\n'
            f'  *lint) exit {lint} ;;\n'
            f'  *site) exit {site} ;;\n'
            f'  *tests) echo "$0 $*" >> {tmp_path}/calls\n'
            '    echo "== 3 passed in 1s =="; echo later\n'
            f'    case "$*" in *" {failing or "none"} "*) exit 1 ;; esac ;;\n'
            'esac\n'
        )
        python.chmod(0o755)
    result = subprocess.run(
        ['bash', str(ROOT / '.ci/run')],
        env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == code
    closing = result.stdout.splitlines()[-4:]
    assert closing == ['== 3 passed in 1s =='] * 4
    ran = (tmp_path / 'calls').read_text().replace(f'{tmp_path}/', '')
    assert ran.splitlines() == [
        f'python3.{minor} tools/bootstrap.py --line {line} tests'
        for line, minor in (
            *(('maintained', 11), ('official', 10)),
            *(('layers-oldest', 10), ('layers-newest', 11)),
        )
    ]
