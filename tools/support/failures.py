"""Explanations of errors that stop a training or a test."""

import errno
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.runner import Runner

from support.checks import SetupError
from support.resuming import checkpoint_dir, newest_checkpoint

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


@contextmanager
def noted(runner: Runner) -> Iterator[None]:
    """Write what ends a training into its log, which only the screen gets."""
    try:
        yield
    except BaseException as error:
        logger = runner.logger
        trace = error.__traceback__ and error.__traceback__.tb_next
        cause = type(error), error, trace
        place = __file__, 0, 'The training ended by:', (), cause
        record = logger.makeRecord(logger.name, logging.ERROR, *place)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(record)
        raise


def unwritable(cfg: Config, error: OSError) -> SetupError | None:
    """Explain a failed write; None for another error."""
    if error.errno not in UNWRITABLE:
        return None
    # The name that the file would have got in the end.
    name = str(error.filename or checkpoint_dir(cfg)).removesuffix('.part')
    newest, _ = newest_checkpoint(cfg)
    return SetupError(
        f'Training stopped: {name} could not be written ({error.strerror}). '
        + (
            f'{newest} is whole. Fix the cause, then add --resume to the '
            'command to continue from there.'
            if newest
            else 'There is no checkpoint yet. Fix the cause and start again.'
        )
    )


# Of UNet; and of sums of maps that were made smaller and larger again.
MULTIPLES = (
    'the model may only take images whose sides are multiples of its stride. '
    'Pad them: --cfg-options '
    'model.data_preprocessor.test_cfg.size_divisor=32 (mmseg), or '
    'model.data_preprocessor.pad_size_divisor=32 (mmdet); in training, give '
    'crop sizes that are multiples'
)
# What the hosts raise about data or settings, and what fixes it.
HOST_ERRORS = {
    'should be divisible by the whole downsample rate': MULTIPLES,
    'must match the size of tensor b': MULTIPLES,
    'Expected more than 1 value per channel': (
        'a batch norm{layer} had one value per channel, as one image gives '
        'it behind a global pooling. Replace the batch norms '
        '(tools/model_converters/apply_norm.py CONFIG NEW.py, with '
        '--remaining those that no norm_cfg reaches), or train more images '
        'per process (train_dataloader.batch_size)'
    ),
    'RoI is a empty tensor': (
        'this head takes no image without boxes. Leave those out: '
        'train_dataloader.dataset.filter_cfg=dict(filter_empty_gt=True)'
    ),
    'selected index k out of range': (
        'the images have fewer places than the model has queries. Train on '
        'larger images, or set a smaller model.num_queries'
    ),
    'to install sklearn': (
        'the package is called scikit-learn. Install it: '
        'pip install scikit-learn'
    ),
}


def known_cause(
    error: Exception, runner: Runner, what: str = 'Training'
) -> SetupError | None:
    """Return the fix of a known error of the host; None for others."""
    for text, fix in HOST_ERRORS.items():
        if text in str(error):
            layer = ''
            frame = error.__traceback__
            while frame is not None:
                own = frame.tb_frame.f_locals.get('self')
                for name, module in runner.model.named_modules():
                    if module is own and 'Norm' in type(own).__name__:
                        layer = f' ({name.removeprefix("module.")})'
                frame = frame.tb_next
            return SetupError(
                f'{what} stopped ({error}): {fix.format(layer=layer)}.'
            )
    return None


def say_how_to_go_on(cfg: Config, iteration: int) -> None:
    """Tell who pressed Ctrl-C what is saved."""
    newest, _ = newest_checkpoint(cfg)
    if get_rank() == 0:
        print(
            f'Stopped at iteration {iteration}. '
            + (
                f'{newest} is whole: add --resume to the command to continue '
                'from there.'
                if newest
                else 'There is no checkpoint yet.'
            ),
            file=sys.stderr,
            flush=True,
        )


def say_who_was_lost(cfg: Config, error: RuntimeError) -> None:
    """Explain an error that another process caused; it goes on upwards."""
    if cfg.launcher == 'none' or not LOST.search(str(error)):
        return
    newest, _ = newest_checkpoint(cfg)
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
