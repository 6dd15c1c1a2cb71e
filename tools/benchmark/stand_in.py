"""A stand-in for Triton's CUDA driver, for machines without a GPU.

CPU tensors stand for CUDA ones. Triton specializes, compiles down to a cubin
and goes through its launch path as on a GPU; the launch itself is dropped, so
nothing is computed. What it shows is the host's side: which variants are
compiled, what they need of a multiprocessor, how long a launch takes before
the driver gets it.

Use it in a process of its own, before anything launches a kernel.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop('TRITON_INTERPRET', None)  # before Triton is imported
os.environ['WS_MM_KERNELS'] = 'triton'
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import support  # noqa: F401

import ws_mm.kernels.cuda  # noqa: F401

REGISTERS, THREADS = 65536, 2048  # of a multiprocessor, sm_80 and sm_90


class Utils:
    """The driver's C part, as far as a compiled kernel calls it."""

    def load_binary(self, *args: Any) -> tuple[object, int, int, int, int]:
        """Module, function, registers, spills and most threads."""
        return object(), 1, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Those that Triton reads."""
        names = 'max_shared_mem', 'multiprocessor_count', 'warpSize'
        return dict(zip(names, (101376, 132, 32), strict=True))


class Launcher:
    """End of a launch; notes names, grids and arguments, if asked."""

    launches: list[tuple[str, int, tuple[Any, ...]]] | None = None

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = source.fn.__name__

    def __call__(self, x: int, y: int, z: int, *args: Any) -> None:
        """Drop it: stream, function, metadata, two hooks, and arguments."""
        if Launcher.launches is not None:
            Launcher.launches.append((self.name, x, args[6:]))


class Driver(GPUDriver):
    """A device of one architecture that runs nothing."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.utils = Utils()
        self.launcher_cls = Launcher
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device=0: divmod(architecture, 10)

    def get_current_target(self) -> GPUTarget:
        """The architecture that kernels are compiled for."""
        return GPUTarget('cuda', self.architecture, 32)

    def get_active_torch_device(self) -> torch.device:
        """Return the device of the tensors."""
        return torch.device('cpu')

    def get_device_interface(self) -> None:
        """There is none."""

    def get_benchmarker(self) -> None:
        """There is nothing to time."""

    @staticmethod
    def is_active() -> bool:
        """Let Triton choose it."""
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        """Of a launcher in C, which is not compiled."""
        return kind


def install(architecture: int = 90) -> list[Any]:
    """Let the kernels of ws_mm run nowhere.

    Returns a list to which every kernel that is compiled is appended.
    """
    driver.set_active(Driver(architecture))
    compiled: list[Any] = []
    init = triton.compiler.CompiledKernel.__init__

    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        compiled.append(self)

    triton.compiler.CompiledKernel.__init__ = recorded

    # Triton has been imported: only ws_mm takes this for the interpreter,
    # and CPU tensors for what its kernels run on.
    os.environ['TRITON_INTERPRET'] = '1'
    return compiled


class Needs(NamedTuple):
    """Registers, spills, occupancy and widest access of a kernel."""

    registers: int
    spilled: int
    occupancy: float
    widest: int


def needs(kernel: Any) -> Needs:
    """Registers, spilled bytes, share of threads that fit, vector width."""
    assembly = kernel.asm['ptx']
    target = re.search(r'\.target (\w+)', assembly).group(1)
    ptxas = get_ptxas(kernel.metadata.target.arch).path
    with tempfile.NamedTemporaryFile('w', suffix='.ptx') as file:
        file.write(assembly)
        file.flush()
        done = subprocess.run(
            [
                ptxas,
                '-v',
                f'--gpu-name={target}',
                file.name,
                '-o',
                '/dev/null',
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    registers = int(re.search(r'Used (\d+) registers', done.stderr).group(1))
    spilled = sum(map(int, re.findall(r'(\d+) bytes spill', done.stderr)))
    threads = 32 * kernel.metadata.num_warps
    # A warp gets its registers in lots of 256, 8 to a thread.
    of_block = -(-registers // 8) * 8 * threads
    blocks = min(REGISTERS // of_block, THREADS // threads)
    wide = re.findall(r'(?:ld|st)\.global\S*?\.v(\d)\.b(\d+)', assembly)
    widest = max((int(n) * int(bits) // 8 for n, bits in wide), default=0)
    return Needs(registers, spilled, blocks * threads / THREADS, widest)
