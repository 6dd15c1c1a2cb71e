"""Train a detector, a segmentor or a classifier from a config."""

import argparse
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from support import checkpoints, checks, failures, launch, resuming
from support.checks import SetupError


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
        '"auto", from the last whole one of the work dir',
    )
    parser.add_argument(
        '--no-exact-resume',
        action='store_true',
        help='leave out ws_mm.ExactResumeHook: the run then draws the random '
        "numbers that MMDetection's or MMSegmentation's own train.py draws, "
        'and a resumed run other ones than an unbroken run',
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
    wrapper = checks.short_name(cfg.optim_wrapper) or 'OptimWrapper'
    if wrapper not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise SetupError(
            f'--amp replaces optim_wrapper.type OptimWrapper, but the config '
            f'has {wrapper!r}. Set the precision in the config instead.'
        )
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def apply_auto_scale_lr(cfg: Config) -> None:
    """Switch the linear learning rate rule on."""
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise SetupError(
            '--auto-scale-lr needs auto_scale_lr.base_batch_size, the total '
            'batch size that the learning rate of the config is meant for. '
            'Add it: --cfg-options auto_scale_lr.base_batch_size=N'
        )
    if 'batch_size' not in cfg.train_dataloader:
        raise SetupError(
            '--auto-scale-lr needs train_dataloader.batch_size, the images '
            'of one process in one iteration, and the config has none. Add '
            'it, or set optim_wrapper.optimizer.lr yourself.'
        )
    counts = cfg.optim_wrapper.get('accumulative_counts', 1)
    if cfg.get('runner_type', 'Runner') != 'Runner' and counts > 1:
        base = cfg.auto_scale_lr.base_batch_size
        raise SetupError(
            f'--auto-scale-lr: runner_type={cfg.runner_type!r} takes the '
            f'images of one iteration, and {counts} make a step '
            '(optim_wrapper.accumulative_counts). Set '
            f'auto_scale_lr.base_batch_size={base / counts:g}, which is '
            f'{base} / {counts}.'
        )
    cfg.auto_scale_lr.enable = True


def scale_lr_by_step(runner: Runner) -> None:
    """Scale learning rates by the images of one optimizer step.

    mmengine takes those of one iteration, which are fewer where
    ``accumulative_counts`` adds the gradients of several.
    """
    scale = runner.scale_lr

    def scale_each(
        optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None
    ) -> None:
        if not (auto_scale_lr or {}).get('enable'):
            return
        several = isinstance(optim_wrapper, OptimWrapperDict)
        for each in optim_wrapper.values() if several else [optim_wrapper]:
            counts = resuming.accumulated(each)
            base = auto_scale_lr['base_batch_size']
            if counts > 1:
                runner.logger.info(
                    f'One optimizer step is {counts} iterations: '
                    f'base_batch_size {base} is {base / counts:g} images per '
                    'iteration.'
                )
            scale(each, {**auto_scale_lr, 'base_batch_size': base / counts})

    runner.scale_lr = scale_each


def check_model_first(cfg: Config) -> None:
    """Name, before training, what ws_mm finds wrong with the model.

    It judges by names and so only warns; a config that lists the hook itself
    can let it stop the training.
    """
    hooks = cfg.get('custom_hooks') or []
    if not any('CheckModelHook' in str(hook) for hook in hooks):
        hook = dict(type='ws_mm.CheckModelHook', on_mistake='print')
        cfg.custom_hooks = [*hooks, hook]


def main() -> None:
    """Check everything, then train."""
    args = parse_args()
    needed = ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper')
    types = {'optim_wrapper.type': 'AmpOptimWrapper'} if args.amp else {}
    cfg = launch.load_config(args, needed, types)
    if args.amp:
        apply_amp(cfg)
    if args.auto_scale_lr:
        apply_auto_scale_lr(cfg)
    checks.check_data(cfg, ('train_dataloader', 'val_dataloader'))
    resuming.apply_resume(cfg, args.resume)
    checkpoints.check_checkpoints(cfg)
    checks.check_writable(cfg.work_dir, '--work-dir')
    resuming.keep_a_whole_checkpoint(cfg)
    check_model_first(cfg)
    if not args.no_exact_resume:
        resuming.resume_exactly(cfg)
    launch.set_up_processes(cfg)

    runner = launch.build_runner(cfg)
    if cfg.get('load_from'):
        checkpoints.check_weights_fit(cfg.load_from, launch.model_of(runner))
    if isinstance(runner, Runner):
        if not cfg.get('resume'):
            checkpoints.check_parts_fit(runner.model)
        launch.build_loops(runner, ('train', 'val'))
        launch.gather_in_work_dir(runner, 'val')
        if is_main_process():
            for part in Path(resuming.checkpoint_dir(cfg)).glob('*.part'):
                part.unlink()
        resuming.save_atomically(runner)
        scale_lr_by_step(runner)
        runner.register_hook(resuming.BatchHook())
    else:
        launch.say(
            f'warning: runner_type={cfg.runner_type!r} saves by its own '
            'strategy: a training that is killed may leave half a checkpoint. '
            'It opens each data set when its phase begins.'
        )
    try:
        with failures.noted(runner):
            runner.train()
    except KeyboardInterrupt:
        failures.say_how_to_go_on(cfg, runner.iter)
        sys.exit(130)  # as a shell says it of SIGINT
    except OSError as error:
        reason = failures.unwritable(cfg, error)
        if reason is None:
            raise
        raise reason from error
    except (AssertionError, ImportError, RuntimeError, ValueError) as error:
        if reason := failures.known_cause(error, runner):
            raise reason from error
        if isinstance(error, RuntimeError):
            failures.say_who_was_lost(cfg, error)
        raise


if __name__ == '__main__':
    launch.run(main)
