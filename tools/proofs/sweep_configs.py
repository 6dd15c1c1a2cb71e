"""Convert and build every config that the installed packages ship.

    python tools/proofs/sweep_configs.py work_dirs/sweep --processes 2

Each distinct model (configs share one that differ in losses, settings,
classes or initial weights) goes the way of a user: apply_norm.py writes
the config, which is loaded again and compared, built, checked, run on one
image with weights of zero, and baked. One line per config and per model goes
to OUT_DIR/records.jsonl at once; started again, it continues there.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.utils import ProgressBar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model_converters import apply_norm
from proofs.long_runs import Records, versions
from proofs.sweep_report import (
    APART,
    CONVERTED,
    FAILED,
    NONE,
    NORMS,
    SIZE,
    grouped,
    page,
    shipped,
    summarize,
    table,
)
from support import launch
from support.checks import SetupError, check_writable

NO_LAYERS = {
    'data_preprocessor',
    'frozen_stages',
    'init_cfg',
    'norm_eval',
    'num_classes',
    'pretrained',
    'test_cfg',
    'train_cfg',
}


def parse_args() -> argparse.Namespace:
    """Command line of the sweep."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('out_dir', help='folder of the records')
    parser.add_argument(
        '--packages',
        nargs='+',
        default=['mmdet', 'mmseg'],
        help='packages whose configs are swept (default: mmdet mmseg)',
    )
    parser.add_argument('--processes', type=int, default=2, help='default: 2')
    parser.add_argument(
        '--every',
        type=int,
        default=1,
        metavar='K',
        help='only each K-th config, for a first look (default: 1, all)',
    )
    parser.add_argument('--conv', default='WSConv2d')
    parser.add_argument('--norm', default='BCN')
    parser.add_argument(
        '--publish',
        metavar='DIR',
        help='write the result as sweep.md and sweep.json there',
    )
    return parser.parse_args()


@contextlib.contextmanager
def classes_kept(package: str) -> Iterator[None]:
    """Undo what a failed build leaves in a class of the host.

    RegNet sets the expansion of ResNeXt's blocks while it is built, and does
    not set it back where that fails: every later ResNeXt would be another.
    """
    if package != 'mmdet':
        yield
        return
    from mmdet.models.backbones.resnext import Bottleneck

    with mock.patch.object(Bottleneck, 'expansion', Bottleneck.expansion):
        yield


@contextlib.contextmanager
def quiet(folder: Path) -> Iterator[None]:
    """Print nothing; paths in configs are relative to ``folder``."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter('ignore')
            yield
    finally:
        os.chdir(before)


def reason(error: BaseException) -> str:
    """First line of an error, without what differs from file to file."""
    cause = error.__cause__
    if isinstance(error, ImportError) and cause is not None:
        error = cause
    text = str(error).strip().splitlines() or ['']
    line = re.sub(r'/\S*/', '', text[0])[:160]
    return grouped(f'{type(error).__name__}: {line}')


def layers_of(value: Any) -> Any:
    """A model's config without what makes no layer another one.

    That are losses, settings of training and testing, preprocessing, initial
    weights, and the number of classes.
    """
    if isinstance(value, dict):
        return {
            key: layers_of(inner)
            for key, inner in value.items()
            if not key.startswith('loss') and key not in NO_LAYERS
        }
    if isinstance(value, (list, tuple)):
        return [layers_of(item) for item in value]
    return value


def load(package: str, name: str) -> dict[str, Any]:
    """Record of one config: the hash of its model, or why it has none."""
    root, _, _ = shipped(package)
    record = dict(kind='config', config=f'{package}::{name}')
    try:
        with quiet(root.parent):
            cfg = Config.fromfile(root / name)
    # Whatever the code in a config may raise.
    except Exception as error:
        return {**record, 'model': None, 'reason': reason(error)}
    if not isinstance(cfg.get('model'), dict):
        return {**record, 'model': None, 'reason': 'no model'}
    model = json.dumps(
        [cfg.get('default_scope'), layers_of(cfg.model.to_dict())],
        sort_keys=True,
        default=str,
    )
    digest = hashlib.sha256(model.encode()).hexdigest()[:16]
    return {**record, 'model': digest}


def convert(
    package: str, name: str, digest: str, conv: str, norm: str
) -> dict[str, Any]:
    """Record of one model: convert, write, load, build, look, run, bake."""
    import ws_mm
    from ws_mm.config_fit import ALONE
    from ws_mm.configs import convert_config
    from ws_mm.shapes import batch_norms, build_without_memory

    torch.set_num_threads(1)
    root, _, _ = shipped(package)
    record = dict(kind='model', model=digest, config=f'{package}::{name}')
    with quiet(root.parent), classes_kept(package):
        cfg = Config.fromfile(root / name)
        before, finished = copy.deepcopy(cfg), copy.deepcopy(cfg)
        scope = cfg.get('default_scope') or 'mmengine'
        try:
            changes, left, built = convert_config(
                cfg, conv, norm, backbone='convert'
            )
            apart = any(ALONE in one.why for one in left)
            if changes:
                written = write(root / name, before, cfg, changes)
                if not apart:
                    few = few_proposals(written.model)
                    built = build_without_memory(few, scope)
            report = ws_mm.check(built)
            wrong = {one.name for one in report if one.mistake}
            if wrong:
                original = build_without_memory(before.model, scope)
                wrong -= {
                    one.name for one in ws_mm.check(original) if one.mistake
                }
            remaining = len(batch_norms(built))
            still = remaining
            if remaining and norm == 'BCN':
                *_, other = convert_config(
                    finished,
                    conv,
                    norm,
                    remaining=True,
                    backbone='convert',
                )
                still = len(batch_norms(other))
        except Exception as error:
            why = reason(error.__cause__ or error)
            return {**record, 'outcome': FAILED, 'reason': why}
        steps = {
            'bakes': attempt(lambda: ws_mm.bake(built)),
            'runs': 'built in parts'
            if apart
            else attempt(lambda: run(built, scope)),
        }
    kinds = Counter(change.key[-1] for change in changes)
    outcome = (
        FAILED
        if wrong
        else APART
        if apart
        else CONVERTED
        if kinds['conv_cfg']
        else NORMS
        if kinds['norm_cfg']
        else NONE
    )
    counts = Counter(
        'standardized'
        if one.standardized
        else 'plain, normalized'
        if one.norms
        else 'plain'
        for one in report
    )
    return {
        **record,
        'outcome': outcome,
        'reason': f'{min(wrong)} has no norm after it' if wrong else '',
        'convs': counts,
        'batch_norms': [remaining, still],
        **steps,
        'left': [
            [below_model(one.key), one.why]
            for one in left
            if one.key[0] == 'model'
        ],
    }


def write(
    path: Path, before: Config, after: Config, changes: list[Any]
) -> Config:
    """The config that apply_norm.py would write, loaded again.

    Raises:
        SetupError: it is another one than it should be.
    """
    source = apply_norm.child_source(str(path), before, after, changes, '')
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'converted.py'
        apply_norm.write_child(out, source, after)
        return Config.fromfile(out)


def few_proposals(value: Any) -> Any:
    """A model's config that keeps few proposals, which take time."""
    if isinstance(value, dict):
        return {
            key: min(inner, 20)
            if key in ('max_per_img', 'nms_pre') and isinstance(inner, int)
            else few_proposals(inner)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)(map(few_proposals, value))
    return value


def run(model: Any, scope: str) -> None:
    """Run a model on one image; give its memory back."""
    from ws_mm.shapes import run_with_zeros

    with DefaultScope.overwrite_default_scope(scope):
        try:
            run_with_zeros(model, scope, size=SIZE)
        finally:
            model.to('meta')


def attempt(step: Callable[[], Any]) -> str:
    """'' where a step works, else the first line of its error."""
    try:
        step()
    # Whatever a model may raise that wants other inputs.
    except Exception as error:
        return reason(error)
    return ''


def below_model(key: Iterable[Any]) -> str:
    """Path of keys below the model."""
    return '.'.join(map(str, list(key)[1:]))


def run_all(
    function: Callable[..., dict[str, Any]],
    jobs: list[tuple[Any, ...]],
    processes: int,
    records: Records,
) -> None:
    """Run jobs in processes and append their records.

    Raises:
        SetupError: a process died, such as for want of memory.
    """
    if not jobs:
        return
    bar = ProgressBar(len(jobs))
    if processes == 1:
        for job in jobs:
            records.add(function(*job))
            bar.update()
        print()
        return
    with ProcessPoolExecutor(processes) as pool:
        running = [pool.submit(function, *job) for job in jobs]
        try:
            for done in as_completed(running):
                records.add(done.result())
                bar.update()
        except BrokenProcessPool as error:
            raise SetupError(
                'A process of the sweep was killed, by want of memory or by '
                'hand. What is done is kept: the same command continues, '
                'with --processes 1 in less memory.'
            ) from error
    print()


def sweep(args: argparse.Namespace) -> Records:
    """Run what is not yet in the records."""
    check_writable(args.out_dir, 'OUT_DIR')
    header = dict(
        kind='sweep',
        conv=args.conv,
        norm=args.norm,
        every=args.every,
        packages=args.packages,
        versions=versions(),
    )
    todo = {}
    for package in args.packages:
        _, configs, _ = shipped(package)
        for name in configs[:: args.every]:
            todo[f'{package}::{name}'] = (package, name)
    records = Records(Path(args.out_dir) / 'records.jsonl', header)
    done = records.of('config', 'config')
    jobs = [job for name, job in todo.items() if name not in done]
    print(f'{len(todo)} configs, {len(jobs)} to load')
    run_all(load, jobs, args.processes, records)
    built = records.of('model', 'model')
    first: dict[str, str] = {}
    for name, record in sorted(records.of('config', 'config').items()):
        if record['model']:
            first.setdefault(record['model'], name)
    new = [
        (*todo[name], digest, args.conv, args.norm)
        for digest, name in first.items()
        if digest not in built
    ]
    print(f'{len(first)} distinct models, {len(new)} to convert and build')
    run_all(convert, new, args.processes, records)
    return records


def main() -> None:
    """Sweep, print the result, publish it if asked."""
    args = parse_args()
    if args.processes < 1 or args.every < 1:
        raise SetupError('--processes and --every must be at least 1.')
    os.environ.setdefault('HF_HUB_OFFLINE', '1')
    summary = summarize(sweep(args))
    print(table(summary))
    if args.publish:
        folder = Path(args.publish)
        check_writable(args.publish, '--publish')
        (folder / 'sweep.md').write_text(page(summary))
        (folder / 'sweep.json').write_text(
            json.dumps(summary, indent=1) + '\n'
        )
        print(f'written: {folder / "sweep.md"}, {folder / "sweep.json"}')


if __name__ == '__main__':
    launch.run(main)
