"""Build settings, cache keys and checks of mmcv's operators.

For tools/bootstrap.py: standard library only, readable by Python 3.6.
"""

import os
import re
from pathlib import Path
from typing import Any, Dict, Tuple

# Setting CFLAGS replaces Python's own flags, so -g0 alone would also drop
# the optimisation: no faster to build, and RoIAlign takes 3.4 times as long.
# With debug symbols the build takes about twice as long.
CFLAGS = '-O3 -g0 -DNDEBUG -fwrapv'

PROBE = """
import json, torch
from torch.utils.cpp_extension import CUDA_HOME
gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
archs = {'sm_%d%d' % torch.cuda.get_device_capability(i) for i in gpus}
print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda,
                  'archs': sorted(archs), 'cuda_home': CUDA_HOME}))
"""
# Importing is not enough: operators built against another torch may load
# and then fail, or crash, at the first call.
RUN = """
import sys, torch
from mmcv.ops import nms, roi_align
for device in sys.argv[1:]:
    corners = [[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]]
    boxes = torch.tensor(corners, dtype=torch.float, device=device)
    scores = torch.tensor([0.9, 0.8, 0.7], device=device)
    kept = nms(boxes, scores, 0.5)[1].tolist()
    assert kept == [0, 2], 'nms kept %r on %s' % (kept, device)
    image = torch.full((1, 1, 8, 8), 3.0, device=device, requires_grad=True)
    roi = torch.tensor([[0.0, 1, 1, 5, 5]], device=device)
    pooled = roi_align(image, roi, 2)
    pooled.sum().backward()
    assert torch.allclose(pooled, torch.full_like(pooled, 3.0)), pooled
    assert abs(image.grad.sum().item() - 4) < 1e-4, image.grad
"""
VERIFY = 'import mmdet, mmseg' + RUN


def operator_key(
    pins: Dict[str, str], torch: str, tag: str, device: str
) -> str:
    """Return the name under which a wheel of operators is kept."""
    machine = os.uname().machine
    (mmcv,) = (pins[name] for name in ('onedl-mmcv', 'mmcv') if name in pins)
    return f'mmcv{mmcv}-torch{torch}-{tag}-{device}-{machine}'


def operator_device(probe: Dict[str, Any], nvcc: str) -> Tuple[str, str]:
    """Return what to build operators for and, if so, why not for the GPU.

    Args:
        probe: Output of PROBE.
        nvcc: Output of nvcc --version, empty without nvcc.
    """
    if not probe['archs']:
        return 'cpu', ''
    cuda = str(probe['cuda'])
    match = re.search(r'release (\d+)', nvcc)
    release = match.group(1) if match else 'absent'
    if release == cuda.split('.')[0]:
        return '_'.join(['cuda' + cuda, *probe['archs']]), ''
    return 'cpu', (
        f"the GPU stays unused: nvcc is {release}, and building mmcv's "
        f'operators for the GPU needs CUDA {cuda}: install that toolkit and '
        'set $CUDA_HOME'
    )


def build_jobs() -> int:
    """Return how many compilers fit at 1.5 GB each."""
    meminfo = Path('/proc/meminfo').read_text()
    match = re.search(r'MemAvailable:\s*(\d+) kB', meminfo)
    fitting = int(match.group(1)) // 1500000 if match else 1
    return max(1, min(len(os.sched_getaffinity(0)), fitting))
