"""Options, config and processes of train.py and test.py."""

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import pickle
import re
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config, ConfigDict
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from support import data_checks
from support.checkpoints import unwrapped
from support.checks import (
    BUILD_ERRORS,
    SetupError,
    did_you_mean,
    iter_datasets,
    type_name,
)
from support.layer_checks import check_norms, explain
from support.options import KeyValues, check_keys

# It lets mmengine find the configs of mmseg under either distribution's name;
# test_onnx.py runs without it.
with contextlib.suppress(ImportError):
    import ws_mm  # noqa: F401

HOSTS = ('mmdet', 'mmseg', 'mmpretrain')
# Environment names of rank, world size and local rank, per launcher.
ENVIRONMENT = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    'mpi': (
        'OMPI_COMM_WORLD_RANK',
        'OMPI_COMM_WORLD_SIZE',
        'OMPI_COMM_WORLD_LOCAL_RANK',
    ),
}
LOCAL_SIZE = {
    'pytorch': 'LOCAL_WORLD_SIZE',
    'slurm': 'SLURM_NTASKS_PER_NODE',
    'mpi': 'OMPI_COMM_WORLD_LOCAL_SIZE',
}


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse takes it.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f'{text!r} must be a whole number of at least 1'
        )
    return int(text)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options that training and testing have in common."""
    parser.add_argument(
        '--work-dir',
        help='folder for logs and outputs; default: work_dir of the config, '
        'else work_dirs/ and the name of the config',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=KeyValues,
        metavar='KEY=VALUE',
        help='replace settings of the config, such as '
        'train_dataloader.batch_size=1 or a.b="[(1,2),(3,4)]" (quoted, '
        'without spaces)',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', *ENVIRONMENT],
        default='none',
        help='what started the processes; without a GPU they talk over gloo',
    )
    # torch.distributed.launch passes it, in the one spelling or the other.
    parser.add_argument(
        '--local_rank',
        '--local-rank',
        help=argparse.SUPPRESS,
    )


def run(main: Callable[[], None]) -> None:
    """Call ``main``; what the user can fix is one message, no traceback.

    That is a SetupError, a ValueError that ws_mm itself raised, and a
    checkpoint that holds code. A reader that has seen enough, such as
    ``head``, ends the process as it ends others.
    """
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread(sys.stdout.fileno()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (SetupError, ValueError, pickle.UnpicklingError) as error:
        if isinstance(error, ValueError) and not _raised_by('ws_mm', error):
            raise
        # The first process of the machine speaks for the others. They wait
        # for it, since the launcher ends all as soon as one has failed.
        local = os.environ.get('LOCAL_RANK', os.environ.get('SLURM_LOCALID'))
        if local not in (None, '0'):
            time.sleep(30)
        print(f'error: {error}', file=sys.stderr, flush=True)
        sys.exit(1)
    # A thread of gloo that is still alive when the interpreter ends aborts
    # the process ('terminate called without an active exception') after all
    # its work is done; to destroy the group aborts it as well.
    if (
        dist.is_available()
        and dist.is_initialized()
        and dist.get_backend() == 'gloo'
    ):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _is_unread(pipe: int) -> bool:
    """Return whether nobody reads a pipe any more."""
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _raised_by(package: str, error: Exception) -> bool:
    """Return whether code of a package raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals['__name__'].split('.')[0] == package


def say(text: str) -> None:
    """Print once, however many processes there are."""
    ranks = (os.environ.get(names[0]) for names in ENVIRONMENT.values())
    if next(filter(None, ranks), '0') == '0':
        print(text, flush=True)


def read_config(path: str | Path, name: str = '') -> Config:
    """Read a config file.

    Args:
        path: Config file.
        name: Name in errors; default: the path.

    Raises:
        SetupError: it cannot be loaded.
    """
    name = name or str(path)
    try:
        return Config.fromfile(path)
    except FileNotFoundError as error:
        raise SetupError(f'{name}: {error}') from error
    except ImportError as error:
        cause = error.__cause__ or error
        raise SetupError(
            f'{name}: its custom_imports do not import ({cause}). Install '
            'that package, or put the folder of the module on PYTHONPATH.'
        ) from error
    # Whatever the code in a config may raise.
    except Exception as error:
        raise SetupError(
            f'{name} cannot be loaded as a config: '
            f'{type(error).__name__}: {error}'
        ) from error


def load_config(
    args: argparse.Namespace,
    needed: Sequence[str],
    types: Mapping[str, str] = MappingProxyType({}),
) -> Config:
    """Read the config file and apply the common options.

    Args:
        args: parsed options.
        needed: top-level keys without which this run is impossible.
        types: keys of types that other options are going to set.

    Raises:
        SetupError: no such file, an unknown key, or an unusable config.
    """
    if not os.path.isfile(args.config):
        raise SetupError(
            f'No config file {args.config}.{did_you_mean(args.config, "*.py")}'
        )
    cfg = read_config(args.config)
    options = args.cfg_options or {}
    check_keys(cfg, options, {**types, **options})
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError) as error:
        raise SetupError(f'--cfg-options: {error}') from error
    lacking = [key for key in needed if cfg.get(key) is None]
    if lacking:
        raise SetupError(
            f'{args.config} has no {", ".join(lacking)}: it is a part that '
            'other configs build on. Give a config outside of _base_.'
        )
    # Pure Python configs name classes and may have no default_scope.
    package = type_name(cfg.get('model')).partition('.')[0]
    if not cfg.get('default_scope') and package in HOSTS:
        cfg.default_scope = package
    check_norms(cfg)
    data_checks.check_class_lists(cfg)
    scope = cfg.get('default_scope')
    if scope and importlib.util.find_spec(scope) is None:
        from ws_mm.compat import install_command

        raise SetupError(
            f'{args.config} needs {scope} (its default_scope), which is not '
            f'installed. Install it with: {install_command(scope)}'
        )
    if scope == 'mmdet' and importlib.util.find_spec('mmcv._ext') is None:
        from ws_mm.compat import mmcv_problem

        raise SetupError(mmcv_problem())
    # test_onnx.py runs without ws_mm, and reads no checkpoint.
    with contextlib.suppress(ImportError):
        from ws_mm.compat import forbid_code

        forbid_code()
    cfg.launcher = args.launcher
    if args.local_rank is not None:
        os.environ.setdefault('LOCAL_RANK', args.local_rank)
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    return cfg


def set_up_processes(cfg: Config) -> None:
    """Check the GPUs; without any, start the processes over gloo.

    mmengine always selects a GPU for a launcher, so on a machine without
    one the process group has to be there before the Runner.

    Args:
        cfg: the config; ``launcher`` is read, ``model_wrapper_cfg`` set.

    Raises:
        SetupError: fewer GPUs than processes, or no launcher's environment.
    """
    launcher = cfg.launcher
    if launcher == 'none':
        os.environ.setdefault('LOCAL_RANK', '0')
        return
    names = ENVIRONMENT[launcher]
    unset = [name for name in names if name not in os.environ]
    if unset:
        raise SetupError(
            f'--launcher {launcher} but {", ".join(unset)} is not set: start '
            'it with tools/dist_train.sh or tools/dist_test.sh (pytorch), '
            'tools/slurm_train.sh (slurm) or mpirun (mpi).'
        )
    rank, world_size, local_rank = (os.environ[name] for name in names)
    os.environ.update(RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK=local_rank)
    gpus = torch.cuda.device_count()
    if gpus:
        # Slurm writes "8(x2)" for two nodes of eight.
        local = os.environ.get(LOCAL_SIZE[launcher], '').split('(')[0]
        wanted = int(local) if local else int(local_rank) + 1
        if wanted > gpus:
            raise SetupError(
                f'{wanted} processes on this machine need {wanted} GPUs, but '
                f'torch sees {gpus}. Ask for {gpus} (the GPUS argument), or '
                "set CUDA_VISIBLE_DEVICES='' to run on the CPU."
            )
        return
    if launcher == 'slurm' and 'MASTER_ADDR' not in os.environ:
        hosts = subprocess.run(
            ['scontrol', 'show', 'hostnames', os.environ['SLURM_NODELIST']],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        os.environ['MASTER_ADDR'] = hosts[0]
    os.environ.setdefault('MASTER_ADDR', '127.0.0.1')
    os.environ.setdefault('MASTER_PORT', '29500')
    seconds = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout', 1800)
    say(
        f'No GPU is visible to torch: {world_size} processes run on the CPU '
        'and talk over gloo.'
    )
    torch.distributed.init_process_group(
        'gloo', timeout=timedelta(seconds=seconds)
    )
    wrapper = cfg.get('model_wrapper_cfg') or dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    cfg.model_wrapper_cfg = {**wrapper, 'device_ids': None}


def build_runner(cfg: Config) -> Runner:
    """Build the Runner that the config asks for.

    Raises:
        SetupError: SyncBN, which torch has for GPUs only, on the CPU; or
            a layer that cannot be built, with its keys.
    """
    try:
        if 'runner_type' in cfg:
            return RUNNERS.build(cfg)
        return Runner.from_cfg(cfg)
    except BUILD_ERRORS as error:
        if 'SyncBatchNorm layers only work with GPU' not in str(error):
            keys = explain(cfg, error)
            if not keys:
                raise
            raise SetupError(
                f'The model of the config cannot be built: {error}{keys}'
            ) from error
        raise SetupError(
            'SyncBN does not run on the CPU in several processes. Set the '
            "type in norm_cfg to 'BN', 'GN' or 'ws_mm.BCN', or run one "
            'process (without --launcher), where it is plain BN.'
        ) from error


def model_of(runner: Any) -> nn.Module:
    """The model of a Runner, with its names and shapes.

    FlexibleRunner builds its own when it begins; this is one without values.
    """
    if isinstance(runner, Runner):
        return runner.model
    from ws_mm.shapes import build_without_memory

    scope = runner.cfg.get('default_scope') or 'mmengine'
    return build_without_memory(runner.cfg.model, scope)


def build_loops(runner: Runner, phases: Sequence[str]) -> None:
    """Load the data sets now, so that an unusable one is reported clearly.

    Args:
        runner: built, not yet run.
        phases: Phases that will run: ``train``, ``val``, ``test``.

    Raises:
        SetupError: an annotation file without images, not readable, or
            with entries that the host or the model cannot use.
    """
    for phase in phases:
        if getattr(runner, f'_{phase}_loop', None) is None:
            continue
        loader = f'{phase}_dataloader'

        def build(loop: str = f'{phase}_loop') -> Any:
            return getattr(runner, loop).dataloader.dataset

        dataset = open_data(runner.cfg, loader, build)
        data_checks.check_num_classes(loader, dataset, unwrapped(runner.model))


def open_data(cfg: Config, loader: str, build: Callable[[], Any]) -> Any:
    """Build the data set of a dataloader and look into it.

    Args:
        cfg: the config.
        loader: key of the dataloader.
        build: builds its data set.

    Raises:
        SetupError: see :func:`build_loops`.
    """
    try:
        with data_checks.checked_annotations(cfg.get('default_scope')):
            dataset = build()
        # A stream may have no length.
        count = len(dataset) if hasattr(dataset, '__len__') else None
    except (ValueError, TypeError) as error:
        reason = _empty_or_broken(cfg, loader, error)
        if reason is None:
            raise
        raise SetupError(reason) from error
    if count == 0:
        raise SetupError(_no_images(cfg, loader))
    data_checks.check_samples(loader, dataset)
    return dataset


def gather_in_work_dir(runner: Runner, phase: str) -> None:
    """Let the processes exchange results within the work dir.

    Otherwise mmengine leaves ``.dist_test`` in the current folder, and fails
    at the end of the first evaluation where that is not writable.
    """
    evaluator = getattr(getattr(runner, f'{phase}_loop'), 'evaluator', None)
    for metric in getattr(evaluator, 'metrics', ()):
        if metric.collect_device == 'cpu' and metric.collect_dir is None:
            metric.collect_dir = os.path.join(runner.log_dir, 'collect')


def _sources(cfg: Config, loader: str) -> str:
    """The files or folders that a dataloader reads, with their keys."""
    named = []
    for key, data in iter_datasets(cfg[loader].dataset, f'{loader}.dataset'):
        name = 'ann_file' if data.get('ann_file') else 'data_root'
        path = os.path.join(
            data.get('data_root') or '', data.get('ann_file') or ''
        )
        named.append(f'{key}.{name} = {path}')
    return '; '.join(named)


def _no_images(cfg: Config, loader: str) -> str:
    suffixes = ''.join(
        map(data_checks.suffixes_there, innermost_datasets(cfg, loader))
    )
    return f'No images for {loader}: {_sources(cfg, loader)}.' + (
        suffixes
        or ' Either the file lists none, or none is left of those it lists, '
        'because filter_cfg drops images without objects.'
    )


def _empty_or_broken(cfg: Config, loader: str, error: Exception) -> str | None:
    """Explain an exception of a data set; None for an unknown one."""
    # mmengine concatenates the serialized samples, of which there are none.
    if 'need at least one array to concatenate' in str(error):
        return _no_images(cfg, loader)
    if re.search('not a subset of classes|does not match classes', str(error)):
        return f'{loader}.dataset.metainfo: {error}'
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, json.JSONDecodeError):
            return (
                f'{_sources(cfg, loader)} is not valid JSON ({cause}). '
                'Fetch or write the annotation file again.'
            )
        cause = cause.__cause__ or cause.__context__
    return None


def innermost_datasets(cfg: Config, loader: str) -> list[ConfigDict]:
    """The data sets of a dataloader, without their wrappers."""
    return [data for _, data in iter_datasets(cfg[loader].dataset, loader)]
