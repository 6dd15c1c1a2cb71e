"""Sum up a sweep of configs as JSON and as a page of docs/."""

import functools
import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from proofs.long_runs import Records
from support.checks import SetupError

# Pixels of the image that a model runs on.
SIZE = 128
CONVERTED, APART, NORMS, NONE, FAILED = (
    'converted',
    'parts converted',
    'norms only',
    'accepts no norm',
    'failed',
)


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
        steps: Counter[str] = Counter()
        errors: dict[str, dict[str, Any]] = {}
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
                if outcome in (CONVERTED, APART, NORMS):
                    _count_steps(model, steps, errors)
        result['packages'][package] = dict(
            files=files,
            configs=len(configs),
            swept=of_configs.total(),
            by_outcome=dict(of_configs),
            models=len(seen),
            models_by_outcome=dict(of_models),
            convs_of_converted=dict(convs),
            steps=dict(steps),
            errors=errors,
            reasons=reasons,
        )
    result['left_alone'] = _left_alone(models.values())
    return result


def _count_steps(
    model: dict[str, Any],
    steps: Counter[str],
    errors: dict[str, dict[str, Any]],
) -> None:
    """Count what a changed model goes through, and why not."""
    remaining, still = model['batch_norms']
    steps['no batch norm'] += not remaining
    steps['no batch norm, --remaining'] += not still
    for step in ('runs', 'bakes'):
        steps[step] += not model[step]
        if model[step] and model[step] != 'built in parts':
            key = f'{step[:-1]}: {model[step]}'
            entry = errors.setdefault(
                key, dict(models=0, example=model['config'])
            )
            entry['models'] += 1


def _left_alone(models: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Count the parts left unconverted, by reason."""
    from ws_mm.config_fit import ALONE

    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for model in models:
        generic = set()
        for key, text in model.get('left', ()):
            text = re.sub(r'^\d+ convolutions', 'convolutions', text)
            text = re.sub(r': [\w.]+(, .*)?$', '', text)
            text = re.sub(
                r'\S+( and \d+ more)? (would have no norm)', r'some \2', text
            )
            text = re.sub(r'^\d+ (batch norms .*) \(.*\): .*', r'\1', text)
            text = re.sub(r'\S+ (is not called)', r'a filter \1', text)
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
    if summary['every'] > 1:
        every = f'one in {summary["every"]}'
        row(f'of them swept, {every}', lambda p: p['swept'])
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
    for step, words in (
        ('no batch norm', 'no batch norm is left'),
        ('no batch norm, --remaining', 'none is left with `--remaining`'),
        ('runs', 'runs on one image, weights of zero'),
        ('bakes', 'bakes, by names and order'),
    ):
        row(
            f'changed models: {words}',
            lambda p, step=step: p['steps'].get(step, 0),
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
        'here, such as transformers, fairscale or lap.',
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
    lines += ['', '| does not | models | such as |', '|---|---|---|']
    for package in packages.values():
        for text, entry in sorted(
            package['errors'].items(), key=lambda item: -item[1]['models']
        ):
            text = text.replace('|', '\\|')
            lines.append(
                f'| {text} | {entry["models"]} | `{entry["example"]}` |'
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
    every = f' --every {summary["every"]}' if summary['every'] > 1 else ''
    return (
        '# Shipped configs, converted\n\n'
        'Written by `python tools/proofs/sweep_configs.py work_dirs/sweep '
        f'--publish docs{every}`,\n'
        f'with {found}.\n\n'
        'Each config goes the way of a user: '
        '`tools/model_converters/apply_norm.py '
        f'--conv {summary["conv"]} --norm {summary["norm"]} --backbone '
        'convert`\nwrites it, it is loaded again and compared, its model is '
        'built without memory for '
        'its weights,\nand every standardized convolution must have a norm, '
        'judged by names and order (`ws_mm.check`).\nThe model then runs on '
        f'one image of {SIZE} pixels with weights of zero, and is baked. '
        'Models are the\nsame if they differ only in losses, training and '
        'testing settings, preprocessing, classes or\ninitial weights. '
        'Training is not part of it; `tools/proofs/try_configs.py` trains '
        'some.\n\n' + table(summary)
    )
