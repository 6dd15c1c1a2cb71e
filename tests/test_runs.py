"""Runs that die: killed, out of disk, without one of their processes."""

import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forks import Forks
from mmengine.config import Config
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from tiny_runs import DET, ROOT, SEG, write_config, write_data

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

# What draws random numbers in the loading, the model and the validation.
AUGMENT = """
for step in ('RandomFlip', 'PhotoMetricDistortion'):
    train_dataloader['dataset']['pipeline'].insert(
        -1, dict(type=step, **(dict(prob=0.5) if step[0] == 'R' else {}))
    )
val_dataloader, val_evaluator = test_dataloader, test_evaluator
val_cfg = dict(type='ValLoop')
"""
ITERATIONS = """
train_cfg.update(max_iters=6, val_interval=3)
train_dataloader.update(num_workers=2, persistent_workers=True)
model['decode_head']['dropout_ratio'] = 0.1
default_hooks['checkpoint'].update(interval=2, max_keep_ckpts=1)
param_scheduler = [dict(type='PolyLR', by_epoch=False, begin=0, end=6)]
"""
EPOCHS = """
train_cfg.update(max_epochs=2, val_interval=1)
train_dataloader['batch_sampler'] = dict(type='AspectRatioBatchSampler')
custom_hooks = [dict(type='ws_mm.UpdateEstimatesHook', num_batches=2)]
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=4)
]
"""


@pytest.fixture
def seg(tmp_path: Path) -> Path:
    """Config of a tiny segmentation that saves every iteration."""
    return write_config(write_data(tmp_path / 'data'), SEG)


def tool(name: str) -> object:
    """A module of tools/."""
    return importlib.import_module(name)


@pytest.mark.parametrize(
    ('text', 'extra', 'kills'),
    [(SEG, ITERATIONS, 2), (DET, EPOCHS, 3)],
    ids=['iterations, two workers', 'epochs, no worker'],
)
def test_a_killed_run_ends_in_the_same_bits(
    forks: Forks, text: str, extra: str, kills: int, tmp_path: Path
) -> None:
    data = write_data(tmp_path / 'data', images=3)
    config = write_config(data, text, AUGMENT + extra)
    code, said = forks.call(
        'kill_and_resume',
        *(config, tmp_path / 'runs', '--kills', kills),
        log=tmp_path / 'log',
    )
    assert code == 0, said
    result = json.loads(said.splitlines()[-1])
    assert result['kills'] == kills
    assert result['of_these_in_the_midst_of_a_save'] > 0
    assert result['resumed_from']
    assert result['logged_iterations'] == 6
    assert result['differences'] == []
    assert result['left_behind'] == result['processes_left'] == []


@pytest.mark.usefixtures('process')
def test_training_may_leave_the_hook_out(
    monkeypatch: pytest.MonkeyPatch, seg: Path
) -> None:
    train = tool('train')
    # What main() passes on to the Runner.
    seen: list[Config] = []
    monkeypatch.setattr(
        train.launch, 'build_runner', lambda cfg: seen.append(cfg) or 1 / 0
    )
    work_dir = ['--work-dir', str(seg.parent / 'run')]
    for options in ([], ['--no-exact-resume']):
        monkeypatch.setattr(
            'sys.argv', ['train', str(seg), *work_dir, *options]
        )
        with pytest.raises(ZeroDivisionError):
            train.main()
    with_hook, without = (str(cfg.custom_hooks) for cfg in seen)
    assert 'ExactResumeHook' in with_hook
    assert 'ExactResumeHook' not in without


def saved(path: Path) -> dict:
    """A checkpoint that these tests wrote."""
    return torch.load(path, weights_only=False)


def test_another_run_of_the_work_dir_is_not_continued(
    forks: Forks, seg: Path, tmp_path: Path
) -> None:
    work_dir = tmp_path / 'run'
    other = seg.with_name('other.py')
    other.write_text(seg.read_text())

    def train(config: Path, iterations: int, *options: str) -> str:
        code, said = forks.call(
            'train',
            *(config, '--work-dir', work_dir, *options, '--cfg-options'),
            f'train_cfg.max_iters={iterations}',
            log=tmp_path / 'log',
        )
        assert code == 0, said
        return said

    train(other, 3)
    left = saved(work_dir / 'iter_3.pth')['meta']['time']
    while time.strftime('%Y%m%d_%H%M%S') == left:
        time.sleep(0.05)
    train(seg, 1)
    # Without the name and with it, which a kill may leave empty.
    (work_dir / 'last_checkpoint').write_text('')
    said = train(seg, 2, '--resume')
    assert f'Resuming from {work_dir}/iter_1.pth.' in said
    assert 'resumed epoch: 0, iter: 1' in said
    assert 'was saved by' not in said
    # A moved work dir, and an older checkpoint that was copied back.
    (work_dir / 'last_checkpoint').write_text('/elsewhere/iter_1.pth')
    said = train(other, 2, '--resume')
    assert f'Resuming from {work_dir}/iter_1.pth.' in said
    assert 'The checkpoint was saved by tiny, and this is other' in said


def test_a_resumed_run_of_another_batch_is_said(
    forks: Forks, seg: Path, tmp_path: Path
) -> None:
    def train(iterations: int, *options: str) -> str:
        code, said = forks.call(
            'train',
            *(seg, '--work-dir', tmp_path / 'run', '--resume'),
            *('--no-exact-resume', '--cfg-options'),
            *(f'train_cfg.max_iters={iterations}', *options),
            log=tmp_path / 'log',
        )
        assert code == 0, said
        return said

    train(1, 'optim_wrapper.accumulative_counts=2')
    path = tmp_path / 'run' / 'iter_1.pth'
    assert saved(path)['meta']['batch'] == {
        'train_dataloader.batch_size': 1,
        'optim_wrapper.accumulative_counts': 2,
        'the number of processes': 1,
    }
    said = train(2, 'optim_wrapper.accumulative_counts=2')
    assert 'another batch' not in said
    # As if two processes had written it.
    content = saved(tmp_path / 'run' / 'iter_2.pth')
    content['meta']['batch']['the number of processes'] = 2
    torch.save(content, tmp_path / 'run' / 'iter_2.pth')
    said = train(3, 'train_dataloader.batch_size=2')
    assert (
        'another batch: train_dataloader.batch_size was 1 and is 2; '
        'optim_wrapper.accumulative_counts was 2 and is 1; the number of '
        'processes was 2 and is 1.'
    ) in said
    assert 'saved by' not in said


def test_each_of_several_optimizers_is_scaled_by_its_own_step(
    tmp_path: Path,
) -> None:
    runner = Runner(
        torch.nn.Linear(1, 1),
        str(tmp_path),
        train_dataloader=dict(
            dataset=[0],
            batch_size=2,
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=False, max_iters=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1.0)),
        experiment_name=tmp_path.name,
    )
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    wrappers = OptimWrapperDict(
        **{
            str(counts): OptimWrapper(
                torch.optim.SGD([parameter], lr=0.3),
                accumulative_counts=counts,
            )
            for counts, parameter in zip((1, 5), parameters, strict=True)
        }
    )
    tool('train').scale_lr_by_step(runner)
    runner.scale_lr(wrappers, dict(base_batch_size=4, enable=False))
    runner.scale_lr(wrappers)
    assert wrappers.get_lr() == {'1.lr': [0.3], '5.lr': [0.3]}
    runner.scale_lr(wrappers, dict(base_batch_size=4, enable=True))
    scaled = wrappers.get_lr()
    assert scaled['1.lr'] == pytest.approx([0.3 * 2 / 4], rel=1e-12)
    assert scaled['5.lr'] == pytest.approx([0.3 * 2 * 5 / 4], rel=1e-12)


@pytest.mark.parametrize('enable', ['--auto-scale-lr', 'in the config'])
def test_the_learning_rate_follows_the_images_of_a_step(
    enable: str, forks: Forks, seg: Path, tmp_path: Path
) -> None:
    options = [
        *('train_cfg.max_iters=1', 'train_dataloader.batch_size=2'),
        *('optim_wrapper.accumulative_counts=3', 'auto_scale_lr.enable=True'),
        'auto_scale_lr.base_batch_size=16',
    ]
    flag = [enable] if enable.startswith('--') else []
    if flag:
        options.remove('auto_scale_lr.enable=True')
    code, said = forks.call(
        'train',
        *(seg, '--work-dir', tmp_path / 'run', *flag),
        *('--cfg-options', *options),
        log=tmp_path / 'log',
    )
    assert code == 0, said
    content = saved(tmp_path / 'run' / 'iter_1.pth')
    (group,) = content['optimizer']['param_groups']
    assert group['lr'] == pytest.approx(0.01 * 2 * 3 / 16, rel=1e-12)
    # The config stays as it is, so that it may be used again.
    assert re.search('base_batch_size=16', content['meta']['cfg'])


def processes_with(word: str) -> list[str]:
    """Command lines in which a word is."""
    found = []
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b'\0', b' ').decode()
            if word in line:
                found.append(line)
    return found


def wait_for(path: Path, alive: object) -> None:
    """Wait until a file appears; fail if what writes it has ended."""
    until = time.monotonic() + 600
    while not path.exists():
        assert alive(), f'it ended without {path}'
        assert time.monotonic() < until
        time.sleep(0.02)


def assert_whole(work_dir: Path, killed: bool = False) -> int:
    """The last checkpoint is named and whole: its iteration.

    Args:
        work_dir: of the run.
        killed: its first rank got a signal, which may have come while it
            wrote a checkpoint or between opening and writing last_checkpoint.
    """
    named = (work_dir / 'last_checkpoint').read_text()
    newest, broken = tool('support.checkpoints').newest_checkpoint(work_dir)
    assert broken == []
    if named or not killed:
        # A kill between renaming a checkpoint and naming it is no harm.
        steps = [int(Path(p).stem.split('_')[1]) for p in (named, newest)]
        assert 0 <= steps[1] - steps[0] <= 1
    if not killed:
        assert not list(work_dir.glob('*.part'))
    return torch.load(newest, weights_only=False)['meta']['iter']


@pytest.mark.skipif(
    not Path('/proc/self/environ').exists(), reason='finds ranks in /proc'
)
def test_a_rank_that_is_killed_ends_the_run(seg: Path, tmp_path: Path) -> None:
    work_dir = tmp_path / 'run'
    with (tmp_path / 'log').open('w') as log:
        run = subprocess.Popen(
            [
                *('bash', str(ROOT / 'tools/dist_train.sh'), str(seg), '2'),
                *('--work-dir', str(work_dir), '--cfg-options'),
                'train_cfg.max_iters=100000',
            ],
            env=os.environ
            | {
                'OMP_NUM_THREADS': '1',
                'CUDA_VISIBLE_DEVICES': '',
                'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
            },
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    wait_for(work_dir / 'iter_3.pth', lambda: run.poll() is None)
    ranks = {}
    for path in Path('/proc').glob('[0-9]*/environ'):
        with contextlib.suppress(OSError):
            text = path.read_bytes().split(b'\0')
            command = (path.parent / 'cmdline').read_bytes()
            if str(work_dir).encode() in command and b'RANK=1' in text:
                ranks[int(path.parent.name)] = command
    assert len(ranks) == 1
    os.kill(next(iter(ranks)), signal.SIGKILL)
    assert run.wait(300) != 0
    assert processes_with(str(work_dir)) == []
    said = (tmp_path / 'log').read_text()
    assert 'Signal 9 (SIGKILL)' in said
    # torchrun ends rank 0 at any moment.
    assert assert_whole(work_dir, killed=True) >= 3


def test_a_rank_that_hangs_ends_the_others_within_the_timeout(
    forks: Forks, seg: Path, tmp_path: Path
) -> None:
    work_dir = tmp_path / 'run'
    options = ('--cfg-options', 'train_cfg.max_iters=100000')
    ranks = forks.start_ranks(
        *('train', seg, '--work-dir', work_dir, *options),
        'env_cfg.dist_cfg.timeout=15',
        logs=tmp_path,
    )
    wait_for(work_dir / 'iter_2.pth', lambda: forks.poll(ranks[0]) is None)
    os.kill(ranks[1], signal.SIGSTOP)
    # Far below the default of half an hour, far above what it takes.
    assert forks.wait(ranks[0], 300) == 1
    os.kill(ranks[1], signal.SIGKILL)
    assert forks.wait(ranks[1]) == -signal.SIGKILL
    said = (tmp_path / 'log 0').read_text()
    assert 'error: rank 0 waited for another process, which died or' in said
    assert 'within env_cfg.dist_cfg.timeout seconds' in said
    assert re.search(r'iter_\d+\.pth is whole: add --resume', said)
    assert 'RuntimeError' in said
    assert assert_whole(work_dir) >= 2


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of its own, in memory.

    Args:
        folder: where it is mounted.
        size: in bytes.
    """
    folder.mkdir(parents=True)
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'test', folder]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
        reason = done.stderr.strip() if done.returncode else ''
    except FileNotFoundError as error:
        reason = str(error)
    if reason:
        pytest.skip(f'no disk of a given size without root: {reason}')
    try:
        yield
    finally:
        subprocess.run(['umount', '-l', folder], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint(
    forks: Forks, seg: Path, tmp_path: Path
) -> None:
    sizes = tmp_path / 'sizes'
    log = tmp_path / 'log'
    code, said = forks.call('train', seg, '--work-dir', sizes, log=log)
    assert code == 0, said
    bytes_of_two = sum(path.stat().st_size for path in sizes.glob('*.pth'))
    work_dir = tmp_path / 'disk' / 'run'
    more = ('--cfg-options', 'train_cfg.max_iters=5')
    with small_disk(tmp_path / 'disk', bytes_of_two * 5 // 4):
        code, said = forks.call(
            'train', seg, '--work-dir', work_dir, *more, log=tmp_path / 'full'
        )
        assert code == 1, said
        assert (
            f'error: Training stopped: {work_dir}/iter_3.pth could not be '
            'written (No space left on device). '
            f'{work_dir}/iter_2.pth is whole. Fix the cause, then add '
            '--resume to the command'
        ) in said
        assert 'Traceback' not in said.split('error: Training')[1]
        assert {path.name for path in work_dir.glob('*.pth*')} == {
            'iter_1.pth',
            'iter_2.pth',
        }
        assert assert_whole(work_dir) == 2
        # What the message says works.
        (work_dir / 'iter_1.pth').unlink()
        code, said = forks.call(
            'train',
            *(seg, '--work-dir', work_dir, '--resume', '--cfg-options'),
            'train_cfg.max_iters=3',
            log=tmp_path / 'again',
        )
        assert code == 0, said
        assert 'resumed epoch: 0, iter: 2' in said
        assert assert_whole(work_dir) == 3


def test_a_read_only_work_dir_is_refused_before_training(
    forks: Forks, seg: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / 'disk', 1 << 20):
        subprocess.run(
            ['mount', '-o', 'remount,ro', tmp_path / 'disk'], check=True
        )
        code, said = forks.call(
            'train',
            *(seg, '--work-dir', tmp_path / 'disk'),
            log=tmp_path / 'log',
        )
    assert code == 1
    assert said.startswith(
        f'error: --work-dir {tmp_path}/disk is not writable '
        '(Read-only file system). Give another folder with --work-dir.'
    )
    assert said.count('\n') == 1


def test_a_hundred_images_one_by_one(forks: Forks, tmp_path: Path) -> None:
    code, said = forks.call('soak', '--iterations', 100, log=tmp_path / 'log')
    result = json.loads(said.splitlines()[-1])
    assert result['iterations'] == 100
    assert result['autocast'] == 'bfloat16'
    # All layers with estimates have them, and the mask head saw no RoI.
    assert result['buffers'] > 40
    assert result['iterations_without_rois'] >= 10
    # So few iterations on a busy machine say nothing of the speed, nor of
    # the memory: pages of files count, which the machine may take and reload.
    assert [
        line
        for line in result['failures']
        if not line.startswith(('ms rose', 'mib rose'))
    ] == []
    assert code == bool(result['failures'])


def test_the_soak_fails_where_a_condition_does() -> None:
    failures = tool('proofs.soak').failures
    fine = dict(mib=[100.0, 101.0], ms=[10.0, 11.0])
    assert failures(fine, []) == []
    assert 'not finite: a' in failures(fine, ['a'])
    assert 'mib rose from' in failures({**fine, 'mib': [9.0, 99.0]}, [])[0]
    assert 'ms rose from' in failures({**fine, 'ms': [10.0, 12.0]}, [])[0]
