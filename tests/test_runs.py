"""Runs that die: killed, out of disk, without one of their processes."""

import contextlib
import errno
import importlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import Forks
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.runner.priority import get_priority
from tiny_runs import DET, ROOT, SEG, write_config, write_data
from torch.utils.data import BatchSampler, DataLoader

from ws_mm import ExactResumeHook

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
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=4)
]
"""


@pytest.fixture(scope='module')
def forks() -> Iterator[Forks]:
    """The scripts of tools/ in processes that start at once."""
    forks = Forks()
    yield forks
    forks.stop()


@pytest.fixture
def seg(tmp_path: Path) -> Path:
    """Config of a tiny segmentation that saves every iteration."""
    return write_config(write_data(tmp_path / 'data'), SEG)


def tool(name: str) -> object:
    """A module of tools/."""
    with contextlib.ExitStack() as stack:
        sys.path.insert(0, str(ROOT / 'tools'))
        stack.callback(sys.path.remove, str(ROOT / 'tools'))
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


class Samples(torch.utils.data.Dataset):
    """Samples that are what the generators draw."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple:
        assert type(index) is int
        drawn = random.random(), np.random.rand(), torch.rand(()).item()
        return (index, *drawn)


def hooked(
    sampler: object, workers: int = 0, epoch: int = 0
) -> tuple[ExactResumeHook, SimpleNamespace]:
    """The hook after the start of a run."""
    loader = DataLoader(
        Samples(),
        batch_sampler=BatchSampler(sampler, 2, drop_last=False),
        num_workers=workers,
        collate_fn=list,
        persistent_workers=workers > 0,
    )
    runner = SimpleNamespace(
        train_loop=SimpleNamespace(dataloader=loader),
        seed=3,
        epoch=epoch,
        iter=0,
    )
    hook = ExactResumeHook()
    hook.before_train(runner)
    return hook, runner


def epochs(workers: int, begin: int, end: int) -> list[list]:
    """The batches of some epochs."""
    sampler = DefaultSampler(Samples(), seed=0)
    hook, runner = hooked(sampler, workers)
    batches = []
    for runner.epoch in range(begin, end):
        hook.before_train_epoch(runner)
        sampler.set_epoch(runner.epoch)
        batches.append(list(runner.train_loop.dataloader))
    return batches


def test_a_sample_draws_the_same_whoever_loads_it_and_since_when() -> None:
    unbroken = epochs(0, 0, 2)
    assert epochs(2, 0, 2) == unbroken
    assert epochs(2, 1, 2) == unbroken[1:]
    drawn = [
        sample[1:] for epoch in unbroken for batch in epoch for sample in batch
    ]
    # 12 samples of three generators: no number comes twice.
    assert len({number for sample in drawn for number in sample}) == 36


def test_a_skipped_sampler_goes_on_with_the_numbers_it_is_at() -> None:
    def batches(skipped: int) -> list:
        hook, runner = hooked(InfiniteSampler(Samples(), seed=0))
        loader = runner.train_loop.dataloader
        hook.before_train_epoch(runner)
        if skipped:
            # As mmengine does it, in batches of two.
            loader.batch_sampler.sampler.skip(2 * skipped)
        return [batch for batch, _ in zip(loader, range(8), strict=False)]

    assert batches(3)[:5] == batches(0)[3:]


def test_samples_of_each_rank_and_seed_differ() -> None:
    resume = importlib.import_module('ws_mm.resume')
    index = resume.Numbered(4)
    index.place = (0, 1)
    drawn = {
        resume.SeededSamples(Samples(), seed, rank)([index])[0]
        for seed in (0, 1)
        for rank in (0, 1)
    }
    assert len(drawn) == 4


def test_an_iteration_draws_by_its_number() -> None:
    hook, runner = hooked(DefaultSampler(Samples(), seed=0))
    drawn = []
    for runner.iter in (5, 6, 5):
        hook.before_train_iter(runner, 0)
        drawn.append((random.random(), np.random.rand(), torch.rand(())))
    assert drawn[0] == drawn[2]
    assert all(a != b for a, b in zip(*drawn[:2], strict=True))
    # Before other hooks, which may draw, too.
    assert get_priority(hook.priority) < get_priority('HIGH')


def test_samplers_of_samplers_and_none_are_left_alone() -> None:
    class Pairs:
        def __iter__(self) -> Iterator[tuple[int, int]]:
            yield from ((0, 1), (2, 3))

    class Tuples(Samples):
        def __getitem__(self, index: tuple) -> tuple:
            return index

    _, runner = hooked(Pairs())
    loader = runner.train_loop.dataloader
    loader.dataset.__getitems__.dataset = Tuples()
    assert list(loader) == [[(0, 1), (2, 3)]]
    runner.train_loop.dataloader = DataLoader(Samples(), batch_size=None)
    hook = ExactResumeHook()
    hook.before_train(runner)
    hook.before_train_epoch(runner)


def test_training_adds_the_hook_once() -> None:
    train = tool('train')
    cfg = Config(dict(custom_hooks=[dict(type='EMAHook')]))
    for _ in range(2):
        train.resume_exactly(cfg)
        assert [hook['type'] for hook in cfg.custom_hooks] == [
            'EMAHook',
            'ws_mm.ExactResumeHook',
        ]
    cfg = Config(dict())
    train.resume_exactly(cfg)
    assert cfg.custom_hooks == [dict(type='ws_mm.ExactResumeHook')]


@pytest.mark.parametrize(
    ('asked', 'warns'), [(None, False), (7, False), (8, True)]
)
def test_a_resumed_run_keeps_the_seed_that_it_began_with(
    asked: int | None,
    warns: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    train = tool('train')
    path = tmp_path / 'iter_1.pth'
    content = dict(state_dict={'a': torch.zeros(1)}, meta=dict(seed=7, iter=1))
    torch.save(content, path)
    cfg = Config(dict(work_dir=str(tmp_path)))
    if asked is not None:
        cfg.randomness = dict(seed=asked, deterministic=True)
    train.apply_resume(cfg, str(path))
    assert cfg.randomness.seed == 7
    assert cfg.randomness.get('deterministic', asked is None)
    said = capsys.readouterr().out
    assert ('randomness.seed=8 is ignored: the run began with 7' in said) == (
        warns
    )


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
    until = time.monotonic() + 120
    while not path.exists():
        assert alive(), f'it ended without {path}'
        assert time.monotonic() < until
        time.sleep(0.02)


def assert_whole(work_dir: Path) -> int:
    """The last checkpoint is named and whole: its iteration."""
    named = Path((work_dir / 'last_checkpoint').read_text())
    newest, broken = tool('checks').newest_checkpoint(work_dir)
    assert broken == []
    # A kill between renaming a checkpoint and naming it is no harm.
    steps = [int(Path(p).stem.split('_')[1]) for p in (named, newest)]
    assert 0 <= steps[1] - steps[0] <= 1
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
    assert run.wait(60) != 0
    assert processes_with(str(work_dir)) == []
    said = (tmp_path / 'log').read_text()
    assert 'Signal 9 (SIGKILL)' in said
    assert assert_whole(work_dir) >= 3


def test_a_rank_that_hangs_ends_the_others_within_the_timeout(
    forks: Forks, seg: Path, tmp_path: Path
) -> None:
    work_dir = tmp_path / 'run'
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = str(server.getsockname()[1])
    ranks = [
        forks.start(
            'train',
            *(seg, '--work-dir', work_dir, '--launcher', 'pytorch'),
            *('--cfg-options', 'train_cfg.max_iters=100000'),
            'env_cfg.dist_cfg.timeout=5',
            log=tmp_path / f'log {rank}',
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE='2',
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=port,
        )
        for rank in range(2)
    ]
    wait_for(work_dir / 'iter_2.pth', lambda: forks.poll(ranks[0]) is None)
    os.kill(ranks[1], signal.SIGSTOP)
    # Far below the default of half an hour, far above what it takes.
    assert forks.wait(ranks[0], 60) == 1
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
            f'{work_dir}/iter_2.pth is whole. Mend the cause, then add '
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


@pytest.mark.parametrize(
    'code', [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EIO]
)
def test_a_write_that_fails_halfway_leaves_nothing(
    code: int, tmp_path: Path
) -> None:
    train = tool('train')

    def save(out_dir: str, filename: str) -> None:
        (Path(out_dir) / filename).write_bytes(b'half')
        raise OSError(code, os.strerror(code))

    runner = SimpleNamespace(save_checkpoint=save)
    train.save_atomically(runner)
    with pytest.raises(OSError, match=os.strerror(code)) as raised:
        runner.save_checkpoint(str(tmp_path), 'iter_1.pth')
    assert not list(tmp_path.iterdir())
    cfg = Config(dict(work_dir=str(tmp_path)))
    said = str(train.unwritable(cfg, raised.value))
    assert said == (
        f'Training stopped: {tmp_path}/iter_1.pth could not be written '
        f'({os.strerror(code)}). There is no checkpoint yet. Mend the cause '
        'and start again.'
    )


def test_other_errors_are_not_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train = tool('train')
    missing = FileNotFoundError(errno.ENOENT, 'gone', 'a.png')
    cfg = Config(dict(work_dir=str(tmp_path), launcher='none'))
    assert train.unwritable(cfg, missing) is None
    lost = RuntimeError('Connection closed by peer')
    train.say_who_was_lost(cfg, lost)
    cfg.launcher = 'pytorch'
    train.say_who_was_lost(cfg, RuntimeError('shapes do not match'))
    assert capsys.readouterr().err == ''
    train.say_who_was_lost(cfg, lost)
    assert 'There is no checkpoint yet.' in capsys.readouterr().err


def test_a_hundred_images_one_by_one(forks: Forks, tmp_path: Path) -> None:
    code, said = forks.call(
        'soak',
        *('--iterations', 100, '--out', tmp_path / 'out.json'),
        log=tmp_path / 'log',
    )
    result = json.loads(said.splitlines()[-1])
    assert result == json.loads((tmp_path / 'out.json').read_text())
    assert result['iterations'] == 100
    assert result['autocast'] == 'bfloat16'
    # All layers with estimates have them, and the mask head saw no RoI.
    assert result['buffers'] > 40
    assert result['iterations_without_rois'] >= 10
    # So few iterations on a busy machine say nothing of the speed.
    assert [line for line in result['failures'] if 'ms rose' not in line] == []
    assert code == bool(result['failures'])


def test_the_soak_fails_where_a_condition_does() -> None:
    failures = tool('soak').failures
    fine = dict(mib=[100.0, 101.0], ms=[10.0, 11.0])
    assert failures(fine, []) == []
    assert 'not finite: a' in failures(fine, ['a'])
    assert 'mib rose from' in failures({**fine, 'mib': [9.0, 99.0]}, [])[0]
    assert 'ms rose from' in failures({**fine, 'ms': [10.0, 12.0]}, [])[0]
