"""Plans: launches of kernels, as far as shapes and dtypes decide them.

A GPU takes microseconds for most layers, so the host must not take more. All
that follows from shapes and dtypes is a plan, made once and cached, and each
kernel goes through Triton's JIT once per plan.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, reduce
from operator import itemgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import JITFunction, driver

from . import CannotLaunch, plain, self_check
from . import triton_kernels as kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Values of a tile of activations, and columns of its widest block. Tiles of
# 8 values to a thread leave registers for half of the threads that fit on a
# multiprocessor.
TILE, COLUMNS, TILE_WARPS = 2048, 1024, 8
# Programs that keep a GPU of 132 multiprocessors busy: a reduction splits
# its rows only where fewer tiles of them are.
PROGRAMS = 512
# (Sample, channel) pairs that the program of a group holds, and how many
# samples do without the full number.
GROUP_TILE, FEW_SAMPLES = 1024, 16
# Values of the filters of a program. Filters share one only beyond a number
# of programs; wider ones are read block by block, not held in registers.
FILTERS, FEW, WIDEST = 4096, 256, 8192
# Numbers of rows and columns, and four times that, are 32 bits wide.
LONGEST = 2**28

ARGUMENTS = {
    name: list(kernel.arg_names)
    for name, kernel in vars(kernels).items()
    if hasattr(kernel, 'arg_names')
}
INTERPRETED = not isinstance(kernels.affine, JITFunction)

Tensors = tuple[Any, ...]  # some of them None
Known = tuple[int, torch.device, bool] | None


class Launch:
    """One kernel at one size.

    The first call goes through Triton's JIT, which takes ten times as long
    as what it compiled: later ones go there, where that is possible. It is
    not in the interpreter, nor with a pointer that is not aligned, for which
    Triton compiles another variant.

    Args:
        name: kernel in :mod:`.triton_kernels`.
        given: names of what a call brings, in its order.
        programs: size of the grid.
        warps: number of warps to a program.
        constants: all other arguments of the kernel.
    """

    def __init__(
        self,
        name: str,
        given: tuple[str, ...],
        programs: int,
        warps: int,
        **constants: Any,
    ) -> None:
        self.name, self.programs = name, programs
        arguments = ARGUMENTS[name]
        taken = [key for key in arguments if key in given]
        self.take = itemgetter(*(given.index(key) for key in taken))
        rest = arguments[len(taken) :]
        self.numbers = tuple(constants[key] for key in rest if key.islower())
        self.meta = {key: constants[key] for key in rest if key.isupper()}
        self.options = {'num_warps': warps, **_options()}
        self.kernel: Any = None
        self.run: Any = None  # of the kernel
        self.first: tuple[Any, ...] = ()
        self.last: tuple[Any, ...] = ()

    def through_jit(self, values: Sequence[Any], aligned: bool) -> None:
        """Launch as Triton does, and keep what it compiled if aligned."""
        arguments = *self.take(values), *self.numbers
        compiled = getattr(kernels, self.name)[(self.programs,)](
            *arguments, **self.meta, **self.options
        )
        signature = getattr(getattr(compiled, 'src', None), 'signature', {})
        last = self.numbers
        if 'constexpr' in signature.values():  # since Triton 3.3
            last += tuple(self.meta.values())
        known = hasattr(compiled, 'function') and hasattr(compiled, 'run')
        count = len(arguments) - len(self.numbers) + len(last)
        if aligned and known and len(signature) == count:
            # Without hooks: of all tools, only Triton's profiler has some.
            packed = compiled.packed_metadata
            self.first = compiled.function, packed, None, None, None
            self.run, self.last = compiled.run, last
            self.kernel = compiled  # since Triton 3.9, it unloads with it


@cache
def _options() -> dict[str, bool]:
    """Multiply and add in one rounding, where Triton leaves the choice."""
    try:
        from triton.backends.nvidia.compiler import CUDAOptions
    except ImportError:
        return {}
    name = 'enable_fp_fusion'
    return {name: True} if hasattr(CUDAOptions, name) else {}


def launch(
    launches: Sequence[Launch], tensors: Tensors, *numbers: float
) -> None:
    """Launch kernels one after the other on the device of their tensors.

    Args:
        launches: the kernels.
        tensors: what was announced as given, the first is not None.
        numbers: the rest of it.

    Raises:
        CannotLaunch: a kernel could not be compiled, loaded or started.
        RuntimeError: the device failed. CUDA reports an error of earlier
            work at the next launch, and nothing can be computed after it.
    """
    device = tensors[0].device
    if device.type == 'cuda' and device.index != torch.cuda.current_device():
        # Triton launches on the current device, whatever its arguments.
        with torch.cuda.device(device):
            launch(launches, tensors, *numbers)
        return
    stream = 0
    if not INTERPRETED:
        stream = driver.active.get_current_stream(device.index or 0)
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    aligned = reduce(or_, addresses) & 15 == 0
    addresses += numbers
    try:
        for each in launches:
            if aligned and each.run is not None:
                each.run(
                    *(each.programs, 1, 1, stream),
                    *each.first,
                    *each.take(addresses),
                    *each.last,
                )
            else:
                each.through_jit((*tensors, *numbers), aligned)
    except Exception as error:
        no_memory = isinstance(error, torch.cuda.OutOfMemoryError)
        if no_memory or (
            isinstance(error, RuntimeError) and 'CUDA' in str(error)
        ):
            raise
        raise CannotLaunch(each.name) from error


@contextmanager
def checking(
    moved: tuple[Tensor, ...] = (), before: Sequence[Tensor] = ()
) -> Iterator[None]:
    """Take a kernel with wrong results for one that cannot run.

    Args:
        moved: what it has changed in place.
        before: what that was.

    Raises:
        CannotLaunch: results are wrong; nothing has moved then.
    """
    try:
        yield
    except self_check.WrongResult as error:
        for values, old in zip(moved, before, strict=True):
            values.copy_(old)
        raise CannotLaunch from error


def dense_format(x: Tensor) -> torch.memory_format:
    """The format in which x is dense, or shall be: outermost N, or filters."""
    if not x.is_contiguous():
        last = {4: torch.channels_last, 5: torch.channels_last_3d}
        memory_format = last.get(x.dim(), torch.contiguous_format)
        if x.is_contiguous(memory_format=memory_format):
            return memory_format
    return torch.contiguous_format


def _power_of_2(number: int) -> int:
    """The smallest one that is not below number."""
    return 1 << max(number - 1, 0).bit_length()


def _power_of_4(number: int) -> int:
    """The smallest one that is not below number."""
    return 1 << (max(number - 1, 0).bit_length() + 1) // 2 * 2


# Weight Standardization


class FilterPlan(NamedTuple):
    """Launches for filters of one shape, layout and dtype."""

    forward: tuple[Launch]
    backward: tuple[Launch]
    rows: int
    memory_format: torch.memory_format
    eps: float
    inside: bool
    dtype: torch.dtype
    check: self_check.Check


@lru_cache(maxsize=4096)
def filter_plan(
    shape: torch.Size,
    dtypes: tuple[torch.dtype, torch.dtype],
    memory_format: torch.memory_format,
    eps: float,
    inside: bool,
    device: torch.device,
) -> FilterPlan | None:
    """Plan of filters; None if the kernels are not made for them.

    Args:
        shape: of the filters, one row for each.
        dtypes: of the filters and of the output.
        memory_format: layout of both.
        eps: added to the standard deviation or the variance.
        inside: whether to add eps inside the square root.
        device: where they are.
    """
    rows, fan_in = shape[0], shape[1:].numel()
    if dtypes[0] not in DTYPES or shape.numel() >= LONGEST:
        return None
    block = min(_power_of_2(fan_in), WIDEST)
    together = 1
    if block < FILTERS:
        together = min(_power_of_2(rows // FEW), FILTERS // block)

    def one(name: str, *given: str) -> Launch:
        return Launch(
            name,
            given,
            -(-rows // together),
            min(max(together * block // 512, 1), 8),
            rows=rows,
            fan_in=fan_in,
            eps=float(eps),
            INSIDE=inside,
            ROWS=together,
            BLOCK=block,
            WHOLE=fan_in <= block,
        )

    return FilterPlan(
        (one('standardize', 'weight', 'output', 'kept'),),
        (one('standardize_backward', 'grad', 'weight', 'kept', 'output'),),
        rows,
        memory_format,
        float(eps),
        inside,
        dtypes[1],
        self_check.check_of(device, 'filters', dtypes, memory_format, inside),
    )


# Batch-Channel Normalization


class NormPlan(NamedTuple):
    """Launches for activations of one shape, layout and dtype."""

    forward: tuple[Launch, Launch, Launch]
    backward: tuple[Launch, Launch, Launch]
    kept: int
    scratch: int
    entries: tuple[int, int, int, int]
    used: tuple[int, int]
    memory_format: torch.memory_format
    settings: tuple[int, float, bool]
    update: bool
    fits: bool  # whether kernels take the affines as they are
    check: self_check.Check


# What a forward and a backward give to their kernels; see triton_kernels.
FORWARD = (
    ('input', 'kept', 'output', 'running_mean', 'running_var')
    + (AFFINES := ('bn_weight', 'bn_bias', 'weight', 'bias'))
    + ('momentum',)
)
GRADIENTS = tuple(f'grad_{name}' for name in AFFINES)
BACKWARD = 'grad', 'input', 'kept', 'scratch', 'output', *GRADIENTS, *AFFINES


@lru_cache(maxsize=4096)
def norm_plan(
    shape: torch.Size,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    device: torch.device,
    given: tuple[Known, ...],
    num_groups: int,
    eps: float,
    of_batch: bool,
    update: bool,
) -> NormPlan | None:
    """Plan of a layer; None if the kernels are not made for its tensors.

    Args:
        shape: of the activations, as the next three.
        dtype: their dtype.
        memory_format: their layout.
        device: their device.
        given: what is :func:`known` of the running values and the affines.
        num_groups: groups of the second step.
        eps: added to both variances.
        of_batch: whether statistics are those of the batch.
        update: whether running values move.
    """
    samples, channels = shape[:2]
    rows, length = samples * channels, shape[2:].numel()
    tensors = [x for x in given if x]
    per_channel = {x[0] for x in given[:4] if x}
    outer = {x[0] for x in given[4:] if x}
    if (
        dtype not in DTYPES
        or plain.has_few_values(
            shape, num_groups, 'batch' if of_batch else 'running'
        )
        or channels % num_groups
        or max(rows, length) >= LONGEST
        or per_channel != {channels}
        or outer not in (set(), {channels}, {num_groups})
        or any(x[1] != device for x in tensors)
        or not all(x[2] for x in tensors[:2])
    ):
        return None
    last = memory_format != torch.contiguous_format
    unit = 1 if last else _unit(length, dtype)
    tile = _tile(rows, length, channels, last, unit)
    entries = channels if outer == {channels} else num_groups
    group_size = channels // num_groups
    width = 8 if group_size <= 8 else max(64, _power_of_2(group_size))
    at_once = max(GROUP_TILE // width, 1)
    if samples <= FEW_SAMPLES:
        at_once = min(at_once, FEW_SAMPLES)

    def pass_over(name: str, given: tuple[str, ...], **more: int) -> Launch:
        splits = more.get('splits', tile.blocks)
        return Launch(
            name,
            given,
            tile.row_tiles * splits,
            TILE_WARPS,
            rows=rows,
            units=length // unit,
            channels=channels,
            **{'splits': splits, **more},
            UNIT=unit,
            CHANNELS_LAST=last,
            ROWS=tile.rows,
            BLOCK=tile.block,
        )

    def for_groups(name: str, given: tuple[str, ...], **more: Any) -> Launch:
        return Launch(
            name,
            given,
            num_groups,
            min(max(at_once * width // 128, 1), 8),
            samples=samples,
            channels=channels,
            group_size=group_size,
            num_groups=num_groups,
            eps=float(eps),
            OF_BATCH=of_batch,
            PER_CHANNEL=entries == channels,
            SAMPLES=at_once,
            CHANNELS=width,
            **more,
        )

    # At least one split, of blocks that do not leave the last one empty.
    each = -(-tile.blocks // -(-PROGRAMS // tile.row_tiles))
    splits = -(-tile.blocks // each)
    kept, scratch = 4 * rows + 2 * channels, 4 * rows
    parts = 2 * splits * rows if splits > 1 else 0
    parted = {'splits': splits, 'parts_at': kept if parts else 0}
    summed = {'splits': splits, 'parts_at': scratch if parts else 0}
    count = samples * length
    return NormPlan(
        (
            pass_over('moments', FORWARD, blocks=each, **parted),
            for_groups(
                'coefficients',
                FORWARD,
                length=length,
                span=each * tile.block,
                unbias=count / max(count - 1, 1),
                UPDATE=update,
                **parted,
            ),
            pass_over('affine', FORWARD),
        ),
        (
            pass_over('sums', BACKWARD, blocks=each, **summed),
            for_groups('slopes', BACKWARD, size=float(length), **summed),
            pass_over('affine_backward', BACKWARD),
        ),
        kept + parts,
        scratch + parts,
        (channels, channels, entries, entries),
        (4 * rows, channels),
        memory_format,
        (num_groups, eps, of_batch),
        update,
        all(x[2] for x in tensors),
        self_check.check_of(device, 'norm', dtype, memory_format, of_batch),
    )


class Tile(NamedTuple):
    """Rows and columns of a tile; tiles of rows, and blocks to a row."""

    rows: int
    block: int
    row_tiles: int
    blocks: int


def _tile(
    rows: int, length: int, channels: int, last: bool, unit: int
) -> Tile:
    """Tiles of TILE values over rows of length columns.

    Powers of 4 make for few variants. In channels_last a tile is 64 channels
    wide, so that every access takes whole lines of the memory. Values that
    are accessed one by one need an address each: half as many.
    """
    if last:
        together = min(_power_of_4(channels), 64, TILE)
        block = min(_power_of_4(length), TILE // together)
        row_tiles = rows // channels * -(-channels // together)
    else:
        block = min(_power_of_4(length), COLUMNS)
        together = max((TILE // 2 if unit == 1 else TILE) // block, 1)
        row_tiles = -(-rows // together)
    return Tile(together, block, row_tiles, -(-length // block))


def _unit(length: int, dtype: torch.dtype) -> int:
    """Values that one access takes: 16 bytes, 4 values or 1."""
    for unit in (16 // dtype.itemsize, 4):
        if length % unit == 0:
            return unit
    return 1


def known(*tensors: Tensor | None) -> tuple[Known, ...]:
    """Properties of tensors per channel or per group that decide a plan.

    These are their size, their device, and whether kernels take them as they
    are.
    """
    return tuple(
        [
            None
            if x is None
            else (
                x.numel(),
                x.device,
                x.dtype is torch.float32 and x.is_contiguous(),
            )
            for x in tensors
        ]
    )


def dense_float32(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Make tensors per channel or per group fit for kernels."""
    return [None if x is None else x.float().contiguous() for x in tensors]


def backward_tensors(
    plan: NormPlan,
    grad: Tensor,
    input: Tensor,
    kept: Tensor,
    affines: Sequence[Tensor | None],
    needs_input: bool,
) -> Tensors:
    """Tensors of a backward in the order of BACKWARD."""
    grad = grad.contiguous(memory_format=plan.memory_format)
    gradient = torch.empty_like(input) if needs_input else None
    scratch = kept.new_empty(plan.scratch)
    grads = [kept.new_empty(number) for number in plan.entries]
    return grad, input, kept, scratch, gradient, *grads, *affines


def gradients(tensors: Tensors) -> list[Tensor | None]:
    """Gradients of the input and the affines, from a finished backward."""
    pairs = zip(tensors[5:9], tensors[9:], strict=True)
    return [tensors[4], *[None if x is None else dx for dx, x in pairs]]


def fail(failure: CannotLaunch) -> None:
    """Raise it, to be reported by ``attempt``."""
    raise failure


def have_moved(running: tuple[Tensor, Tensor], plan: NormPlan) -> None:
    """Tell autograd that kernels have changed the running values."""
    if plan.update:
        for values in running:
            torch.autograd.graph.increment_version(values)


def used(kept: Tensor, plan: NormPlan) -> tuple[Tensor, Tensor]:
    """Mean and variance of the first step."""
    start, channels = plan.used
    mean, var = kept[start : start + 2 * channels].split(channels)
    return mean, var
