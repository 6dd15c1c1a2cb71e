"""Tables and figures of the records of an experiment.

    python tools/experiments/report.py OUT_DIR [--grid GRID.py]
    python tools/experiments/report.py docs/results/records.json --task NAME

Prints one Markdown table for each task: a row for each norm, a column for
each number of images per step (and of steps per update, and learning-rate
factor, where a norm has several), cells with mean, standard deviation and
number of seeds. Runs that diverged or could not be are cells too. With --grid
only the runs of that file are shown, in its order, and those that were not
run are named; grids may share a folder. With --metrics the columns are those
metrics (or the loss) at the end, with --average their means over the runs.
--figure draws the loss, as the means of 20 parts of a run, or with --curve a
metric, over the images seen; with --layers what SingularitiesHook measured in
each layer at the end; with --points the numbers of the tables, a point for
each run. --publish collects the records in one file, which this command reads
as well. --which prints one table of all tasks instead, at the best learning
rate of each cell, with cost. --paired ROW compares the rows with that one,
seed by seed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import records
from experiments.figures import curve_of, draw_lines, draw_points, layers_of
from experiments.grid import Cell, GridError
from experiments.grid import load as load_grid
from experiments.paired import paired_table
from experiments.tables import (
    Records,
    average,
    last,
    metrics_table,
    of_task,
    table,
)
from experiments.which import which_table


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
    parser.add_argument('--task', nargs='+', help='only these tasks')
    parser.add_argument('--metrics', nargs='+', help='columns, see above')
    parser.add_argument(
        '--average', action='store_true', help='not at the end, see above'
    )
    parser.add_argument('--figure', type=Path, help='PNG to draw')
    parser.add_argument('--curve', default='loss', help='what it shows')
    parser.add_argument('--layers', help='what it shows of the layers')
    parser.add_argument(
        '--points', action='store_true', help='the runs of the tables'
    )
    parser.add_argument('--publish', type=Path, help='JSON to collect in')
    parser.add_argument(
        '--which', type=Path, help='result of benchmark/zoo.py, see above'
    )
    parser.add_argument('--paired', metavar='ROW', help='see above')
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
    for task in options.task or []:
        if task not in tasks:
            parser.error(
                f'--task={task!r} has no records; there are '
                f'{", ".join(map(repr, tasks)) or "none at all"}'
            )
    if options.task:
        tasks = options.task
        found = [r for r in found if r['cell']['task'] in tasks]
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
    value = average if options.average else last
    if options.which and not options.which.is_file():
        parser.error(f'--which={options.which}: no such file')
    if options.which:
        print(f'{which_table(found, options.which)}\n')
    for task in [] if options.which else tasks:
        own = of_task(found, task)
        if options.paired:
            metric = own[0]['task']['metric']
            for key in options.metrics or [metric]:
                try:
                    words = paired_table(task, own, options.paired, key, value)
                except ValueError as error:
                    parser.error(f'--paired={error}')
                print(f'{words}\n')
        elif options.metrics:
            print(f'{metrics_table(task, own, options.metrics, value)}\n')
        else:
            print(f'{table(task, own)}\n')
    if options.figure and options.points:
        draw_points(found, tasks, options.metrics, value, options.figure)
    elif options.figure and options.layers:
        draw_lines(
            found,
            tasks,
            lambda record: layers_of(record, options.layers),
            ('layer', options.layers),
            options.figure,
        )
    elif options.figure:
        shown = options.curve.replace('loss', 'training loss')
        draw_lines(
            found,
            tasks,
            lambda record: curve_of(record, options.curve),
            ('images seen', shown),
            options.figure,
        )
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


if __name__ == '__main__':
    main()
