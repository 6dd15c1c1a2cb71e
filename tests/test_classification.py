"""Classifiers of mmpretrain through the tools, and what starts from them."""

import importlib.util
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from in_process import Script, load, tools  # noqa: F401
from tiny_runs import DET, ROOT, SEG, write_config, write_data

from ws_mm.compat import read_checkpoint

pytest.importorskip('mmseg')
pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain', exc_type=ImportError)

# A shipped config, small, on two images of two classes.
SMALL = """
_base_ = 'BASE'
model = dict(
    backbone=dict(
        stem_channels=8, base_channels=8, norm_cfg=dict(num_groups=4)
    ),
    head=dict(num_classes=2, in_channels=64),
)
data = dict(data_root='DATA', data_prefix='')
train_dataloader = dict(batch_size=1, dataset=data)
val_dataloader = dict(batch_size=1, dataset=data)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1, val_interval=1)
default_hooks = dict(logger=dict(interval=1))
randomness = dict(seed=0)
"""
# The names of mmpretrain's deep stem are not those of mmseg's.
HOSTS = {
    'mmseg': SEG.replace('ResNetV1c', 'ResNet'),
    'mmdet': DET.replace('depth=18,', 'depth=18,\n        stem_channels=8,'),
}
NORMS = {'bcn': "type='ws_mm.BCN'", 'gn': "type='GN'"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The data of the tiny configs, and a folder for each class."""
    folder = write_data(tmp_path / 'data')
    for index in '01':
        target = folder / 'classes' / index
        target.mkdir(parents=True)
        shutil.copy(folder / f'images/{index}.png', target)
    return folder


def write_classifier(folder: Path, norm: str, extra: str = '') -> Path:
    (base,) = (ROOT / 'configs/demo').glob(f'resnet18-w32_{norm}-ws-all_*.py')
    config = folder / f'{norm}.py'
    text = SMALL.replace('BASE', str(base))
    text = text.replace('DATA', str(folder / 'data/classes'))
    config.write_text(text + extra)
    return config


@pytest.mark.parametrize('norm', NORMS)
def test_detectors_and_segmentors_start_from_a_classifier(
    norm: str, data: Path, tmp_path: Path, script: Callable[..., int]
) -> None:
    config = write_classifier(tmp_path, norm)
    assert script('train', config, '--work-dir', tmp_path / 'cls') == 0
    weights = tmp_path / 'cls/epoch_1.pth'
    check_tools(norm, config, weights, tmp_path, script)
    pretrained = read_backbone(weights)
    start = dict(
        type='Pretrained', checkpoint=str(weights), prefix='backbone.'
    )
    for host, text in HOSTS.items():
        folder = tmp_path / host
        folder.mkdir()
        tiny = text.replace("type='ws_mm.BCN'", NORMS[norm])
        tiny = tiny.replace('DATA', str(data))
        extra = (
            f'model["backbone"]["init_cfg"] = {start}\n'
            'optim_wrapper["optimizer"]["lr"] = 0\n'
        )
        finer = write_config(folder, tiny, extra)
        assert script('train', finer, '--work-dir', folder) == 0
        (path,) = folder.glob('*_1.pth')
        started = read_backbone(path)
        # Without a step of the optimizer, they stay what was loaded.
        assert set(started) == set(pretrained)
        for name, value in pretrained.items():
            if 'running' not in name and 'num_batches' not in name:
                assert torch.equal(started[name], value), name
        (log,) = folder.glob('*/*.log')
        assert 'do not match' not in log.read_text()


def read_backbone(path: Path) -> dict[str, torch.Tensor]:
    state = read_checkpoint(str(path))['state_dict']
    return {k: v for k, v in state.items() if k.startswith('backbone.')}


def check_tools(
    norm: str,
    config: Path,
    weights: Path,
    folder: Path,
    script: Callable[..., int],
) -> None:
    """Evaluate, draw, check, bake and export it."""
    work, scores = ('--work-dir', folder / 'test'), []
    shown, out = folder / 'shown', folder / 'scores.pkl'
    for options in (('--show-dir', shown), ('--tta',)):
        options = ('--out', out, *work, *options)
        assert script('test', config, weights, *options) == 0
        found = pickle.loads(out.read_bytes())
        scores.append(torch.stack([each['pred_score'] for each in found]))
        torch.testing.assert_close(scores[-1].sum(1), torch.ones(2))
    assert not torch.equal(*scores)  # flipped images count
    assert len(list(shown.glob('*.png'))) == 2
    assert script('check_model', config) == 0
    if norm == 'gn':
        assert script('bake', config, weights, folder / 'baked') == 0
        baked = (folder / 'baked/gn.py').read_text()
        assert 'ImageClassifier' in baked
        assert 'ws_mm' not in baked
    elif importlib.util.find_spec('onnxruntime'):  # not in the official line
        onnx = folder / 'classifier.onnx'
        assert script('export', config, weights, onnx) == 0
        session = importlib.import_module('onnxruntime').InferenceSession
        (output,) = session(onnx).get_outputs()
        assert (output.name, output.shape[1]) == ('logits', 2)


def test_a_shipped_config_is_converted(
    tmp_path: Path, script: Callable[..., int]
) -> None:
    new = tmp_path / 'new.py'
    shipped = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'
    assert script('apply_norm', shipped, new, '--norm', 'BCN') == 0
    model = load('check_model').models.build_model
    cfg = load('apply_norm').read_config(str(new))
    names = [type(layer).__name__ for layer in model(cfg).modules()]
    assert names.count('WSConv2d') == names.count('BCN') == 53
    # It has its preprocessing beside the model.
    notes = load('export').notes_of(cfg, str(new))['preprocessing']
    settings = cfg.data_preprocessor
    assert json.loads(notes) == dict(
        mean=settings.mean, std=settings.std, to_rgb=True
    )


def test_a_layer_norm_is_left_alone(
    tmp_path: Path,
    script: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    new = tmp_path / 'new.py'
    shipped = 'mmpretrain::convnext/convnext-tiny_32xb128_in1k.py'
    assert script('apply_norm', shipped, new) == 0
    said = capsys.readouterr().out
    assert 'model.backbone: its norm LN2d is not' in said
    assert 'Nothing to change' in said


def test_mistakes_are_named(
    data: Path,
    tmp_path: Path,
    refuses: Script,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extra = "train_dataloader['dataset']['data_prefix'] = 'train'\n"
    config = write_classifier(tmp_path, 'gn', extra)
    missing = "train_dataloader.dataset.data_prefix = 'train': nothing at"
    refuses(missing, 'train', config)
    config = write_classifier(
        tmp_path, 'gn', "model['head']['num_classes'] = 3"
    )
    wrong = r'model\.head\.num_classes = 3, but train_dataloader has 2 classes'
    refuses(wrong, 'train', config, '--work-dir', tmp_path / 'work')
    both = ('--tta', '--show-dir', tmp_path / 'shown')
    weights = tmp_path / 'weights.pth'
    torch.save(dict(state_dict={'some.weight': torch.ones(2)}), weights)
    refuses('draws one view', 'test', config, weights, *both)
    launch = load('train').launch
    monkeypatch.setattr(launch.importlib.util, 'find_spec', lambda name: None)
    refuses(
        r'needs mmpretrain \(its default_scope\), which is not installed. '
        'Install it with: pip install (onedl-)?mmpretrain==',
        'train',
        config,
    )
