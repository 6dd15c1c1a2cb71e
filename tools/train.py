"""Train a detector or a segmentor from a config."""

import argparse
import contextlib
import errno
import glob
import os
import re
import sys
from typing import Any

import checks
import launch
import torch
from checks import SetupError
from mmengine.config import Config
from mmengine.dist import get_rank, is_main_process
from mmengine.runner import Runner

# Disk or quota full, file too large, read-only, denied, and a dying disk.
UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
)

# What gloo and NCCL say of a process that is gone or hangs.
LOST = re.compile(
    'connection (closed|reset|refused)|broken pipe|timed? ?out|'
    'remote process exited|socket',
    re.IGNORECASE,
)


def parse_args() -> argparse.Namespace:
    """Command line of training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--amp', action='store_true', help='automatic mixed precision (GPU)'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate to the total batch size',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from this checkpoint; without a value, or with '
        '"auto", from the newest whole one in the work dir',
    )
    launch.add_common_options(parser)
    return parser.parse_args()


def apply_amp(cfg: Config) -> None:
    """Switch the optimizer wrapper to mixed precision."""
    if not torch.cuda.is_available():
        raise SetupError(
            '--amp needs a GPU and torch sees none. Leave it out to train in '
            'float32.'
        )
    wrapper = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if wrapper not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise SetupError(
            f'--amp replaces optim_wrapper.type OptimWrapper, but the config '
            f'has {wrapper!r}. Set the precision in the config instead.'
        )
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.loss_scale = 'dynamic'


def apply_auto_scale_lr(cfg: Config) -> None:
    """Switch the linear learning rate rule on."""
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise SetupError(
            '--auto-scale-lr needs auto_scale_lr.base_batch_size, the total '
            'batch size that the learning rate of the config is meant for. '
            'Add it: --cfg-options auto_scale_lr.base_batch_size=16'
        )
    cfg.auto_scale_lr.enable = True


def checkpoint_dir(cfg: Config) -> str:
    """Folder into which mmengine's CheckpointHook will save."""
    hook = cfg.get('default_hooks', {}).get('checkpoint') or {}
    out_dir = hook.get('out_dir') or cfg.work_dir
    if os.path.abspath(out_dir) == os.path.abspath(cfg.work_dir):
        return cfg.work_dir
    return os.path.join(out_dir, os.path.basename(cfg.work_dir.rstrip('/')))


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
        folder = checkpoint_dir(cfg)
        hook = cfg.get('default_hooks', {}).get('checkpoint') or {}
        resume, broken = checks.newest_checkpoint(
            folder, hook.get('save_optimizer', True)
        )
        for line in broken:
            launch.say(f'warning: passed over while resuming: {line}')
        launch.say(
            f'Resuming from {resume}.'
            if resume
            else f'No whole checkpoint in {folder}: training starts from '
            'scratch.'
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
    if not checks.is_local(checkpoint):
        return
    try:
        meta = checks.read_checkpoint(checkpoint).get('meta') or {}
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


def check_model_first(cfg: Config) -> None:
    """Name, before training, what ws_mm finds wrong with the model.

    It judges by names and so only warns; a config that lists the hook itself
    can let it stop the training.
    """
    hooks = cfg.get('custom_hooks') or []
    if not any('CheckModelHook' in str(hook) for hook in hooks):
        hook = dict(type='ws_mm.CheckModelHook', on_mistake='print')
        cfg.custom_hooks = [*hooks, hook]


def keep_a_whole_checkpoint(cfg: Config) -> None:
    """Never let the only checkpoint be deleted before the next is written.

    mmengine's hook removes what exceeds ``max_keep_ckpts`` first and saves
    then, so a run with 1 that is killed while saving would have nothing.
    """
    hook = cfg.get('default_hooks', {}).get('checkpoint') or {}
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
        if any(remote):
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


def unwritable(cfg: Config, error: OSError) -> SetupError | None:
    """What a failed write means for the run, None if it was no write."""
    if error.errno not in UNWRITABLE:
        return None
    # The name that the file would have got in the end.
    name = str(error.filename or checkpoint_dir(cfg)).removesuffix('.part')
    newest, _ = checks.newest_checkpoint(checkpoint_dir(cfg))
    return SetupError(
        f'Training stopped: {name} could not be written ({error.strerror}). '
        + (
            f'{newest} is whole. Mend the cause, then add --resume to the '
            'command to continue from there.'
            if newest
            else 'There is no checkpoint yet. Mend the cause and start again.'
        )
    )


def say_who_was_lost(cfg: Config, error: RuntimeError) -> None:
    """Explain an error that another process caused; it goes on upwards."""
    if cfg.launcher == 'none' or not LOST.search(str(error)):
        return
    newest, _ = checks.newest_checkpoint(checkpoint_dir(cfg))
    print(
        f'error: rank {get_rank()} waited for another process, which died or '
        'did not answer within env_cfg.dist_cfg.timeout seconds; what that '
        'one printed last says why. '
        + (
            f'{newest} is whole: add --resume to the command to continue.'
            if newest
            else 'There is no checkpoint yet.'
        ),
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    """Check everything, then train."""
    args = parse_args()
    needed = ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper')
    cfg = launch.load_config(args, needed)
    if args.amp:
        apply_amp(cfg)
    if args.auto_scale_lr:
        apply_auto_scale_lr(cfg)
    checks.check_data(cfg, ('train_dataloader', 'val_dataloader'))
    apply_resume(cfg, args.resume)
    checks.check_checkpoints(cfg)
    checks.check_writable(cfg.work_dir, '--work-dir')
    keep_a_whole_checkpoint(cfg)
    check_model_first(cfg)
    resume_exactly(cfg)
    launch.set_up_processes(cfg)

    runner = launch.build_runner(cfg)
    if isinstance(runner, Runner):
        checks.check_weights_fit(cfg.get('load_from'), runner.model)
        launch.build_loops(runner, ('train', 'val'))
        launch.gather_in_work_dir(runner, 'val')
        if is_main_process():
            for part in glob.glob(os.path.join(checkpoint_dir(cfg), '*.part')):
                os.remove(part)
        save_atomically(runner)
    try:
        runner.train()
    except OSError as error:
        reason = unwritable(cfg, error)
        if reason is None:
            raise
        raise reason from error
    except RuntimeError as error:
        say_who_was_lost(cfg, error)
        raise


if __name__ == '__main__':
    launch.run(main)
