"""Figures of the records of experiments."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.tables import Records, groups_of, of_task

Points = list[list[float]]


def curve_of(record: dict[str, Any], key: str) -> Points:
    """Images seen, and the training loss or a metric there."""
    images = record['cell']['images']
    points = (
        smoothed(record['curve'])
        if key == 'loss'
        else [[m['step'], m[key]] for m in record['metrics'] if key in m]
    )
    return [[step * images, y] for step, y in points]


def smoothed(points: Points, most: int = 20) -> Points:
    """Means of ``most`` parts of a curve: one image's loss is noise."""
    parts = min(most, len(points))
    edges = [len(points) * i // max(parts, 1) for i in range(parts + 1)]
    return [
        [fmean(column) for column in zip(*points[a:b], strict=True)]
        for a, b in pairwise(edges)
    ]


def layers_of(record: dict[str, Any], key: str) -> Points:
    """Layers from 1, and what was measured there at the end."""
    values = [layer[key] for layer in record['layers'].values()]
    return [[x, y] for x, y in enumerate(values, 1)]


def draw_lines(
    found: Records,
    tasks: list[str],
    points_of: Callable[[dict[str, Any]], Points],
    labels: tuple[str, str],
    path: Path,
) -> None:
    """A line for each run, a panel for each task."""
    figure, axes = panels(1, len(tasks), figsize=(5 * len(tasks), 4.5))
    for axis, task in zip(axes.flat, tasks, strict=True):
        lowest = 1.0
        groups = groups_of(of_task(found, task))
        for index, (name, group) in enumerate(groups.items()):
            drawn = [points for r in group if (points := points_of(r))]
            for points in drawn:
                x, y = zip(*points, strict=True)
                axis.plot(x, y, color=f'C{index % 10}', linewidth=0.8)
                lowest = min(lowest, *y)
            if drawn:
                axis.plot([], [], color=f'C{index % 10}', label=name)
        axis.set_title(task, size=9)
        axis.set_xlabel(labels[0])
        axis.set_ylabel(labels[1])
        if lowest > 0:
            axis.set_yscale('log')
        if axis.lines:
            below = dict(loc='upper center', bbox_to_anchor=(0.5, -0.15))
            axis.legend(fontsize=6, **below)
    save(figure, path)


def draw_points(
    found: Records,
    tasks: list[str],
    metrics: Sequence[str] | None,
    value: Callable[[dict[str, Any], str], float | None],
    path: Path,
) -> None:
    """A point for each run, a panel for each task and metric."""
    keys = metrics or ['']
    rows = {task: groups_of(of_task(found, task)) for task in tasks}
    figure, axes = panels(
        len(tasks),
        len(keys),
        figsize=(
            3 + 3 * len(keys),
            sum(0.6 + 0.22 * len(groups) for groups in rows.values()),
        ),
        height_ratios=[3 + len(groups) for groups in rows.values()],
        sharey='row',
    )
    for line, (task, groups) in zip(axes, rows.items(), strict=True):
        for axis, key in zip(line, keys, strict=True):
            name = key
            for height, group in enumerate(groups.values()):
                name = key or group[0]['task']['metric']
                values = [
                    value(r, key) if key else r['metric']
                    for r in group
                    if r['status'] == 'done'
                ]
                values = [v for v in values if v is not None]
                axis.plot(values, [height] * len(values), 'C0o', alpha=0.6)
            axis.set_yticks(range(len(groups)), list(groups), fontsize=7)
            axis.set_ylim(len(groups) - 0.5, -0.5)
            axis.grid(axis='x', alpha=0.3)
            axis.set_title(f'{task}, {name}', size=8)
    save(figure, path)


def panels(rows: int, columns: int, **settings: Any) -> Any:
    """A figure and its axes, drawn without a screen."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    return plt.subplots(
        rows, columns, layout='constrained', squeeze=False, **settings
    )


def save(figure: Any, path: Path) -> None:
    """Write a figure and forget it."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
