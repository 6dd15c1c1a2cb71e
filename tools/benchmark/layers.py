"""Time WS and BCN against their peers, layer by layer, side by side.

    python tools/benchmark/layers.py OUT_DIR [--rounds 15] [--seed 0]

Writes OUT_DIR/layers--<device>.json, which describes itself, and a plot of it
beside it. In each round every contender runs once, in a new random order, so
that a machine that slows down slows all of them; figures are medians over
the rounds with their 20th and 80th percentile. A case that fails becomes an
error row. The peers are imported where a package has them: mmcv's ConvWS and
torch's norms. The authors' estimate-based BCN was published as text only and
timm's StdConv2d is one call of batch_norm: both are written here. "copy" is a
bare copy of the same tensors, the bandwidth of the machine.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import ws_mm  # noqa: E402

SCHEMA = 1
# Activations of a ResNet-50 FPN at 800 x 1333, of DeepLab at 513, and RoIs.
ACTIVATIONS = {
    'stem 1x64x400x672': (1, 64, 400, 672),
    'layer1 1x256x200x336': (1, 256, 200, 336),
    'layer2 1x512x100x168': (1, 512, 100, 168),
    'layer3 1x1024x50x84': (1, 1024, 50, 84),
    'deeplab 1x2048x33x33': (1, 2048, 33, 33),
    'deeplab 2x256x129x129': (2, 256, 129, 129),
    'box RoIs 512x256x7x7': (512, 256, 7, 7),
    'mask RoIs 100x256x14x14': (100, 256, 14, 14),
    'pooled 1x256x1x1': (1, 256, 1, 1),
}
BACKBONES = ('resnet50', 'resnext101_32x8d')


class AuthorsBCN(nn.Module):
    """Estimate-based BCN in the operations of the authors' README."""

    def __init__(self, channels: int, groups: int = 32, rate: float = 0.1):
        super().__init__()
        self.groups, self.rate = groups, rate
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self.weight = nn.Parameter(torch.ones(1, groups, 1))
        self.bias = nn.Parameter(torch.zeros(1, groups, 1))
        self.register_buffer('mean', torch.zeros(channels))
        self.register_buffer('var', torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Update the estimates, normalize with them, then by groups."""
        n, c = x.shape[:2]
        with torch.no_grad():
            flat = x.transpose(0, 1).reshape(c, -1)
            deviation = (flat - self.mean[:, None]) ** 2
            self.mean.lerp_(flat.mean(1), self.rate)
            self.var.lerp_(deviation.mean(1), self.rate)
        view = 1, c, *[1] * (x.dim() - 2)
        y = (x - self.mean.clone().view(view)) / (
            self.var.clone().view(view) + 1e-5
        ).sqrt()
        y = y * self.gamma.view(view) + self.beta.view(view)
        y = y.view(1, n * self.groups, -1)
        var, mean = torch.var_mean(y, 2, correction=0, keepdim=True)
        y = ((y - mean) / (var + 1e-5).sqrt()).view(n, self.groups, -1)
        return (y * self.weight + self.bias).view(x.shape)


def norms(channels: int) -> dict[str, Callable[[], nn.Module]]:
    """The contenders that normalize activations."""
    return {
        'GroupNorm': lambda: nn.GroupNorm(32, channels),
        'BatchNorm2d': lambda: nn.BatchNorm2d(channels),
        'authors BCN': lambda: AuthorsBCN(channels),
        'BCN estimate': lambda: ws_mm.BCN(channels),
        'BCN batch': lambda: ws_mm.BCN(channels, mode='batch'),
        'BCN plain': lambda: ws_mm.BCN(channels),
    }


def standardizers() -> dict[str, Callable[[Tensor], Tensor]]:
    """The contenders that standardize weights."""

    def mmcv_form(weight: Tensor) -> Tensor:
        from mmcv.cnn.bricks import conv_ws

        # mmcv has no function for the weight alone: stop at its convolution.
        with mock.patch.object(conv_ws.F, 'conv2d', lambda x, w, *_: w):
            return conv_ws.conv_ws_2d(weight, weight)

    def batch_norm_trick(weight: Tensor) -> Tensor:
        rows = weight.reshape(1, weight.shape[0], -1)
        rows = F.batch_norm(rows, None, None, training=True, eps=1e-6)
        return rows.view_as(weight)

    return {
        'copy': lambda weight: weight.clone(),
        'mmcv ConvWS': mmcv_form,
        'timm StdConv2d form': batch_norm_trick,
        'WS': ws_mm.standardize_weight,
        'WS plain': ws_mm.standardize_weight,
    }


def environment() -> dict[str, Any]:
    """What a reader has to know to judge the figures."""
    import mmcv

    gpu = torch.cuda.is_available()
    return {
        'torch': torch.__version__,
        'mmcv': mmcv.__version__,
        'ws_mm': ws_mm.__version__,
        'python': platform.python_version(),
        'device': torch.cuda.get_device_name() if gpu else cpu_name(),
        'threads': torch.get_num_threads(),
        'load': os.getloadavg()[0],
        'dtype': 'float32',
    }


def cpu_name() -> str:
    """The processor as the kernel names it."""
    for line in Path('/proc/cpuinfo').read_text().splitlines():
        if line.startswith('model name'):
            return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == 'cuda':
        torch.cuda.synchronize()


def race(
    contenders: dict[str, Callable[[], None]], rounds: int, device: str
) -> list[dict[str, Any]]:
    """Run all contenders in every round; one row for each."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    errors: dict[str, str] = {}
    for turn in range(rounds + 2):  # two to warm up
        order = [name for name in contenders if name not in errors]
        random.shuffle(order)
        for name in order:
            plain = 'plain' if name.endswith(' plain') else 'auto'
            os.environ['WS_MM_KERNELS'] = plain
            try:
                synchronize(device)
                start = time.perf_counter()
                contenders[name]()
                synchronize(device)
            except Exception as error:
                errors[name] = f'{type(error).__name__}: {error}'
                continue
            if turn >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    os.environ.pop('WS_MM_KERNELS', None)
    rows = []
    for name, values in times.items():
        if name in errors:
            rows.append({'contender': name, 'error': errors[name]})
            continue
        values.sort()
        rows.append(
            {
                'contender': name,
                'ms': median(values),
                'ms_p20': values[len(values) // 5],
                'ms_p80': values[-1 - len(values) // 5],
            }
        )
    return rows


def saved_bytes(function: Callable[[], Tensor]) -> int:
    """Bytes kept for backward, every storage once, parameters excluded."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = function()
    del output
    return sum(storages.values())


def time_norms(
    shape: tuple[int, ...], rounds: int, device: str
) -> list[dict[str, Any]]:
    """Forward and backward of each norm on one activation."""
    x = torch.randn(shape, device=device, requires_grad=True)
    cotangent = torch.randn(shape, device=device)
    layers: dict[str, nn.Module] = {}

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            if name not in layers:
                layers[name] = norms(shape[1])[name]().to(device)
            x.grad = None
            layers[name](x).backward(cotangent)

        return run

    contenders = {name: step(name) for name in norms(shape[1])}
    contenders['copy'] = lambda: void(x.detach().clone())
    rows = race(contenders, rounds, device)
    for row in rows:
        if row['contender'] in layers and 'error' not in row:
            layer = layers[row['contender']]
            row['saved_bytes'] = saved_bytes(lambda layer=layer: layer(x))
    return rows


def void(_: Any) -> None:
    """Drop a value."""


def time_weights(
    backbone: str, rounds: int, device: str
) -> list[dict[str, Any]]:
    """Forward and backward over all filters of a backbone."""
    import torchvision

    model = getattr(torchvision.models, backbone)(weights=None)
    weights = [
        m.weight.detach().to(device).requires_grad_()
        for m in model.modules()
        if isinstance(m, nn.Conv2d)
    ]
    cotangents = [torch.randn_like(w) for w in weights]

    def step(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for weight in weights:
                weight.grad = None
            outputs = [function(weight) for weight in weights]
            torch.autograd.backward(outputs, cotangents)

        return run

    contenders = {n: step(f) for n, f in standardizers().items()}
    return race(contenders, rounds, device)


def add_ratios(rows: list[dict[str, Any]], baseline: str) -> None:
    """Each row's time over that of the baseline, in the same rounds."""
    base = next(r for r in rows if r['contender'] == baseline).get('ms')
    for row in rows:
        if base and 'ms' in row:
            row['ratio'] = row['ms'] / base


def check(result: dict[str, Any]) -> None:
    """Refuse a result that does not describe itself.

    Raises:
        ValueError: something is missing; the message names it.
    """
    for key in ('schema', 'suite', 'command', 'environment', 'cases'):
        if key not in result:
            raise ValueError(f'the result lacks {key!r}')
    for case in result['cases']:
        for row in case['rows']:
            if 'error' not in row and not {'ms', 'ms_p20', 'ms_p80'} <= set(
                row
            ):
                raise ValueError(f'a row of {case["name"]!r} lacks a time')


def plot(result: dict[str, Any], path: Path) -> None:
    """Ratios to the baseline of every case, as bars."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    cases = result['cases']
    figure, axes = plt.subplots(
        len(cases), figsize=(7, 1.5 * len(cases)), layout='constrained'
    )
    for axis, case in zip(axes, cases, strict=True):
        rows = [row for row in case['rows'] if 'ratio' in row]
        names = [row['contender'] for row in rows]
        ours = [name.startswith(('BCN', 'WS')) for name in names]
        axis.barh(
            names,
            [row['ratio'] for row in rows],
            color=['tab:orange' if own else 'tab:gray' for own in ours],
        )
        axis.axvline(1, color='black', linewidth=0.8)
        axis.set_xscale('log')
        axis.set_title(f'{case["name"]}, over {case["baseline"]}', size=8)
        axis.tick_params(labelsize=7)
    figure.suptitle(result['environment']['device'], size=9)
    figure.savefig(path, dpi=120)


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with tempfile.NamedTemporaryFile(
        'w', dir=path.parent, delete=False
    ) as file:
        file.write(text)
    os.replace(file.name, path)
    path.chmod(0o644)


def main() -> None:
    """Run the suite."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('out_dir', type=Path)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--only', default='', help='cases whose name contains this'
    )
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f'--rounds={arguments.rounds} must be at least 1')
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    random.seed(arguments.seed)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'

    suite: dict[str, tuple[str, Callable[[], list[dict[str, Any]]]]] = {}
    for name in BACKBONES:
        suite[f'filters of {name}'] = (
            'mmcv ConvWS',
            lambda name=name: time_weights(name, arguments.rounds, device),
        )
    for name, shape in ACTIVATIONS.items():
        suite[name] = (
            'GroupNorm',
            lambda shape=shape: time_norms(shape, arguments.rounds, device),
        )
    chosen = {k: v for k, v in suite.items() if arguments.only in k}
    if not chosen:
        parser.error(
            f'--only={arguments.only!r} names no case of {", ".join(suite)}'
        )
    cases = []
    for name, (baseline, run) in chosen.items():
        rows = run()
        add_ratios(rows, baseline)
        cases.append({'name': name, 'baseline': baseline, 'rows': rows})
        shown = ', '.join(
            f'{row["contender"]} {row["ratio"]:.2f}'
            if 'ratio' in row
            else f'{row["contender"]} error'
            for row in rows
        )
        print(f'{name}: {shown}', flush=True)
    result = {
        'schema': SCHEMA,
        'suite': 'layers',
        'what': 'forward + backward, training mode, float32, NCHW',
        'command': (
            'python tools/benchmark/layers.py OUT_DIR '
            f'--rounds {arguments.rounds} --seed {arguments.seed}'
        ),
        'environment': environment(),
        'cases': cases,
    }
    check(result)
    stem = arguments.out_dir / f'layers--{device}'
    write(stem.with_suffix('.json'), json.dumps(result, indent=1) + '\n')
    if len(cases) > 1:
        plot(result, stem.with_suffix('.png'))


if __name__ == '__main__':
    main()
