"""Time WS and BCN against their peers, layer by layer, side by side.

    python tools/benchmark/layers.py OUT_DIR [--rounds 15] [--seed 0]

Writes OUT_DIR/layers--<device>.json, which describes itself, and a plot of it
beside it. Forward and backward in training mode, or one forward in eval mode;
"copy" is a bare copy of the same tensors, the bandwidth of the machine. Rows
of ours say how far the fused implementation is from the plain one there, in
outputs, gradients and statistics. A first look: --rounds 3 --only layer2.

On a CPU, tensors reuse memory. In cases of "new pages" the system maps theirs
each time, as in a training whose maps are larger than 32 MB.
"""

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.agreement import agreement
from benchmark.implementations import norms, standardizers
from benchmark.race import Row, choose_pages, kernels_of, race
from benchmark.result import Suite, arguments, run
from support.tensors import saved_bytes

# Activations of a ResNet-50 FPN at 800 x 1333, of DeepLab at 513 and 512 with
# output stride 16 and 8, RoIs, and what global pooling leaves.
ACTIVATIONS = {
    'stem 1x64x400x672': (1, 64, 400, 672),
    'layer1 1x256x200x336': (1, 256, 200, 336),
    'layer2 1x512x100x168': (1, 512, 100, 168),
    'layer3 1x1024x50x84': (1, 1024, 50, 84),
    'layer4 1x2048x25x42': (1, 2048, 25, 42),
    'layer2 2x512x100x168': (2, 512, 100, 168),
    'deeplab 1x2048x33x33': (1, 2048, 33, 33),
    'deeplab 1x2048x65x65': (1, 2048, 65, 65),
    'deeplab 2x256x129x129': (2, 256, 129, 129),
    'deeplab 2x2048x32x32': (2, 2048, 32, 32),
    'deeplab 1x2048x64x64': (1, 2048, 64, 64),
    'box RoIs 512x256x7x7': (512, 256, 7, 7),
    'mask RoIs 100x256x14x14': (100, 256, 14, 14),
    'pooled 1x256x1x1': (1, 256, 1, 1),
    'pooled 2x256x1x1': (2, 256, 1, 1),
}
# What else a layer meets, each on these activations.
VARIED = (
    'layer2 1x512x100x168',
    'deeplab 2x2048x32x32',
    'box RoIs 512x256x7x7',
)
VARIANTS = {
    'bf16': {'dtype': torch.bfloat16},
    'fp16': {'dtype': torch.half},
    'channels_last': {'layout': torch.channels_last},
    'bf16 channels_last': {
        'dtype': torch.bfloat16,
        'layout': torch.channels_last,
    },
    'fp16 channels_last': {
        'dtype': torch.half,
        'layout': torch.channels_last,
    },
    'eval': {'training': False},
    'bf16 eval': {'dtype': torch.bfloat16, 'training': False},
}
# Values of an activation from which it is also measured in new pages.
NEW_PAGES = 1 << 20
BACKBONES = ('resnet50', 'resnext101_32x8d')


def time_norms(
    shape: tuple[int, ...],
    rounds: int,
    device: str,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    training: bool = True,
    new_pages: bool = False,
) -> list[Row]:
    """Each norm on one activation; parameters stay float32, as in AMP."""
    choose_pages(new_pages)
    x = torch.randn(shape, device=device, dtype=dtype)
    x = x.contiguous(memory_format=layout).requires_grad_(training)
    cotangent = torch.randn_like(x)
    layers: dict[str, nn.Module] = {}

    def forward(name: str) -> Tensor:
        if name not in layers:
            layer = norms(shape[1], device)[name]().to(device)
            layers[name] = layer.train(training)
        # Native norms take a half-precision input and float32 parameters
        # on every device only where those are cast.
        if dtype == torch.float32:
            return layers[name](x)
        with torch.autocast(device, dtype):
            return layers[name](x)

    def step(name: str) -> Callable[[], None]:
        def run_once() -> None:
            x.grad = None
            if not training:
                with torch.no_grad():
                    forward(name)
                return
            output = forward(name)
            output.backward(cotangent.to(output.dtype))

        return run_once

    contenders = {name: step(name) for name in norms(shape[1], device)}
    contenders['copy'] = lambda: x.detach().clone()  # type: ignore
    rows = race(contenders, 'GroupNorm', rounds, device)
    for row in rows:
        name = row['contender']
        if training and name in layers and 'error' not in row:
            with kernels_of(name, device):
                row['saved_bytes'] = saved_bytes(partial(forward, name))
        if name in ('BCN estimate', 'BCN batch') and 'ms' in row:
            if name == 'BCN batch' and x.numel() == 2 * x.shape[1]:
                continue  # gradients are what cancellation leaves, near zero
            kind = norms(shape[1], device)[name]
            results = results_of(kind, x, cotangent, training)
            row |= agreement(results, dtype)
        if name == 'copy' and 'ms' in row:
            moved = 2 * x.numel() * x.element_size()
            row['gigabytes_per_second'] = moved / row['ms'] / 1e6
    return rows


def results_of(
    kind: Callable[[], nn.Module], x: Tensor, cotangent: Tensor, training: bool
) -> Callable[[], dict[str, Tensor]]:
    """Output, gradients and statistics of a layer with random parameters."""

    def results() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        layer = kind().train(training)
        with torch.no_grad():
            for values in (*layer.parameters(), layer.running_var):
                values.uniform_(0.5, 2, generator=generator)
            layer.running_mean.normal_(generator=generator)
        layer.to(x.device)
        leaf = x.detach().clone(memory_format=torch.preserve_format)
        output = layer(leaf.requires_grad_())
        output.backward(cotangent.to(output.dtype))
        return {
            'output': output.detach(),
            'input': leaf.grad,
            **{name: p.grad for name, p in layer.named_parameters()},
            **dict(layer.named_buffers()),
        }

    return results


def time_weights(backbone: str, rounds: int, device: str) -> list[Row]:
    """Forward and backward over all filters of a backbone."""
    import torchvision

    choose_pages(False)
    model = getattr(torchvision.models, backbone)(weights=None)
    weights = [
        m.weight.detach().to(device).requires_grad_()
        for m in model.modules()
        if isinstance(m, nn.Conv2d)
    ]
    cotangents = [torch.randn_like(w) for w in weights]

    def step(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run_once() -> None:
            for weight in weights:
                weight.grad = None
            outputs = [function(weight) for weight in weights]
            torch.autograd.backward(outputs, cotangents)

        return run_once

    contenders = {n: step(f) for n, f in standardizers().items()}
    rows = race(contenders, 'mmcv ConvWS', rounds, device)

    def results() -> dict[str, Tensor]:
        outputs = [standardizers()['WS'](weight) for weight in weights]
        gradients = torch.autograd.grad(outputs, weights, cotangents)
        found = {}
        for place, pair in enumerate(zip(outputs, gradients, strict=True)):
            found[f'output {place}'], found[f'weight {place}'] = pair
        return found

    for row in rows:
        if row['contender'] == 'WS' and 'ms' in row:
            row |= agreement(results, torch.float32)
            # The worst filter stands for all.
            worst: dict[str, float] = {}
            for name, value in row['differences'].items():
                kind = name.split()[0]
                worst[kind] = max(worst.get(kind, 0.0), value)
            row['differences'] = worst
    return rows


def main() -> None:
    """Run the suite."""
    options = arguments(__doc__, rounds=15)
    rounds, device = options.rounds, options.device
    suite: Suite = {}
    cases = {}
    if device == 'cpu':
        cases = {
            f'{name} new pages': (shape, {'new_pages': True})
            for name, shape in ACTIVATIONS.items()
            if math.prod(shape) > NEW_PAGES
        }
    cases |= {name: (shape, {}) for name, shape in ACTIVATIONS.items()}
    for name in VARIED:
        for variant, how in VARIANTS.items():
            cases[f'{name} {variant}'] = (ACTIVATIONS[name], how)
    for name, (shape, how) in cases.items():
        suite[name] = (
            'GroupNorm',
            lambda shape=shape, how=how: time_norms(
                shape, rounds, device, **how
            ),
        )
    for name in BACKBONES:
        suite[f'filters of {name}'] = (
            'mmcv ConvWS',
            lambda name=name: time_weights(name, rounds, device),
        )
    what = 'forward + backward in training, float32 and NCHW if not said'
    run('layers', what, suite, options)


if __name__ == '__main__':
    main()
