"""Configs are used as their users use them, and what came of it is said."""

import importlib.util
import json
import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from mmengine.config import Config
from model_converters.apply_norm import find_config
from proofs import odd_data, try_configs
from proofs.fit_config import write_user_config
from support import launch
from tiny_runs import DET, SEG, call

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')


def plain(text: str) -> str:
    """A config of the host's own layers, which somebody else wrote."""
    return (
        text.replace("type='ws_mm.BCN'", "type='GN'")
        .replace("type='ws_mm.WSConv2d'", "type='Conv2d'")
        .replace('num_classes=1,', 'num_classes=80,')
        .replace('num_classes=2,', 'num_classes=19,')
    )


@pytest.fixture(scope='module')
def tried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector and a segmentor through all steps, and one that is none."""
    folder = tmp_path_factory.mktemp('trial')
    (folder / 'det.py').write_text(plain(DET))
    (folder / 'seg.py').write_text(plain(SEG))
    done = run(folder, 'det', 'seg', 'none')
    assert done.returncode == 0, done.stdout
    return folder


def run(folder: Path, *names: str) -> CompletedProcess:
    """Try configs of a folder."""
    return call(
        *('try_configs.py', folder / 'out', '--publish', folder / 'docs'),
        *('--configs', *(folder / f'{name}.py' for name in names)),
    )


def test_every_step_is_run_and_recorded(tried: Path) -> None:
    summary = json.loads((tried / 'docs/trial.json').read_text())
    for name in ('det', 'seg'):
        steps = summary['configs'][str(tried / f'{name}.py')]
        assert list(steps) == [
            f'{goal} {step}'
            for goal in ('BCN', 'GN')
            for step in try_configs.GOALS[goal]
        ]
        if importlib.util.find_spec('onnx') is None:
            assert 'error: ONNX needs' in steps.pop('BCN export')['message']
        assert {step['outcome'] for step in steps.values()} == {'ok'}, steps
        assert not steps['BCN apply']['batch_norms']
        assert steps['BCN apply']['norms']['BCN'] > 20
        assert steps['GN apply']['norms']['GroupNorm'] > 20
        # Every image took part in training.
        (folder,) = (tried / 'out').glob(f'*{name}/BCN')
        log = (folder / 'train.log').read_text()
        assert re.findall(r'\[(\d)/3\]', log)[-3:] == ['1', '2', '3']
        assert (
            (folder / 'user.py')
            .read_text()
            .startswith("_base_ = 'converted.py'")
        )


def test_a_refusal_is_recorded_with_its_message(tried: Path) -> None:
    text = (tried / 'docs/trial.md').read_text()
    exported = importlib.util.find_spec('onnx') is not None
    assert f'3 configs, {2 * exported} of them through all steps.' in text
    config = tried / 'none.py'
    assert f'| `{config}` |  | refused |' in text
    (line,) = re.findall(rf'.*{config}` \| BCN apply.*', text)
    assert f'No config file {config}' in line


def test_what_has_a_record_is_not_repeated(tried: Path) -> None:
    records = tried / 'out/records.jsonl'
    before = records.read_text()
    done = run(tried, 'det', 'none')
    assert done.returncode == 0, done.stdout
    assert records.read_text() == before


def test_a_new_conversion_ends_the_records_of_the_old(tmp_path: Path) -> None:
    records = try_configs.Records(tmp_path / 'r.jsonl', dict(kind='trial'))
    steps = (
        *(('BCN', 'apply'), ('BCN', 'train'), ('GN', 'apply')),
        *(('GN', 'train'), ('BCN', 'apply')),
    )
    for number, (goal, step) in enumerate(steps):
        name = f'a.py {goal} {step}'
        records.add(
            dict(
                kind='step',
                id=name,
                config='a.py',
                goal=goal,
                step=step,
                outcome=str(number),
            )
        )
    found = try_configs.latest(records)
    assert {key: record['outcome'] for key, record in found.items()} == {
        'a.py GN apply': '2',
        'a.py GN train': '3',
        'a.py BCN apply': '4',
    }


SCRIPTS = {
    'ok': 'print("error: 0.1")\nprint("loss: 1.5")',
    'refused': (
        'import sys\nprint("error: no such file.\\nWrite it.", '
        'file=sys.stderr)\nsys.exit(1)'
    ),
    'traceback': 'raise ValueError("No key.\\n  In: the dict.")',
    'not finite': 'print("loss: 1.5")\nprint("loss: nan  loss_mask: 0.1")',
    'timeout': 'import time\ntime.sleep(60)',
}


@pytest.mark.parametrize('outcome', SCRIPTS)
def test_outcomes_of_a_process(
    outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(try_configs, 'PRELOADED', ('torch', 'mmengine.runner'))
    (tmp_path / 'tool.py').write_text(SCRIPTS[outcome])
    monkeypatch.setattr(
        try_configs, 'command_of', lambda *_: [str(tmp_path / 'tool.py')]
    )
    limit = 3 if outcome == 'timeout' else 60
    record = try_configs.run_step(
        'train', 'config.py', 'BCN', tmp_path, tmp_path, limit
    )
    assert record['outcome'] == outcome
    message = {
        'refused': 'error: no such file. Write it.',
        'traceback': 'ValueError: No key.',
        'timeout': 'killed after 3 seconds',
    }
    assert record['message'] == message.get(outcome, record['message'])


def user_config(config: str, folder: Path) -> Config:
    """A host's config as its user changes it."""
    path = folder / 'user.py'
    write_user_config(config, path, odd_data.write(folder / 'd'))
    return Config.fromfile(path)


def test_one_weight_for_each_class(tmp_path: Path) -> None:
    cfg = user_config(
        'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py', tmp_path
    )
    head = cfg.model.panoptic_head
    assert head.num_things_classes == 3
    assert head.num_stuff_classes == 0
    # The last is of no object.
    assert head.loss_cls.class_weight == [1.0, 1.0, 1.0, 0.1]


def test_as_many_weights_as_classes(tmp_path: Path) -> None:
    name = 'pidnet-s_2xb6-120k_1024x1024-cityscapes.py'
    cfg = user_config(f'mmseg::pidnet/{name}', tmp_path)
    head = cfg.model.decode_head
    before = launch.read_config(find_config(f'mmseg::pidnet/{name}'))
    for new, old in zip(
        head.loss_decode, before.model.decode_head.loss_decode, strict=True
    ):
        if 'class_weight' in old:
            assert new.class_weight == old.class_weight[:4]
    assert head.num_classes == 4
    assert cfg.model.data_preprocessor.size == (96, 96)
    assert cfg.model.backbone.init_cfg is None
    assert cfg.train_cfg.max_iters == 3


def test_semantic_maps_of_a_detector(tmp_path: Path) -> None:
    cfg = user_config('mmdet::htc/htc_r50_fpn_1x_coco.py', tmp_path)
    roi_head = cfg.model.roi_head
    assert [head.num_classes for head in roi_head.bbox_head] == [3, 3, 3]
    # With the background.
    assert roi_head.semantic_head.num_classes == 4
    dataset = cfg.train_dataloader.dataset
    assert dataset.data_prefix.seg == 'masks'
    load, resize = dataset.pipeline[1:3]
    assert load.imdecode_backend == 'pillow'
    assert resize.scale == (160, 96)


def test_a_panoptic_detector_is_not_scored(tmp_path: Path) -> None:
    name = 'panoptic-fpn_r50_fpn_1x_coco.py'
    cfg = user_config(f'mmdet::panoptic_fpn/{name}', tmp_path)
    load = cfg.train_dataloader.dataset.pipeline[1]
    assert load.type == 'LoadAnnotations'
    assert load.with_mask
    assert load.with_seg
    for key in ('dataloader', 'evaluator', 'cfg'):
        assert cfg[f'test_{key}'] is None
        assert cfg[f'val_{key}'] is None
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/last_checkpoint').write_text('iter_3.pth')
    assert try_configs.needed('export', tmp_path)
    assert not try_configs.needed('test', tmp_path)
