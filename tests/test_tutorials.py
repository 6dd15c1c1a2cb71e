"""The tutorials, followed from top to bottom at small size."""

import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import Forks
from mmengine.config import Config
from tiny_runs import ROOT, call, fake_commands

import ws_mm

for package in 'mmdet', 'mmseg', 'torchvision', 'onnxruntime':
    pytest.importorskip(package)

# What makes a run small, and what saves the network.
SMALL = {
    'EPOCHS=12': 'EPOCHS=1',
    'EPOCHS=4': 'EPOCHS=1',
    'ITERS=300': 'ITERS=2',
    '--out data/demo/stardist': '--out data/demo/stardist --generated',
    "weights='DEFAULT'": 'weights=None',
    'max_epochs=$EPOCHS': 'max_epochs=1 train_cfg.val_interval=2'
    ' train_dataloader.dataset.indices=2',
    ' test_dataloader.': ' test_dataloader.dataset.indices=1 test_dataloader.',
}


def blocks(name: str) -> list[tuple[str, str]]:
    """The code of a tutorial: bash or python, and its text."""
    text = (ROOT / f'docs/tutorials/{name}.md').read_text()
    for shown, small in SMALL.items():
        text = text.replace(shown, small)
    return re.findall(r'^```(bash|python)\n(.*?)^```', text, re.M | re.S)


@pytest.fixture
def follow(
    forks: Forks,
    script: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[str], None]:
    """Do what a tutorial says, in a folder with the checkout's tools."""
    monkeypatch.chdir(tmp_path)
    for name in 'configs', 'tools':
        (tmp_path / name).symlink_to(ROOT / name)

    def run(line: str) -> None:
        words = shlex.split(os.path.expandvars(line), comments=True)
        if words[0] == 'export':
            monkeypatch.setenv(*words[1].split('='))
            return
        if words[0] == 'tools/dist_train.sh':
            # In one process here; test_tools_run.py runs two.
            words = ['python', 'train.py', words[1], *words[3:]]
        python, path, *arguments = words
        assert python == 'python'
        name = Path(path).stem
        if name in ('train', 'test'):
            done = forks.run(name, *arguments)
            assert done.returncode == 0, done.stdout
        else:
            assert not script(name, *arguments), line

    def execute(code: str) -> None:
        file = re.match(r'# (\w+\.py)\n', code)
        if file:
            Path(file[1]).write_text(code)
            return
        with monkeypatch.context() as context:
            # A tutorial may do as if it were not installed.
            context.setitem(sys.modules, 'ws_mm', ws_mm)
            exec(code, {})
        said = capsys.readouterr().out
        for shown in re.findall(r'print\(.*\)  # (.+)', code):
            assert shown in said

    def all_of(name: str) -> None:
        for language, code in blocks(name):
            if language == 'python':
                execute(code)
                continue
            for line in code.replace('\\\n', '').splitlines():
                run(line)

    return all_of


def test_own_dataset(follow: Callable[[str], None], tmp_path: Path) -> None:
    follow('own_dataset')
    (metrics,) = (tmp_path / 'work_dirs/mine/test').glob('*/*.json')
    assert 'coco/segm_mAP' in metrics.read_text()


def test_without_ws_mm(follow: Callable[[str], None], tmp_path: Path) -> None:
    follow('without_ws_mm')
    (baked,) = (tmp_path / 'work_dirs/baked').glob('*.py')
    assert 'ws_mm' not in baked.read_text()


def test_one_image(follow: Callable[[str], None], tmp_path: Path) -> None:
    follow('one_image')
    for run in 'bn', 'bcn':
        folder = tmp_path / f'work_dirs/{run}'
        (metrics,) = folder.glob('test/*/*.json')
        assert 'coco/segm_mAP' in metrics.read_text()
    name = 'mask-rcnn_r18_fpn64_bcn-ws-all_2xb1-4e_nuclei.py'
    shipped = Config.fromfile(ROOT / 'configs/demo' / name)
    fixed = Config.fromfile('fixed.py')
    assert fixed.model == shipped.model
    assert fixed.custom_hooks == shipped.custom_hooks


def test_several_machines(tmp_path: Path) -> None:
    """Torchrun and srun are called as the text says; gloo runs elsewhere.

    test_tools_run.py trains in two processes by the same scripts.
    """
    text = '\n'.join(code for _, code in blocks('several_machines'))
    file = tmp_path / 'tutorial.sh'
    file.write_text(f'set -e\ncd {ROOT}\n{text}')
    done = call(file, PATH=fake_commands(tmp_path / 'bin'))
    assert done.returncode == 0, done.stdout
    said = ' '.join(done.stdout.split())
    config = re.search(r'CONFIG=(\S+)', text)[1]
    assert said.count(config) == 8
    for rank in 0, 1:
        assert (
            f'--nnodes 2 --node-rank {rank} --master-addr 127.0.0.1 '
            '--master-port 29511 --nproc-per-node 8'
        ) in said
    assert (
        '--gres gpu:8 --ntasks 16 --ntasks-per-node 8 --cpus-per-task 6 '
        '--kill-on-bad-exit=1 --time 24:00:00 python'
    ) in said
    assert said.count('--launcher slurm') == 2
    assert said.count('--launcher pytorch') == 6
