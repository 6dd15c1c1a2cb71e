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
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from mmengine.config import Config
from support import checks, launch, runs
from support.checks import SetupError
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
    head = 'run', 'folder', 'state', 'last of the log', 'images per iteration'
    rows = []
    for name, run in found.items():
        cause = run.traceback.splitlines()[-1:] or ['no end in the log']
        state = 'ended' if run.ended else f'did not end: {cause[0]}'
        loss = run.train.get('loss', {})
        bad = [step for step, y in loss.items() if not math.isfinite(y)]
        if bad:
            state += f'; the loss is {loss[bad[0]]} in iteration {bad[0]}'
        last = run.progress or UNKNOWN, run.images or UNKNOWN
        rows.append((name, run.folder.absolute(), state, *last))
    yield table(head, rows)
    for name, run in found.items():
        if not run.ended:
            last = max(map(max, run.train.values()), default=0)
            yield (
                f'<h3>{escape(name)} did not end</h3>\n<p>Its last value is '
                f'of iteration {last}. The last lines of its log:</p>\n'
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
    """Last and highest value of each metric."""
    parts = []
    for run in found.values():
        cells = {
            f'test: {key}': f'{value:g}' if isinstance(value, float) else value
            for key, value in run.tests.items()
        }
        for key, curve in run.metrics.items():
            high = max(curve, key=curve.__getitem__)
            cells[key] = f'{curve[max(curve)]:g}'
            if len(curve) > 1:
                cells[key] += f', highest {curve[high]:g} at iteration {high}'
        parts.append(cells)
    yield by_key(found, parts, 'No validation and no test was recorded.')
    cells = [str(cell) for part in parts for cell in part.values()]
    if any(re.match(r'-1(,|$)', cell) for cell in cells):
        yield '<p>-1 of COCO: there is no object of this kind to find.</p>'


def by_key(names: Iterable[str], parts: list[dict], nothing: str) -> str:
    """A table with a row for each key that is in one of the dicts."""
    keys = dict.fromkeys(key for part in parts for key in part)
    rows = [[key, *(p.get(key, UNKNOWN) for p in parts)] for key in keys]
    return table(['', *names], rows) if rows else f'<p>{nothing}</p>'


def panels(label: str, parts: list[dict[str, Curve]]) -> list[str]:
    """A panel for each key: losses, then metrics, then the rest."""
    keys = dict.fromkeys(key for part in parts for key in part)
    return [
        panel(key, label, {n: p[key] for n, p in enumerate(parts) if key in p})
        for key in sorted(keys, key=lambda key: 'loss' not in key)
    ]


def curves(found: dict[str, Run]) -> Iterator[str]:
    """Every value over three axes, one of them shown."""
    yield legend(found)
    for number, axis in enumerate(AXES):
        checked = '' if number else ' checked'
        yield (
            f'<input type="radio" name="x" id="x{number}"{checked}>'
            f'<label for="x{number}">{axis}</label>'
        )
    for number, axis in enumerate(AXES):
        parts = [
            {key: over(run, axis, curve) for key, curve in all_of.items()}
            for run in found.values()
            for all_of in [{**run.metrics, **run.train}]
        ]
        yield grid(panels(axis, parts), f'x{number}')


def over(run: Run, axis: str, curve: Curve) -> dict[float, float]:
    """Values over another axis than iterations; empty if it is unknown."""
    if axis == AXES[0]:
        return curve
    if axis == AXES[1]:
        return {x * run.images: y for x, y in curve.items() if run.images}
    hours = run.hours()
    if not hours:
        return {}
    places = np.interp(list(curve), list(hours), list(hours.values()))
    return dict(zip(places.tolist(), curve.values(), strict=True))


def pictures(found: dict[str, Run], most: int) -> Iterator[str]:
    """The last pictures of each run, by the numbers in their names."""
    for name, run in found.items():
        yield f'<h3>{escape(name)}</h3>'
        every = [*run.folder.rglob('*.png'), *run.folder.rglob('*.jpg')]
        every.sort(key=lambda p: [int(n) for n in re.findall(r'\d+', str(p))])
        drawn = [
            picture(path, str(path.relative_to(run.folder)))
            for path in every[max(0, len(every) - most) :]
        ]
        yield (
            '<p>Two halves: left the ground truth, right the prediction.</p>'
            + grid(drawn)
            if drawn
            else '<p>None below the work dir: tools/test.py --show-dir draws '
            'them, or default_hooks.visualization.draw=True.</p>'
        )


def norms(found: dict[str, Run]) -> Iterator[str]:
    """What hooks recorded, layers at the end, and running statistics."""
    yield legend(found)
    everything = list(found.values())
    yield (
        '<p>Where the axis is "layer", layers stand in the order of the '
        'network. Running statistics are those of the last checkpoint: the '
        'median size over the channels of a layer.</p>'
    )
    yield grid(panels(AXES[0], [run.others for run in everything]))
    yield grid(panels('layer', [runs.layers(r.folder) for r in everything]))
    kept = [runs.statistics(run.folder) for run in everything]
    yield grid(panels('layer', kept))
    if not any(run.others for run in everything):
        yield (
            '<p>No singularities were recorded: custom_hooks = '
            "[dict(type='ws_mm.SingularitiesHook')] does so.</p>"
        )
    if not any(kept):
        yield '<p>No checkpoint with running statistics is there.</p>'


def differences(configs: dict[str, Config | None]) -> str:
    """A table of the keys whose values are not the same in all."""
    there = {name: config for name, config in configs.items() if config}
    parts = [dict(runs.flat(c._cfg_dict)) for c in there.values()]
    same = {
        key
        for key, value in (parts or [{}])[0].items()
        if all(key in part and part[key] == value for part in parts)
    }
    parts = [{k: v for k, v in p.items() if k not in same} for p in parts]
    return by_key(there, parts, 'No difference.')


def configs(found: dict[str, Run], base: Path | None) -> Iterator[str]:
    """Each run against its base, and all against each other."""
    for name, run in found.items():
        path = base or runs.base_of(run.folder)
        if run.config is None:
            yield f'<p>{escape(name)}: its config is gone.</p>'
        elif path is None:
            yield (
                f'<p>{escape(name)}: no config of its name is in configs/, '
                'mmdet or mmseg; --base names one.</p>'
            )
        else:
            yield f'<h3>{escape(name)} against {escape(str(path))}</h3>'
            other = launch.read_config(path)
            yield differences({path.name: other, name: run.config})
    if len(found) > 1:
        yield '<h3>Between the runs</h3>'
        yield differences({name: run.config for name, run in found.items()})


def main() -> None:
    """Read the runs and write the page."""
    args = parse_args()
    if args.out.is_dir():
        raise SetupError(f'--out {args.out} is a folder. Name a HTML file.')
    checks.check_writable(str(args.out.absolute().parent), '--out')
    names = [path.absolute().name for path in args.work_dirs]
    found = {
        name if names.count(name) == 1 else str(path): runs.read_run(path)
        for name, path in zip(names, args.work_dirs, strict=True)
    }
    machine = [run.environment for run in found.values()]
    sections = {
        'Runs': overview(found),
        'Metrics': metrics(found),
        'Curves': curves(found),
        'Predictions': pictures(found, args.pictures),
        'Norms': norms(found),
        'Environment': [by_key(found, machine, 'No log says it.')],
        'Config': configs(found, args.base),
    }
    parts = []
    for title, section in sections.items():
        parts += [f'<section><h2>{title}</h2>', *section, '</section>']
    write_text(args.out, page(', '.join(found), parts))
    print(f'{args.out} is written: {args.out.stat().st_size / 1e6:.1f} MB.')


if __name__ == '__main__':
    launch.run(main)
