"""Read what a training by mmengine's Runner left in its work dir."""

import contextlib
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config

from support import ROOT
from support.checkpoints import read_checkpoint
from support.checks import SetupError
from support.files import read_lines

Curve = dict[int, float]  # values by iterations that were done, or by layers
PROGRESS = re.compile(
    r'(?:Epoch|Iter)\(train\) +(?:\[ *(\d+)\])?\[ *(\d+)/ *(\d+)\]'
)
TRACEBACK = 'Traceback (most recent call last):'
# Where people send what a training prints: mmengine logs no Traceback.
CONSOLES = ('*.log', '*.out', '*.err', '*.txt')
TIME = '[0-9]*_[0-9]*/*.json'
TAIL, LONGEST = 15, 80  # lines of a log, and of a Traceback
NO_CURVE = {'epoch', 'iter', 'step'}
NO_METRIC = {*NO_CURVE, 'time', 'data_time', 'memory'}


@dataclass
class Run:
    """One training, of one or several starts.

    Attributes:
        folder: its work dir.
        train: curves of training, by key.
        metrics: curves of validation.
        others: what hooks recorded beside them.
        tests: results of the last test in the same work dir.
        config: as it was dumped; None if it is gone.
        environment: what the log says of it.
        progress: the last iteration that was logged, in words.
        ended: whether the log shows the end.
        tail: last lines of the log.
        traceback: of a run that did not end; '' if none was found.
    """

    folder: Path
    train: dict[str, Curve] = field(default_factory=dict)
    metrics: dict[str, Curve] = field(default_factory=dict)
    others: dict[str, Curve] = field(default_factory=dict)
    tests: dict[str, float] = field(default_factory=dict)
    config: Config | None = None
    environment: dict[str, str] = field(default_factory=dict)
    progress: str = ''
    ended: bool = False
    tail: str = ''
    traceback: str = ''

    @property
    def images(self) -> int | None:
        """Images of one iteration in all processes; None if unknown."""
        loader = (self.config or {}).get('train_dataloader') or {}
        sampler = loader.get('batch_sampler') or {}
        size = loader.get('batch_size') or sampler.get('batch_size')
        return size and size * int(self.environment.get('GPU number', 1))

    def hours(self) -> Curve:
        """Hours of training by iterations, validation left out."""
        total, before, hours = 0.0, 0, {}
        for step, seconds in sorted(self.train.get('time', {}).items()):
            total += (step - before) * seconds / 3600
            before, hours[step] = step, total
        return hours


def read_run(folder: Path) -> Run:
    """Read a work dir.

    Raises:
        SetupError: it is none.
    """
    scalars = sorted(folder.glob('*/vis_data/scalars.json'))
    logs = {p: _text(p) for p in sorted(folder.glob('*/*.log'))}
    if not logs and not scalars:
        raise SetupError(
            f'{folder} is no work dir of a training: it has no '
            'TIME/TIME.log and no TIME/vis_data/scalars.json. Give the '
            'folder that --work-dir named.'
        )
    run = Run(folder)
    _read_curves(run, scalars)
    # Tests have logs, too.
    of_training = [p for p, text in logs.items() if PROGRESS.search(text)]
    log = (of_training or [*logs] or [None])[-1]
    start = log.parent if log else scalars[-1].parents[1]
    run.config = _config(start / 'vis_data/config.py', *folder.glob('*.py'))
    if log:
        _read_log(run, logs[log])
    files = [p for kind in CONSOLES for p in sorted(folder.glob(kind))]
    for text in [*map(_text, files), logs.get(log, '')]:
        _, found, rest = text.rpartition(TRACEBACK)
        if found and not run.ended:
            run.traceback = '\n'.join((found + rest).splitlines()[:LONGEST])
    # Of a test in the work dir, or in a folder of its own below it.
    results = [*folder.glob(TIME), *folder.glob(f'*/{TIME}')]
    for path in sorted(results, key=lambda path: path.parent.name):
        for line in read_lines(path):
            run.tests = {k: v for k, v in line.items() if k not in NO_METRIC}
    return run


def _text(path: Path) -> str:
    return path.read_text(errors='replace')


def _read_curves(run: Run, files: list[Path]) -> None:
    """Sort the lines of scalars; a resumed run replaces what it repeats."""
    first, last = 0, 0
    for path in files:
        lines = list(read_lines(path))
        steps = [line['step'] for line in lines if {'iter', 'step'} <= {*line}]
        if steps and steps[0] <= first:  # from the start again
            run.train, run.metrics, run.others = {}, {}, {}
            first = 0
        first = first or (steps or [0])[0]
        for line in lines:
            kind, step, left_out = run.others, line.get('step', 0), NO_CURVE
            if 'iter' in line:
                kind, last = run.train, step
            elif 'time' in line:
                # The step of a validation may count epochs, or nothing.
                kind, step, left_out = run.metrics, last, NO_METRIC
            for key, value in line.items():
                if key not in left_out and isinstance(value, (int, float)):
                    kind.setdefault(key, {})[step] = value


def _config(*paths: Path) -> Config | None:
    """The first of these files that can be read."""
    for path in paths:
        try:
            return Config.fromfile(path, import_custom_modules=False)
        # Whatever the code in a config may raise.
        except Exception:
            continue
    return None


def _read_log(run: Run, text: str) -> None:
    said = text.rpartition(TRACEBACK)[0] or text
    run.tail = '\n'.join(said.splitlines()[-TAIL:])
    block = re.search(r'System environment:\n(.*?)\n-{20}', text, re.S)
    for line in block[1].splitlines() if block else ():
        if match := re.match(r' {4}(\w[^:]*): (.*)', line):
            if match[2] != 'PyTorch built with:':  # a list follows
                run.environment[match[1]] = match[2]
    found = PROGRESS.findall(text)
    if not found:
        return
    epoch, iteration, count = found[-1]
    loop = (run.config or {}).get('train_cfg') or {}
    unit, total = 'epochs', loop.get('max_epochs')
    if total is None:
        # A log by epochs counts the iterations of an endless sampler on.
        unit, total = 'iterations', loop.get('max_iters', count)
        run.progress = f'iteration {iteration} of {total}'
        at_end = iteration == str(total)
    else:
        run.progress = (
            f'iteration {iteration} of {count} in epoch {epoch} of {total}'
        )
        at_end = (epoch, iteration) == (str(total), count)
    run.ended = at_end or f'Saving checkpoint at {total} {unit}' in text


def layers(folder: Path) -> dict[str, Curve]:
    """What SingularitiesHook measured last, over the layers from 1."""
    path = folder / 'singularities.jsonl'
    lines = list(read_lines(path)) if path.is_file() else []
    last = lines[-1].get('layers', {}).values() if lines else []
    keys = {key: None for layer in last for key in layer}
    return {
        f'{key}, last': {n: layer[key] for n, layer in enumerate(last, 1)}
        for key in keys
    }


def statistics(folder: Path) -> dict[str, Curve]:
    """Medians of running statistics in the last checkpoint, over layers."""
    saved = sorted(folder.glob('*.pth'), key=lambda p: p.stat().st_mtime)
    content: dict[str, Any] = {}
    for path in reversed(saved):  # a killed run may have cut the newest
        with contextlib.suppress(SetupError):
            content = read_checkpoint(path)
            break
    curves: dict[str, Curve] = {}
    for name, value in content.get('state_dict', {}).items():
        kind = name.rpartition('.')[2]
        if kind in ('running_mean', 'running_var'):
            curve = curves.setdefault(f'size of {kind}, median, last', {})
            curve[len(curve) + 1] = value.double().abs().median().item()
    return curves


def base_of(folder: Path) -> Path | None:
    """The config of a run's name in configs/, mmdet or mmseg."""
    roots = [ROOT / 'configs']
    for name in ('mmdet', 'mmseg'):
        if spec := importlib.util.find_spec(name):
            roots.append(Path(spec.origin or '').parent / '.mim/configs')
    names = [path.name for path in folder.glob('*.py')]
    found = (p for root in roots for n in names for p in root.rglob(n))
    return next(found, None)


def flat(config: Any, key: str = '') -> Iterator[tuple[str, Any]]:
    """Yield the values of a config by keys.

    A dict in a list goes by its type: a step that is put into a pipeline
    leaves the keys of the others.
    """
    if isinstance(config, dict) and config:
        for name, value in config.items():
            yield from flat(value, f'{key}.{name}'.lstrip('.'))
    elif isinstance(config, (list, tuple)) and 'type' in str(config):
        seen: Counter[str] = Counter()
        for item in config:
            name = str(item.get('type') if isinstance(item, dict) else '')
            seen[name] += 1
            count = f' {seen[name]}' if seen[name] > 1 else ''
            yield from flat(item, f'{key}[{name}{count}]')
    else:
        yield key, list(config) if isinstance(config, tuple) else config
