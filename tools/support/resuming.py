"""Whole checkpoints, and exact resume from them."""

import contextlib
import os
import re
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner

from support import checkpoints, launch
from support.checks import SetupError, is_local


def accumulated(optim_wrapper: OptimWrapper) -> int:
    """Iterations that make one step of an optimizer."""
    return getattr(optim_wrapper, '_accumulative_counts', 1)


class BatchHook(Hook):
    """Save what makes a batch, and say where a resumed run differs."""

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note the batch beside the other facts of the run."""
        checkpoint['meta']['batch'] = self._batch(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare with the run that wrote the checkpoint."""
        meta = checkpoint.get('meta') or {}
        if not runner._resume:
            return
        then, now = meta.get('batch') or {}, self._batch(runner)
        differs = [
            f'{key} was {then[key]} and is {value}'
            for key, value in now.items()
            if then.get(key, value) != value
        ]
        if differs:
            runner.logger.warning(
                'The resumed run was trained with another batch: '
                f'{"; ".join(differs)}. Its learning rate and its schedule '
                'in iterations stay those of the config, and it does not '
                'end as the unbroken run. To continue as it began, set what '
                'it was.'
            )
        stems = [
            re.sub(r'_\d{8}_\d{6}$', '', str(name))
            for name in (meta.get('experiment_name'), runner.experiment_name)
        ]
        if meta.get('experiment_name') and stems[0] != stems[1]:
            runner.logger.warning(
                f'The checkpoint was saved by {stems[0]}, and this is '
                f'{stems[1]}: to start anew, leave out --resume and give '
                'another --work-dir.'
            )

    @staticmethod
    def _batch(runner: Runner) -> dict[str, int]:
        loader = runner.train_dataloader
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, OptimWrapperDict):
            wrapper = next(iter(wrapper.values()))
        size = loader.batch_size or getattr(
            loader.batch_sampler, 'batch_size', 0
        )
        return {
            'train_dataloader.batch_size': size,
            'optim_wrapper.accumulative_counts': accumulated(wrapper),
            'the number of processes': runner.world_size,
        }


def _checkpoint_hook(cfg: Config) -> dict:
    return (cfg.get('default_hooks') or {}).get('checkpoint') or {}


def checkpoint_dir(cfg: Config) -> str:
    """Folder into which mmengine's CheckpointHook will save."""
    out_dir = _checkpoint_hook(cfg).get('out_dir')
    # mmengine compares the text: a relative path is another folder.
    if out_dir in (None, os.path.abspath(cfg.work_dir)):
        return cfg.work_dir
    return os.path.join(out_dir, os.path.basename(cfg.work_dir.rstrip('/')))


def newest_checkpoint(cfg: Config) -> tuple[str | None, list[str]]:
    """Checkpoint to continue from, and a line per broken one."""
    with_optimizer = _checkpoint_hook(cfg).get('save_optimizer', True)
    return checkpoints.newest_checkpoint(
        checkpoint_dir(cfg), with_optimizer, cfg.work_dir
    )


def apply_resume(cfg: Config, resume: str | None) -> None:
    """Choose the checkpoint to continue from.

    Args:
        cfg: the config; ``resume`` and ``load_from`` are set.
        resume: None, ``'auto'`` or a path.
    """
    if resume is None and cfg.get('resume'):
        resume = cfg.get('load_from') or 'auto'
    if resume is None:
        return
    if resume == 'auto':
        resume, broken = newest_checkpoint(cfg)
        for line in broken:
            launch.say(f'warning: passed over while resuming: {line}')
        launch.say(
            f'Resuming from {resume}.'
            if resume
            else f'No whole checkpoint in {checkpoint_dir(cfg)}: training '
            'starts from scratch.'
        )
    cfg.resume = resume is not None
    if resume:
        cfg.load_from = resume
        keep_seed(cfg, resume)


def keep_seed(cfg: Config, checkpoint: str) -> None:
    """Continue with the seed that the run began with.

    mmengine takes it from the checkpoint, too, but only after the samplers
    and the workers have got another one.
    """
    try:
        meta = checkpoints.read_checkpoint(checkpoint).get('meta') or {}
    except SetupError:
        return  # check_checkpoints reports it, with the key
    begun = meta.get('seed')
    randomness = dict(cfg.get('randomness') or {})
    asked = randomness.get('seed')
    if begun is None or begun == asked:
        return
    if asked is not None:
        launch.say(
            f'warning: randomness.seed={asked} is ignored: the run began with '
            f'{begun}. To start anew with another seed, leave out --resume '
            'and give another --work-dir.'
        )
    cfg.randomness = {**randomness, 'seed': begun}


def resume_exactly(cfg: Config) -> None:
    """Add the hook that makes a resumed run equal to an unbroken one."""
    hooks = cfg.get('custom_hooks') or []
    if 'ExactResumeHook' not in str(hooks):
        cfg.custom_hooks = [*hooks, dict(type='ws_mm.ExactResumeHook')]


def keep_a_whole_checkpoint(cfg: Config) -> None:
    """Never let the only checkpoint be deleted before the next is written.

    mmengine's hook removes what exceeds ``max_keep_ckpts`` first and saves
    then, so a run with 1 that is killed while saving would have nothing.
    """
    hook = _checkpoint_hook(cfg)
    if hook.get('max_keep_ckpts') == 1:
        hook['max_keep_ckpts'] = 2
        launch.say(
            'max_keep_ckpts raised from 1 to 2: the last checkpoint is kept '
            'until the next is whole.'
        )


def save_atomically(runner: Runner) -> None:
    """Let a checkpoint appear under its name only once it is whole."""
    save = runner.save_checkpoint

    def save_then_rename(
        out_dir: str, filename: str, *args: Any, **kwargs: Any
    ) -> None:
        # A file client or a backend may write to what has no rename.
        remote = (
            *args,
            *map(kwargs.get, ('file_client_args', 'backend_args')),
        )
        if any(remote) or not is_local(out_dir):
            save(out_dir, filename, *args, **kwargs)
            return
        part = os.path.join(out_dir, f'{filename}.part')
        try:
            save(out_dir, os.path.basename(part), *args, **kwargs)
            if is_main_process():
                os.replace(part, os.path.join(out_dir, filename))
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.remove(part)
            if isinstance(error, OSError) and error.filename is None:
                # open() names its file in the exception, write() does not.
                error.filename = part
            raise

    runner.save_checkpoint = save_then_rename
