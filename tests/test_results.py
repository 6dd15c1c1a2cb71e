"""The document of results says what the published records say."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
from experiments import document, records, which  # noqa: E402

RECORDS = ROOT / 'docs/results/records.json'
PAGES = [
    *(ROOT / f'docs/{name}.md' for name in ('results', 'zoo')),
    *sorted(RECORDS.parent.glob('*.md')),
]
SPREAD = re.compile(r'(\d[\d.]*) ± (\d[\d.]*)')


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_records(monkeypatch, page):
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    assert document.rendered(text, figures=False) == text


def run_of(status: str, metric: float, factor: float) -> dict[str, Any]:
    return dict(status=status, metric=metric, cell=dict(lr_factor=factor))


def test_a_cell_of_the_table_of_all_norms_is_the_better_rate():
    runs = [run_of('done', 30, 3.0), run_of('done', 40, 3.0)]
    assert which.best(runs) == '35.0 ± 7.1 (n=2) x3'
    runs += [run_of('done', 36, 10.0), run_of('diverged', 0, 30.0)]
    # Chosen when each rate had one seed.
    assert which.best(runs) == '35.0 ± 7.1 (n=2) x3'
    assert which.best(runs[1:]) == '40.0 x3'
    assert which.best(runs[-1:]) == 'diverged'
    assert which.best([]) == '-'
    precise = [run_of('done', 0.283, 1.0), run_of('done', 0.289, 1.0)]
    assert which.best(precise) == '0.286 ± 0.004 (n=2) x1'


def test_spreads_in_the_readme_are_those_of_the_tables():
    there = SPREAD.findall(
        ''.join(
            line
            for page in PAGES
            for line in page.read_text().splitlines()
            if line.startswith('|')
        )
    )
    shown = SPREAD.findall((ROOT / 'README.md').read_text())
    assert len(shown) > 5
    for pair in shown:
        assert any(all(map(rounds_to, known, pair)) for known in there), pair


def rounds_to(value: str, shown: str) -> bool:
    digits = len(shown.partition('.')[2])
    return abs(float(value) - float(shown)) <= 0.5 * 10**-digits + 1e-9


def test_every_figure_is_drawn_by_a_command_and_shown():
    drawn = set()
    for page in PAGES:
        text = page.read_text()
        for block in document.BLOCK.finditer(text):
            words = document.arguments_of(block)
            if '--figure' in words:
                path = ROOT / words[words.index('--figure') + 1]
                assert f'({path.relative_to(page.parent)})' in text
                drawn.add(path)
    assert drawn == set(RECORDS.parent.glob('*.png'))


def test_records_are_whole_and_say_what_made_them():
    found, bad = records.read_all(RECORDS)
    assert not bad
    for record in found:
        assert record['versions']['commit'], record['cell']
        assert record['status'] in records.STATUSES


def test_a_document_is_written_anew(monkeypatch, tmp_path, capsys):
    command = (
        'python tools/experiments/report.py docs/results/records.json \\\n'
        '    --grid tools/experiments/grids/learning_rate.py \\\n'
        '    --task cifar_resnet8'
    )
    path = tmp_path / 'some.md'
    path.write_text(
        f'Before.\n\n```bash\n{command}\n```\n\n| old |\n|---|\n\nAfter.\n'
    )
    monkeypatch.chdir(tmp_path)
    document.main([str(path)])
    once = path.read_text()
    assert '| old |' not in once
    assert f'```bash\n{command}\n```\n\n| cifar_resnet8 | 1 per' in once
    assert once.endswith(' |\n\nAfter.\n')
    document.main([str(path)])
    assert path.read_text() == once
    path.write_text('Nothing.\n')
    with pytest.raises(SystemExit):
        document.main([str(path)])
    assert 'has no block with' in capsys.readouterr().err
    # One wrong page, and none is written.
    good = tmp_path / 'good.md'
    good.write_text(f'```bash\n{command}\n```\n')
    with pytest.raises(SystemExit):
        document.main([str(good), str(path)])
    assert '| cifar' not in good.read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        document.main([str(tmp_path / 'missing.md')])
    assert 'cannot be read' in capsys.readouterr().err
