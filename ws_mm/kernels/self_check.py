"""Kernels prove themselves on the user's own device, at their first use.

The last group of the first real layer, or its last filter, is computed once
more in float64 and composed operations: groups do not depend on each other.
That is done for each direction, dtype and layout, takes no random number and
talks to no other process, and a marker in Triton's cache remembers what has
passed. A kernel that is off by more than BARS is never used: composed
operations take over and a warning names it. In mode 'sync_batch' that shows
before the ranks exchange anything, see :mod:`.cuda_ranks`.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from .. import compat
from . import VARIABLE

# Relative errors: of what is rounded to a dtype, of all else the first.
BARS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# Results of a kernel, what they should be, and the size of the terms whose
# sum that is: rounding errors are relative to those.
Compared = tuple[Tensor, Tensor, Tensor]


class WrongResult(Exception):
    """A kernel computes something else than the formula."""


class Check:
    """Pending checks of one kind of layer on one device.

    Args:
        device: where its kernels run.
        kind: what else its kernels depend on.
    """

    def __init__(self, device: torch.device, *kind: object) -> None:
        self.device = device if device.type == 'cuda' else None
        self.forced = os.environ.get(VARIABLE) == 'check'
        self.marker: Path | None = None
        if device.type == 'cuda':
            self.marker = _folder() / f'{_digest(_machine(device), *kind)}'
        known = self.marker is None or self.marker.exists()
        self.pending: set[str] = set()
        if self.forced or not known:
            self.pending = {'forward', 'backward'}

    def is_due(self, way: str) -> bool:
        """Return whether to check this call, never while capturing a graph."""
        if way not in self.pending or not torch.cuda.is_available():
            return way in self.pending
        with torch.cuda.device(self.device):
            return not torch.cuda.is_current_stream_capturing()

    def compare(
        self, way: str, kernels: Mapping[str, list[Compared]], bar: float
    ) -> None:
        """Compare what the kernels of one way have computed, in their order.

        Args:
            way: 'forward' or 'backward'.
            kernels: what each has computed, and should have.
            bar: factor of BARS, by how much the input is ill-conditioned.

        Raises:
            WrongResult: a kernel is off by more than its bar.
        """
        says_something = True
        for kernel, results in kernels.items():
            for actual, expected, terms in results:
                size = float(terms.norm())
                error = float((actual.double() - expected).norm())
                allowed = bar * BARS[actual.dtype]
                if not error <= allowed * size:
                    raise WrongResult(
                        f'the kernel {kernel!r} is off by '
                        f'{error / max(size, 1e-300):.1e} of its results '
                        f'({actual.dtype}, {way}; up to {allowed:.0e} is '
                        'rounding)'
                    )
                says_something &= size > 0  # scales of 0 hide all else
        if says_something and not self.forced:
            self.pending.discard(way)
            if not self.pending and self.marker is not None:
                _touch(self.marker)


@cache
def check_of(device: torch.device, *kind: object) -> Check:
    """The one check of this kind of layer."""
    return Check(device, *kind)


def _folder() -> Path:
    home = Path(os.environ.get('TRITON_HOME', Path.home())) / '.triton/cache'
    return Path(os.environ.get('TRITON_CACHE_DIR', home)) / 'ws_mm'


def _touch(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        pass  # a folder that cannot be written: checked again next time


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@cache
def _machine(device: torch.device) -> str:
    """Digest of sources, packages, driver and GPU."""
    folder = Path(__file__).parent
    return _digest(
        *(
            (folder / name).read_text()
            for name in sorted(os.listdir(folder))
            if name.endswith('.py')
        ),
        triton.__version__,
        torch.__version__,
        compat.gpu_driver(),
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_capability(device),
    )


# Weight Standardization


def filters_forward(
    check: Check, weight: Tensor, output: Tensor, eps: float, inside: bool
) -> None:
    """Check the last filter.

    Raises:
        WrongResult: it is not the formula's.
    """
    expected = _standardized(weight[-1].double(), eps, inside)[0]
    if expected.isfinite().all():
        actual = output[-1]
        results = {'standardize': [(actual, expected, expected)]}
        check.compare('forward', results, 1.0)


def filters_backward(
    check: Check,
    weight: Tensor,
    grad: Tensor,
    gradient: Tensor,
    eps: float,
    inside: bool,
) -> None:
    """Check the gradient of the last filter.

    Raises:
        WrongResult: it is not the formula's.
    """
    leaf = weight[-1].detach().double().requires_grad_()
    cotangent = grad[-1].double()
    with torch.enable_grad():
        output, denominator = _standardized(leaf, eps, inside)
        (expected,) = torch.autograd.grad(output, leaf, cotangent)
    if expected.isfinite().all():
        terms = cotangent / denominator.detach()
        results = {'standardize_backward': [(gradient[-1], expected, terms)]}
        check.compare('backward', results, 1.0)


def _standardized(
    filter: Tensor, eps: float, inside: bool
) -> tuple[Tensor, Tensor]:
    variance = filter.var()
    root = (variance + eps).sqrt() if inside else variance.sqrt() + eps
    return (filter - filter.mean()) / root, root


# Batch-Channel Normalization


class Group:
    """The last group of a layer in float64, and what it is compared with.

    Args:
        input: all activations.
        affines: bn_weight, bn_bias, weight and bias of the layer.
        num_groups: of the layer.
        eps: of both steps.
    """

    def __init__(
        self,
        input: Tensor,
        affines: Iterable[Tensor | None],
        num_groups: int,
        eps: float,
    ) -> None:
        self.samples, self.channels = input.shape[:2]
        self.size = self.channels // num_groups
        self.eps = eps
        self.x = self.of(input)
        self.m, self.v = self.x.mean(2), self.x.var(2, correction=0)
        ones = self.x.new_ones(self.size)
        defaults = (ones, 0 * ones, ones, 0 * ones)
        self.affines = [
            default if values is None else self.last(values)
            for values, default in zip(affines, defaults, strict=True)
        ]

    def of(self, values: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Of the layer's activations, those of the group: (N, size, L)."""
        part = values.detach()[:, -self.size :].to(dtype)
        return part.reshape(self.samples, self.size, -1)

    def last(self, values: Tensor) -> Tensor:
        """Of one number per channel or group, those of the group."""
        count = self.size if values.numel() == self.channels else 1
        return values.detach()[-count:].double()

    def rows(self, buffer: Tensor, place: int) -> Tensor:
        """Of the place-th number per row, those of the group."""
        rows = self.samples * self.channels
        values = buffer[place * rows : (place + 1) * rows]
        return values.view(self.samples, -1)[:, -self.size :]

    def condition(self, mean: Tensor) -> float:
        """Size of the values over their spread; it may be inf or NaN."""
        size = (self.m.abs() + mean.abs()).square().mean() + self.v.mean()
        return max(float((size / self.v.mean()).sqrt()), 1.0)

    def normalized(
        self, x: Tensor, affines: list[Tensor], mean: Tensor, var: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, and what it is before the outer affine; 1 / deviation."""
        a, b, c, d = (values[:, None] for values in affines)
        y = (x - mean[:, None]) / (var[:, None] + self.eps).sqrt() * a + b
        y = y - y.mean((1, 2), keepdim=True)
        spread = y.square().mean((1, 2), keepdim=True)
        r = (spread + self.eps).rsqrt()
        return y * r * c + d, y * r, r


def norm_forward(
    check: Check,
    input: Tensor,
    kept: Tensor,
    output: Tensor,
    before: list[Tensor],
    running: tuple[Tensor, Tensor],
    affines: Iterable[Tensor | None],
    momentum: float,
    update: bool,
    settings: tuple[int, float, bool],
) -> None:
    """Check the last group.

    Raises:
        WrongResult: it is not the formula's.
    """
    num_groups, eps, of_batch = settings
    group = Group(input, affines, num_groups, eps)
    m, v = group.m, group.v
    mean, var = old = [group.last(values) for values in before]
    new = old
    if of_batch or update:
        batch_mean = m.mean(0)
        around = batch_mean if of_batch else mean
        batch_var = (v + (m - around).square()).mean(0)
        count = input.numel() / group.channels
        unbias = count / (count - 1) if of_batch else 1.0
        if update:
            new = [
                mean + momentum * (batch_mean - mean),
                var + momentum * (batch_var * unbias - var),
            ]
        mean, var = (batch_mean, batch_var) if of_batch else new
    condition = group.condition(mean)
    expected, y, r = group.normalized(group.x, group.affines, mean, var)
    if not (condition < 1e3 and expected.isfinite().all()):
        return  # says nothing about the kernels
    a, _, c, d = group.affines
    scales = r[:, :, 0] * c * a / (var + eps).sqrt()
    shifts = (y * c[:, None]).mean(2) + d
    kept_mean, kept_var = kept[4 * m.shape[0] * group.channels :].split(
        group.channels
    )[:2]
    size = (m.square() + v).sqrt()
    now = [values[-group.size :] for values in running]
    deviation = (mean.square() + var).sqrt()
    check.compare(
        'forward',
        {
            'moments': [
                (group.rows(kept, 0), m, size),
                (group.rows(kept, 1), v, v),
            ],
            'coefficients': [
                (kept_mean[-group.size :], mean, deviation),
                (kept_var[-group.size :], var, var),
                (now[0], new[0], (new[0].square() + new[1]).sqrt()),
                (now[1], new[1], new[1]),
                (group.rows(kept, 2), scales, scales),
                (
                    group.rows(kept, 3),
                    shifts,
                    shifts.abs() + (y * c[:, None]).square().mean(2).sqrt(),
                ),
            ],
            'affine': [(group.of(output, output.dtype), expected, expected)],
        },
        condition,
    )


def norm_backward(
    check: Check,
    tensors: tuple[Any, ...],
    settings: tuple[int, float, bool],
) -> None:
    """Check the gradients of the last group.

    Args:
        check: of this kind of layer.
        tensors: what the kernels were given.
        settings: groups, eps and whether statistics are the batch's.

    Raises:
        WrongResult: they are not the formula's.
    """
    grad, input, kept, scratch, gradient = tensors[:5]
    grads, affines = tensors[5:9], tensors[9:]
    num_groups, eps, of_batch = settings
    group = Group(input, affines, num_groups, eps)
    g, m = group.of(grad), group.m
    used = kept[4 * m.shape[0] * group.channels :].split(group.channels)[:2]
    mean, var = (values[-group.size :].double() for values in used)
    with torch.enable_grad():
        x = group.x.requires_grad_()
        leaves = [values.clone().requires_grad_() for values in group.affines]
        wide = [values.expand(group.size) for values in leaves]
        if of_batch:
            mean = x.mean((0, 2))
            var = (x - mean[:, None]).square().mean((0, 2))
        output, y, r = group.normalized(x, wide, mean, var)
        dx, *found = torch.autograd.grad(output, [x, *leaves], g)
    x, y, r, mean, var = (t.detach() for t in (x, y, r, mean, var))
    condition = group.condition(mean)
    if not (condition < 1e3 and dx.isfinite().all()):
        return  # says nothing about the kernels
    inner, _, outer, _ = (t.detach().expand(group.size) for t in leaves)
    dy = (g * r * outer[:, None]).abs()
    deviation = (var + eps).sqrt()[:, None]
    xhat = ((x - mean[:, None]) / deviation).abs()
    terms = [(dy * xhat), dy, (g * y).abs(), g.abs()]
    d = x - m[:, :, None]
    wide_terms = dy * (inner[:, None] / deviation).abs()
    slopes: list[Compared] = []
    for values, affine, expected, part in zip(
        grads, affines, found, terms, strict=True
    ):
        if affine is not None:
            size = part.sum((0, 2))
            size = size if expected.numel() == group.size else size.sum()
            slopes.append((values[-expected.numel() :], expected, size))
    results: dict[str, list[Compared]] = {
        'sums': [
            (group.rows(scratch, 0), g.sum(2), g.abs().sum(2)),
            (group.rows(scratch, 1), (g * d).sum(2), (g * d).abs().sum(2)),
        ],
        'slopes': slopes,
    }
    if gradient is not None:
        scale, along, constant = (
            t.double()[:, :, None]
            for t in (
                group.rows(kept, 2),
                group.rows(scratch, 2),
                group.rows(scratch, 3),
            )
        )
        composed = (g * scale + d * along + constant).float()
        slopes.append((composed, dx, wide_terms))
        results['affine_backward'] = [
            (group.of(gradient, gradient.dtype), dx, wide_terms)
        ]
    check.compare('backward', results, condition)
