"""Findings of the doctor: environment, good configs, and each mistake."""

import argparse
import importlib
import logging
import multiprocessing
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
import torch
from in_process import load, tools  # noqa: F401
from mmengine.config import Config
from mmengine.logging import MMLogger
from support import config_checks, environment, environment_checks, ranks
from support.config_checks import Training
from support.findings import Finding, findings_of
from support.tensors import saved_bytes
from tiny_runs import DET, SEG, without_ws, write_config, write_data

import ws_mm
from ws_mm import compat, kernels

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

MEANT = """
auto_scale_lr = dict(base_batch_size=4)
train_dataloader['batch_size'] = 2
optim_wrapper['accumulative_counts'] = 2
"""


@pytest.fixture
def examined(tmp_path: Path) -> Callable[..., list[Finding]]:
    """Findings of the checks of a config."""

    def examine(
        text: str, extra: str = '', processes: int = 1, memory: bool = False
    ) -> list[Finding]:
        config = write_config(write_data(tmp_path / 'data'), text, extra)
        cfg = Config.fromfile(config)
        training = Training(cfg, processes, tmp_path / 'drawn')
        return list(findings_of(training.checks(64, memory)))

    return examine


def not_ok(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level != 'ok']


def test_a_good_config_in_this_environment(
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    config = write_config(write_data(tmp_path / 'data'), DET, MEANT)
    work = tmp_path / 'work'
    words = [str(config), '--work-dir', str(work), '--memory']
    monkeypatch.setattr('sys.argv', ['doctor.py', *words])
    with pytest.raises(SystemExit) as stop:
        load('doctor').main()
    said = capsys.readouterr().out
    assert stop.value.code == 0, said
    *lines, total = said.splitlines()
    # The versions may be others than those of a line.
    assert total.endswith(' 0 error')
    for line in (
        'two processes of this machine talk over gloo',
        'operators of mmcv run on cpu',
        'WS and BCN on cpu are off by',
        f'{work} can be written',
        '20 of 34 convolutions standardized',
        '0 batch norms',
        'lr=0.01 is meant for 4 images per step',
        'train_dataloader: 2 images, 1 classes; a sample of 64x64 is in',
        'one step keeps about',
    ):
        assert any(found.startswith(f'ok       {line}') for found in lines)
    for loader in ('train', 'test'):
        image = cv2.imread(str(work / f'doctor/{loader}_dataloader.png'))
        assert image.shape == (64, 64, 3)
        # The truth has a colour; the image is of greys and dark noise.
        square = image[30:40, 20:35].mean((0, 1))
        assert square.max() - square.min() > 50
    assert 'loading annotations' not in said


def test_a_good_segmentation(examined, tmp_path: Path) -> None:
    assert not_ok(examined(SEG, MEANT)) == []
    image = cv2.imread(str(tmp_path / 'drawn/train_dataloader.png'))
    red = image[20:36, 15:35, 2] - image[20:36, 15:35, 0].astype(float)
    assert red.mean() > 50  # the palette's


@pytest.mark.parametrize('text', [DET, SEG], ids=['mmdet', 'mmseg'])
def test_a_test_image_of_another_size(
    text: str, examined, tmp_path: Path
) -> None:
    # As in the hosts' pipelines, the truth is loaded behind it.
    resize = "dict(type='Resize', scale=(96, 96))"
    extra = (
        f"{MEANT}test_dataloader['dataset']['pipeline'].insert(1, {resize})\n"
    )
    assert not_ok(examined(text, extra)) == []
    image = cv2.imread(str(tmp_path / 'drawn/test_dataloader.png'))
    assert image.shape == (64, 64, 3)


def test_classes_that_are_not_those_of_a_head(examined) -> None:
    extra = MEANT + "model['decode_head']['num_classes'] = 3\n"
    train, test = not_ok(examined(SEG, extra))
    assert train.level == test.level == 'error'
    assert train.text.startswith('model.decode_head.num_classes = 3, but')
    assert 'Set model.decode_head.num_classes=2' in train.text


def test_data_that_is_not_there(examined) -> None:
    extra = MEANT + "train_dataloader['dataset']['ann_file'] = 'no.json'\n"
    (found,) = not_ok(examined(DET, extra))
    assert found.level == 'error'
    assert "train_dataloader.dataset.ann_file = 'no.json'" in found.text


def test_batch_norms_that_remain(examined) -> None:
    text = without_ws(SEG)
    (found,) = not_ok(examined(text, MEANT))
    assert found.level == 'warning'
    assert 'The model trains 24 batch norms (' in found.text
    assert ', ...) on the statistics of 2 images. ' in found.text
    assert 'apply_norm.py replaces them' in found.text


def test_a_batch_norm_of_one_value(examined) -> None:
    text = without_ws(SEG).replace("type='FCNHead'", "type='ASPPHead'")
    text = text.replace('num_convs=1', 'dilations=(1, 2)')
    extra = MEANT + "train_dataloader['batch_size'] = 1\n"
    extra += "auto_scale_lr['base_batch_size'] = 2\n"
    (found,) = [f for f in examined(text, extra) if f.level == 'error']
    assert 'Expected more than 1 value per channel' in found.text
    assert '--remaining those that no norm_cfg reaches' in found.fix


@pytest.mark.parametrize(
    ('norm', 'said'),
    [
        ('GN', 'GroupNorm layers do not train, and are as they were built'),
        (
            'ws_mm.EvoNormS0',
            'EvoNormS0 layers do not train, and are as they were built',
        ),
        ('ws_mm.BCN', 'These BCN layers are in eval mode'),
    ],
)
def test_norms_that_stay_as_built(norm: str, said: str, examined) -> None:
    extra = MEANT + "model['backbone']['frozen_stages'] = 1\n"
    (found,) = not_ok(examined(SEG.replace('ws_mm.BCN', norm), extra))
    assert said in found.text
    assert 'Set frozen_stages=-1' in found.text


@pytest.mark.parametrize(
    ('schedule', 'name', 'kind'),
    [
        ('[{}]', 'param_scheduler.0', "'LinearLR'"),
        ('{}', 'param_scheduler', "'LinearLR'"),
        ('{}', 'param_scheduler', 'LinearLR'),  # of a pure Python config
    ],
)
def test_a_warm_up_that_never_ends(
    schedule: str, name: str, kind: str, examined
) -> None:
    warm_up = f'dict(type={kind}, start_factor=0.1, by_epoch=False, end=9)'
    extra = f'{MEANT}param_scheduler = {schedule.format(warm_up)}\n'
    text = SEG
    if kind == 'LinearLR':
        text = f'from mmengine.optim import LinearLR\n{SEG}'
    (found,) = not_ok(examined(text, extra))
    assert found.level == 'warning'
    said = f'{name}, a warm-up, ends at iteration 9, and'
    assert found.text.startswith(said)
    assert f'--cfg-options {name}.end=1' in found.fix


@pytest.mark.parametrize(('processes', 'steps'), [(1, 6), (2, 4), (3, 2)])
def test_a_warm_up_is_compared_with_all_iterations(
    processes: int, steps: int, tmp_path: Path
) -> None:
    warm_up = "dict(type='LinearLR', by_epoch=False, end=%d)"
    for end in (steps - 1, steps):
        extra = f"{MEANT}train_cfg['max_epochs'] = 2\n"
        extra += f'param_scheduler = {warm_up % end}\n'
        cfg = Config.fromfile(write_config(tmp_path, DET, extra))
        # Of five images, two a step.
        found = list(Training(cfg, processes, tmp_path).warm_up(5))
        assert bool(found) == (end == steps)
    assert f'and the training has {steps}: it' in found[0].text


def test_weights_that_do_not_fit(examined, tmp_path: Path) -> None:
    path = tmp_path / 'other.pth'
    torch.save({'state_dict': {'other.weight': torch.ones(1)}}, path)
    start = dict(type='Pretrained', checkpoint=str(path))
    extra = MEANT + f"model['backbone']['init_cfg'] = {start}\n"
    (found,) = not_ok(examined(SEG, extra))
    assert found.level == 'error'
    assert 'model.backbone.init_cfg: checkpoint' in found.text
    assert 'shares no parameter with the model' in found.text


def test_weights_are_loaded_without_a_line_per_parameter(
    examined, tmp_path: Path
) -> None:
    path = tmp_path / 'own.pth'
    extra = MEANT + (
        "model['backbone']['init_cfg'] = "
        f"dict(type='Pretrained', checkpoint={str(path)!r})\n"
    )
    torch.save({'layer1.0.conv1.weight': torch.zeros(16, 16, 3, 3)}, path)
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    try:
        found = examined(SEG, extra)
        assert any('own.pth: can be loaded' in f.text for f in found), found
        level = logger.level
    finally:
        logger.removeHandler(handler)
    lines = [record.getMessage() for record in said]
    assert not [line for line in lines if 'layer1.0.conv1.weight -' in line]
    assert level <= logging.INFO


def test_a_model_that_does_not_build_is_said_once(examined) -> None:
    found = examined(SEG.replace('ws_mm.BCN', 'ws_mm.BNC'), MEANT)
    errors = [each for each in found if each.level == 'error']
    assert len(errors) == 1
    assert "did you mean 'ws_mm.BCN'" in errors[0].text
    assert 'a sample of' in found[-1].text


def test_batch_norms_of_all_processes(examined) -> None:
    sync = without_ws(SEG).replace("'BN'", "'SyncBN'")
    extra = MEANT + "auto_scale_lr['base_batch_size'] = 8\n"
    assert not_ok(examined(sync, extra, processes=2)) == []


def test_a_convolution_without_a_norm(examined) -> None:
    extra = MEANT + (
        "model['decode_head'].update(norm_cfg=None, "
        "conv_cfg=dict(type='ws_mm.WSConv2d'))\n"
    )
    found = not_ok(examined(SEG, extra))
    assert {each.level for each in found} == {'error'}
    assert 'Set model.decode_head.norm_cfg=' in found[0].text


@pytest.mark.parametrize(
    ('change', 'processes', 'fix'),
    [
        ('', 4, 'optim_wrapper.optimizer.lr=0.04 '),
        ("auto_scale_lr['base_batch_size'] = 16\n", 1, 'lr=0.0025 '),
        ('auto_scale_lr = None\n', 1, 'base_batch_size'),
        ("auto_scale_lr['enable'] = True\n", 4, None),
        ("train_dataloader['batch_size'] = 1\n", 2, None),
    ],
)
def test_the_learning_rate_is_for_a_batch(
    change: str, processes: int, fix: str | None, tmp_path: Path
) -> None:
    cfg = Config.fromfile(write_config(tmp_path, SEG, MEANT + change))
    training = Training(cfg, processes, tmp_path)
    (found,) = training.learning_rate()
    assert found.level == ('warning' if fix else 'ok')
    assert not fix or fix in found.fix


def test_memory_is_what_a_step_keeps() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 1, 1))
    x = torch.randn(3, 4, 8, 8, requires_grad=True)
    size = x.numel() * 4

    def run() -> torch.Tensor:
        # The product keeps x, and the weight, which is there anyway; the
        # exponential its output, which the square keeps as a view.
        return (x * weight).exp().view(3, -1).square().sum()

    assert saved_bytes(run, [weight]) == 2 * size


@pytest.mark.usefixtures('tools')
@pytest.mark.parametrize(
    ('tool', 'words'),
    [
        ('doctor', ['--processes', '-8']),
        ('doctor', ['--size', '0']),
        ('check_model', ['config.py', '--size', '-4']),
    ],
)
def test_numbers_are_at_least_1(
    tool: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr('sys.argv', [tool, *words])
    with pytest.raises(SystemExit, match='2'):
        load(tool).main()
    said = capsys.readouterr().err
    assert f'{words[-2]}: {words[-1]!r} must be a whole number of at' in said


def test_frozen_weights_take_memory_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_checks, 'MIB', 1)
    found = []
    data = write_data(tmp_path / 'data')
    pure = SEG.replace("type='SGD'", 'type=SGD')
    pure = f'from torch.optim import SGD\n{pure}'
    for stages, text in ((-1, SEG), (4, pure)):
        extra = MEANT + f"model['backbone']['frozen_stages'] = {stages}\n"
        config = write_config(data, text, extra)
        training = Training(Config.fromfile(config), 1, tmp_path / 'drawn')
        _, model = training._step()
        own = sum(p.nbytes for p in model.parameters())
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        (said,) = training.memory()
        found.append(re.search(r'images, (\d+) weights', said.text)[1])
        # A gradient and a momentum are those of trained ones alone.
        assert int(found[-1]) == own + 2 * trained
    assert found[0] != found[1]


def test_errors_of_a_check_do_not_hide_the_others(examined) -> None:
    extra = MEANT + "model['backbone']['depth'] = 17\n"

    def breaks() -> list[Finding]:
        raise RuntimeError('first line\nsecond')

    (found,) = findings_of([breaks])
    assert found.text == 'breaks: RuntimeError: first line'
    levels = [f.level for f in examined(SEG, extra)]
    # The model; the rate and both data sets are fine.
    assert levels == ['error', 'ok', 'ok', 'ok']


@pytest.mark.parametrize(
    ('levels', 'strict', 'code'),
    [
        (['ok'], False, 0),
        (['warning'], False, 0),
        (['warning'], True, 1),
        (['ok', 'error'], False, 1),
    ],
)
def test_exit_status(
    levels: list[str],
    strict: bool,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    doctor = load('doctor')
    found = [Finding(level, 'a thing', 'a command') for level in levels]
    monkeypatch.setattr(doctor, 'examine', lambda args: iter(found))
    monkeypatch.setattr('sys.argv', ['doctor.py', *['--strict'] * strict])
    with pytest.raises(SystemExit) as stop:
        doctor.main()
    assert stop.value.code == code
    assert 'fix: a command' in capsys.readouterr().out


def test_a_config_that_does_not_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    doctor = load('doctor')
    monkeypatch.setattr(environment_checks, 'checks', lambda *_: [])
    options = dict(work_dir=None, local_rank=None, cfg_options=None)
    config = tmp_path / 'a.py'
    config.write_text("default_scope = 'mmwhat'\nmodel = dict()\n")
    args = argparse.Namespace(config=str(config), launcher='none', **options)
    (found,) = doctor.examine(args)
    assert found.level == 'error'
    assert 'has no train_dataloader' in found.text


# The environment, with what the checks ask replaced.


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {'torch': ('torch', '2.10.0+cu128'), 'mmcv': ('onedl-mmcv', '9')}
    monkeypatch.setattr(environment_checks, 'distribution', there.get)
    monkeypatch.setattr(compat, 'installed_line', lambda: 'maintained')
    owners = dict(mmcv=['onedl-mmcv', 'mmcv'], torch=['torch'])
    monkeypatch.setattr(
        environment_checks.metadata, 'packages_distributions', lambda: owners
    )
    both, line, other = environment_checks.versions_fit()
    assert both.level == 'error'
    assert both.fix.startswith('pip uninstall -y mmcv onedl-mmcv; ')
    assert line.level == 'ok'
    assert 'no mmdet (pip install onedl-mmdetection' in line.text
    assert other.level == 'warning'
    assert other.text.endswith('onedl-mmcv 9, tested 2.3.6')


@pytest.mark.parametrize('package', ['numpy', 'torch', 'mmengine'])
def test_what_is_installed_is_found(package: str) -> None:
    name, version = environment.distribution(package)
    assert name in (package, f'onedl-{package}')
    assert (
        version.split('+')[0]
        == (importlib.import_module(package).__version__.split('+')[0])
    )
    assert environment.distribution('no_such_package') is None


def test_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess([], 1, '', 'a\nundefined symbol')

    monkeypatch.setattr(environment_checks.subprocess, 'run', fails)
    (found,) = environment_checks.operators_run()
    assert found.level == 'error'
    assert 'undefined symbol' in found.text
    assert compat.install_command('mmcv') in found.fix
    monkeypatch.setattr(compat, 'mmcv_problem', lambda: 'no operators')
    for there, level in ((('mmdet', '3'), 'error'), (None, 'warning')):
        monkeypatch.setattr(
            environment_checks, 'distribution', lambda _, there=there: there
        )
        (found,) = environment_checks.operators_run()
        assert (found.level, found.text) == (level, 'no operators')


@pytest.mark.parametrize(
    ('built', 'level'),
    [('12.8', 'ok'), ('11.8', 'error'), ('not available', 'error')],
)
def test_cuda_of_mmcv_is_that_of_torch(
    built: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = pytest.importorskip('mmcv.ops')
    monkeypatch.setattr(ops, 'get_compiling_cuda_version', lambda: built)
    monkeypatch.setattr(torch.version, 'cuda', '12.1')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'a GPU')
    _, found = environment_checks.cuda_is_one()
    assert found.level == level
    assert ('FORCE_CUDA=1' in found.fix) == (level == 'error')


def test_a_gpu_that_torch_does_not_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for path, level in ((None, 'ok'), ('/bin/nvidia-smi', 'warning')):
        monkeypatch.setattr(
            environment_checks.shutil, 'which', lambda _, path=path: path
        )
        (found,) = environment_checks.cuda_is_one()
        assert found.level == level


def test_kernels_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = environment_checks.kernels_compute()
    assert found.level == 'ok'
    right = kernels.cpu.standardize_weight
    monkeypatch.setattr(
        kernels.cpu, 'standardize_weight', lambda *a: right(*a) * 1.001
    )
    (found,) = environment_checks.kernels_compute()
    assert found.level == 'error'
    assert 'WS_MM_KERNELS=plain' in found.fix


def test_processes_that_do_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(*_: object, **__: object) -> list:
        return ranks.in_ranks(lambda rank: time.sleep(600), seconds=2)

    monkeypatch.setattr(environment_checks, 'in_ranks', waits)
    others = multiprocessing.active_children()  # of other tests
    (found,) = environment_checks.processes_talk()
    assert found.level == 'error'
    assert 'no end within 2 seconds' in found.text
    assert set(multiprocessing.active_children()) <= set(others)


def test_processes_that_cannot_talk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> list:
        raise RuntimeError('a process\nConnection refused')

    monkeypatch.setattr(environment_checks, 'in_ranks', fails)
    (found,) = environment_checks.processes_talk()
    assert found.level == 'error'
    assert 'Connection refused' in found.text
    assert 'GLOO_SOCKET_IFNAME=lo' in found.fix


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    folder = str(tmp_path / 'file' / 'work')
    check = environment_checks.checks(folder, '--work-dir')[-1]
    (found,) = findings_of([check])
    assert found.level == 'error'
    assert 'is no folder' in found.text
    free = str(tmp_path / 'new' / 'work')
    check = environment_checks.checks(free, '--work-dir')[-1]
    (found,) = findings_of([check])
    assert found.level == 'ok'
    assert not (tmp_path / 'new').exists()


def test_the_environment_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(kernels.VARIABLE, 'plain')
    backends = []
    run = environment_checks._step

    def step(*args: object) -> list[torch.Tensor]:
        backends.append(ws_mm.kernels.for_weight(torch.ones(2, 3)))
        return run(*args)

    monkeypatch.setattr(environment_checks, '_step', step)
    list(environment_checks.kernels_compute())
    assert backends == [kernels.plain, kernels.cpu]
    assert ws_mm.kernels.for_weight(torch.ones(2, 3)) is kernels.plain
