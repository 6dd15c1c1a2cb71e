"""The demo: its steps, with scripts that write what the real ones write."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip('mmdet')

import demo
from support.checks import SetupError

FULL = ['nuclei_tiles.py', 'train.py', 'test.py', 'train.py', 'test.py']
METRICS = {
    'mask-rcnn': {'coco/bbox_mAP': 0.4, 'coco/segm_mAP': 0.5},
    'deeplabv3': {'mIoU': 75.0, 'mDice': 85.0},
}


class Scripts:
    """Stands in for demo.call; only the converter runs."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.dies_in: str | None = None
        self.call = demo.call

    def __call__(self, script: str, *arguments: object) -> int:
        words = [script, *map(str, arguments)]
        self.commands.append(words)
        if script == demo.CONVERTER:
            return self.call(script, *arguments)
        if self.dies_in and self.dies_in in ' '.join(words):
            return 1
        work_dir = Path(words[words.index('--work-dir') + 1])
        work_dir.mkdir(parents=True)
        name = Path(words[1]).name
        if script == 'train.py':
            steps = 400 if 'mask-rcnn' in name else 300
            (work_dir / f'iter_{steps}.pth').touch()
            return 0
        assert Path(words[2]).is_file()
        (work_dir / 'time').mkdir()
        metrics = METRICS[name.partition('_')[0]]
        (work_dir / 'time/result.json').write_text(json.dumps(metrics))
        return 0

    def names(self) -> list[str]:
        """Scripts run since the last call."""
        names = [Path(command[0]).name for command in self.commands]
        self.commands.clear()
        return names


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Scripts:
    fake = Scripts()
    monkeypatch.setattr(demo, 'call', fake)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    def run(*options: str) -> None:
        monkeypatch.setattr('sys.argv', ['demo.py', *options])
        demo.main()

    before = signal.getsignal(signal.SIGTERM)
    yield run
    # The demo sets its own.
    signal.signal(signal.SIGTERM, before)


def test_every_step_is_run_once(
    scripts: Scripts, run: object, capfd: pytest.CaptureFixture[str]
) -> None:
    run('--offline')
    trained = scripts.commands[1]
    root = 'train_dataloader.dataset.data_root=data/demo/generated/'
    assert root in trained
    assert scripts.names() == FULL
    said = capfd.readouterr().out
    assert 'Mask R-CNN, bcn-ws-all, 400 steps: box AP 0.4, mask AP 0.5' in said
    assert 'DeepLabV3, bcn-ws-all, 300 steps: mIoU 75, mDice 85' in said
    assert '*** The images are GENERATED SHAPES' in said
    assert said.endswith(f'source {sys.prefix}/bin/activate\n')
    # Again: nothing is trained twice.
    run('--offline')
    assert scripts.names() == [FULL[0], 'test.py', 'test.py']
    run('--offline', '--compare')
    assert scripts.names().count('train.py') == 2 * 3


def test_the_next_call_goes_on_where_a_script_failed(
    scripts: Scripts, run: object
) -> None:
    scripts.dies_in = '/deeplabv3'
    with pytest.raises(SetupError, match=r'train\.py failed \(exit'):
        run('--offline')
    assert scripts.names() == FULL[:4]
    scripts.dies_in = None
    run('--offline')
    assert scripts.names() == [FULL[0], 'test.py', 'train.py', 'test.py']


def test_without_network_the_demo_falls_back(
    scripts: Scripts,
    run: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path))
    run()
    assert scripts.names() == [FULL[0], *FULL]
    said = capfd.readouterr()
    assert 'pip download stardist==0.9.2 failed: ERROR' in said.err
    assert 'GENERATED SHAPES' in said.out
    assert not list((tmp_path / 'cache/ws_mm').iterdir())
    # A broken download is no missing network.
    (tmp_path / 'cache/ws_mm/stardist-0.9.2-any.whl').write_text('junk')
    with pytest.raises(SetupError, match=r'nuclei_tiles\.py failed'):
        run()
    assert 'delete it and run again' in capfd.readouterr().err


def test_the_configs_are_those_of_each_norm() -> None:
    for model in demo.MODELS:
        for norm in demo.NORMS:
            (path,) = demo.CONFIGS.glob(model.configs.format(norm))
            assert f'_{norm}' in path.name


def test_a_request_to_end_ends_the_script_that_runs(
    run: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Raised in subprocess.run, it kills the child.
    monkeypatch.setattr(
        demo.subprocess, 'run', lambda _: signal.raise_signal(signal.SIGTERM)
    )
    with pytest.raises(SystemExit, match='143'):
        run('--offline')
