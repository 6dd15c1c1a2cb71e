"""Convert and build every config that the installed packages ship.

    python tools/sweep_configs.py work_dirs/sweep --processes 2

Each distinct model (configs share one that differ in losses, settings,
classes or initial weights) is converted as tools/apply_norm.py does, built
without memory for its weights, and every standardized convolution is looked
at. One line per config and per model goes to OUT_DIR/records.jsonl at once;
started again, it continues there.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import launch
import torch
from checks import SetupError, check_writable
from mmengine.config import Config
from mmengine.utils import ProgressBar

DISTRIBUTIONS = {
    'mmdet': ('onedl-mmdetection', 'mmdet'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation'),
    'mmcv': ('onedl-mmcv', 'mmcv'),
    'mmengine': ('onedl-mmengine', 'mmengine'),
    'torch': ('torch',),
}
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
CONVERTED, APART, NORMS, NONE, FAILED = (
    'converted',
    'parts converted',
    'norms only',
    'accepts no norm',
    'failed',
)


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


@functools.cache
def shipped(package: str) -> tuple[Path, list[str], int]:
    """Root of a package's configs, the configs, and its number of files.

    What lies in ``_base_`` folders is no config of its own.

    Raises:
        SetupError: the package is not installed, or without configs.
    """
    spec = importlib.util.find_spec(package)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    root = Path(locations[0] if locations else '.') / '.mim' / 'configs'
    files = [
        path
        for path in root.rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    ]
    if not locations or not files:
        raise SetupError(
            f'--packages {package}: not installed, or without configs. '
            'Packages that ship configs are mmdet and mmseg.'
        )
    configs = sorted(
        str(path.relative_to(root))
        for path in files
        if path.suffix == '.py' and '_base_' not in path.parts
    )
    return root, configs, len(files)


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


def grouped(text: str) -> str:
    """A reason in words that all configs share which have it."""
    if text.startswith('needs '):
        return text
    missing = (
        re.search(r"No module named '(\w+)", text)
        or re.search(r'Failed to import (\w+)', text)
        or re.search(r'(\w+) is not installed', text)
        or re.search(r'install (?:the )?(mmpretrain|fairscale)', text)
    )
    if missing:
        return f'needs {missing[1]}, which is not installed'
    if text.startswith('FileNotFoundError'):
        return 'inherits from a file that is not shipped'
    return re.sub(r'\s+', ' ', text)


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
    """Record of one model: convert, build, look at every convolution."""
    import ws_mm
    from ws_mm.configs import ALONE, build_without_memory, convert_config

    torch.set_num_threads(1)
    root, _, _ = shipped(package)
    record = dict(kind='model', model=digest, config=f'{package}::{name}')
    with quiet(root.parent):
        cfg = Config.fromfile(root / name)
        before = copy.deepcopy(cfg)
        scope = cfg.get('default_scope') or 'mmengine'
        try:
            changes, left, built = convert_config(cfg, conv, norm)
            report = ws_mm.check(built)
            wrong = {one.name for one in report if one.mistake}
            if wrong:
                original = build_without_memory(before.model, scope)
                wrong -= {
                    one.name for one in ws_mm.check(original) if one.mistake
                }
        except Exception as error:
            why = reason(error.__cause__ or error)
            return {**record, 'outcome': FAILED, 'reason': why}
    kinds = Counter(change.key[-1] for change in changes)
    outcome = (
        FAILED
        if wrong
        else APART
        if any(ALONE in one.why for one in left)
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
        'left': [[below_model(one.key), one.why] for one in left],
    }


def below_model(key: Iterable[Any]) -> str:
    """Path of keys below the model."""
    return '.'.join(map(str, list(key)[1:]))


class Records:
    """Lines of JSON that survive a kill."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.header = header
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text().splitlines():
                # The last one may be cut short.
                with contextlib.suppress(json.JSONDecodeError):
                    self.lines.append(json.loads(line))
        if self.lines and self.lines[0] != header:
            raise SetupError(
                f'{path} was made by another sweep ({self.lines[0]}). Give '
                'another OUT_DIR, or delete it.'
            )
        if not self.lines:
            path.write_text(json.dumps(header) + '\n')
            self.lines = [header]
        elif not path.read_text().endswith('\n'):
            with path.open('a') as file:
                file.write('\n')

    def add(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self.lines.append(record)
        with self.path.open('a') as file:
            file.write(json.dumps(record) + '\n')

    def of(self, kind: str, key: str) -> dict[str, dict[str, Any]]:
        """The records of a kind by one of their values."""
        return {
            line[key]: line
            for line in self.lines
            if line.get('kind') == kind and line[key]
        }


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


def versions() -> dict[str, str]:
    """Versions of what takes part."""
    import ws_mm

    found = {'python': platform.python_version(), 'ws_mm': ws_mm.__version__}
    for name, distributions in DISTRIBUTIONS.items():
        for distribution in distributions:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                version = importlib.metadata.version(distribution)
                found[name] = f'{distribution} {version}'
                break
    return found


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


def summarize(records: Records) -> dict[str, Any]:
    """Count configs and models by package and outcome, with reasons."""
    models = records.of('model', 'model')
    result: dict[str, Any] = dict(records.header)
    result['packages'] = {}
    for package in records.header['packages']:
        _, configs, files = shipped(package)
        of_models: Counter[str] = Counter()
        of_configs: Counter[str] = Counter()
        reasons: dict[str, dict[str, Any]] = {}
        seen = set()
        convs: Counter[str] = Counter()
        for name, record in records.of('config', 'config').items():
            if not name.startswith(f'{package}::'):
                continue
            digest = record['model']
            model = models.get(digest, record) if digest else record
            outcome = model.get(
                'outcome',
                'no model' if model['reason'] == 'no model' else FAILED,
            )
            of_configs[outcome] += 1
            if outcome in (FAILED, 'no model'):
                entry = reasons.setdefault(
                    grouped(model['reason']),
                    dict(outcome=outcome, configs=0, example=name),
                )
                entry['configs'] += 1
            if digest and digest not in seen:
                seen.add(digest)
                of_models[outcome] += 1
                if outcome == CONVERTED:
                    convs.update(model['convs'])
        result['packages'][package] = dict(
            files=files,
            configs=len(configs),
            swept=of_configs.total(),
            by_outcome=dict(of_configs),
            models=len(seen),
            models_by_outcome=dict(of_models),
            convs_of_converted=dict(convs),
            reasons=reasons,
        )
    result['left_alone'] = _left_alone(models.values())
    return result


def _left_alone(models: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What stayed in converted models, by reason."""
    from ws_mm.configs import ALONE

    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for model in models:
        generic = set()
        for key, text in model.get('left', ()):
            text = re.sub(r'^\d+ convolutions', 'convolutions', text)
            text = re.sub(r': [\w.]+(, .*)?$', '', text)
            text = re.sub(r'\S+( and \d+ more)? (would)', r'some \2', text)
            text = re.sub(r'^\w+ builds neither', 'it builds neither', text)
            text = re.sub(r'(, since the model .*: ).*', r'\1...', text)
            text = re.sub(r'^.*\.py is a config', 'a .py is a config', text)
            text = re.sub(r'^\w+ (takes no norm_cfg)', r'its class \1', text)
            text = re.sub(
                r': \w+ (takes no conv_cfg)', r': its class \1', text
            )
            if text.startswith(ALONE):
                text = f'{ALONE}, since a package for the model is missing'
            if 'is not installed' in text:
                text = 'a package that it needs is missing'
            if text.startswith('groups of BCN'):
                text = 'fewer than 32 groups of BCN'
            generic.add(text)
            examples.setdefault(text, f'{model["config"]} {key}')
        counts.update(generic)
    return {
        text: dict(models=count, example=examples[text])
        for text, count in counts.most_common()
    }


def share(summary: dict[str, Any]) -> tuple[int, int]:
    """Configs converted, and configs that accept a norm at all."""
    counts: Counter[str] = Counter()
    for package in summary['packages'].values():
        counts.update(package['by_outcome'])
    good = counts[CONVERTED] + counts[APART] + counts[NORMS]
    return good, good + counts[FAILED]


def table(summary: dict[str, Any]) -> str:
    """The summary as markdown."""
    packages = summary['packages']
    good, able = share(summary)
    apart = sum(p['by_outcome'].get(APART, 0) for p in packages.values())
    lines = [
        '| | ' + ' | '.join(packages) + ' |',
        '|---' * (len(packages) + 1) + '|',
    ]

    def row(title: str, value: Callable[[dict], Any]) -> None:
        cells = (str(value(package)) for package in packages.values())
        lines.append(f'| {title} | ' + ' | '.join(cells) + ' |')

    row('files shipped', lambda p: p['files'])
    row('of them configs (`.py` outside of `_base_`)', lambda p: p['configs'])
    for outcome, words in (
        (CONVERTED, 'converted and built'),
        (APART, 'parts converted, each built alone: a package is missing'),
        (NORMS, 'norms converted and built, convolutions kept'),
        (NONE, 'accepts no norm of channels'),
        ('no model', 'has no model'),
        (FAILED, 'not converted, below'),
    ):
        row(
            f'configs: {words}',
            lambda p, outcome=outcome: p['by_outcome'].get(outcome, 0),
        )
    row('distinct models', lambda p: p['models'])
    for outcome in (CONVERTED, APART, NORMS, NONE, FAILED):
        row(
            f'models: {outcome}',
            lambda p, outcome=outcome: p['models_by_outcome'].get(outcome, 0),
        )
    for kind, words in (
        ('standardized', 'standardized'),
        ('plain, normalized', 'plain under a norm'),
        ('plain', 'plain without a norm'),
    ):
        row(
            f'convolutions of the converted models: {words}',
            lambda p, kind=kind: p['convs_of_converted'].get(kind, 0),
        )
    lines += [
        '',
        f'Of {able} configs that accept a norm, or may (those that failed '
        f'count), {good} were converted and built, '
        f'{100 * good / max(able, 1):.1f} %: {good - apart} as whole models '
        f'({100 * (good - apart) / max(able, 1):.1f} %), and {apart} part by '
        'part, because their model needs a package that is not installed '
        'here (transformers, fairscale, lap or mmpretrain).',
        '',
        '| not converted, because | configs | such as |',
        '|---|---|---|',
    ]
    for package in packages.values():
        for text, entry in sorted(
            package['reasons'].items(), key=lambda item: -item[1]['configs']
        ):
            text = text.replace('|', '\\|')
            lines.append(
                f'| {text} | {entry["configs"]} | `{entry["example"]}` |'
            )
    lines += [
        '',
        '| left alone in a converted model | models | such as |',
        '|---|---|---|',
    ]
    for text, entry in summary['left_alone'].items():
        text = text.replace('|', '\\|')
        lines.append(f'| {text} | {entry["models"]} | `{entry["example"]}` |')
    return '\n'.join(lines) + '\n'


def page(summary: dict[str, Any]) -> str:
    """The published page."""
    found = ', '.join(
        f'{value}' if ' ' in value else f'{name} {value}'
        for name, value in summary['versions'].items()
    )
    return (
        '# Every shipped config, converted\n\n'
        'Written by `python tools/sweep_configs.py work_dirs/sweep --publish '
        'docs`,\n'
        f'with {found}.\n\n'
        f'Each config is converted as `tools/apply_norm.py` does with '
        f'`--conv {summary["conv"]}\n--norm {summary["norm"]}`, each distinct '
        'model is built without memory for its weights and\nwithout '
        'pretrained ones, and every standardized convolution must have a '
        'norm,\njudged by names and order (`ws_mm.check`). No model runs '
        'here: that it trains is\nshown by `tests/test_apply_norm.py`, for '
        'a few. Models are the same if they differ only in losses, training '
        'and testing\nsettings, preprocessing, classes or initial weights.'
        '\n\n' + table(summary)
    )


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
