"""Look at an environment before a training."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ws_mm
from support import ROOT
from support.checks import SetupError, check_writable
from support.environment import distribution
from support.findings import Finding
from support.operators import RUN
from support.ranks import in_ranks
from support.tensors import relative_error
from ws_mm import compat, kernels

PACKAGES = ('torch', 'numpy', 'mmengine', 'mmcv', 'mmdet', 'mmseg')
MOST = 1e-5  # relative error in float32


def checks(folder: str, option: str) -> list[Callable]:
    """All checks; the folder is that of outputs, the option sets it."""
    return [
        processes_talk,
        versions_fit,
        cuda_is_one,
        operators_run,
        kernels_compute,
        partial(outputs_can_be_written, folder, option),
    ]


def versions_fit() -> Iterator[Finding]:
    """Compare what is installed with the line of the support matrix."""
    line = compat.installed_line()
    path = ROOT / f'tools/requirements/{line}.txt'
    rows = [row.split('#')[0].strip() for row in path.open()]
    pins = dict(row.split('==') for row in rows if row)
    owners = metadata.packages_distributions()
    there, other = [], []
    for package in PACKAGES:
        names = sorted(set(owners.get(package, ())))
        if len(names) > 1:
            yield Finding(
                'error',
                f'{" and ".join(names)} are both installed and overwrite '
                "each other's files",
                f'pip uninstall -y {" ".join(names)}; '
                + compat.install_command(package),
            )
        found = distribution(package)
        if found is None:
            command = compat.install_command(package)
            there.append(f'no {package} ({command})')
            continue
        name, version = found
        there.append(f'{package} {version}')
        tested = pins.get(name)
        if tested and version.split('+')[0] != tested:
            other.append(f'{name} {version}, tested {tested}')
    yield Finding('ok', f'{line} line: {", ".join(there)}')
    if other:
        yield Finding(
            'warning',
            f'not the versions that the tests ran with: {"; ".join(other)}',
            f'python3 tools/bootstrap.py --line {line} env makes an '
            'environment with those',
        )


def cuda_is_one() -> Iterator[Finding]:
    """See that torch sees the GPU, and that mmcv was built for its CUDA."""
    cuda = torch.version.cuda
    if not torch.cuda.is_available():
        driver = shutil.which('nvidia-smi')
        yield Finding(
            'warning' if driver else 'ok',
            f'torch {torch.__version__} sees no GPU: trainings run on the CPU',
            'nvidia-smi names the CUDA of the driver: install a torch for it'
            if driver
            else '',
        )
        return
    name = torch.cuda.get_device_name()
    yield Finding('ok', f'{torch.cuda.device_count()} GPUs, {name}')
    if compat.mmcv_problem():
        return  # said of the operators
    from mmcv.ops import get_compiling_cuda_version

    built = get_compiling_cuda_version()
    same = built.split('.')[0] == str(cuda).split('.')[0]
    yield Finding(
        'ok' if same else 'error',
        f'torch is for CUDA {cuda}, the operators of mmcv for {built}',
        ''
        if same
        else f'with the CUDA {cuda} toolkit and FORCE_CUDA=1: pip uninstall '
        f'-y mmcv onedl-mmcv; {compat.install_command("mmcv")}',
    )


def operators_run() -> Iterator[Finding]:
    """Run operators of mmcv in a process that may crash."""
    if problem := compat.mmcv_problem():
        level = 'error' if distribution('mmdet') else 'warning'
        yield Finding(level, problem)
        return
    devices = ['cpu', *['cuda'] * torch.cuda.is_available()]
    done = subprocess.run(
        [sys.executable, '-c', RUN, *devices], capture_output=True, text=True
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f'exit {done.returncode}']
        yield Finding(
            'error',
            f'the operators of mmcv do not run: {said[-1]}',
            'they were built against another torch: pip uninstall -y mmcv '
            f'onedl-mmcv; {compat.install_command("mmcv")}',
        )
    else:
        yield Finding('ok', f'operators of mmcv run on {", ".join(devices)}')


def kernels_compute() -> Iterator[Finding]:
    """Compare one step of WS and BCN with the formulas in float64."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    layers = nn.Sequential(ws_mm.WSConv2d(8, 16, 3), ws_mm.BCN(16, 4))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, cotangent = torch.randn(2, 8, 12, 12), torch.randn(2, 16, 10, 10)
        for values in layers.parameters():
            nn.init.normal_(values)
    exact = copy.deepcopy(layers).double()
    with mock.patch.dict(os.environ, {kernels.VARIABLE: 'plain'}):
        wanted = _step(exact, x.double(), cotangent.double())
    # 'check' compares each kernel on its own, and falls back where it fails.
    choice = 'check' if device == 'cuda' else 'fused'
    with mock.patch.dict(os.environ, {kernels.VARIABLE: choice}):
        found = _step(layers.to(device), x.to(device), cotangent.to(device))
    errors = [
        relative_error(actual.double().cpu(), expected)
        for actual, expected in zip(found, wanted, strict=True)
    ]
    if kernels._failed:
        yield Finding(
            'warning',
            f'the kernels do not run on this GPU: {kernels._failed[0]}',
            'WS_MM_KERNELS=triton shows the whole error; until then eager '
            'operations compute the same, slower',
        )
    good = max(errors) < MOST
    yield Finding(
        'ok' if good else 'error',
        f'WS and BCN on {device} are off by {max(errors):.0e} in a step',
        '' if good else 'WS_MM_KERNELS=plain python tools/train.py ...',
    )


def _step(model: nn.Module, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    x.requires_grad_()
    output = model(x)
    output.backward(cotangent)
    return [output.detach(), x.grad, *(p.grad for p in model.parameters())]


def processes_talk() -> Iterator[Finding]:
    """Let two processes of gloo add numbers."""
    try:
        sums = in_ranks(_sum, seconds=60)
    # Whatever the processes may die of.
    except Exception as error:
        sums = str(error).strip().splitlines()[-1:]
    good = sums == [3.0, 3.0]
    yield Finding(
        'ok' if good else 'error',
        'two processes of this machine talk over gloo'
        if good
        else f'two processes of this machine cannot talk over gloo: {sums}',
        ''
        if good
        else 'GLOO_SOCKET_IFNAME=lo, or a line for the name of this machine '
        'in /etc/hosts',
    )


def _sum(rank: int) -> float:
    value = torch.tensor([rank + 1.0])
    dist.all_reduce(value)
    return float(value)


def outputs_can_be_written(folder: str, option: str) -> Iterator[Finding]:
    """Write into the folder of outputs, or where it will be made."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise SetupError(f'{option} {folder}: {place} is no folder.')
    check_writable(str(place), option)
    yield Finding('ok', f'{folder} can be written')
