"""tools/misc/recommend.py: advice, the edit, and figures of the records."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from experiments.grid import load
from misc.recommend import FEW, FROZEN, MANY, STARTS, WS, advise, evidence
from tiny_runs import ROOT

import ws_mm  # noqa: F401


@pytest.mark.parametrize(
    ('start', 'images', 'processes', 'advice'),
    [
        ('bn', 1, 1, FROZEN),
        ('bn', 2, 8, FROZEN),
        ('ws', 1, 1, WS),
        ('none', 1, 1, FEW),
        ('none', 15, 1, FEW),
        ('none', 16, 1, MANY),
        ('none', 2, 8, MANY),
    ],
)
def test_advice(start: str, images: int, processes: int, advice: object):
    assert advise(start, images, processes) is advice


def test_rows_are_those_of_grids() -> None:
    grids = (ROOT / 'tools/experiments/grids').glob('*.py')
    known = {
        (cell.task, cell.images, cell.label)
        for path in grids
        for cell in load(path).cells
    }
    for advice in FROZEN, FEW, MANY:
        for task, images, names in advice.compared:
            assert {(task, images, name) for name in names} <= known
        for line in evidence(advice):
            assert re.search(r'; \S.* \d+\.\d', line), line


@pytest.mark.parametrize('start', STARTS)
def test_it_prints_a_command_that_works(
    start: str,
    script: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert script('recommend', '--start', start, '--images', 1) == 0
    said = capsys.readouterr().out
    memory = re.search('frozen BN .*BCN[+]WS [0-9]+', said)[0]
    page = (ROOT / 'docs/which_norm.md').read_text()
    for amount in re.findall(r' (\d+)', memory):
        assert f'| {int(amount):,} ' in page
    command = re.search('apply_norm.py CONFIG NEW.py (.*)', said)[1]
    config = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
    new = tmp_path / 'new.py'
    assert script('apply_norm', config, new, *command.split()) == 0
    # Random weights leave no frozen batch norm.
    text = new.read_text()
    assert ('init_cfg=None' in text) == (start != 'bn')
    assert 'train_dataloader.batch_size=1 in NEW.py' in said


def test_mistakes_are_named(
    script: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert script('recommend', '--start', 'none', '--images', 0) == 2
    assert '--images=0 must be at least 1' in capsys.readouterr().err


def test_a_reader_that_has_seen_enough() -> None:
    command = ROOT / 'tools/misc/recommend.py', '--start', 'bn'
    with subprocess.Popen(
        [sys.executable, *command, '--images', '1'],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()  # as head does
        assert 'Traceback' not in (said := process.stderr.read()), said
        assert 'BrokenPipe' not in said
    assert process.returncode == 128 + 13
