"""Read what a training by mmengine's Runner left in its work dir."""

import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config

from support import ROOT
from support.checkpoints import read_checkpoint
from support.checks import SetupError
from support.files import read_lines

PROGRESS = re.compile(
    r'(?:Epoch|Iter)\(train\) +(?:\[ *(\d+)\])?\[ *(\d+)/ *(\d+)\]'
)
TRACEBACK = 'Traceback (most recent call last):'
# Of a training alone: no curves, but numbers of the line itself.
NO_CURVE = {'epoch', 'iter', 'step'}
# Where people send what a training prints; mmengine's log has no traceback.
CONSOLES = ('*.log', '*.out', '*.err', '*.txt')
SINGULARITIES = 'singularities.jsonl'  # of SingularitiesHook
TAIL = 15
LONGEST = 80
Curve = dict[int, float]  # values by iterations that were done


@dataclass
class Run:
    """One training, of one or several starts.

    Attributes:
        folder: its work dir.
        train: curves of training, by key.
        metrics: curves of validation.
        others: what hooks recorded beside them.
        tests: results of tests in the same work dir, by key.
        config: as it was dumped; None if it is gone.
        environment: first lines of the log.
        progress: words of the last iteration that was logged.
        ended: whether the log shows the last iteration.
        tail: last lines of the log.
        traceback: last one that was found; '' without.
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
    def last(self) -> int:
        """Last iteration with a value."""
        return max((max(curve) for curve in self.train.values()), default=0)

    @property
    def images(self) -> int | None:
        """Images of one iteration in all processes; None if unknown."""
        loader = (self.config or {}).get('train_dataloader') or {}
        size = loader.get('batch_size') or (
            loader.get('batch_sampler') or {}
        ).get('batch_size')
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
    if not folder.is_dir():
        raise SetupError(f'No folder {folder}.')
    logs = sorted(folder.glob('*/*.log'))
    scalars = sorted(folder.glob('*/vis_data/scalars.json'))
    if not logs and not scalars:
        raise SetupError(
            f'{folder} is no work dir of a training: it has no '
            'TIME/TIME.log and no TIME/vis_data/scalars.json. Give the '
            'folder that --work-dir named.'
        )
    run = Run(folder)
    _read_curves(run, scalars)
    texts = {path: path.read_text(errors='replace') for path in logs}
    trained = [p for p, text in texts.items() if PROGRESS.search(text)]
    log = (trained or logs or [None])[-1]
    run.config = _config(folder, log or scalars[-1].parent)
    if log:
        _read_log(run, texts[log])
    for path in [log] * bool(log) + sorted(
        path for kind in CONSOLES for path in folder.glob(kind)
    ):
        _, found, rest = path.read_text(errors='replace').rpartition(TRACEBACK)
        if found and not run.ended:
            run.traceback = '\n'.join((found + rest).splitlines()[:LONGEST])
    for path in sorted(folder.glob('*/*.json')):
        for line in read_lines(path):
            run.tests |= {k: v for k, v in line.items() if _is_metric(k, v)}
    return run


def _read_curves(run: Run, files: list[Path]) -> None:
    """Sort the lines of scalars; a resumed run goes over what it repeats."""
    first, last = 0, 0
    for path in files:
        lines = list(read_lines(path))
        steps = [line['step'] for line in lines if 'iter' in line]
        if steps and steps[0] == first:  # a new training, from the start
            run.train, run.metrics, run.others = {}, {}, {}
        first = first or (steps or [0])[0]
        for line in lines:
            step, kind = line.get('step', 0), run.others
            if 'iter' in line:
                kind, last = run.train, step
            elif 'time' in line:
                # The step of a validation may count epochs, or nothing.
                kind, step = run.metrics, last
            for key, value in line.items():
                if kind is run.metrics and not _is_metric(key, value):
                    continue
                if key not in NO_CURVE and isinstance(value, (int, float)):
                    kind.setdefault(key, {})[step] = value


def _is_metric(key: str, value: Any) -> bool:
    timing = {*NO_CURVE, 'time', 'data_time'}
    return isinstance(value, (int, float)) and key not in timing


def _config(folder: Path, near: Path) -> Config | None:
    """The config that was dumped beside a log, else into the work dir."""
    for path in (
        near.parent / 'vis_data/config.py',
        near / 'config.py',
        *sorted(folder.glob('*.py')),
    ):
        if path.is_file():
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
            run.environment[match[1]] = match[2]
    found = list(PROGRESS.finditer(text))
    if not found:
        return
    epoch, iteration, count = found[-1].groups()
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
    path = folder / SINGULARITIES
    lines = list(read_lines(path)) if path.is_file() else []
    curves: dict[str, Curve] = {}
    for place, layer in enumerate(
        lines[-1]['layers'].values() if lines else (), 1
    ):
        for key, value in layer.items():
            curves.setdefault(f'{key}, last', {})[place] = value
    return curves


def statistics(folder: Path) -> dict[str, Curve]:
    """Medians of running statistics in the last checkpoint, over layers."""
    saved = sorted(folder.glob('*.pth'), key=lambda p: p.stat().st_mtime)
    if not saved:
        return {}
    weights = read_checkpoint(saved[-1]).get('state_dict') or {}
    curves: dict[str, Curve] = {}
    for kind in ('running_mean', 'running_var'):
        values = [v for k, v in weights.items() if k.endswith(kind)]
        for place, value in enumerate(values, 1):
            size = value.double().abs().median().item()
            name = f'{kind}, median size, {saved[-1].name}'
            curves.setdefault(name, {})[place] = size
    return curves


def base_of(folder: Path) -> Path | None:
    """The config of a run's name among those of the packages."""
    packages = [importlib.util.find_spec(name) for name in ('mmdet', 'mmseg')]
    roots = [ROOT / 'configs'] + [
        Path(spec.origin).parent / '.mim/configs' for spec in packages if spec
    ]
    for dumped in folder.glob('*.py'):
        for root in roots:
            for path in root.rglob(dumped.name):
                return path
    return None


def flat(config: Any, key: str = '') -> Iterator[tuple[str, Any]]:
    """Yield the values of a config by keys.

    A dict in a list goes by its type, so that a step that is put into a
    pipeline leaves the keys of the others.
    """
    if isinstance(config, dict):
        for name, value in config.items():
            yield from flat(value, f'{key}.{name}'.lstrip('.'))
        if not config:
            yield key, {}
    elif isinstance(config, (list, tuple)) and any(
        isinstance(item, dict) for item in config
    ):
        seen: dict[str, int] = defaultdict(int)
        for item in config:
            name = str(item.get('type') if isinstance(item, dict) else item)
            seen[name] += 1
            more = f' {seen[name]}' if seen[name] > 1 else ''
            yield from flat(item, f'{key}[{name}{more}]')
    else:
        yield key, list(config) if isinstance(config, tuple) else config
