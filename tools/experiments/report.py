"""Tables and figures of the records of an experiment.

    python tools/experiments/report.py OUT_DIR [--task NAME] [--figure FILE]

Prints one Markdown table for each task: a row for each norm, a column for
each number of images per step (and learning-rate factor, where several were
tried), cells with mean, standard deviation and number of seeds. Runs that
diverged or could not be are cells too. The figure shows the loss curves.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import records

Records = list[dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> None:
    """Print tables; draw the figure if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('out_dir', type=Path)
    parser.add_argument('--task', default='', help='only this task')
    parser.add_argument('--figure', type=Path, help='PNG of the loss curves')
    options = parser.parse_args(argv)
    found, bad = records.read_all(options.out_dir / 'records')
    for line in bad:
        print(f'left out: {line}', file=sys.stderr)
    tasks = list(dict.fromkeys(r['cell']['task'] for r in found))
    if options.task:
        if options.task not in tasks:
            parser.error(
                f'--task={options.task!r} has no records; there are '
                f'{", ".join(map(repr, tasks)) or "none at all"}'
            )
        tasks = [options.task]
    if not tasks:
        parser.error(f'{options.out_dir} has no records')
    for task in tasks:
        own = [r for r in found if r['cell']['task'] == task]
        print(f'{table(task, own)}\n')
    if options.figure:
        draw(found, tasks, options.figure)


def column_of(record: dict[str, Any]) -> tuple[int, float]:
    """Images per step and learning-rate factor."""
    return record['cell']['images'], record['cell']['lr_factor']


def table(task: str, found: Records) -> str:
    """The Markdown table of one task."""
    columns = sorted({column_of(record) for record in found})
    factors = {factor for _, factor in columns}
    heads = [
        f'{images} per step' + (f', lr x{factor:g}' if factors != {1} else '')
        for images, factor in columns
    ]
    lines = [
        f'| {task} | ' + ' | '.join(heads) + ' |',
        '|---' * (len(columns) + 1) + '|',
    ]
    for label in dict.fromkeys(r['cell']['label'] for r in found):
        own = [r for r in found if r['cell']['label'] == label]
        cells = (
            cell([r for r in own if column_of(r) == column])
            for column in columns
        )
        lines.append(f'| {label} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def cell(found: Records) -> str:
    """Mean, standard deviation and n of one cell, or why there is none."""
    if not found:
        return 'not run'
    values = [r['metric'] for r in found if r['status'] == 'done']
    others = [r for r in found if r['status'] != 'done']
    words = []
    if values:
        spread = f' ± {stdev(values):.3f}' if len(values) > 1 else ''
        words.append(f'{mean(values):.3f}{spread} (n={len(values)})')
    for status in dict.fromkeys(r['status'] for r in others):
        own = [r for r in others if r['status'] == status]
        words.append(f'{status}: {own[0]["reason"]} (n={len(own)})')
    return '; '.join(words).replace('|', '/')


def draw(found: Records, tasks: list[str], path: Path) -> None:
    """Loss over images seen, one panel for each task."""
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
        for record in found:
            if record['cell']['task'] != task or not record['curve']:
                continue
            images = record['cell']['images']
            name = f'{record["cell"]["label"]}, {images}'
            color = colors.setdefault(name, f'C{len(colors) % 10}')
            axis.plot(
                [step * images for step, _ in record['curve']],
                [loss for _, loss in record['curve']],
                color=color,
                linewidth=0.8,
            )
        for name, color in colors.items():
            axis.plot([], [], color=color, label=name)
        axis.set_title(task, size=9)
        axis.set_xlabel('images seen')
        axis.set_ylabel('training loss')
        axis.set_yscale('log')
        if colors:
            axis.legend(fontsize=6, title='norm, images per step')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == '__main__':
    main()
