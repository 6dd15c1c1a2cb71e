"""Measure on a GPU what no other machine can: the first ten minutes with one.

    python tools/benchmark/gpu_probe.py OUT_DIR [--rounds 7] [--dry]

Needs torch, triton and ws_mm (with its mmengine), no other package. Writes
OUT_DIR/gpu_probe--cuda.json after each case, in the form of the other suites:

    check          every kernel against float64, by dtype and layout
    repeat         the same step many times: equal bits
    host           milliseconds of the host for layers on a tiny map
    layers         norms on activations of a detector, beside a copy
    graph          a captured CUDA graph against eager execution
    detector,      whole training steps of networks of the shape of Mask R-CNN
    segmentor      R50-FPN and DeepLab, by precision and layout

Cases that do not begin within nine minutes say so. Convolutions of fp32 use
TF32, as torch does by default. --dry runs tiny shapes on a CPU, whose times
mean nothing. The Triton tests come first:
python -m pytest tests/test_kernels_triton.py tests/test_self_check.py
"""

import copy
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if '--dry' in sys.argv:
    os.environ['TRITON_INTERPRET'] = '1'  # before Triton is imported
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import support  # noqa: F401

try:
    import ws_mm.kernels
except ImportError as error:
    sys.exit(f'gpu_probe.py needs ws_mm and the mmengine it needs: {error}')
from benchmark.layers import time_norms
from benchmark.race import Row, choosing, forced, once, race
from benchmark.result import TIMES, Suite, arguments, run

DRY = '--dry' in sys.argv
SECONDS = 540
NCHW, LAST = torch.contiguous_format, torch.channels_last
LAYOUTS = {'NCHW': NCHW, 'channels_last': LAST}
DTYPES = {'fp32': torch.float32, 'fp16': torch.half, 'bf16': torch.bfloat16}
SHAPES = {
    'stem': (1, 64, 400, 672),
    'layer2': (1, 512, 100, 168),
    'layer3': (1, 1024, 50, 84),
    'layer4': (1, 2048, 25, 42),
    'box RoIs': (512, 256, 7, 7),
    'odd': (3, 32, 33, 35),
}
IMAGE, CROP, ROIS, MASKS, REPEATS = (800, 1344), (513, 513), 512, 128, 200
COUNTS, KINDS = (3, 4, 6, 3), ('fp32', 'bf16')
if DRY:
    SHAPES = {'layer3': (1, 64, 5, 4)}
    IMAGE, CROP, ROIS, MASKS, REPEATS = (64, 64), (33, 33), 2, 1, 2
    COUNTS, KINDS = (1, 1, 1, 1), ('fp32',)


def step_of(
    layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, layout: Any
) -> Callable[[], list[Tensor]]:
    """A step of a layer from the same state, and all that it computes."""
    device = 'cpu' if DRY else 'cuda'
    layer.to(device)
    x = (torch.randn(shape, device=device) * 2 + 1).to(dtype)
    x = x.contiguous(memory_format=layout).requires_grad_()
    cotangent = torch.randn_like(x)
    state = {k: v.clone() for k, v in layer.state_dict().items()}

    def step() -> list[Tensor]:
        layer.load_state_dict(state)
        layer.zero_grad()
        x.grad = None
        output = layer(x)
        output.backward(cotangent.to(output.dtype))
        gradients = [p.grad for p in layer.parameters()]
        return [output, x.grad, *gradients, *layer.buffers()]

    return step


class Standardized(nn.Module):
    """The filters of a convolution, standardized, as a function of one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        """Standardize."""
        return ws_mm.standardize_weight(input, dtype=self.dtype)


def forget() -> None:
    """Let kernels be chosen and checked anew, as in a new process."""
    from ws_mm.kernels import plans, self_check

    ws_mm.kernels._failed.clear()
    for kept in (self_check.check_of, plans.norm_plan, plans.filter_plan):
        kept.cache_clear()


def check(rounds: int, device: str) -> list[Row]:
    """Layers by dtype and layout; a wrong kernel is an error row.

    Each is checked by itself, and no later case is.
    """
    contenders: dict[str, Callable[[], object]] = {}

    def checked(step: Callable[[], object]) -> None:
        forget()
        step()
        if ws_mm.kernels._failed:
            raise ws_mm.kernels._failed[0]

    for kind, dtype in DTYPES.items():
        for layout, memory_format in LAYOUTS.items():
            for name, shape in SHAPES.items():
                for mode in ('estimate', 'batch'):
                    layer = ws_mm.BCN(shape[1], mode=mode)
                    contenders[f'{mode} {name} {kind} {layout}'] = partial(
                        checked, step_of(layer, shape, dtype, memory_format)
                    )
            # As autocast wants them, and of a model in half precision.
            filters = 64, 64, 3, 3
            for own in (torch.float32, dtype):
                name = f'WS {str(own)[6:]} to {kind} {layout}'
                layer = Standardized(dtype)
                contenders[name] = partial(
                    checked, step_of(layer, filters, own, memory_format)
                )
    if DRY:  # bfloat16 is not rounded by the interpreter
        contenders = {k: v for k, v in contenders.items() if 'fp32' in k}
    try:
        with choosing('check'):
            return once(contenders)
    finally:
        forget()


def repeat(rounds: int, device: str) -> list[Row]:
    """The same step again and again: a race moves a bit."""

    def repeated(step: Callable[[], list[Tensor]]) -> None:
        first = [x.clone() for x in step()]
        for turn in range(REPEATS):
            for one, other in zip(step(), first, strict=True):
                if not torch.equal(one, other):
                    raise RuntimeError(f'bits differ in turn {turn}')

    contenders = {
        name: partial(
            repeated,
            step_of(ws_mm.BCN(shape[1]), shape, torch.float32, NCHW),
        )
        for name, shape in SHAPES.items()
    }
    return once(contenders)


def host(rounds: int, device: str) -> list[Row]:
    """Host time of layers on a map that the device is done with at once."""
    shape = 1, 256, 2, 2
    kinds: dict[str, nn.Module] = {
        'GroupNorm': nn.GroupNorm(32, 256),
        'BatchNorm2d': nn.BatchNorm2d(256),
        'BCN': ws_mm.BCN(256),
        'BCN plain': ws_mm.BCN(256),
    }
    contenders = {}
    for name, layer in kinds.items():
        layer.to(device)
        x = torch.randn(shape, device=device, requires_grad=True)

        def both(layer: nn.Module = layer, x: Tensor = x) -> None:
            leaves = [x, *layer.parameters()]
            for _ in range(REPEATS):
                for leaf in leaves:
                    leaf.grad = None
                layer(x).backward(x.detach())

        contenders[name] = both
    # By the host's clock: what it hands over is done meanwhile.
    rows = race(contenders, 'GroupNorm', rounds, 'cpu')
    return [
        {k: v / REPEATS if k in TIMES else v for k, v in row.items()}
        for row in rows
    ]


def graph(rounds: int, device: str) -> list[Row]:
    """A captured graph computes what eager execution does."""
    eager = nn.Sequential(
        ws_mm.WSConv2d(64, 64, 3, padding=1), ws_mm.BCN(64), nn.ReLU()
    ).to(device)
    x = torch.randn(2, 64, 33, 35, device=device, requires_grad=True)
    cotangent = torch.randn_like(x)

    def step(net: nn.Sequential) -> list[Tensor]:
        net[1].reset_running_stats()
        output = net(x)
        leaves = [x, *net.parameters()]
        gradients = torch.autograd.grad(output, leaves, cotangent)
        return [output, *gradients, *net.buffers()]

    contenders = {'eager': partial(step, eager)}
    if not DRY:
        captured = torch.cuda.make_graphed_callables(
            copy.deepcopy(eager), (x,)
        )
        for one, other in zip(step(captured), step(eager), strict=True):
            torch.testing.assert_close(one, other)
        contenders['captured'] = partial(step, captured)
    return race(contenders, 'eager', rounds, device)


class ConvWS(nn.Conv2d):
    """Standardization in composed operations, as mmcv's."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the standardized weight."""
        flat = self.weight.flatten(1)
        mean = flat.mean(1).view(-1, 1, 1, 1)
        std = flat.std(1).view(-1, 1, 1, 1)
        weight = (self.weight - mean) / (std + 1e-5)
        return self._conv_forward(input, weight, self.bias)


class FrozenBN(nn.BatchNorm2d):
    """A batch norm whose statistics and affine do not change."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> 'FrozenBN':
        """Stay in eval mode."""
        return super().train(False)


Make = Callable[..., nn.Module]
group_norm = partial(nn.GroupNorm, 32)
CONTENDERS: dict[str, tuple[Make, Make]] = {
    'frozen BN': (nn.Conv2d, FrozenBN),
    'BN': (nn.Conv2d, nn.BatchNorm2d),
    'GN': (nn.Conv2d, group_norm),
    'GN + ConvWS': (ConvWS, group_norm),
    'GN+WS': (ws_mm.WSConv2d, group_norm),
    'BCN+WS': (ws_mm.WSConv2d, ws_mm.BCN),
}


class Block(nn.Module):
    """A bottleneck of ResNet."""

    def __init__(
        self, unit: Make, inputs: int, width: int, stride: int, dilation: int
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            unit(inputs, width, 1),
            nn.ReLU(inplace=True),
            unit(width, width, 3, stride, dilation),
            nn.ReLU(inplace=True),
            unit(width, 4 * width, 1),
        )
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or inputs != 4 * width:
            self.skip = unit(inputs, 4 * width, 1, stride)

    def forward(self, input: Tensor) -> Tensor:
        """Add the body to the input."""
        return F.relu(self.body(input) + self.skip(input), inplace=True)


class Network(nn.Module):
    """ResNet-50 and heads of the shape of Mask R-CNN's or DeepLab's.

    Without boxes and losses: what a norm is part of, at its real size.
    """

    def __init__(self, conv: Make, norm: Make, detects: bool) -> None:
        super().__init__()
        self.detects = detects

        def unit(
            inputs: int,
            outputs: int,
            kernel: int,
            stride: int = 1,
            dilation: int = 1,
        ) -> nn.Module:
            around = dilation * (kernel // 2)
            return nn.Sequential(
                conv(
                    inputs,
                    outputs,
                    kernel,
                    stride,
                    around,
                    dilation,
                    bias=False,
                ),
                norm(outputs),
            )

        relu = nn.ReLU(inplace=True)
        self.stem = nn.Sequential(
            unit(3, 64, 7, 2), relu, nn.MaxPool2d(3, 2, 1)
        )
        self.stages = nn.ModuleList()
        inputs = 64
        for width, count in zip((64, 128, 256, 512), COUNTS, strict=True):
            stride = 1 if width == 64 else 2
            dilation = 1
            if width == 512 and not detects:
                stride, dilation = 1, 2
            stage = [Block(unit, inputs, width, stride, dilation)]
            inputs = 4 * width
            for _ in range(count - 1):
                stage.append(Block(unit, inputs, width, 1, dilation))
            self.stages.append(nn.Sequential(*stage))
        widths = (256, 512, 1024, 2048)
        if detects:
            self.lateral = nn.ModuleList(unit(w, 256, 1) for w in widths)
            self.smooth = nn.ModuleList(unit(256, 256, 3) for _ in widths)
            self.box, self.mask = (
                nn.Sequential(
                    *(m for _ in range(4) for m in (unit(256, 256, 3), relu))
                )
                for _ in range(2)
            )
        else:
            self.branches = nn.ModuleList(
                [unit(2048, 256, 1)]
                + [unit(2048, 256, 3, 1, rate) for rate in (6, 12, 18)]
            )
            self.bottleneck = unit(1024, 256, 3)
            self.classes = nn.Conv2d(256, 21, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return a number to differentiate."""
        x = self.stem(image)
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        if not self.detects:
            parts = [F.relu(branch(x)) for branch in self.branches]
            logits = self.classes(F.relu(self.bottleneck(torch.cat(parts, 1))))
            return F.interpolate(logits, image.shape[2:]).square().mean()
        top, total = None, image.new_zeros(())
        for level in range(3, -1, -1):
            x = self.lateral[level](levels[level])
            if top is not None:
                x = x + F.interpolate(top, x.shape[2:])
            top = x
            x = self.smooth[level](x)
            total = total + x.float().square().mean()
        for head, count, size in (
            (self.box, ROIS, 7),
            (self.mask, MASKS, 14),
        ):
            pooled = F.adaptive_avg_pool2d(x, size)
            scale = torch.linspace(0.5, 1, count, device=x.device)
            rois = pooled * scale.to(pooled.dtype)[:, None, None, None]
            total = total + head(rois).float().square().mean()
        return total


def train(
    detects: bool, amp: bool, layout: str, rounds: int, device: str
) -> list[Row]:
    """Whole steps: forward, backward, SGD."""
    size = (1, 3, *IMAGE) if detects else (2, 3, *CROP)
    image = torch.randn(size, device=device)
    image = image.contiguous(memory_format=LAYOUTS[layout])
    built: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}

    def step(name: str) -> None:
        if name not in built:
            torch.manual_seed(0)
            model = Network(*CONTENDERS[name], detects).to(device)
            model.to(memory_format=LAYOUTS[layout]).train()
            learned = [p for p in model.parameters() if p.requires_grad]
            built[name] = model, torch.optim.SGD(learned, 1e-6, momentum=0.9)
        model, optimizer = built[name]
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            loss = model(image)
        loss.backward()
        optimizer.step()

    contenders = {name: partial(step, name) for name in CONTENDERS}
    return race(contenders, 'GN', rounds, device, warm_up=0 if DRY else 2)


def main() -> None:
    """Run the probe."""
    options = arguments(__doc__, rounds=7, flags=['--dry'])
    if DRY:
        options.device = 'cpu'
    elif options.device != 'cuda':
        options.parser.error('there is no GPU; --dry runs without')
    rounds, device = options.rounds, options.device
    plan: dict[str, tuple[str, Callable[[], list[Row]]]] = {}
    shape = next(iter(SHAPES))
    for part, baseline in (
        (check, f'estimate {shape} fp32 NCHW'),
        (repeat, shape),
        (host, 'GroupNorm'),
        (graph, 'eager'),
    ):
        plan[part.__name__] = baseline, partial(part, rounds, device)
    for detects in (True, False):
        for kind in KINDS:
            for layout in LAYOUTS:
                name = 'detector' if detects else 'segmentor'
                plan[f'{name} {kind} {layout}'] = (
                    'GN',
                    partial(
                        train, detects, kind == 'bf16', layout, rounds, device
                    ),
                )
    for name, shape in SHAPES.items():
        for kind in KINDS:
            for layout, memory_format in LAYOUTS.items():
                plan[f'layers {name} {kind} {layout}'] = (
                    'GroupNorm',
                    partial(
                        time_norms,
                        shape,
                        rounds,
                        device,
                        DTYPES[kind],
                        memory_format,
                    ),
                )
    begin = time.monotonic()

    def in_time(baseline: str, part: Callable[[], list[Row]]) -> list[Row]:
        why = f'not run: {SECONDS} seconds were over'
        if time.monotonic() - begin < SECONDS:
            try:
                return part()
            except Exception as error:
                why = f'{type(error).__name__}: {error!s:.200}'
        return [{'contender': baseline, 'error': why}]

    suite: Suite = {}
    for name, (baseline, part) in plan.items():
        suite[name] = baseline, partial(in_time, baseline, part)
    what = 'forward + backward, see tools/benchmark/gpu_probe.py'
    what = f'dry, no figures: {what}' if DRY else what
    # So that kernels that cannot run are errors.
    with choosing(forced(not DRY)):
        run('gpu_probe', what, suite, options)


if __name__ == '__main__':
    main()
