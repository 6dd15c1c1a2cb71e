"""One table of all norms and filters: which at which batch size.

    python tools/experiments/which.py RECORDS GRID.py COST.json

RECORDS are those of run.py, a folder or published; COST.json is a result of
tools/benchmark/zoo.py. A cell is the final metric at the best learning rate
of the grid's, in percent, the mean where there are several seeds; behind it
the spread, and the learning rate's factor, unless it is 1. Time is that of
a convolution, its norm and its activation over the same with GN, memory what
they keep for the backward. What others published is theirs.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import records
from experiments.norms import PUBLISHED
from experiments.report import of_grid
from experiments.tables import Records, of_task

COST_CASE = 'layer3 1x256x50x84'


def best(found: Records) -> str:
    """The best learning rate's metric; or why there is none."""
    if not found:
        return '-'
    groups: dict[float, list[float]] = {}
    for record in found:
        if record['status'] == 'done':
            factor = record['cell']['lr_factor']
            groups.setdefault(factor, []).append(record['metric'])
    if not groups:
        return str(found[0]['status'])
    factor = max(groups, key=lambda f: mean(groups[f]))
    values = groups[factor]
    words = f'{mean(values):.1f}'
    if len(values) > 1:
        words += f' ± {stdev(values):.1f} (n={len(values)})'
    return words + (f' x{factor:g}' if factor != 1 else '')


def table(found: Records, labels: list[str], cost: dict[str, Any]) -> str:
    """The Markdown table."""
    tasks = list(dict.fromkeys(r['cell']['task'] for r in found))
    columns = sorted(
        {
            (tasks.index(c['task']), c['images'])
            for r in found
            for c in [r['cell']]
        }
    )
    (case,) = (c for c in cost['cases'] if c['name'] == COST_CASE)
    rows = {row['contender']: row for row in case['rows']}
    heads = [f'{tasks[task]}, {images}' for task, images in columns]
    lines = [
        '| norm | ' + ' | '.join(heads) + ' | time | memory | published |',
        '|---' * (len(heads) + 4) + '|',
    ]
    for label in labels:
        own = [r for r in found if r['cell']['label'] == label]
        cells = [
            best(
                [
                    r
                    for r in of_task(own, tasks[task])
                    if r['cell']['images'] == images
                ]
            )
            for task, images in columns
        ]
        row, base = rows.get(label, {}), rows['GN']
        time, memory = '-', '-'
        if 'ratio' in row:
            time = f'{row["ratio"]:.2f}'
            memory = f'{row["saved_bytes"] / base["saved_bytes"]:.2f}'
        cells += [time, memory, PUBLISHED.get(label, '-')]
        lines.append(f'| {label} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('source', type=Path, metavar='RECORDS')
    parser.add_argument('grid', metavar='GRID.py')
    parser.add_argument('cost', type=Path, metavar='COST.json')
    options = parser.parse_args(argv)
    source = options.source
    found, _ = records.read_all(
        source / 'records' if source.is_dir() else source
    )
    found, missing = of_grid(found, options.grid)
    labels = list(dict.fromkeys(r['cell']['label'] for r in found))
    print(table(found, labels, json.loads(options.cost.read_text())))
    if missing:
        print(f'{len(missing)} runs of the grid were not run', file=sys.stderr)


if __name__ == '__main__':
    main()
