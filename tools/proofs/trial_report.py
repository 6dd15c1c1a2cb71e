"""Sum up a trial of configs as JSON and as a page of docs/."""

from collections import Counter
from typing import Any

from proofs.long_runs import Records

OK, REFUSED, TRACEBACK, NOT_FINITE, TIMEOUT = (
    'ok',
    'refused',
    'traceback',
    'not finite',
    'timeout',
)
# The layers that a config gets, and what is done with it.
GOALS = {
    'BCN': ('apply', 'check', 'train', 'test', 'export'),
    'GN': ('apply', 'train', 'bake', 'baked test'),
    'original': ('train', 'test'),
}


def latest(records: Records) -> dict[str, dict[str, Any]]:
    """The last record of every step, by what identifies the step."""
    found: dict[str, dict[str, Any]] = {}
    for record in records.lines:
        if record['kind'] != 'step':
            continue
        if record['step'] == 'apply':
            # The steps before were those of another conversion.
            group = f'{record["config"]} {record["goal"]} '
            for key in [key for key in found if key.startswith(group)]:
                del found[key]
        found[record['id']] = record
    return found


def summarize(records: Records) -> dict[str, Any]:
    """Return the outcome of every config, step by step."""
    configs: dict[str, dict[str, Any]] = {}
    for record in latest(records).values():
        steps = configs.setdefault(record['config'], {})
        kept = ('outcome', 'message', 'seconds', 'norms', 'batch_norms')
        step = {key: record[key] for key in kept if key in record}
        # That of a success names files of the machine.
        if step['outcome'] == OK:
            del step['message']
        steps[f'{record["goal"]} {record["step"]}'] = step
    return {**records.header, 'configs': configs}


def table(summary: dict[str, Any]) -> str:
    """The summary as markdown."""
    columns = [
        f'{goal} {step}'
        for goal, steps in GOALS.items()
        for step in steps
        if goal != 'original'
    ]
    lines = [
        f'| config | batch norms left | {" | ".join(columns)} |',
        '|---' * (len(columns) + 2) + '|',
    ]
    notes, counts = [], Counter()
    for config, steps in summary['configs'].items():
        cells = []
        for column in columns:
            step = steps.get(column)
            if step is None:
                cells.append('')
                continue
            counts[step['outcome']] += 1
            cells.append(step['outcome'])
            if step['outcome'] == OK:
                continue
            tried = steps.get(f'original {column.split()[-1]}')
            theirs = tried['outcome'] if tried else ''
            message = step['message'].replace('|', '\\|')[:400]
            notes.append(
                f'| `{config}` | {column} | {step["outcome"]} | {message} '
                f'| {theirs} |'
            )
        left = steps.get('BCN apply', {}).get('batch_norms')
        number = '' if left is None else str(len(left))
        lines.append(f'| `{config}` | {number} | {" | ".join(cells)} |')
    # What is left out is not tested, such as panoptic models.
    whole = sum(
        {'BCN export', 'GN bake'} <= set(steps)
        and all(step['outcome'] == OK for step in steps.values())
        for steps in summary['configs'].values()
    )
    found = ', '.join(f'{counts[key]} {key}' for key in counts)
    lines += [
        '',
        f'{len(summary["configs"])} configs, {whole} of them through all '
        f'steps. Steps: {found}.',
    ]
    if notes:
        lines += [
            '',
            '| config | step | outcome | message | the original config |',
            '|---|---|---|---|---|',
            *notes,
        ]
    return '\n'.join(lines) + '\n'


def page(summary: dict[str, Any]) -> str:
    """The published page."""
    found = ', '.join(
        value if ' ' in value else f'{name} {value}'
        for name, value in summary['versions'].items()
    )
    return f"""# Shipped configs, used as their users do

Written by `python tools/proofs/try_configs.py work_dirs/trial --publish docs`,
with {found}, on a CPU.

Each config is converted, checked, trained for 3 iterations of one image,
tested, exported (with BCN) and baked (with GN), each step by its tool in a
process of its own. The data are those of `tools/proofs/odd_data.py`: large
ids in no order, polygons and both forms of run lengths, a crowd, an image
without objects, a gray and an RGBA one, a name that is not ASCII.

`refused` is a message of the tool that names the cause and what fixes it,
`traceback` is not. An empty cell: a step before it failed, or the model is
not tested, such as a panoptic one. Where a step with the new layers failed,
the last column has what became of the original config.

{table(summary)}"""
