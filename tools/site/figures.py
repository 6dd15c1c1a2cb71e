"""Draw the figures of docs/explanation.md from the layers themselves."""

import argparse
import sys
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import ws_mm  # noqa: E402

BLUE, ORANGE, GRAY = '#3f51b5', '#e07b00', '#8a8a8a'
STYLE = {
    'axes.spines.right': False,
    'axes.spines.top': False,
    'font.size': 9,
    'legend.frameon': False,
    'savefig.bbox': 'tight',
    'svg.fonttype': 'none',  # letters, not their outlines
    'svg.hashsalt': 'ws_mm',  # the same names in every file
}
IMAGES = 300
ROUNDING = 1e-15  # of float64; what is below it differs between machines


def filters() -> Tensor:
    """Return filters of a convolution that training has moved and scaled."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 64, 3, 3, generator=random, dtype=torch.float64)
    mean = torch.tensor([-0.06, 0.0, 0.1], dtype=torch.float64)
    std = torch.tensor([0.02, 0.05, 0.03], dtype=torch.float64)
    return weight * std[:, None, None, None] + mean[:, None, None, None]


def projection() -> dict[str, tuple[float, float]]:
    """Return how much of a gradient moves the mean and scale of a filter.

    Returns:
        For the convolution and the standardized one: cosines, absolute,
        between the gradient of the raw filter and a constant filter, and
        between it and the centered filter itself; at least ROUNDING.
    """
    random = torch.Generator().manual_seed(1)
    x = torch.randn(1, 64, 32, 32, generator=random, dtype=torch.float64)
    found = {}
    for name, layer in (
        ('convolution', torch.nn.Conv2d(64, 3, 3, bias=False)),
        ('WSConv2d', ws_mm.WSConv2d(64, 3, 3, bias=False)),
    ):
        layer.double().weight.data = filters()
        layer(x).square().sum().backward()
        gradient, weight = layer.weight.grad[2], layer.weight.detach()[2]
        directions = torch.ones_like(weight), weight - weight.mean()
        found[name] = tuple(
            abs(torch.cosine_similarity(gradient.flatten(), d.flatten(), 0))
            .clamp(min=ROUNDING)
            .item()
            for d in directions
        )
    return found


def one_image_steps(
    norm: torch.nn.Module, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Train a norm on one image after the other.

    Args:
        norm: layer with a ``running_mean``.
        images: (N, C, H, W).

    Returns:
        Running mean of the first channel after each step; and, for each
        image, the distance between the outputs in training and afterwards in
        evaluation, relative to the latter.
    """
    means, outputs = [], []
    for image in images:
        outputs.append(norm(image[None]).detach())
        means.append(norm.running_mean[0].clone())
    evaluated = norm.eval()(images).detach()
    distance = (torch.cat(outputs) - evaluated).flatten(1).norm(dim=1)
    return torch.stack(means), distance / evaluated.flatten(1).norm(dim=1)


def draw_ws(left: Axes, middle: Axes, right: Axes) -> None:
    """Draw filters before and after WS, and what their gradients keep."""
    weight = filters()
    for axes, values, title in (
        (left, weight, 'raw filters'),
        (middle, ws_mm.standardize_weight(weight), 'standardized filters'),
    ):
        for each, color in zip(values, (BLUE, GRAY, ORANGE), strict=True):
            axes.hist(
                each.flatten(),
                30,
                color=color,
                alpha=0.6,
                histtype='stepfilled',
            )
        axes.set(title=title, xlabel='value')
    for place, (name, cosines) in enumerate(projection().items()):
        where = [place * 0.4 + each for each in range(2)]
        right.bar(where, cosines, 0.38, color=(GRAY, BLUE)[place], label=name)
    right.set(
        title='gradient along ...',
        xticks=(0.2, 1.2),
        xticklabels=('a constant', 'the filter'),
        ylabel='|cosine|',
        ylim=(ROUNDING / 10, 1e6),
        yscale='log',
    )
    right.legend()


def draw_bcn(left: Axes, right: Axes) -> None:
    """Draw images of a channel, their estimates, training and evaluation."""
    random = torch.Generator().manual_seed(2)
    bright = 1 + 0.8 * torch.randn(IMAGES, 1, 1, 1, generator=random)
    images = bright + 0.5 * torch.randn(IMAGES, 4, 8, 8, generator=random)
    # The channels differ in how much they see of the brightness.
    images *= torch.tensor([1.0, -1.0, 0.5, 2.0])[:, None, None]
    means = images[:, 0].mean((1, 2))
    left.plot(means, '.', color=GRAY, ms=2, label='mean of the one image')
    for name, norm, color in (
        ('BN', torch.nn.BatchNorm2d(4), ORANGE),
        ('BCN', ws_mm.BCN(4, 2), BLUE),
    ):
        running, distance = one_image_steps(norm, images)
        label = f'running mean, momentum {norm.momentum}'
        left.plot(running, color=color, label=label)
        half = slice(IMAGES * 2 // 3, None)  # the estimates have settled
        right.plot(
            means[half], distance[half], '.', color=color, ms=3, label=name
        )
    left.set(title='mean of a channel', xlabel='step', ylim=(-2, 5.5))
    left.legend(loc='upper right')
    right.set(
        title='training against evaluation',
        xlabel='mean of the image',
        ylabel='relative distance',
        yscale='log',
    )
    right.legend()


def draw(folder: Path) -> None:
    """Write ws.svg and bcn.svg."""
    with mpl.rc_context(STYLE):
        for name, paint, columns in (('ws', draw_ws, 3), ('bcn', draw_bcn, 2)):
            figure = Figure((7.4, 2.7), layout='constrained')
            paint(*figure.subplots(1, columns))
            path = folder / f'{name}.svg'
            figure.savefig(path, metadata={'Date': None})


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'folder', type=Path, nargs='?', default=ROOT / 'docs/figures'
    )
    draw(parser.parse_args().folder)
