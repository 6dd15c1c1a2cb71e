"""Compile every Triton kernel for a GPU, which need not be there.

    python tests/compile_kernels.py [ARCHITECTURE]    # 90 is an H100 or H200

Run without TRITON_INTERPRET. Prints a line per kernel; fails at the first
that does not compile. Each is compiled as launched for large feature maps
and, where Triton makes constants of numbers that are 1, for small ones.
"""

import importlib.util
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

PATH = Path(__file__).resolve().parent.parent
# Not through its package: that would import torch.
spec = importlib.util.spec_from_file_location(
    'triton_kernels', PATH / 'ws_mm/kernels/triton_kernels.py'
)
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)

INTEGERS = 'rows fan_in length channels splits span samples group_size'.split()
FLOATS = 'eps momentum unbias size'.split()
# Activations and filters; all other pointers are float32.
HALF = 'input grad output weight'.split()

filters = dict(INSIDE=False, ROWS=2, BLOCK=2048)
tiles = dict(ROWS=64, BLOCK=64)
groups = dict(SAMPLES=4, CHANNELS=8)
LAUNCHES = [
    ('standardize', dict(filters, WHOLE=True)),
    ('standardize', dict(filters, INSIDE=True, WHOLE=False)),
    ('standardize_backward', dict(filters, INSIDE=True, WHOLE=True)),
    ('standardize_backward', dict(filters, WHOLE=False)),
    *(
        (name, dict(tiles, CHANNELS_LAST=last))
        for name in ('moments', 'affine', 'sums', 'affine_backward')
        for last in (False, True)
    ),
    ('join_moments', dict(ROWS=4, BLOCK=1024)),
    ('coefficients', dict(groups, OF_BATCH=1, UPDATE=1, PER_CHANNEL=1)),
    ('coefficients', dict(groups, OF_BATCH=0, UPDATE=1, PER_CHANNEL=0)),
    ('coefficients', dict(groups, OF_BATCH=0, UPDATE=0, PER_CHANNEL=0)),
    ('slopes', dict(groups, OF_BATCH=1, PER_CHANNEL=1)),
    ('slopes', dict(groups, OF_BATCH=0, PER_CHANNEL=0)),
]


def compile_for(target: GPUTarget, name: str, meta: dict, small: bool) -> None:
    kernel = getattr(kernels, name)
    signature, constants, attributes = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in meta:
            constants[(place,)] = meta[argument]
        elif small and argument in INTEGERS:
            constants[(place,)] = 1
        elif small and argument in ('bn_weight', 'bias'):
            constants[(place,)] = None
        elif argument in INTEGERS:
            signature[argument] = 'i32'
        elif argument in FLOATS:
            signature[argument] = 'fp32'
        else:
            affine = name in ('coefficients', 'slopes')
            half = argument in HALF and not affine
            signature[argument] = '*bf16' if half else '*fp32'
            attributes[(place,)] = [['tt.divisibility', 16]]
    for place, argument in enumerate(kernel.arg_names):
        if (place,) in constants:
            signature[argument] = 'constexpr'
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target)
    print(name, meta, 'small' if small else 'large', len(compiled.asm['ptx']))


def main() -> None:
    target = GPUTarget('cuda', int((sys.argv[1:] or ['90'])[0]), 32)
    for name, meta in LAUNCHES:
        compile_for(target, name, meta, small=False)
    for name in ('moments', 'affine', 'coefficients', 'slopes'):
        meta = next(meta for launch, meta in LAUNCHES if launch == name)
        compile_for(target, name, meta, small=True)


if __name__ == '__main__':
    main()
