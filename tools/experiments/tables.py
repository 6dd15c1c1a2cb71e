"""Tables of the records of experiments."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

Records = list[dict[str, Any]]


def of_task(found: Records, task: str) -> Records:
    """The runs of one task."""
    return [record for record in found if record['cell']['task'] == task]


def column_of(record: dict[str, Any]) -> tuple[tuple[int, int], float]:
    """Steps of one update and their images; learning-rate factor."""
    cell = record['cell']
    return (cell.get('accumulation', 1), cell['images']), cell['lr_factor']


def batch(update: tuple[int, int]) -> str:
    """Return the number of images of an update, in words."""
    steps, images = update
    return f'{images} per step' + (f', {steps} steps' if steps > 1 else '')


def rate(factor: float) -> str:
    """A learning-rate factor, in words."""
    return f'lr x{factor:g}'


def table(task: str, found: Records) -> str:
    """The Markdown table of one task."""
    rows: dict[str, dict[tuple[tuple[int, int], float], Records]] = {}
    for record in found:
        row = rows.setdefault(record['cell']['label'], {})
        row.setdefault(column_of(record), []).append(record)
    columns = sorted({column for row in rows.values() for column in row})
    sweep = any(
        len({update for update, _ in row}) < len(row) for row in rows.values()
    )
    if sweep:
        heads = [f'{batch(update)}, {rate(f)}' for update, f in columns]
    else:
        columns = sorted({(update, 0.0) for update, _ in columns})
        heads = [batch(update) for update, _ in columns]
    lines = [
        f'| {task} | ' + ' | '.join(heads) + ' |',
        '|---' * (len(columns) + 1) + '|',
    ]
    for label, row in rows.items():
        cells = []
        for update, factor in columns:
            if not sweep:
                factor = next((f for u, f in row if u == update), 1.0)
            words = cell(row.get((update, factor), []))
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
    for head, own in groups_of(found).items():
        cells = [
            cell(own, lambda record, key=key: value(record, key))
            for key in keys
        ]
        lines.append(f'| {head} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def groups_of(found: Records) -> dict[str, Records]:
    """The runs that differ in their seed only, under a name for them."""
    groups: dict[str, Records] = {}
    for record in found:
        update, factor = column_of(record)
        name = f'{record["cell"]["label"]}, {batch(update)}'
        if factor != 1:
            name += f', {rate(factor)}'
        groups.setdefault(name, []).append(record)
    return groups


def last(record: dict[str, Any], key: str) -> float | None:
    """A metric where the run measured it last."""
    values = values_of(record, key)
    return values[-1] if values else None


def average(record: dict[str, Any], key: str) -> float | None:
    """The mean of a metric over the run."""
    values = values_of(record, key)
    return mean(values) if values else None


def values_of(record: dict[str, Any], key: str) -> list[float]:
    """All measurements of a metric, or of the loss, in their order."""
    if key == 'loss':
        return [loss for _, loss in record['curve']]
    return [m[key] for m in record['metrics'] if key in m]


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
