"""Files that are no checkpoint, or not of the model: a clear message."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import (  # noqa: F401
    Script,
    backbone_weights,
    load,
    save_run,
    tools,
    write_bad_checkpoint,
)
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from shipped import read
from tiny_runs import SEG, write_config, write_data

import ws_mm
from ws_mm.shapes import build_without_memory

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

# What runs with FSDP or DeepSpeed in place of Runner.
FLEXIBLE = dict(
    runner_type='FlexibleRunner',
    strategy=dict(type='SingleDeviceStrategy'),
    env_cfg=dict(cudnn_benchmark=False),
)


def add_lines(config: Path, settings: dict[str, Any]) -> None:
    """Append settings to a config file."""
    lines = (f'{name} = {value!r}' for name, value in settings.items())
    config.write_text('\n'.join([config.read_text(), *lines]))


def state_of(config: Path) -> dict[str, torch.Tensor]:
    """The tensors of a detector with random weights."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(Config.fromfile(config).model).state_dict()


@pytest.mark.parametrize(
    ('kind', 'match'),
    [
        ('text', r'w\.pth is not a checkpoint: torch\.save did not write'),
        ('empty', r'w\.pth is not a checkpoint: torch\.save did not write'),
        ('list', 'it holds a list'),
        ('no state_dict', "no state_dict; it holds 'epoch'"),
        ('state_dict of a list', 'it has no state_dict'),
        ('another key', r"torch.save\({'state_dict': .*\['model'\]}, new\)"),
        ('code', r'holds a \w+\.mkdir, which only running code'),
        ('old code', r'holds a \w+\.mkdir, which only running code'),
        ('truncated', r'w\.pth is truncated'),
        ('old truncated', r'w\.pth is not a checkpoint'),
    ],
)
def test_checkpoint_that_is_none(
    refuses: Script, config: Path, tmp_path: Path, kind: str, match: str
) -> None:
    path = tmp_path / 'w.pth'
    write_bad_checkpoint(kind, path)
    work = ('--work-dir', tmp_path / 'work')
    refuses(match, 'test', config, path, *work)
    refuses(match, 'train', config, *work, '--resume', path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    refuses(
        f'^load_from: .*{match}',
        *('train', config, *work, '--cfg-options', f'load_from={path}'),
    )
    with config.open('a') as file:
        file.write(f'model["backbone"]["init_cfg"] = [{init_cfg}]\n')
    key = r'model\.backbone\.init_cfg\.0\.checkpoint'
    refuses(f'{key}: .*{match}', 'train', config, *work)
    assert not (tmp_path / 'ran').exists()
    assert not (tmp_path / 'work').exists()


def test_checkpoint_of_the_host_is_read(tmp_path: Path) -> None:
    hub = MessageHub('tools')
    hub.update_scalar('train/loss', 1.5)
    hub.update_info('seen', np.float32(0.5))
    content = dict(state_dict=dict(a=torch.ones(1)))
    content['message_hub'] = hub.state_dict()
    torch.save(content, tmp_path / 'w.pth')
    found = load('checkpoints').read_checkpoint(tmp_path / 'w.pth')
    assert found['message_hub']['runtime_info']['seen'] == 0.5


def test_checkpoints_elsewhere_are_left_to_the_host() -> None:
    checkpoints = load('checkpoints')
    init_cfg = dict(type='Pretrained', checkpoint='torchvision://resnet18')
    url = 'https://host/w.pth'
    model = dict(backbone=dict(init_cfg=init_cfg))
    checkpoints.check_checkpoints(Config(dict(model=model, load_from=url)))
    checkpoints.check_weights_fit(url, torch.nn.Linear(1, 1))
    checkpoints.check_weights_fit(None, torch.nn.Linear(1, 1))


def test_weights_of_a_layer_below_are_named_with_its_key(
    tmp_path: Path,
) -> None:
    checkpoints = load('checkpoints')
    inner = torch.nn.Linear(1, 1)
    path = str(tmp_path / 'inner.pth')
    torch.save(dict(state_dict=inner.state_dict()), path)
    key = 'model.backbone.init_cfg'
    match = (
        rf"set model\.backbone\.inner\.init_cfg=dict\(type='Pretrained', "
        rf"checkpoint='{path}'\) in place of model\.backbone\.init_cfg;"
    )
    with pytest.raises(checkpoints.SetupError, match=match):
        checkpoints.check_weights_fit(
            path, torch.nn.ModuleDict({'inner': inner}), key
        )


def test_a_backbone_that_renames_what_it_loads_is_left_to_itself(
    weights: Path,
) -> None:
    checkpoints = load('checkpoints')
    backbones = pytest.importorskip('mmdet.models.backbones')
    init_cfg = dict(type='Pretrained', checkpoint=str(weights))
    shape = dict(embed_dims=4, depths=(1,) * 4, num_heads=(1,) * 4)
    swin = backbones.SwinTransformer(**shape, init_cfg=init_cfg)
    checkpoints.check_parts_fit(torch.nn.ModuleDict({'backbone': swin}))
    resnet = backbones.ResNet(18, base_channels=4, init_cfg=init_cfg)
    match = r'^model\.backbone\.init_cfg: checkpoint .* shares no parameter'
    with pytest.raises(checkpoints.SetupError, match=match):
        checkpoints.check_parts_fit(torch.nn.ModuleDict({'backbone': resnet}))


def test_weights_of_a_teacher_are_opened(tmp_path: Path) -> None:
    cfg = read('mmdet::ld/ld_r18-gflv1-r101_fpn_1x_coco.py')
    checkpoints = load('checkpoints')
    checkpoints.check_checkpoints(cfg)  # an address
    path = tmp_path / 'teacher.pth'
    path.touch()
    cfg.model.teacher_ckpt = str(path)
    match = r'^model\.teacher_ckpt: .*teacher\.pth is not a checkpoint'
    with pytest.raises(checkpoints.SetupError, match=match):
        checkpoints.check_checkpoints(cfg)


def test_prefixes_of_wrappers_are_no_difference(tmp_path: Path) -> None:
    checkpoints = load('checkpoints')
    plain = torch.nn.Linear(1, 1)
    wrapped = torch.nn.ModuleDict({'module': plain})
    twice = torch.nn.ModuleDict({'module': wrapped})
    for index, saved in enumerate((plain, wrapped)):
        path = str(tmp_path / f'{index}.pth')
        torch.save(dict(state_dict=saved.state_dict()), path)
        for model in (plain, wrapped, twice):
            checkpoints.check_weights_fit(path, model)


def test_half_a_checkpoint_is_not_evaluated(
    refuses: Script,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = state_of(config)
    half = {k: v for k, v in state.items() if 'mask_head' not in k}
    path = tmp_path / 'half.pth'
    torch.save(dict(state_dict=half), path)
    refuses(
        rf'lacks {len(state) - len(half)} of {len(state)} tensors of the '
        r'model, such as roi_head\.mask_head\..*--allow-missing',
        *('test', config, path, '--work-dir', tmp_path / 'work'),
    )

    def evaluate(runner: Runner) -> None:
        raise load('test').SetupError('evaluated')

    monkeypatch.setattr(Runner, 'test', evaluate)
    refuses(
        '^evaluated$',
        *('test', config, path, '--work-dir', tmp_path / 'work'),
        '--allow-missing',
    )


def test_what_is_missing_is_said_after_the_layers_have_mapped_it(
    tmp_path: Path,
) -> None:
    checkpoints = load('checkpoints')
    norm = torch.nn.Sequential(ws_mm.BCN(64), torch.nn.BatchNorm2d(3))
    wrapped = torch.nn.ModuleDict({'module': norm})
    path = str(tmp_path / 'norm.pth')
    theirs = dict(torch.nn.BatchNorm2d(64).state_dict(prefix='0.pbn.'))
    theirs['0.weight'] = theirs['0.bias'] = torch.rand(1, 32, 1)
    theirs.update(norm[1].state_dict(prefix='1.'))
    del theirs['1.num_batches_tracked']
    for prefix in ('', 'module.'):
        state = {prefix + name: values for name, values in theirs.items()}
        torch.save(dict(state_dict=state), path)
        for model in (norm, wrapped):
            checkpoints.check_weights_complete(path, model)
        del state[f'{prefix}1.running_mean']
        torch.save(state, path)
        for model in (norm, wrapped):
            with pytest.raises(checkpoints.SetupError, match='lacks 1 of 11'):
                checkpoints.check_weights_complete(path, model)
    # Wrong shapes are the host's to report, addresses its to read.
    torch.save({'1.weight': torch.ones(5)}, path)
    checkpoints.check_weights_complete(path, norm)
    checkpoints.check_weights_complete('https://host/weights.pth', norm)


def test_checkpoint_with_a_typo(
    refuses: Script, config: Path, weights: Path
) -> None:
    wrong = weights.with_name('wieghts.pth')
    refuses(
        rf'No checkpoint file {wrong}\. Did you mean {weights}\?',
        *('test', config, wrong),
    )


@pytest.mark.parametrize('runner', [{}, FLEXIBLE], ids=['Runner', 'Flexible'])
def test_checkpoint_of_another_model(
    refuses: Script,
    config: Path,
    weights: Path,
    tmp_path: Path,
    runner: dict[str, Any],
) -> None:
    work = ('--work-dir', tmp_path / 'work')
    add_lines(config, runner)
    refuses(
        "shares no parameter with the model: it has 'some.weight'",
        *('test', config, weights, *work),
    )
    refuses(
        "shares no parameter with the model: it has 'some.weight'",
        *('train', config, *work, '--cfg-options', f'load_from={weights}'),
    )


def test_another_runner_evaluates_whole_checkpoints(
    script: Callable[..., int],
    refuses: Script,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    state = state_of(config)
    add_lines(config, FLEXIBLE)
    path = tmp_path / 'all.pth'
    torch.save(dict(state_dict=state, meta={}), path)
    work = ('--work-dir', tmp_path / 'work')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load('checkpoints').check_weights_complete(
            path, build_without_memory(Config.fromfile(config).model, 'mmdet')
        )
    assert script('test', config, path, *work) == 0
    assert 'coco/segm_mAP' in capsys.readouterr().out
    del state['backbone.conv1.weight']
    torch.save(dict(state_dict=state, meta={}), path)
    refuses(r'lacks 1 of .*conv1\.weight', 'test', config, path, *work)


def test_checkpoint_with_a_prefix_too_many(
    refuses: Script, config: Path, tmp_path: Path
) -> None:
    state = backbone_weights(config)
    path = tmp_path / 'moco.pth'
    theirs = {f'module.encoder_q.{name}': state[name] for name in state}
    theirs['module.queue'] = torch.ones(3)
    torch.save(dict(state_dict=theirs), path)
    work = ('--work-dir', tmp_path / 'work', '--cfg-options')
    right = (
        r"model\.backbone\.init_cfg=dict\(type='Pretrained', checkpoint="
        rf"'{path}', prefix='module\.encoder_q\.'\)"
    )
    refuses(
        r"without the prefix 'module\.encoder_q\.' of the checkpoint and the "
        rf"prefix 'backbone\.' of the model\..*{right} in place of load_from",
        *('train', config, *work, f'load_from={path}'),
    )
    refuses(right, 'test', config, path, *work[:2])
    # A backbone alone, without a prefix.
    torch.save(dict(state_dict=state), tmp_path / 'bare.pth')
    refuses(
        rf"set model\.backbone\.init_cfg=dict\(type='Pretrained', "
        rf"checkpoint='{tmp_path}/bare\.pth'\) in place",
        *('train', config, *work, f'load_from={tmp_path}/bare.pth'),
    )
    own = dict(type='Pretrained', checkpoint=str(path))
    text = config.read_text()
    key = r'model\.backbone\.init_cfg'
    for init_cfg, match in (
        (own, rf"^{key}: checkpoint .* Set {key}\.prefix='module\.encoder_q"),
        ([own], rf"Set {key}\.0\.prefix='module\.encoder_q\.'\.$"),
        (own | dict(prefix='encoder_q'), rf"Set {key}\.prefix='module\."),
    ):
        config.write_text(
            f'{text}model["backbone"]["init_cfg"] = {init_cfg}\n'
        )
        refuses(match, 'train', config, *work[:2])


@pytest.mark.parametrize('key', ['message_hub', 'epoch', 'iter'])
def test_weights_alone_are_not_resumed(
    refuses: Script, config: Path, tmp_path: Path, key: str
) -> None:
    path = tmp_path / 'w.pth'
    meta = {name: 1 for name in ('epoch', 'iter') if name != key}
    save_run(path, 1, meta=meta, **{key: None})
    command = f'--cfg-options resume=False load_from={path}'
    match = rf'^--resume: {path} has weights alone.*{command}$'
    refuses(match, 'train', config, '--resume', path)
    refuses(
        match,
        *('train', config, '--cfg-options', 'resume=True'),
        f'load_from={path}',
    )


def test_a_prefix_as_it_is_said_is_taken(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = backbone_weights(config)
    theirs = {f'module.encoder_q.{name}': state[name] for name in state}
    torch.save(dict(state_dict=theirs), tmp_path / 'moco.pth')
    init_cfg = dict(
        type='Pretrained',
        checkpoint=str(tmp_path / 'moco.pth'),
        prefix='module.encoder_q.',
    )
    with config.open('a') as file:
        file.write(f'model["backbone"]["init_cfg"] = {init_cfg}\n')
    found = {}

    def train(runner: Runner) -> None:
        runner._init_model_weights()
        found.update(runner.model.backbone.state_dict())

    monkeypatch.setattr(Runner, 'train', train)
    work = ('--work-dir', str(tmp_path / 'work'))
    monkeypatch.setattr('sys.argv', ['train', str(config), *work])
    load('train').main()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_legacy_key_is_opened_too(refuses: Script, tmp_path: Path) -> None:
    config = write_config(write_data(tmp_path / 'data'), SEG)
    path = tmp_path / 'w.pth'
    path.touch()
    with config.open('a') as file:
        file.write(f"model['pretrained'] = '{path}'\n")
    work = ('--work-dir', tmp_path / 'work')
    refuses(r'^model\.pretrained: .*w\.pth is not a checkp', 'train', config)
    state = backbone_weights(config)
    torch.save({f'k.{name}': state[name] for name in state}, path)
    key = r'model\.backbone\.init_cfg'
    refuses(rf"^{key}: .* Set {key}\.prefix='k\.'\.$", 'train', config, *work)
