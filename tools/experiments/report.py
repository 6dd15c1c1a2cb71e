"""Tables and figures of the records of an experiment.

    python tools/experiments/report.py OUT_DIR [--grid GRID.py]
    python tools/experiments/report.py docs/results/batch.json --task NAME

Prints one Markdown table for each task: a row for each norm, a column for
each number of images per step (and learning-rate factor, where a norm has
several), cells with mean, standard deviation and number of seeds. Runs that
diverged or could not be are cells too. With --grid only the runs of that
file are shown, in its order, and those that were not run are named; grids
may share a folder. With --metrics the columns are those metrics at the end of
the runs, with --average their means over the runs. --figure draws the loss,
or with --curve a metric, over the images seen, or with --layers what
SingularitiesHook measured in each layer at the end. --publish collects the
records in one file, which this command reads as well.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import records
from experiments.grid import Cell, GridError
from experiments.grid import load as load_grid

Records = list[dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> None:
    """Print tables; draw and collect if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'source', type=Path, help='folder of run.py, or published records'
    )
    parser.add_argument('--grid', help='only the runs of this file')
    parser.add_argument('--task', default='', help='only this task')
    parser.add_argument('--metrics', nargs='+', help='columns, see above')
    parser.add_argument(
        '--average', action='store_true', help='not at the end, see above'
    )
    parser.add_argument('--figure', type=Path, help='PNG to draw')
    parser.add_argument('--curve', default='loss', help='what it shows')
    parser.add_argument('--layers', help='what it shows of the layers')
    parser.add_argument('--publish', type=Path, help='JSON to collect in')
    options = parser.parse_args(argv)
    source = options.source
    if source.is_dir():
        source = source / 'records'
    elif not source.is_file():
        parser.error(f'{source} is neither a folder nor a file')
    try:
        found, bad = records.read_all(source)
    except ValueError as error:
        parser.error(f'{source} is no collection of records: {error}')
    for line in bad:
        print(f'left out: {line}', file=sys.stderr)
    if options.grid:
        try:
            found, missing = of_grid(found, options.grid)
        except GridError as error:
            parser.error(str(error))
        for key in missing:
            print(f'not run: {key}', file=sys.stderr)
    tasks = list(dict.fromkeys(r['cell']['task'] for r in found))
    if options.task:
        if options.task not in tasks:
            parser.error(
                f'--task={options.task!r} has no records; there are '
                f'{", ".join(map(repr, tasks)) or "none at all"}'
            )
        tasks = [options.task]
        found = [r for r in found if r['cell']['task'] == options.task]
    if not tasks:
        parser.error(f'{options.source} has no records')
    known = {'loss', *(key for r in found for m in r['metrics'] for key in m)}
    for key in [*(options.metrics or []), options.curve]:
        if key not in known:
            parser.error(
                f'{key!r} is in no record; there are '
                + ', '.join(sorted(known))
            )
    if options.layers:
        known = {
            key
            for r in found
            for layer in r['layers'].values()
            for key in layer
        }
        if options.layers not in known:
            parser.error(
                f'--layers={options.layers!r} is in no record; there are '
                + (', '.join(sorted(known)) or 'none at all')
            )
    for task in tasks:
        own = [r for r in found if r['cell']['task'] == task]
        if options.metrics:
            value = average if options.average else last
            print(f'{metrics_table(task, own, options.metrics, value)}\n')
        else:
            print(f'{table(task, own)}\n')
    if options.figure:
        draw(found, tasks, options.curve, options.layers, options.figure)
    if options.publish:
        records.collect(found, options.publish)


def of_grid(found: Records, path: str) -> tuple[Records, list[str]]:
    """The records of a grid's runs, in its order, and what has none."""
    by_key = {}
    for record in found:
        cell = {k: v for k, v in record['cell'].items() if k != 'label'}
        by_key[Cell(**cell).key] = record
    keys = [cell.key for cell in load_grid(path).cells]
    return (
        [by_key[key] for key in keys if key in by_key],
        [key for key in keys if key not in by_key],
    )


def column_of(record: dict[str, Any]) -> tuple[int, float]:
    """Images per step and learning-rate factor."""
    return record['cell']['images'], record['cell']['lr_factor']


def rate(factor: float) -> str:
    """A learning-rate factor, in words."""
    return f'lr x{factor:g}'


def table(task: str, found: Records) -> str:
    """The Markdown table of one task."""
    rows: dict[str, dict[tuple[int, float], Records]] = {}
    for record in found:
        row = rows.setdefault(record['cell']['label'], {})
        row.setdefault(column_of(record), []).append(record)
    columns = sorted({column for row in rows.values() for column in row})
    sweep = any(
        len({images for images, _ in row}) < len(row) for row in rows.values()
    )
    if sweep:
        heads = [f'{images} per step, {rate(f)}' for images, f in columns]
    else:
        columns = sorted({(images, 0.0) for images, _ in columns})
        heads = [f'{images} per step' for images, _ in columns]
    lines = [
        f'| {task} | ' + ' | '.join(heads) + ' |',
        '|---' * (len(columns) + 1) + '|',
    ]
    for label, row in rows.items():
        cells = []
        for images, factor in columns:
            if not sweep:
                factor = next((f for i, f in row if i == images), 1.0)
            words = cell(row.get((images, factor), []))
            if not sweep and factor != 1:
                words += f', {rate(factor)}'
            cells.append(words)
        lines.append(f'| {label} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def metrics_table(
    task: str, found: Records, keys: Sequence[str], value: Any
) -> str:
    """The Markdown table of some metrics of a task's runs."""
    lines = [f'| {task} | ' + ' | '.join(keys) + ' |']
    lines.append('|---' * (len(keys) + 1) + '|')
    groups: dict[tuple[str, tuple[int, float]], Records] = {}
    for record in found:
        key = record['cell']['label'], column_of(record)
        groups.setdefault(key, []).append(record)
    for (label, column), own in groups.items():
        cells = [
            cell(own, lambda record, key=key: value(record, key))
            for key in keys
        ]
        images, factor = column
        head = f'{label}, {images} per step'
        if factor != 1:
            head += f', {rate(factor)}'
        lines.append(f'| {head} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def last(record: dict[str, Any], key: str) -> float | None:
    """A metric where the run measured it last."""
    values = [m[key] for m in record['metrics'] if key in m]
    return values[-1] if values else None


def average(record: dict[str, Any], key: str) -> float | None:
    """The mean of a metric over the run."""
    values = [m[key] for m in record['metrics'] if key in m]
    return mean(values) if values else None


def cell(found: Records, value: Any = lambda record: record['metric']) -> str:
    """Mean, standard deviation and n of one cell, or why there is none."""
    if not found:
        return 'not run'
    values = [value(r) for r in found if r['status'] == 'done']
    values = [v for v in values if v is not None]
    others = [r for r in found if r['status'] != 'done']
    words = []
    if values:
        spread = f' ± {stdev(values):.3g}' if len(values) > 1 else ''
        words.append(f'{mean(values):.4g}{spread} (n={len(values)})')
    for status in dict.fromkeys(r['status'] for r in others):
        own = [r for r in others if r['status'] == status]
        words.append(f'{status}: {own[0]["reason"]} (n={len(own)})')
    return '; '.join(words).replace('|', '/') or 'not measured'


def draw(
    found: Records,
    tasks: list[str],
    curve: str,
    layers: str | None,
    path: Path,
) -> None:
    """A curve over the images seen or the layers, one panel for each task."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1,
        len(tasks),
        figsize=(5 * len(tasks), 4),
        layout='constrained',
        squeeze=False,
    )
    for axis, task in zip(axes.flat, tasks, strict=True):
        colors: dict[str, str] = {}
        positive = True
        for record in found:
            if layers:
                values = [v[layers] for v in record['layers'].values()]
                points = [[x, y] for x, y in enumerate(values, 1)]
            else:
                points = curve_of(record, curve)
            if record['cell']['task'] != task or not points:
                continue
            images, factor = column_of(record)
            name = f'{record["cell"]["label"]}, {images}'
            if factor != 1:
                name += f', {rate(factor)}'
            color = colors.setdefault(name, f'C{len(colors) % 10}')
            positive = positive and min(y for _, y in points) > 0
            axis.plot(
                [x if layers else x * images for x, _ in points],
                [y for _, y in points],
                color=color,
                linewidth=0.8,
            )
        for name, color in colors.items():
            axis.plot([], [], color=color, label=name)
        axis.set_title(task, size=9)
        axis.set_xlabel('layer' if layers else 'images seen')
        shown = 'training loss' if curve == 'loss' else curve
        axis.set_ylabel(layers or shown)
        if positive:
            axis.set_yscale('log')
        if colors:
            axis.legend(fontsize=6, title='norm, images per step')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def curve_of(record: dict[str, Any], key: str) -> list[list[float]]:
    """Steps and values of the training loss or of a metric."""
    if key == 'loss':
        return record['curve']
    return [[m['step'], m[key]] for m in record['metrics'] if key in m]


if __name__ == '__main__':
    main()
