"""Compile the Triton kernels for a GPU, which need not be there.

    python tests/compile_kernels.py [ARCHITECTURE]    # 90 is an H100 or H200

Layers are run forward and backward on a stand-in for the GPU's driver, so
each kernel is compiled as it is launched. Prints a line per kernel; fails at
the first that does not compile, and at the end if one does not keep a bar:
no spilled registers, room for half of the threads of a multiprocessor in
those that pass over activations, whole vectors where rows allow them, few
variants for all the sizes of a detector's images.
"""

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tools'))

import torch
import triton
from benchmark import stand_in

import ws_mm

PASSES = ('moments', 'affine', 'sums', 'affine_backward')
NCHW, LAST = torch.contiguous_format, torch.channels_last
ROIS, MAP, ODD = (512, 256, 7, 7), (1, 256, 50, 84), (1, 256, 25, 42)
NORMS = [
    (ROIS, torch.float32, NCHW),
    (MAP, torch.float32, NCHW),
    (MAP, torch.bfloat16, LAST),
    (ODD, torch.bfloat16, NCHW),
    ((1, 1024, 50, 84), torch.bfloat16, NCHW),
    ((128, 256, 14, 14), torch.bfloat16, NCHW),
]
FILTERS = [(64, 64, 1, 1), (512, 512, 3, 3), (256, 2048, 3, 3)]
# A detector's images, short edge 800 or long edge 1344, padded to 32.
SIZES = {
    size
    for edge in range(800, 1345, 32)
    for size in ((800, edge), (edge, 800))
} | {
    size
    for edge in range(544, 800, 32)
    for size in ((1344, edge), (edge, 1344))
}
# Channels and stride of the norms of ResNet-50 and its FPN.
DETECTOR = [
    *((64, 2), (64, 4), (256, 4), (128, 8), (512, 8), (256, 8)),
    *((256, 16), (1024, 16), (512, 32), (2048, 32), (256, 32)),
]
MOST_VARIANTS = 16


def broken(kernel: triton.compiler.CompiledKernel, shape: tuple) -> list[str]:
    """Print what a kernel needs; the bars that it does not keep."""
    name = kernel.src.fn.__name__
    found = stand_in.needs(kernel)
    print(name, shape, *(f'{k}={v}' for k, v in found._asdict().items()))
    bars = {'spilled': found.spilled == 0}
    if name in PASSES:
        bars['occupancy'] = found.occupancy >= 0.5
        if shape[2:].numel() % 4 == 0:
            bars['widest'] = found.widest >= 8
    return [f'{name} {shape}: {bar}' for bar, kept in bars.items() if not kept]


def variants(dtype: torch.dtype) -> int:
    """Kernels that a detector compiles over all sizes of one image."""
    keys = set()

    def skip(key: str, repr: str, fn: object, **rest: object) -> bool:
        keys.add((fn.name, key))
        return True  # not compiled

    triton.knobs.runtime.jit_cache_hook = skip
    layers = {channels: ws_mm.BCN(channels) for channels, _ in DETECTOR}
    for (height, width), (channels, stride) in product(SIZES, DETECTOR):
        shape = 1, channels, -(-height // stride), -(-width // stride)
        x = torch.empty(shape, dtype=dtype, requires_grad=True)
        layers[channels](x).backward(torch.empty_like(x))
    triton.knobs.runtime.jit_cache_hook = None
    return len(keys)


def main() -> None:
    """Compile for one architecture."""
    compiled = stand_in.install(int((sys.argv[1:] or ['90'])[0]))
    failures = []
    for dtype in (torch.float32, torch.bfloat16):  # first: all are new
        count = variants(dtype)
        print(f'variants {dtype} {count} for {len(SIZES)} sizes')
        if count > MOST_VARIANTS:
            failures.append(f'{count} variants of {dtype}')

    def check(shape: torch.Size) -> None:
        for kernel in compiled:
            failures.extend(broken(kernel, shape))
        compiled.clear()

    for shape, dtype, layout in NORMS:
        x = torch.empty(shape, dtype=dtype, memory_format=layout)
        ws_mm.BCN(shape[1])(x.requires_grad_()).backward(torch.empty_like(x))
        check(x.shape)
    x = torch.empty(2, 12, 5, 3, requires_grad=True)
    layer = ws_mm.BCN(12, 4, mode='batch', outer_affine='channel')
    layer(x).backward(torch.empty_like(x))
    layer.eval()(x)
    check(x.shape)
    for shape in FILTERS:
        conv = ws_mm.WSConv2d(shape[1], shape[0], shape[2:])
        conv.standardized_weight().backward(torch.empty(shape))
        check(conv.weight.shape)
    if failures:
        sys.exit('\n'.join(failures))


if __name__ == '__main__':
    main()
