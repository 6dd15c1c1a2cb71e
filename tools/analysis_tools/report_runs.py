r"""Show one or several trainings on one page of HTML, without a network.

    python tools/analysis_tools/report_runs.py WORK_DIR [WORK_DIR ...] \
        --out REPORT.html

A work dir is one of tools/train.py, or of MMDetection's or MMSegmentation's
own train.py. Pictures are those of all folders below it: --show-dir of
test.py, draw=True of the visualization hook. A Traceback is looked for in the
log and in files such as console.log or slurm.out in the work dir.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from mmengine.config import Config
from support import launch, runs
from support.files import write_text
from support.page import grid, legend, page, panel, picture, table
from support.runs import Curve, Run

AXES = ('iterations', 'images seen', 'hours of training')
UNKNOWN = '-'


def parse_args() -> argparse.Namespace:
    """Command line of the report."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('work_dirs', nargs='+', type=Path, metavar='WORK_DIR')
    parser.add_argument('--out', type=Path, required=True, help='HTML file')
    parser.add_argument(
        '--base',
        type=Path,
        help='config to compare each run with; default: the one of the '
        "run's name in configs/, or of mmdet or mmseg, if there is one",
    )
    parser.add_argument(
        '--pictures',
        type=int,
        default=8,
        help='most pictures of each run, the last ones (default: 8)',
    )
    return parser.parse_args()


def overview(found: dict[str, Run]) -> Iterator[str]:
    """A row for each run, and where those stopped that did not end."""
    head = 'run', 'folder', 'state', 'last line of the log', 'last value'
    rows = []
    for name, run in found.items():
        cause = run.traceback.splitlines()[-1:]
        state = 'ended' if run.ended else f'died: {cause[0]}' if cause else ''
        loss = run.train.get('loss', {})
        bad = [step for step, y in loss.items() if not math.isfinite(y)]
        if bad:
            state += f'; the loss is {loss[bad[0]]} in iteration {bad[0]}'
        words = state or 'did not end', run.progress or UNKNOWN
        count = run.images or UNKNOWN
        rows.append((name, run.folder.absolute(), *words, run.last, count))
    yield table([*head, 'images per iteration'], rows)
    for name, run in found.items():
        if not run.ended:
            yield (
                f'<h3>{escape(name)} did not end</h3>\n<p>Its last value is '
                f'of iteration {run.last}. The last lines of its log:</p>\n'
                f'<pre>{escape(run.tail)}</pre>'
            )
            yield (
                f'<pre>{escape(run.traceback)}</pre>'
                if run.traceback
                else '<p>There is no Traceback in the log or in a text file '
                'of the work dir: it was killed, or still runs, or the cause '
                'is where the output of the command went.</p>'
            )


def metrics(found: dict[str, Run]) -> Iterator[str]:
    """Best and last value of each metric."""
    rows = []
    for key in keys_of(run.metrics for run in found.values()):
        row = [key]
        for run in found.values():
            curve = run.metrics.get(key)
            best = max(curve, key=lambda step: curve[step]) if curve else 0
            row.append(
                f'{curve[max(curve)]:g} (highest {curve[best]:g} at {best})'
                if curve
                else UNKNOWN
            )
        rows.append(row)
    for key in keys_of(run.tests for run in found.values()):
        values = [run.tests.get(key, UNKNOWN) for run in found.values()]
        rows.append([f'test: {key}', *values])
    yield (
        table(['last', *found], rows)
        if rows
        else ('<p>No validation and no test was recorded.</p>')
    )


def keys_of(dicts: Iterator[dict]) -> list[str]:
    """All keys, in the order in which they come."""
    return list(dict.fromkeys(key for each in dicts for key in each))


def along(run: Run, axis: str, curve: Curve) -> dict[float, float]:
    """Values over another axis than iterations; empty if it is unknown."""
    if axis == 'iterations':
        return curve
    if axis == 'images seen':
        count = run.images
        return {step * count: y for step, y in curve.items()} if count else {}
    hours = run.hours()
    if not hours:
        return {}
    places = np.interp(list(curve), list(hours), list(hours.values()))
    return dict(zip(places.tolist(), curve.values(), strict=True))


def curves(found: dict[str, Run]) -> Iterator[str]:
    """Every value over three axes, one of them shown."""
    yield legend(found)
    all_of = [{**run.train, **run.metrics} for run in found.values()]
    found_metrics = keys_of(run.metrics for run in found.values())
    keys = sorted(
        keys_of(iter(all_of)),
        key=lambda key: ('loss' not in key, key not in found_metrics),
    )
    for number, axis in enumerate(AXES):
        checked = '' if number else ' checked'
        yield (
            f'<input type="radio" name="x" id="x{number}"{checked}>'
            f'<label for="x{number}">{axis}</label>'
        )
    for number, axis in enumerate(AXES):
        drawn = []
        for key in keys:
            lines = {
                index: along(run, axis, all_of[index][key])
                for index, run in enumerate(found.values())
                if key in all_of[index]
            }
            drawn.append(panel(key, axis, lines))
        yield grid(drawn, f'x{number}')


def pictures(found: dict[str, Run], most: int) -> Iterator[str]:
    """The last pictures of each run, with their numbers in order."""
    for name, run in found.items():
        yield f'<h3>{escape(name)}</h3>'
        paths = sorted(
            (
                p
                for kind in ('png', 'jpg')
                for p in run.folder.rglob(f'*.{kind}')
            ),
            key=lambda p: [int(n) for n in re.findall(r'\d+', str(p))],
        )[-most:]
        if paths:
            yield '<p>Two halves: left the ground truth, right the prediction.'
            yield grid(
                picture(p, str(p.relative_to(run.folder))) for p in paths
            )
        else:
            yield (
                '<p>None below the work dir. tools/test.py --show-dir draws '
                'them, or default_hooks.visualization.draw=True.</p>'
            )


def norms(found: dict[str, Run]) -> Iterator[str]:
    """What hooks recorded, layers at the end, and running statistics."""
    for label, part in (
        ('iterations', [run.others for run in found.values()]),
        ('layer', [runs.layers(run.folder) for run in found.values()]),
        ('layer', [runs.statistics(run.folder) for run in found.values()]),
    ):
        drawn = [
            panel(
                key, label, {i: p[key] for i, p in enumerate(part) if key in p}
            )
            for key in keys_of(iter(part))
        ]
        if drawn:
            yield grid(drawn)
    if not any(run.others for run in found.values()):
        yield (
            '<p>No singularities were recorded: custom_hooks = '
            "[dict(type='ws_mm.SingularitiesHook')] does so.</p>"
        )


def differences(configs: dict[str, Config | None]) -> str:
    """A table of the keys whose values are not the same in all."""
    parts = {
        name: dict(runs.flat(config._cfg_dict))
        for name, config in configs.items()
        if config is not None
    }
    first = next(iter(parts.values()), {})
    rows = [
        [key, *(part.get(key, UNKNOWN) for part in parts.values())]
        for key in keys_of(iter(parts.values()))
        if any(
            part.get(key, UNKNOWN) != first.get(key, UNKNOWN)
            for part in parts.values()
        )
    ]
    return table(['key', *parts], rows) if rows else '<p>No difference.</p>'


def configs(found: dict[str, Run], base: Path | None) -> Iterator[str]:
    """Each run against its base, and all against each other."""
    for name, run in found.items():
        if run.config is None:
            yield f'<p>{escape(name)}: the config is gone.</p>'
            continue
        path = base or runs.base_of(run.folder)
        if path is None:
            yield (
                f'<p>{escape(name)}: no config of that name is in configs/, '
                'mmdet or mmseg; --base names one.</p>'
            )
            continue
        yield f'<h3>{escape(name)} against {escape(str(path))}</h3>'
        yield differences(
            {path.name: launch.read_config(path), name: run.config}
        )
    if len(found) > 1:
        yield '<h3>Between the runs</h3>'
        yield differences({name: run.config for name, run in found.items()})


def environments(found: dict[str, Run]) -> Iterator[str]:
    """What the logs say of machine and versions."""
    parts = [run.environment for run in found.values()]
    rows = [
        [k, *(p.get(k, UNKNOWN) for p in parts)] for k in keys_of(iter(parts))
    ]
    yield table(['', *found], rows) if rows else '<p>No log says it.</p>'


def main() -> None:
    """Read the runs and write the page."""
    args = parse_args()
    found: dict[str, Run] = {}
    for folder in args.work_dirs:
        names = [path.absolute().name for path in args.work_dirs]
        short = folder.absolute().name
        name = str(folder) if names.count(short) > 1 else short
        found[name] = runs.read_run(folder)
    sections = {
        'Runs': overview(found),
        'Metrics': metrics(found),
        'Curves': curves(found),
        'Predictions': pictures(found, args.pictures),
        'Norms': norms(found),
        'Config': configs(found, args.base),
        'Environment': environments(found),
    }
    parts = []
    for title, section in sections.items():
        parts += [f'<section><h2>{title}</h2>', *section, '</section>']
    write_text(args.out, page(', '.join(found), parts))
    print(f'{args.out} is written: {args.out.stat().st_size / 1e6:.1f} MB.')


if __name__ == '__main__':
    launch.run(main)
