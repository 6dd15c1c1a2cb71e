"""The pictures of tools/demo.py."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from pycocotools import mask as rle

from support.files import read_scalars, replacing

SCORE = 0.5  # predicted instances below it are not drawn
Curve = tuple[list[int], list[float]]


def metrics_line(metrics: dict[str, float]) -> str:
    """Return metrics as a line of text."""
    return ', '.join(f'{name} {value:.3g}' for name, value in metrics.items())


def draw_results(
    rows: list[dict[str, Any]], work_dir: Path, data: Path, origin: str
) -> list[Path]:
    """Draw predictions of the BCN runs and the curves of all runs.

    Args:
        rows: Results of the runs.
        work_dir: Folder of the runs, and of the pictures.
        data: Root of the data set.
        origin: Where the images come from.
    """
    curves: dict[str, dict[str, Curve]] = defaultdict(dict)
    metrics: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    pictures = []
    for row in rows:
        run_dir = work_dir / Path(row['config']).stem
        curves[row['model']][row['norm']] = read_curve(run_dir)
        metrics[row['model']][row['norm']] = row['metrics']
        if row['norm'] != 'bcn-ws':
            continue
        title = (
            f'{row["model"]}, WS + BCN, {row["steps"]} steps of one image: '
            f'{metrics_line(row["metrics"])}\n{origin}'
        )
        predictions = run_dir / 'test/predictions'
        if 'segm AP' in row['metrics']:
            segments = predictions.with_suffix('.segm.json')
            pictures.append(work_dir / 'instances.png')
            draw_instances(data, segments, title, pictures[-1])
        else:
            pictures.append(work_dir / 'semantic.png')
            draw_semantic(data, predictions, title, pictures[-1])
    pictures.append(work_dir / 'losses.png')
    draw_curves(curves, origin, pictures[-1])
    if len(rows) > len(curves):
        pictures.append(work_dir / 'comparison.png')
        title = f'{origin}\nbn of DeepLabV3: gn in the head'
        draw_comparison(curves, metrics, title, pictures[-1])
    return pictures


def read_curve(run_dir: Path, key: str = 'loss') -> Curve:
    """Read a scalar over the steps from the host's ``scalars.json`` files.

    Where two starts of a training logged a step, the later one counts.

    Args:
        run_dir: work dir of a training.
        key: name of the scalar.

    Returns:
        Steps, and the value at each.
    """
    values: dict[int, float] = {}
    for scalars in read_scalars(run_dir):
        if key in scalars:
            values[scalars['step']] = scalars[key]
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def draw_instances(
    data: Path, predictions: Path, title: str, target: Path
) -> Figure:
    """Draw each held-out tile beside its true and its predicted nuclei.

    Args:
        data: root of the data set.
        predictions: the host's ``*.segm.json``.
        title: Title of the figure.
        target: picture to write.
    """
    truth = json.loads((data / 'annotations/instances_val.json').read_text())
    masks = defaultdict(list)
    for annotation in truth['annotations']:
        masks['truth', annotation['image_id']].append(annotation)
    for prediction in json.loads(predictions.read_text()):
        if prediction['score'] >= SCORE:
            masks['predicted', prediction['image_id']].append(prediction)
    figure, axes = _grid(title, len(truth['images']))
    for row, image in zip(axes, truth['images'], strict=True):
        picture = _picture(data / 'val' / image['file_name'])
        row[0].imshow(picture)
        for axis, kind in zip(row[1:], ('truth', 'predicted'), strict=True):
            found = masks[kind, image['id']]
            axis.imshow(_overlay(picture, found))
            axis.set_title(f'{kind}: {len(found)} nuclei', fontsize=8)
    return _save(figure, target)


def draw_semantic(
    data: Path, predictions: Path, title: str, target: Path
) -> Figure:
    """Draw each held-out tile beside its true and its predicted mask.

    Args:
        data: root of the data set.
        predictions: folder of index masks, named as the tiles.
        title: Title of the figure.
        target: picture to write.
    """
    tiles = sorted((data / 'val').glob('*.png'))
    figure, axes = _grid(title, len(tiles))
    for row, tile in zip(axes, tiles, strict=True):
        truth = np.array(Image.open(data / 'semantic/val' / tile.name))
        predicted = np.array(Image.open(predictions / tile.name))
        row[0].imshow(_picture(tile))
        row[1].imshow(truth, cmap='gray', vmin=0, vmax=1)
        row[1].set_title('truth', fontsize=8)
        row[2].imshow(predicted, cmap='gray', vmin=0, vmax=1)
        right = (predicted == truth).mean()
        row[2].set_title(f'predicted: {right:.1%} of pixels right', fontsize=8)
    return _save(figure, target)


def draw_curves(
    curves: dict[str, dict[str, Curve]], title: str, target: Path
) -> Figure:
    """Draw training losses, one panel per model, one line per norm.

    Args:
        curves: model, then norm, to its curve.
        title: Title of the figure.
        target: picture to write.
    """
    figure, axes = plt.subplots(
        1, len(curves), figsize=(5 * len(curves), 4), squeeze=False
    )
    figure.suptitle(title, fontsize=9)
    for axis, (model, norms) in zip(axes[0], curves.items(), strict=True):
        _plot_losses(axis, model, norms)
    return _save(figure, target)


def draw_comparison(
    curves: dict[str, dict[str, Curve]],
    metrics: dict[str, dict[str, dict[str, float]]],
    title: str,
    target: Path,
) -> Figure:
    """Draw losses above final metrics, one column per model.

    Args:
        curves: model, then norm, to its curve.
        metrics: model, then norm, then name of the metric, to its value.
        title: Title of the figure.
        target: picture to write.
    """
    figure, axes = plt.subplots(
        2, len(curves), figsize=(5 * len(curves), 7), squeeze=False
    )
    figure.suptitle(title, fontsize=9)
    for column, model in enumerate(curves):
        _plot_losses(axes[0, column], model, curves[model])
        axis, norms = axes[1, column], metrics[model]
        names = list(next(iter(norms.values())))
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            bars = axis.bar(
                np.arange(len(norms)) + (index + 0.5) * width - 0.4,
                [values[name] for values in norms.values()],
                width,
                label=name,
            )
            axis.bar_label(bars, fmt='%.3g', fontsize=7)
        axis.set_xticks(range(len(norms)), norms)
        axis.legend(fontsize=8, ncols=len(names), loc='upper right')
        axis.margins(y=0.25)  # room for the legend
        axis.set_title(f'{model}, held-out tiles', fontsize=9)
    return _save(figure, target)


def _plot_losses(axis: Axes, model: str, norms: dict[str, Curve]) -> None:
    for norm, (steps, losses) in norms.items():
        axis.plot(steps, losses, marker='.', label=norm)
    axis.set_title(f'{model}, one image per step', fontsize=9)
    axis.set_xlabel('step')
    axis.set_ylabel('training loss')
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)


def _grid(title: str, rows: int) -> tuple[Figure, np.ndarray]:
    """A figure of image, truth and prediction for each of ``rows`` tiles."""
    figure, axes = plt.subplots(
        rows, 3, figsize=(7.5, 2.6 * rows), squeeze=False
    )
    figure.suptitle(title, fontsize=9)
    for axis in axes.flat:
        axis.axis('off')
    return figure, axes


def _picture(path: Path) -> np.ndarray:
    """A tile (h, w, 3) in [0, 1], stretched so that dim nuclei show."""
    grey = np.array(Image.open(path).convert('L'), np.float32)
    low, high = np.percentile(grey, (1, 99))
    grey = np.clip((grey - low) / max(high - low, 1), 0, 1)
    return np.repeat(grey[..., None], 3, axis=2)


def _overlay(picture: np.ndarray, found: list[dict]) -> np.ndarray:
    """The picture with one translucent colour per instance."""
    colors = plt.get_cmap('tab10').colors
    picture = picture.copy()
    for index, instance in enumerate(found):
        mask = rle.decode(instance['segmentation']).astype(bool)
        color = np.array(colors[index % len(colors)])
        picture[mask] = 0.4 * picture[mask] + 0.6 * color
    return picture


def _save(figure: Figure, target: Path) -> Figure:
    figure.tight_layout()
    with replacing(target) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)
    return figure
