"""Norms compared seed by seed."""

from statistics import median
from typing import Any

import numpy as np
from experiments.tables import Records, groups_of
from scipy.stats import bootstrap

RESAMPLES = 10_000
LEAST = 5  # pairs for an interval


def paired_table(
    task: str, found: Records, base: str, key: str, value: Any
) -> str:
    """The Markdown table of the differences from one row.

    Formula:
        difference = median over the seeds of both (row - base)
        interval = percentiles 2.5 and 97.5 of the medians of resampled
            differences

    Args:
        task: its name.
        found: records of one task.
        base: start of the name of the row that the others are compared to.
        key: metric.
        value: function (record, key), the metric of a record.

    Raises:
        ValueError: no row or several have that name; the message lists all.
    """
    groups = groups_of(found)
    names = [name for name in groups if name == base] or [
        name for name in groups if name.startswith(f'{base}, ')
    ]
    if len(names) != 1:
        raise ValueError(
            f'{base!r} is the name of {len(names)} rows of {task}; there '
            f'are {", ".join(map(repr, groups))}'
        )
    for name, own in groups.items():
        seeds = [record['cell']['seed'] for record in own]
        if len({*seeds}) < len(seeds):
            raise ValueError(
                f'{name!r} has several runs of one seed: their settings '
                'differ. Give cells of the grid a name, or choose by --grid'
            )
    values = {
        name: {
            record['cell']['seed']: number
            for record in own
            if record['status'] == 'done'
            and (number := value(record, key)) is not None
        }
        for name, own in groups.items()
    }
    middle = values[names[0]]
    lines = [
        f'| {task}, {key} | median (least to most), seeds '
        f'| minus {names[0]}: median | 95 % interval | higher |',
        '|---' * 5 + '|',
    ]
    for name, own in values.items():
        seeds = sorted(set(own) & set(middle))
        words = [spread(list(own.values()))]
        if lost := sum(r['status'] != 'done' for r in groups[name]):
            words[0] += f', {lost} lost'
        if name == names[0] or not seeds:
            words += ['-'] * 3
        else:
            words += compared([own[s] - middle[s] for s in seeds])
        lines.append(f'| {name} | {" | ".join(words)} |')
    return '\n'.join(lines)


def spread(numbers: list[float]) -> str:
    """Median and range of a row."""
    if not numbers:
        return 'not measured'
    ends = f'{min(numbers):.4g} to {max(numbers):.4g}'
    return f'{median(numbers):.4g} ({ends}), n={len(numbers)}'


def compared(differences: list[float]) -> list[str]:
    """Median, interval and wins of the differences of pairs."""
    ahead = sum(d > 0 for d in differences)
    interval = '-'
    if len(differences) >= LEAST:
        found = bootstrap(
            (np.array(differences),),
            np.median,
            n_resamples=RESAMPLES,
            method='percentile',
            rng=np.random.default_rng(0),
        ).confidence_interval
        interval = f'{found.low:+.3g} to {found.high:+.3g}'
    return [
        f'{median(differences):+.3g}',
        interval,
        f'{ahead} of {len(differences)}',
    ]
