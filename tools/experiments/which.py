"""One table of all norms and filters: which at which batch size."""

import json
from math import inf
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.norms import PUBLISHED
from experiments.tables import Records, of_task

COST_CASE = 'layer1 1x64x200x336'


def chosen(found: Records) -> tuple[float, list[float]]:
    """The factor of the best learning rate, and what each seed reached.

    Of rates with more seeds than others, one was chosen before. A rate that
    loses seeds is none, if there is another.
    """
    groups: dict[float, list[float | None]] = {}
    for record in found:
        done = record['status'] == 'done'
        group = groups.setdefault(record['cell']['lr_factor'], [])
        group.append(record['metric'] if done else None)
    ended = {f: [v for v in g if v is not None] for f, g in groups.items()}

    def rank(factor: float) -> tuple[bool, int, float]:
        values, runs = ended[factor], len(groups[factor])
        return len(values) == runs, runs, mean(values)

    factor = max((f for f in ended if ended[f]), key=rank, default=1.0)
    return factor, ended.get(factor, [])


def best(found: Records) -> str:
    """Final metric at the best learning rate, or why there is none.

    Behind it the spread over seeds and the factor of the learning rate.
    """
    factor, values = chosen(found)
    if not values:
        return str(found[0]['status']) if found else '-'
    digits = 1 if max(values) > 1 else 3  # percent, or AP
    words = f'{mean(values):.{digits}f}'
    if len(values) > 1:
        words += f' ± {stdev(values):.{digits}f} (n={len(values)})'
    runs = [r for r in found if r['cell']['lr_factor'] == factor]
    lost = len(runs) - len(values)
    return f'{words} x{factor:g}' + (f'; {lost} lost' if lost else '')


def which_table(found: Records, cost: Path) -> str:
    """The Markdown table; the best figure of a column is bold.

    Args:
        found: records of several tasks.
        cost: result of tools/benchmark/zoo.py. Time is that of a
            convolution, its norm and its activation over the same with GN,
            memory what they keep for the backward.
    """
    cases: list[dict[str, Any]] = json.loads(cost.read_text())['cases']
    (case,) = (case for case in cases if case['name'] == COST_CASE)
    costs = {row['contender']: row for row in case['rows']}
    cells = [record['cell'] for record in found]
    tasks = list(dict.fromkeys(cell['task'] for cell in cells))
    columns = sorted(
        {(tasks.index(cell['task']), cell['images']) for cell in cells}
    )
    heads = [f'{tasks[task]}, {images}' for task, images in columns]
    lines = [
        f'| norm | {" | ".join(heads)} | time | memory | published |',
        '|---' * (len(heads) + 4) + '|',
    ]
    labels = list(dict.fromkeys(cell['label'] for cell in cells))
    rows = [
        [
            [
                record
                for record in of_task(found, tasks[task])
                if record['cell']['label'] == label
                and record['cell']['images'] == images
            ]
            for task, images in columns
        ]
        for label in labels
    ]

    def figure(cell: Records) -> float:
        values = chosen(cell)[1]
        return mean(values) if values else -inf

    tops = [max(map(figure, column)) for column in zip(*rows, strict=True)]
    for label, row in zip(labels, rows, strict=True):
        words = [
            f'**{best(cell)}**' if figure(cell) == top > -inf else best(cell)
            for cell, top in zip(row, tops, strict=True)
        ]
        words += [ratio(costs, label, key) for key in ('ms', 'saved_bytes')]
        words.append(PUBLISHED.get(label, '-'))
        lines.append(f'| {label} | {" | ".join(words)} |')
    return '\n'.join(lines)


def ratio(costs: dict[str, dict[str, Any]], label: str, key: str) -> str:
    """A cost over that of GN."""
    row = costs.get(label, {})
    if key not in row:
        return '-'
    return (
        f'{row["ratio"] if key == "ms" else row[key] / costs["GN"][key]:.2f}'
    )
