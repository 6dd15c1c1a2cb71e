"""Whole checkpoints and exact resume, without a training."""

import copy
import errno
import importlib
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from in_process import load, save_run, tools  # noqa: F401
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.fileio import FileClient
from mmengine.fileio.backends import LocalBackend, registry_utils
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner, loops
from mmengine.runner.priority import get_priority
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ws_mm import ExactResumeHook

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')


def test_newest_checkpoint_goes_by_name_then_time_and_can_be_continued(
    tmp_path: Path,
) -> None:
    newest = load('checkpoints').newest_checkpoint
    assert newest(str(tmp_path)) == (None, [])
    save_run(tmp_path / 'iter_10.pth', 10)
    save_run(tmp_path / 'iter_9.pth', 9)
    # save_best leaves out the optimizer; weights were put there by hand.
    save_run(tmp_path / 'best_iter_12.pth', 12, optimizer=None)
    torch.save({'state_dict': {'a': torch.ones(1)}}, tmp_path / 'w.pth')
    # Other tools leave out parts that continuing needs.
    save_run(tmp_path / 'no_hub.pth', 13, message_hub=None)
    save_run(tmp_path / 'no_iter.pth', 14, meta=dict(epoch=9))
    assert newest(str(tmp_path)) == (str(tmp_path / 'iter_10.pth'), [])
    assert newest(str(tmp_path), with_optimizer=False) == (
        str(tmp_path / 'best_iter_12.pth'),
        [],
    )
    save_run(tmp_path / 'iter_11.pth', 11)
    os.truncate(tmp_path / 'iter_11.pth', 100)
    path, broken = newest(str(tmp_path))
    assert path == str(tmp_path / 'iter_10.pth')
    assert len(broken) == 1
    assert 'iter_11.pth is truncated' in broken[0]
    (tmp_path / 'iter_11.pth').unlink()
    # An earlier run went further.
    for iteration, day in (
        (20, '0101'),
        (7, '0103'),
        (8, '0103'),
        (9, '0102'),
    ):
        meta = dict(iter=iteration, epoch=0, time=f'2026{day}_000000')
        save_run(tmp_path / f'iter_{iteration}.pth', iteration, meta=meta)
    assert newest(str(tmp_path))[0] == str(tmp_path / 'iter_8.pth')
    last = tmp_path / 'last_checkpoint'
    for name, found in (
        ('/moved/since/iter_9.pth', 'iter_9.pth'),
        ('iter_11.pth', 'iter_8.pth'),  # is gone
        ('w.pth', 'iter_8.pth'),  # cannot be continued
        ('', 'iter_8.pth'),
    ):
        last.write_text(name)
        assert newest(str(tmp_path))[0] == str(tmp_path / found)
    # The hook writes it into the work dir and saves elsewhere.
    (tmp_path / 'work').mkdir()
    last.rename(tmp_path / 'work' / 'last_checkpoint').write_text('iter_9.pth')
    assert newest(str(tmp_path), work_dir=str(tmp_path / 'work'))[0] == str(
        tmp_path / 'iter_9.pth'
    )


@pytest.mark.parametrize('named', ['', 'iter_4.pth'])
def test_the_end_of_a_killed_run_is_its_newest_checkpoint(
    tmp_path: Path, named: str
) -> None:
    # Killed while last_checkpoint was opened, after the last iteration.
    kill_and_resume = importlib.import_module('proofs.kill_and_resume')
    for iteration in (2, 4):
        state = {'weight': torch.full((1,), float(iteration))}
        save_run(
            tmp_path / f'iter_{iteration}.pth', iteration, state_dict=state
        )
    (tmp_path / 'last_checkpoint').write_text(named)
    assert kill_and_resume.final(tmp_path)['state_dict']['weight'] == 4


def test_resume_from_nothing_keeps_load_from(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    resuming = load('resuming')
    cfg = Config(dict(work_dir=str(tmp_path), load_from='start.pth'))
    resuming.apply_resume(cfg, 'auto')
    assert not cfg.resume
    assert cfg.load_from == 'start.pth'
    assert 'training starts from scratch' in capsys.readouterr().out


def test_resume_looks_where_the_hook_saves(tmp_path: Path) -> None:
    resuming = load('resuming')
    hook = dict(checkpoint=dict(out_dir=str(tmp_path / 'elsewhere')))
    cfg = Config(
        dict(work_dir=f'{tmp_path}/run/', default_hooks=hook, resume=True)
    )
    (tmp_path / 'elsewhere' / 'run').mkdir(parents=True)
    saved = tmp_path / 'elsewhere' / 'run' / 'iter_3.pth'
    save_run(saved, 3)
    # An earlier run left another; mmengine notes the last in the work dir.
    save_run(saved.with_name('iter_5.pth'), 5)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'last_checkpoint').write_text(str(saved))
    resuming.apply_resume(cfg, None)
    assert cfg.load_from == str(saved)


@pytest.mark.parametrize('work_dir', ['run', 'run/', '{}/run', '{}/run/'])
@pytest.mark.parametrize('out_dir', ['run', '{}/run', '{}/run/', 'other'])
def test_the_folder_of_checkpoints_is_that_of_the_hook(
    work_dir: str,
    out_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    work_dir, out_dir = work_dir.format(tmp_path), out_dir.format(tmp_path)
    hook = dict(type='CheckpointHook', out_dir=out_dir)
    cfg = Config(dict(work_dir=work_dir, default_hooks=dict(checkpoint=hook)))
    built = HOOKS.build(cfg.default_hooks.checkpoint)
    built.before_train(
        SimpleNamespace(
            work_dir=os.path.abspath(work_dir),
            logger=logging.getLogger('saves'),
            message_hub=MessageHub('saves'),
        )
    )
    found = load('resuming').checkpoint_dir(cfg)
    assert os.path.abspath(found) == os.path.abspath(built.out_dir)


def test_hooks_of_a_config_that_has_none(tmp_path: Path) -> None:
    resuming = load('resuming')
    cfg = Config(dict(work_dir=str(tmp_path), default_hooks=None))
    resuming.keep_a_whole_checkpoint(cfg)
    save_run(tmp_path / 'iter_3.pth', 3)
    resuming.apply_resume(cfg, 'auto')
    assert cfg.load_from == str(tmp_path / 'iter_3.pth')


def test_resume_of_the_config_takes_its_load_from(tmp_path: Path) -> None:
    resuming = load('resuming')
    save_run(tmp_path / 'iter_3.pth', 3)
    settings = dict(work_dir=str(tmp_path), resume=True, load_from='a.pth')
    cfg = Config(settings)
    resuming.apply_resume(cfg, None)
    assert (cfg.load_from, cfg.resume) == ('a.pth', True)
    cfg = Config(settings | dict(resume=False))
    resuming.apply_resume(cfg, None)
    assert (cfg.load_from, cfg.resume) == ('a.pth', False)


def test_resume_where_no_optimizer_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    resuming = load('resuming')
    save_run(tmp_path / 'iter_3.pth', 3, optimizer=None)
    (tmp_path / 'iter_4.pth').touch()
    hook = dict(checkpoint=dict(save_optimizer=False))
    cfg = Config(dict(work_dir=str(tmp_path), default_hooks=hook))
    resuming.apply_resume(cfg, 'auto')
    assert (cfg.load_from, cfg.resume) == (str(tmp_path / 'iter_3.pth'), True)
    said = capsys.readouterr().out
    assert f'passed over while resuming: {tmp_path}/iter_4.pth is not' in said
    assert f'Resuming from {tmp_path}/iter_3.pth.' in said


def test_an_interrupted_save_leaves_no_checkpoint(tmp_path: Path) -> None:
    resuming = load('resuming')
    written: list[str] = []

    def save(
        out_dir: str, filename: str, *_: object, fail: bool, **__: object
    ) -> None:
        written.append(filename)
        (Path(out_dir) / filename).write_bytes(b'half')
        if fail:
            raise KeyboardInterrupt

    runner = SimpleNamespace(save_checkpoint=save)
    resuming.save_atomically(runner)
    with pytest.raises(KeyboardInterrupt, match=r'^$'):
        runner.save_checkpoint(str(tmp_path), 'a.pth', None, fail=True)
    assert not (tmp_path / 'a.pth').exists()
    runner.save_checkpoint(str(tmp_path), 'a.pth', None, fail=False)
    assert [path.name for path in tmp_path.iterdir()] == ['a.pth']
    assert written == ['a.pth.part', 'a.pth.part']
    # What only a backend can name is left to the backend. mmengine's hook
    # gives the older argument by its place.
    for args, more in (
        ((), dict(backend_args={'b': 1})),
        ((), dict(file_client_args={'b': 1})),
        (({'b': 1},), {}),
    ):
        written.clear()
        runner.save_checkpoint(
            str(tmp_path), 'b.pth', *args, fail=False, **more
        )
        assert written == ['b.pth']


def test_what_is_saved_elsewhere_is_left_to_the_backend_of_its_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    class Bucket(LocalBackend):
        def put(self, obj: bytes, filepath: str) -> None:
            written.append(filepath)

    # mmengine asks both of its registries.
    for backends in (
        registry_utils.prefix_to_backends,
        FileClient._prefix_to_backends,
    ):
        monkeypatch.setitem(backends, 'bucket', Bucket)
    runner = runner_of_batches(tmp_path)
    load('resuming').save_atomically(runner)
    runner.save_checkpoint('bucket://b', 'a.pth', save_optimizer=False)
    assert written == ['bucket://b/a.pth']


def test_only_the_first_process_renames_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resuming = load('resuming')
    # The others call the hook as well and write nothing.
    runner = SimpleNamespace(save_checkpoint=lambda *_, **__: None)
    resuming.save_atomically(runner)
    monkeypatch.setattr(resuming, 'is_main_process', lambda: False)
    runner.save_checkpoint(str(tmp_path), 'a.pth')
    assert not list(tmp_path.iterdir())


def test_the_only_checkpoint_outlives_the_next_save(
    capsys: pytest.CaptureFixture,
) -> None:
    resuming = load('resuming')
    hook = dict(checkpoint=dict(max_keep_ckpts=1))
    cfg = Config(dict(default_hooks=hook))
    resuming.keep_a_whole_checkpoint(cfg)
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == 2
    assert 'raised from 1 to 2' in capsys.readouterr().out
    hook['checkpoint'].update(max_keep_ckpts=5)
    cfg = Config(dict(default_hooks=hook))
    resuming.keep_a_whole_checkpoint(cfg)
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == 5


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
        logger=logging.getLogger('hooked'),
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


@pytest.mark.skipif(
    not hasattr(InfiniteSampler, 'skip'),
    reason='this mmengine loads what it passes over',
)
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


def test_workers_that_started_before_the_hook_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # What a loop of iterations takes its batches from.
    iterator = loops._InfiniteDataloaderIterator
    caplog.set_level(logging.INFO)
    for workers in (0, 1):
        hook, runner = hooked(InfiniteSampler(Samples(), seed=0), workers)
        loop = runner.train_loop
        loop.dataloader_iterator = iterator(loop.dataloader)
        for begun in (not hasattr(iterator, 'skip_iter'), True):
            caplog.clear()
            hook.before_train(runner)
            said = 'the same train_dataloader.num_workers=1' in caplog.text
            assert said == (begun and workers == 1)
            next(loop.dataloader_iterator)


class Stream(IterableDataset):
    """Images that come one after the other."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


def test_a_stream_is_read_as_it_is_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    opened = load('launch').open_data(Config(), 'train_dataloader', Stream)
    _, runner = hooked(InfiniteSampler(Samples(), seed=0))
    assert 'a stream' not in caplog.text
    runner.train_loop.dataloader = DataLoader(opened, batch_size=2)
    ExactResumeHook().before_train(runner)
    assert 'the data set is a stream' in caplog.text
    assert [*map(list, runner.train_loop.dataloader)] == [[0, 1], [2, 3]]


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


@pytest.mark.parametrize('initialized', [True, False])
def test_gpus_are_seeded_where_cuda_has_begun(
    initialized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = importlib.import_module('ws_mm.resume')
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: initialized)
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', seeds.append)
    for place in ((3, 1), (3, 2), (3, 1)):
        resume.seed_generators(*place)
    if not initialized:
        assert not seeds
        return
    assert seeds[0] == seeds[2] == torch.initial_seed()
    assert seeds[0] != seeds[1]


def test_the_hook_seeds_the_samples_of_its_own_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resume = importlib.import_module('ws_mm.resume')
    drawn = []
    for rank in (0, 1):
        monkeypatch.setattr(resume, 'get_rank', lambda rank=rank: rank)
        hook, runner = hooked(DefaultSampler(Samples(), shuffle=False))
        hook.before_train_epoch(runner)
        drawn += [s for b in runner.train_loop.dataloader for s in b]
    assert [sample[0] for sample in drawn] == [*range(6), *range(6)]
    assert len({number for sample in drawn for number in sample[1:]}) == 36


def test_a_numbered_sampler_has_what_its_sampler_has() -> None:
    resume = importlib.import_module('ws_mm.resume')
    inner = DefaultSampler(Samples(), seed=0)
    numbered = resume.NumberedSampler(inner)
    numbered.set_epoch(3)
    assert inner.epoch == 3
    # mmengine calls set_epoch of each sampler that has one.
    assert not hasattr(resume.NumberedSampler(range(6)), 'set_epoch')
    again = copy.deepcopy(numbered)
    assert list(again) == list(numbered)


@pytest.mark.skipif(
    not hasattr(InfiniteSampler, 'skip'),
    reason='this mmengine loads what it passes over',
)
def test_a_skip_counts_from_the_start_of_the_samples() -> None:
    resume = importlib.import_module('ws_mm.resume')
    numbered = resume.NumberedSampler(InfiniteSampler(Samples(), seed=0))
    numbered.skip(4)
    numbered.skip(6)
    assert next(iter(numbered)).place == (0, 6)


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


@pytest.mark.parametrize('as_indices', [list, np.array, torch.tensor])
def test_indices_of_numpy_and_torch_are_numbered(
    as_indices: Callable[[list[int]], Iterable[Any]],
) -> None:
    order = np.random.permutation(6).tolist()

    class Shuffled:
        def __iter__(self) -> Iterator[Any]:
            return iter(as_indices(order))

    drawn = []
    for _ in range(2):
        hook, runner = hooked(Shuffled())
        hook.before_train_epoch(runner)
        drawn.append([s for b in runner.train_loop.dataloader for s in b])
    assert [sample[0] for sample in drawn[0]] == order
    assert drawn[0] == drawn[1]


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
    resuming = load('resuming')
    cfg = Config(dict(custom_hooks=[dict(type='EMAHook')]))
    for _ in range(2):
        resuming.resume_exactly(cfg)
        assert [hook['type'] for hook in cfg.custom_hooks] == [
            'EMAHook',
            'ws_mm.ExactResumeHook',
        ]
    cfg = Config(dict())
    resuming.resume_exactly(cfg)
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
    resuming = load('resuming')
    path = tmp_path / 'iter_1.pth'
    content = dict(state_dict={'a': torch.zeros(1)}, meta=dict(iter=1))
    torch.save(content, path)
    cfg = Config(dict(work_dir=str(tmp_path), randomness=dict(seed=3)))
    resuming.apply_resume(cfg, str(path))
    assert cfg.randomness.seed == 3  # the checkpoint does not say its own
    content['meta']['seed'] = 7
    torch.save(content, path)
    cfg = Config(dict(work_dir=str(tmp_path)))
    if asked is not None:
        cfg.randomness = dict(seed=asked, deterministic=True)
    resuming.apply_resume(cfg, str(path))
    assert cfg.randomness.seed == 7
    assert cfg.randomness.get('deterministic', asked is None)
    said = capsys.readouterr().out
    assert ('is ignored' in said) == warns
    assert not warns or 'randomness.seed=8 is ignored: the run began' in said


def runner_of_batches(
    folder: Path, optim_wrapper: object = None, **loader: object
) -> Runner:
    """A Runner that could train."""
    return Runner(
        torch.nn.Linear(1, 1),
        str(folder),
        train_dataloader=DataLoader(Samples(), **loader),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=optim_wrapper or dict(optimizer=dict(type='SGD', lr=1)),
    )


def test_the_batch_of_any_loader_and_optimizer_is_saved(
    tmp_path: Path,
) -> None:
    batches = BatchSampler(DefaultSampler(Samples()), 3, drop_last=False)
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), 0.1)
    wrapper = OptimWrapper(optimizer, accumulative_counts=5)
    for loader, wrappers, size, counts in (
        (dict(batch_size=2), wrapper, 2, 5),
        (
            dict(batch_sampler=batches),
            OptimWrapperDict(a=wrapper),
            *(3, 5),
        ),
        (dict(batch_size=4), None, 4, 1),
    ):
        content: dict = dict(meta={})
        runner = runner_of_batches(tmp_path, wrappers, **loader)
        load('resuming').BatchHook().before_save_checkpoint(runner, content)
        assert list(content['meta']['batch'].values()) == [size, counts, 1]


def test_a_batch_is_compared_where_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of_batches(tmp_path, batch_size=2)
    said: list[str] = []
    monkeypatch.setattr(runner.logger, 'warning', said.append)
    hook = load('resuming').BatchHook()
    of_another = {'batch': {'train_dataloader.batch_size': 9}}
    # mmengine appends the time of the start to the name of a config.
    runner._experiment_name = f'bcn_2x_{runner.timestamp}'
    earlier = dict(experiment_name='bcn_2x_20200102_030405')
    for resume, meta, warnings in (
        (False, of_another | dict(experiment_name='other'), 0),
        (True, {}, 0),  # of a run without this hook
        (True, of_another, 1),
        (True, earlier, 0),
        (True, of_another | dict(experiment_name='other'), 2),
    ):
        said.clear()
        runner._resume = resume
        hook.after_load_checkpoint(runner, dict(meta=meta))
        assert len(said) == warnings


@pytest.mark.parametrize(
    'code', [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EIO]
)
def test_a_write_that_fails_halfway_leaves_nothing(
    code: int, tmp_path: Path
) -> None:
    resuming = load('resuming')
    failures = load('failures')

    def save(out_dir: str, filename: str) -> None:
        (Path(out_dir) / filename).write_bytes(b'half')
        raise OSError(code, os.strerror(code))

    runner = SimpleNamespace(save_checkpoint=save)
    resuming.save_atomically(runner)
    with pytest.raises(OSError, match=os.strerror(code)) as raised:
        runner.save_checkpoint(str(tmp_path), 'iter_1.pth')
    assert not list(tmp_path.iterdir())
    cfg = Config(dict(work_dir=str(tmp_path)))
    said = str(failures.unwritable(cfg, raised.value))
    assert said == (
        f'Training stopped: {tmp_path}/iter_1.pth could not be written '
        f'({os.strerror(code)}). There is no checkpoint yet. Fix the cause '
        'and start again.'
    )


def test_other_errors_are_not_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    failures = load('failures')
    missing = FileNotFoundError(errno.ENOENT, 'gone', 'a.png')
    cfg = Config(dict(work_dir=str(tmp_path), launcher='none'))
    assert failures.unwritable(cfg, missing) is None
    lost = RuntimeError('Connection closed by peer')
    failures.say_who_was_lost(cfg, lost)
    cfg.launcher = 'pytorch'
    failures.say_who_was_lost(cfg, RuntimeError('shapes do not match'))
    assert capsys.readouterr().err == ''
    failures.say_who_was_lost(cfg, lost)
    assert 'There is no checkpoint yet.' in capsys.readouterr().err
