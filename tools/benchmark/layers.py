"""Time WS and BCN against their peers, layer by layer, side by side.

    python tools/benchmark/layers.py OUT_DIR [--rounds 15] [--seed 0]

Writes OUT_DIR/layers--<device>.json, which describes itself, and a plot of it
beside it. Forward and backward in training mode, or one forward in eval mode;
"copy" is a bare copy of the same tensors, the bandwidth of the machine.
"""

from collections.abc import Callable

import torch
from race import Row, race, saved_bytes
from result import Suite, arguments, run
from torch import Tensor, nn

from peers import norms, standardizers  # isort: skip

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
# What else a layer meets, each on these activations.
VARIED = ('layer2 1x512x100x168', 'box RoIs 512x256x7x7')
VARIANTS = {
    'bf16': {'dtype': torch.bfloat16},
    'fp16': {'dtype': torch.half},
    'channels_last': {'layout': torch.channels_last},
    'bf16 channels_last': {
        'dtype': torch.bfloat16,
        'layout': torch.channels_last,
    },
    'eval': {'training': False},
}
BACKBONES = ('resnet50', 'resnext101_32x8d')


def time_norms(
    shape: tuple[int, ...],
    rounds: int,
    device: str,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    training: bool = True,
) -> list[Row]:
    """Each norm on one activation; parameters stay float32, as in AMP."""
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
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
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
            row['saved_bytes'] = saved_bytes(lambda name=name: forward(name))
        if name == 'copy' and 'ms' in row:
            moved = 2 * x.numel() * x.element_size()
            row['gigabytes_per_second'] = moved / row['ms'] / 1e6
    return rows


def time_weights(backbone: str, rounds: int, device: str) -> list[Row]:
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
        def run_once() -> None:
            for weight in weights:
                weight.grad = None
            outputs = [function(weight) for weight in weights]
            torch.autograd.backward(outputs, cotangents)

        return run_once

    contenders = {n: step(f) for n, f in standardizers().items()}
    return race(contenders, 'mmcv ConvWS', rounds, device)


def main() -> None:
    """Run the suite."""
    options = arguments(__doc__, rounds=15)
    rounds, device = options.rounds, options.device
    suite: Suite = {}
    for name in BACKBONES:
        suite[f'filters of {name}'] = (
            'mmcv ConvWS',
            lambda name=name: time_weights(name, rounds, device),
        )
    cases = {name: (shape, {}) for name, shape in ACTIVATIONS.items()}
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
    what = 'forward + backward in training, float32 and NCHW if not said'
    run('layers', what, suite, options)


if __name__ == '__main__':
    main()
