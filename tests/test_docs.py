"""Pages name links, commands, configs, versions and tests that exist."""

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

import ws_mm

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (
        ROOT / 'README.md',
        ROOT / 'CONTRIBUTING.md',
        ROOT / 'configs/README.md',
        *sorted((ROOT / 'docs').rglob('*.md')),
    )
]
# Has the names of commands and configs that are gone.
HISTORY = 'docs/changelog.md'
# Rooms of docs/architecture.md from the lowest, and their modules.
ROOMS = (
    'arguments compat distributed',
    'kernels/*',
    'functional running_statistics symbolic',
    'checkpoint conv norm replacement zoo/*',
    'baking checking conversion converted estimates restoring shapes',
    'config_* configs estimates_hook hooks resume singularities registry',
)
CONTRACT = (ROOT / 'docs/host_contract.md').read_text()
CONFIGS = {path.stem for path in (ROOT / 'configs').glob('*/*.py')}
# Messages of torch, mmengine and mmcv.
FOREIGN = {
    'Cannot find None in registry',
    '... is not in the ... registry',
    "got an unexpected keyword argument 'num_groups'",
    'Expected more than 1 value per channel when training',
    "No module named 'mmcv._ext'",
    'Scale must be a number or tuple of int',
    'mmengine does not support to load ws_mm config',
    'mmsegmentation is not installed',
}
# A name by the grammar of configs/README.md, or the beginning of one.
CONFIG = re.compile(
    r'[a-z0-9-]+_[a-z0-9-]+(?:_fpn\d*)?_(?:bcn|gn|bn|syncbn|frozen-bn)[a-z-]*'
    r'_\d+xb\d+-\w+(?:-\w+)*'
)

every_page = pytest.mark.parametrize('page', PAGES)


def rows(text: str, skipped: tuple[str, ...] = ()) -> list[list[str]]:
    """Cells of all tables, without rules and these headers."""
    return [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in text.splitlines()
        if line.startswith('|') and not line.startswith(('|---', *skipped))
    ]


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the titles of a page."""
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.M | re.S)
    titles = re.findall(r'^#+ (.+)$', text, re.M)
    return {
        re.sub(r'[^\w -]', '', title).strip().lower().replace(' ', '-')
        for title in titles
    }


@cache
def functions_of(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }


@every_page
def test_links_lead_to_files_and_titles(page: str) -> None:
    here = ROOT / page
    links = re.findall(r'\]\((?!https?:)([^)\s]+)\)', here.read_text())
    for link in links:
        name, _, anchor = link.partition('#')
        target = (here.parent / name).resolve() if name else here
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize('page', [page for page in PAGES if page != HISTORY])
def test_commands_run_files_that_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for script in re.findall(r'\btools/[\w/]+\.(?:py|sh)\b', text):
        assert (ROOT / script).is_file(), script


def test_the_table_of_tools_names_files_that_exist() -> None:
    text = (ROOT / 'docs/tools.md').read_text()
    found = re.findall(r'^\| `((?:\w+/)*\w+\.py)', text, re.M)
    assert len(found) > 10
    for script in found:
        assert (ROOT / 'tools' / script).is_file(), script


def test_configs_that_are_named_exist() -> None:
    texts = [ROOT / page for page in PAGES if page != HISTORY]
    for folder in 'tools', 'tests', 'ws_mm':
        texts += (ROOT / folder).rglob('*.py')
    named = {
        name: path.relative_to(ROOT)
        for path in texts
        if path != Path(__file__)
        for name in CONFIG.findall(path.read_text())
    }
    assert len(named) > 30
    for name, path in named.items():
        # A string of Python may go on in the next line.
        found = any(config.startswith(name) for config in CONFIGS)
        assert found, f'{path} names {name}'


def test_messages_are_those_of_the_code() -> None:
    page = (ROOT / 'docs/troubleshooting.md').read_text()
    code = ''.join(
        # A message may go on in the next string.
        re.sub(r'[\'"]\s+[fr]?[\'"]', '', path.read_text())
        for folder in ('ws_mm', 'tools')
        for path in (ROOT / folder).rglob('*.py')
    )
    messages = {
        message
        for row in rows(page, ('| message ',))
        for message in re.findall(r'`(.{9,}?)`', row[0])
    }
    assert messages >= FOREIGN
    for message in messages - FOREIGN:
        for part in message.split('...'):
            assert part.strip() in code, message


def test_the_readme_is_short() -> None:
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 150


def test_the_readme_states_figures_of_the_benchmark() -> None:
    stated = re.search(
        r'takes (\S+) \(Mask R-CNN\) and (\S+)\s+\(DeepLabV3\) times',
        (ROOT / 'README.md').read_text(),
    )
    page = (ROOT / 'docs/benchmark.md').read_text()
    models = 'Mask R-CNN', 'DeepLabV3'
    for model, ratio in zip(models, stated.groups(), strict=True):
        before, row = re.search(
            rf'^(.*)\n\|[-|]+\n(\| {model} train .*)$', page, re.M
        ).groups()
        assert before.endswith('| BCN+WS |')
        assert row.endswith(f' {ratio} |')


def test_versions_are_those_of_the_requirements() -> None:
    text = (ROOT / 'docs/install.md').read_text()
    matrix = rows(text, ('| line ',))
    pinned = {path.stem for path in (ROOT / 'tools/requirements').iterdir()}
    assert {row[0] for row in matrix} == pinned - {'site'}
    for line, _, torch, packages, _ in matrix:
        pins = (ROOT / f'tools/requirements/{line}.txt').read_text()
        for package in f'torch {torch}, {packages}'.split(', '):
            assert '{}=={}\n'.format(*package.split(' ')) in pins, package


@pytest.mark.parametrize(
    'row', rows(CONTRACT, ('| what ',)), ids=lambda row: row[0]
)
def test_every_row_names_a_test_that_exists(row: list[str]) -> None:
    assert len(row) == 4, 'what, others, ws_mm, test'
    assert all(row), 'no empty cell: write "not applicable" or "not run"'
    tests = re.findall(r'`(test_\w+)\.py::(test_\w+)`', row[3])
    assert tests, 'the last column is `test_FILE.py::test_NAME`'
    for file, name in tests:
        assert name in functions_of(ROOT / f'tests/{file}.py')


def test_every_page_is_in_the_navigation_once() -> None:
    index = (ROOT / 'docs/README.md').read_text()
    names = re.findall(r'^\| \[.+?\]\((.+?)\)', index, re.M)
    pages = [Path('docs', name) for name in names]
    below = {page for page in pages if page.parts[1] != '..'}
    for page in list(below):  # pages of a folder stand behind its page
        folder = (ROOT / page).with_suffix('')
        below |= {path.relative_to(ROOT) for path in folder.glob('*.md')}
    found = {Path(page) for page in PAGES if page.startswith('docs/')}
    assert below == found - {Path('docs/README.md')}
    assert len(set(names)) == len(names)


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / 'docs/api.md').read_text()
    shown = re.findall(r'^::: ws_mm\.([\w.]+)$', text, re.M)
    zoo = [
        f'zoo.{name}'
        for name, value in vars(ws_mm.zoo).items()
        if callable(value)
    ]
    names = {*ws_mm.__all__, *zoo} - {'__version__', 'zoo'}
    assert sorted(shown) == sorted(names)


def test_no_room_uses_one_above_it() -> None:
    package = ROOT / 'ws_mm'
    room = {
        path.relative_to(package).with_suffix('').as_posix(): height
        for height, patterns in enumerate(ROOMS)
        for pattern in patterns.split()
        for path in package.glob(f'{pattern}.py')
    }
    modules = {
        path.relative_to(package).with_suffix('').as_posix()
        for path in package.rglob('*.py')
    }
    assert room.keys() == modules - {'__init__'}
    imports = 0
    for name, height in room.items():
        for node in ast.parse((package / f'{name}.py').read_text()).body:
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            parts = [*name.split('/')[: -node.level]]
            parts += node.module.split('.') if node.module else []
            for alias in node.names:
                for used in (parts, [*parts, alias.name]):
                    path = '/'.join(used)
                    assert room.get(path, -1) <= height, f'{name}: {path}'
                    imports += path in room
    assert imports > 80


def test_the_figures_of_the_layers_are_what_the_script_draws(
    tmp_path: Path,
) -> None:
    pytest.importorskip('matplotlib')
    spec = importlib.util.spec_from_file_location(
        'site_figures', ROOT / 'tools/site/figures.py'
    )
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    figures.draw(tmp_path)
    for path in tmp_path.iterdir():
        drawn, kept = (
            [float(x) for x in re.findall(r'[" ML](-?\d+\.\d+)', text)]
            for text in (
                path.read_text(),
                (ROOT / 'docs/figures' / path.name).read_text(),
            )
        )
        assert len(kept) > 1000
        # Last digits of another machine; the figures are 600 points wide.
        assert drawn == pytest.approx(kept, abs=0.5)
    plain, standardized = figures.projection().values()
    assert min(plain) > 0.2
    assert standardized[0] < 1e-12
    assert standardized[1] < 1e-3


def test_pre_commit_has_the_versions_of_the_linters() -> None:
    pins = (ROOT / 'tools/requirements/maintained.txt').read_text()
    hooks = (ROOT / '.pre-commit-config.yaml').read_text()
    found = re.findall(r'/(\w+?)(?:-pre-commit)?\n +rev: v(.+)', hooks)
    assert {name for name, _ in found} == {'ruff', 'codespell'}
    for name, version in found:
        assert f'{name}=={version}\n' in pins
    pins = (ROOT / 'tools/requirements/site.txt').read_text()
    assert dict(found)['ruff'] in pins


def test_the_first_tutorial_has_the_figures_of_the_configs() -> None:
    text = (ROOT / 'docs/tutorials/one_image.md').read_text()
    configs = (ROOT / 'configs/README.md').read_text()
    for norm, box, mask in rows(text, ('| norm ',)):
        name = norm.lower().replace('+', '-')
        row = f'mask-rcnn_r18_fpn64_{name}-all_2xb1-4e_nuclei.py) | - | - |'
        assert f'{row} {box} box, {mask} mask AP |' in configs
    assert '**0.051** box AP, **0.045** mask AP' in text
