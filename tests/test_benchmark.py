"""The benchmark runs, describes itself, and is what README.md shows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / 'tools/benchmark'
sys.path.insert(0, str(BENCHMARK))
import layers  # noqa: E402
import table  # noqa: E402

RESULT = BENCHMARK / 'results/layers--cpu.json'


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, BENCHMARK / 'layers.py', *arguments],
        capture_output=True,
        text=True,
    )


def test_one_case_from_the_command_line(tmp_path):
    done = run(str(tmp_path), '--rounds', '1', '--only', 'pooled')
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob('*.json')
    result = json.loads(path.read_text())
    layers.check(result)
    rows = {r['contender']: r for r in result['cases'][0]['rows']}
    # One value per channel: an error row, not a crash.
    assert 'more than 1 value' in rows['BatchNorm2d']['error']
    assert rows['GroupNorm']['ratio'] == 1
    assert rows['BCN estimate']['ms_p20'] > 0
    assert rows['BCN estimate']['saved_bytes'] > 0


def test_refuses(tmp_path):
    done = run(str(tmp_path / 'out'), '--only', 'nothing')
    assert done.returncode == 2
    assert "--only='nothing'" in done.stderr
    assert 'pooled' in done.stderr
    assert '--rounds=0' in run(str(tmp_path), '--rounds', '0').stderr
    assert not list(tmp_path.rglob('*.json'))


def test_schema_names_what_is_missing():
    result = json.loads(RESULT.read_text())
    layers.check(result)
    del result['cases'][0]['rows'][0]['ms_p20']
    with pytest.raises(ValueError, match='filters of resnet50.*lacks a time'):
        layers.check(result)
    del result['environment']
    with pytest.raises(ValueError, match="lacks 'environment'"):
        layers.check(result)


def test_contenders_compute_what_they_claim():
    import torch

    weight = torch.randn(8, 4, 3, 3)
    functions = layers.standardizers()
    torch.testing.assert_close(
        functions['WS'](weight), functions['mmcv ConvWS'](weight)
    )
    # Another convention (biased, 1e-6 inside), up to one constant.
    constant = (36 / 35) ** 0.5
    torch.testing.assert_close(
        functions['WS'](weight) * constant,
        functions['timm StdConv2d form'](weight),
        rtol=1e-3,
        atol=1e-3,
    )
    x = torch.randn(2, 64, 5, 5) * 3 + 1
    contenders = layers.norms(64)
    for _ in range(2):
        outputs = [
            contenders[name]()(x) for name in ('BCN estimate', 'authors BCN')
        ]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_readme_shows_the_result():
    shown = table.table(json.loads(RESULT.read_text()))
    readme = (ROOT / 'README.md').read_text()
    assert shown in readme, f'paste this into README.md:\n{shown}'
