"""Options and launchers of train.py and test.py."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from in_process import Script, load, save_run, tools  # noqa: F401
from mmengine.config import Config
from mmengine.evaluator import DumpResults, Evaluator
from mmengine.registry import MODELS, DefaultScope
from tiny_runs import DET, SEG, write_config, write_data

from ws_mm import BCN

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')


@pytest.mark.skipif(
    not os.path.exists('/dev/full'), reason='this system has no /dev/full'
)
def test_work_dir_on_a_full_disk(
    refuses: Script, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = load('train').checks
    monkeypatch.setattr(
        checks.tempfile, 'TemporaryFile', lambda dir: open('/dev/full', 'wb')
    )
    work = ('--work-dir', config.parent / 'work')
    refuses(r'not writable \(No space left on dev', 'train', config, *work)


def test_work_dir_that_cannot_be_written(
    refuses: Script, config: Path, weights: Path
) -> None:
    below_a_file = weights / 'work'
    match = rf'--work-dir {below_a_file} is not writable \(Not a directory\)'
    refuses(match, 'train', config, '--work-dir', below_a_file)
    refuses(match, 'test', config, weights, '--work-dir', below_a_file)


@pytest.mark.parametrize(
    ('options', 'match'),
    [
        (('--out', 'a.json'), r'--out a\.json: the name must end with \.pkl'),
        (('--out', '/dev/null/a.pkl'), '--out /dev/null is not writable'),
        (('--show-dir', '/dev/null/a'), '--show-dir /dev/null/a is not'),
        (
            ('--show-dir', 'a', '--cfg-options', 'default_scope=mmengine'),
            "know default_scope mmdet, mmseg, mmpretrain, not 'mmengine'",
        ),
        (('--show',), '--show needs a screen'),
        (('--tta',), 'merges boxes, not masks.*mask_head=None'),
    ],
)
def test_options_of_testing(
    refuses: Script,
    config: Path,
    weights: Path,
    options: tuple[str, ...],
    match: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name in ('DISPLAY', 'WAYLAND_DISPLAY'):
        monkeypatch.delenv(name, raising=False)
    work = ('--work-dir', tmp_path / 'work')
    refuses(match, 'test', config, weights, *work, *options)


@pytest.mark.parametrize(
    ('name', 'match'),
    [
        ('rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py', r'bbox_head\.mask_head'),
        ('solov2/solov2-light_r18_fpn_ms-3x_coco.py', r'model\.mask_head'),
        ('condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py', 'CondInst'),
        ('maskformer/maskformer_r50_ms-16xb1-75e_coco.py', 'panoptic_head'),
        ('rtmdet/rtmdet_tiny_8xb32-300e_coco.py', ''),
    ],
)
def test_augmentation_of_masks_is_refused(name: str, match: str) -> None:
    mmdet = pytest.importorskip('mmdet')
    test = load('test')
    root = Path(mmdet.__file__).parent / '.mim' / 'configs'
    cfg = Config.fromfile(root / name)
    cfg.tta_model = dict(type='mmdet.DetTTAModel')
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    if not match:
        test.check_tta(cfg, model)
        return
    with pytest.raises(test.SetupError, match=f'{match}.*Leave --tta out'):
        test.check_tta(cfg, model)
    cfg.tta_model.type = 'Mine'
    test.check_tta(cfg, model)


@pytest.mark.parametrize('own', [False, True])
@pytest.mark.parametrize('text', [DET, SEG], ids=['det', 'seg'])
def test_augmentation_is_that_of_the_config_or_a_flip(
    reaches: Callable[..., Config],
    weights: Path,
    tmp_path: Path,
    text: str,
    own: bool,
) -> None:
    config = write_config(write_data(tmp_path / 'data'), text)
    with config.open('a') as file:
        if text is DET:
            file.write('model["roi_head"]["mask_head"] = None\n')
        if own:
            file.write('tta_pipeline = [dict(type="MyAugmentation")]\n')
            file.write('tta_model = dict(type="MyModel", weight=2)\n')
    cfg = reaches('test', config, weights, '--tta', '--work-dir', tmp_path)
    host = 'DetTTAModel' if text is DET else 'SegTTAModel'
    assert cfg.model.type == ('MyModel' if own else host)
    kind = 'MaskRCNN' if text is DET else 'EncoderDecoder'
    assert cfg.model.module.type == kind
    last = cfg.test_dataloader.dataset.pipeline[-1]
    if own:
        assert last.type == 'MyAugmentation'
        assert cfg.model.weight == 2
    else:
        flips, (pack,) = last.transforms
        assert [flip.prob for flip in flips] == [0, 1]
        # The last of the transforms that the config had.
        assert pack.type.startswith('Pack')
        steps = [step.type for step in cfg.test_dataloader.dataset.pipeline]
        assert steps[0] == 'LoadImageFromFile'
        assert pack.type not in steps


def test_options_of_testing_reach_the_config(
    reaches: Callable[..., Config],
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv('DISPLAY', ':0')
    monkeypatch.chdir(tmp_path)
    url = 'https://host/w.pth'
    cfg = reaches(
        *('test', config, url, '--show', '--wait-time', '7'),
        *('--show-dir', 'seen', '--cfg-options', 'resume=True'),
    )
    # Its counters and its optimizer are of no interest here.
    assert (cfg.load_from, cfg.resume) == (url, False)
    assert cfg.work_dir == 'work_dirs/tiny'
    hook = cfg.default_hooks.visualization
    assert (hook.draw, hook.show, hook.wait_time) == (True, True, 7)
    # An absolute path: mmdet would put it into the work dir.
    assert hook.test_out_dir == str(tmp_path / 'seen')
    hook = reaches(
        *('test', config, url, '--show-dir', 'seen'),
    ).default_hooks.visualization
    assert (hook.draw, hook.get('show')) == (True, None)


@pytest.mark.parametrize(
    'hooks', ['None', 'dict(visualization=None)', 'dict(logger=None)']
)
def test_pictures_are_drawn_where_the_config_draws_none(
    reaches: Callable[..., Config], config: Path, tmp_path: Path, hooks: str
) -> None:
    with config.open('a') as file:
        file.write(f'default_hooks = {hooks}\nvisualizer = None\n')
    command = 'test', config, 'https://host/w.pth', '--work-dir', tmp_path
    cfg = reaches(*command, '--show-dir', tmp_path / 'seen')
    hook = cfg.default_hooks.visualization
    assert (hook.type, hook.draw) == ('DetVisualizationHook', True)
    assert hook.test_out_dir == str(tmp_path / 'seen')
    # The visualizer of mmengine would draw none.
    assert cfg.visualizer.type == 'DetLocalVisualizer'
    assert cfg.default_hooks.get('logger', 0) == (
        None if 'logger' in hooks else 0
    )


def write_pure(folder: Path) -> Path:
    """The detection config in pure Python: classes for types, no scope."""
    config = write_config(write_data(folder))
    text = config.read_text().replace("default_scope = 'mmdet'\n", '')
    for module, kind in (
        ('mmengine.optim', 'OptimWrapper'),
        ('mmdet.models', 'MaskRCNN'),
    ):
        assert f"type='{kind}'" in text
        text = text.replace(f"type='{kind}'", f'type={kind}')
        text = f'from {module} import {kind}\n{text}'
    text = f'from mmdet.models import DetTTAModel\n{text}'
    config.write_text(f'{text}\ntta_model = dict(type=DetTTAModel)\n')
    return config


def test_a_pure_python_config_is_understood(
    reaches: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    config = write_pure(tmp_path / 'data')
    work = ('--work-dir', tmp_path / 'work')
    cfg = reaches('train', config, *work, '--amp')
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.default_scope == 'mmdet'
    # The scope that a config names is the one of its other parts.
    scope = '--cfg-options', 'default_scope=mmengine'
    cfg = reaches('train', config, *work, *scope)
    assert cfg.default_scope == 'mmengine'
    command = 'test', config, 'https://host/w.pth', *work
    cfg = reaches(*command, '--show-dir', tmp_path / 'seen')
    assert cfg.default_hooks.visualization.type == 'DetVisualizationHook'


def test_augmentation_of_masks_in_a_pure_python_config(
    refuses: Script, weights: Path, tmp_path: Path
) -> None:
    config = write_pure(tmp_path / 'data')
    work = ('--work-dir', tmp_path / 'work')
    match = 'merges boxes, not masks.*MaskRCNN'
    refuses(match, 'test', config, weights, *work, '--tta')


def test_options_of_training_reach_the_config(
    reaches: Callable[..., Config],
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    options = ('auto_scale_lr.base_batch_size=16', 'work_dir=of_config')
    command = 'train', config, '--amp', '--auto-scale-lr', '--cfg-options'
    own = reaches(*command, options[0], 'optim_wrapper.loss_scale=512')
    assert own.optim_wrapper.loss_scale == 512
    cfg = reaches(
        *(*command, *options, 'default_hooks.checkpoint.max_keep_ckpts=1'),
    )
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
    assert cfg.auto_scale_lr == dict(base_batch_size=16, enable=True)
    assert cfg.work_dir == 'of_config'
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == 2
    assert not cfg.get('resume')
    # mmengine reads it, and without a launcher nothing else sets it.
    assert os.environ['LOCAL_RANK'] == '0'

    Path('mine').mkdir()
    save_run(Path('mine/iter_3.pth'), 3)
    work = ('--work-dir', 'mine')
    cfg = reaches('train', config, *work, '--cfg-options', *options)
    assert cfg.work_dir == 'mine'
    assert not cfg.get('resume')
    for resume in ((), ('mine/iter_3.pth',)):
        cfg = reaches('train', config, *work, '--resume', *resume)
        assert (cfg.load_from, cfg.resume) == ('mine/iter_3.pth', True)
        assert cfg.optim_wrapper.type == 'OptimWrapper'


def test_amp_replaces_no_wrapper_of_another_kind(
    refuses: Script, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    refuses(
        "config has 'ApexOptimWrapper'",
        *('train', config, '--amp', '--cfg-options'),
        'optim_wrapper.type=ApexOptimWrapper',
    )


def test_options_of_training(refuses: Script, config: Path) -> None:
    refuses('--amp needs a GPU', 'train', config, '--amp')
    refuses(
        r'needs auto_scale_lr\.base_batch_size',
        *('train', config, '--auto-scale-lr'),
    )
    refuses(
        r'needs auto_scale_lr\.base_batch_size',
        *('train', config, '--auto-scale-lr', '--cfg-options'),
        'auto_scale_lr=None',
    )
    refuses(
        r"runner_type='FlexibleRunner' .* and 4 make a step .*"
        r'Set auto_scale_lr\.base_batch_size=3, which is 12 / 4',
        *('train', config, '--auto-scale-lr', '--cfg-options'),
        *('runner_type=FlexibleRunner', 'auto_scale_lr.base_batch_size=12'),
        'optim_wrapper.accumulative_counts=4',
    )


def test_processes(
    refuses: Script, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = ('--work-dir', config.parent / 'work', '--launcher', 'pytorch')
    refuses(
        r'RANK, WORLD_SIZE, LOCAL_RANK is not set.*dist_train\.sh',
        *('train', config, *work),
    )
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    for name in ('WORLD_SIZE', 'LOCAL_WORLD_SIZE'):
        monkeypatch.setenv(name, '8')
    for name in ('RANK', 'LOCAL_RANK'):
        monkeypatch.setenv(name, '0')
    refuses(
        '8 processes on this machine need 8 GPUs, but torch sees 1',
        *('train', config, *work),
    )


@pytest.mark.parametrize(
    ('launcher', 'environment', 'wanted'),
    [
        # Two nodes of eight; what Slurm writes for a single task, nothing.
        ('slurm', dict(SLURM_NTASKS_PER_NODE='8(x2)'), 8),
        ('slurm', dict(SLURM_LOCALID='3'), 4),
        ('mpi', dict(OMPI_COMM_WORLD_LOCAL_SIZE='5'), 5),
    ],
)
def test_processes_of_this_machine_are_counted(
    monkeypatch: pytest.MonkeyPatch,
    launcher: str,
    environment: dict,
    wanted: int,
) -> None:
    launch = load('launch')
    monkeypatch.delenv('SLURM_NTASKS_PER_NODE', raising=False)
    for names in (launch.ENVIRONMENT['slurm'], launch.ENVIRONMENT['mpi']):
        for name, value in zip(names, '0G0', strict=True):
            monkeypatch.setenv(name, value.replace('G', '16'))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: wanted - 1)
    with pytest.raises(launch.SetupError, match=f'{wanted} processes on this'):
        launch.set_up_processes(Config(dict(launcher=launcher)))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: wanted)
    cfg = Config(dict(launcher=launcher))
    launch.set_up_processes(cfg)
    # With GPUs, the rest is mmengine's.
    assert not torch.distributed.is_initialized()
    assert 'model_wrapper_cfg' not in cfg


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list:
    """Record the arguments of init_process_group instead of calling it."""
    calls = []
    monkeypatch.setattr(
        torch.distributed,
        'init_process_group',
        lambda *args, **kwargs: calls.append((args, kwargs)),
    )
    return calls


def test_without_gpu_the_processes_of_slurm_talk_over_gloo(
    monkeypatch: pytest.MonkeyPatch, groups: list
) -> None:
    launch = load('launch')
    for name, value in zip(launch.ENVIRONMENT['slurm'], '231', strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('SLURM_NODELIST', 'node[7-8]')

    def run(command: list[str], **_: object) -> SimpleNamespace:
        assert command == ['scontrol', 'show', 'hostnames', 'node[7-8]']
        return SimpleNamespace(stdout='node7\nnode8\n')

    monkeypatch.setattr(launch.subprocess, 'run', run)
    cfg = Config(dict(launcher='slurm', find_unused_parameters=True))
    with monkeypatch.context() as user:
        user.setenv('MASTER_ADDR', '10.9.8.7')
        launch.set_up_processes(cfg.copy())
        assert os.environ['MASTER_ADDR'] == '10.9.8.7'
    groups.clear()
    launch.set_up_processes(cfg)
    names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
    found = [os.environ[name] for name in names]
    assert found == ['2', '3', '1', 'node7', '29500']
    assert groups == [(('gloo',), dict(timeout=timedelta(seconds=1800)))]
    assert cfg.model_wrapper_cfg == dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=True,
        device_ids=None,
    )


def test_wrapper_address_and_timeout_of_the_user_stay(
    monkeypatch: pytest.MonkeyPatch,
    groups: list,
    capsys: pytest.CaptureFixture,
) -> None:
    launch = load('launch')
    for name, value in zip(launch.ENVIRONMENT['pytorch'], '120', strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('MASTER_ADDR', '10.9.8.7')
    monkeypatch.setenv('MASTER_PORT', '1234')
    cfg = Config(
        dict(
            launcher='pytorch',
            model_wrapper_cfg=dict(type='Mine', device_ids=[3]),
            env_cfg=dict(dist_cfg=dict(timeout=9)),
        )
    )
    launch.set_up_processes(cfg)
    assert cfg.model_wrapper_cfg == dict(type='Mine', device_ids=None)
    assert groups == [(('gloo',), dict(timeout=timedelta(seconds=9)))]
    assert os.environ['MASTER_ADDR'] == '10.9.8.7'
    assert os.environ['MASTER_PORT'] == '1234'
    # Only the first process speaks.
    assert not capsys.readouterr().out


def test_local_rank_as_older_launchers_pass_it(
    reaches: Callable[..., Config], config: Path
) -> None:
    work = ('--work-dir', config.parent / 'work')
    reaches('train', config, *work, '--local_rank=3')
    assert os.environ['LOCAL_RANK'] == '3'
    reaches('train', config, *work, '--local-rank', '4')
    assert os.environ['LOCAL_RANK'] == '3'


def test_a_runner_of_the_config_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch = load('launch')
    builder = SimpleNamespace(build=lambda cfg: cfg.runner_type)
    monkeypatch.setattr(launch, 'RUNNERS', builder)
    assert launch.build_runner(Config(dict(runner_type='Mine'))) == 'Mine'


def test_results_are_gathered_in_the_work_dir_unless_it_is_said(
    tmp_path: Path,
) -> None:
    metrics = [
        DumpResults('a.pkl'),
        DumpResults('b.pkl', collect_device='cpu', collect_dir='mine'),
        DumpResults('c.pkl', collect_device='gpu'),
    ]
    loop = SimpleNamespace(evaluator=Evaluator(metrics))
    runner = SimpleNamespace(val_loop=loop, log_dir=str(tmp_path))
    load('launch').gather_in_work_dir(runner, 'val')
    found = [metric.collect_dir for metric in metrics]
    assert found == [str(tmp_path / 'collect'), 'mine', None]


def test_an_error_that_no_user_can_fix_keeps_its_traceback(
    capfd: pytest.CaptureFixture,
) -> None:
    launch = load('launch')
    with pytest.raises(ValueError, match='invalid literal'):
        launch.run(lambda: int('x'))

    def broken() -> None:
        raise BrokenPipeError('of a worker')

    with pytest.raises(BrokenPipeError, match='of a worker'):
        launch.run(broken)
    assert not capfd.readouterr().err
    with pytest.raises(SystemExit, match='1'):
        launch.run(lambda: BCN(4, momentum=2))
    assert capfd.readouterr().err.startswith('error: momentum')


@pytest.mark.parametrize('local', ['LOCAL_RANK', 'SLURM_LOCALID'])
def test_other_processes_wait_for_the_message_of_the_first(
    monkeypatch: pytest.MonkeyPatch, local: str
) -> None:
    launch = load('launch')
    waited = []
    monkeypatch.setattr(launch.time, 'sleep', waited.append)

    def fail() -> None:
        raise launch.SetupError('of the test')

    for rank, expected in (('0', []), ('1', [30])):
        monkeypatch.setenv(local, rank)
        with pytest.raises(SystemExit, match='1'):
            launch.run(fail)
        assert waited == expected
