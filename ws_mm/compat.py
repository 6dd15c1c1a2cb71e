"""Compatibility with the supported versions of torch, NumPy and mmengine.

Only this module asks for a version or uses a private name of torch.

==============================  =============================================
what differs                    answer
==============================  =============================================
``torch.compiler.is_compiling`` since torch 2.3; before, in ``torch._utils``
``torch.compiler.is_exporting`` since torch 2.7; before, compilers get what
                                exporters get
``torch.get_autocast_dtype``    since torch 2.4; before, a function per device
``tree_leaves``                 since torch 2.2; ``tree_flatten`` is older
``torch._C`` (four groups)      see each use for a torch without it
``torch.library.custom_op``     since torch 2.4; the compiler uses ours since
                                2.7, when exporters can be told from it
``add_safe_globals``            since torch 2.4 (names since 2.6); before,
                                see :func:`read_checkpoint`
``get_torch_safe_globals``      of onedl-mmengine alone; the list here serves
                                both lines
``numpy.dtypes``                since NumPy 1.25; before, no checkpoint holds
                                such a class
float16 on a CPU                batch norm takes it since torch 2.2
NumPy 2                         since torch 2.3
subclasses of a tensor          compiled since torch 2.10; before, the compiler
                                leaves and enters its graph around them
Triton 3                        since torch 2.4; before, a GPU runs eager
                                operations
``package::`` configs           mmengine knows a fixed list of packages, by
                                the distributions of the official line
==============================  =============================================
"""

import codecs
import importlib.util
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import (
    _disable_current_modes,
)
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack as _dispatch_modes,
)
from torch.utils._pytree import tree_flatten

OLDEST_TORCH = '2.1'
OLDEST_TORCH_FOR_NUMPY_2 = '2.3'
OLDEST_MMENGINE = '0.10.0'
OLDEST_TRITON = '3.0'
# OpenMMLab's packages have two distributions, of the same modules. Installed
# together, they overwrite each other's files.
MAINTAINED = 'onedl-'
INSTALL = {
    'official': {
        'mmengine': "pip install 'mmengine==0.10.7'",
        'mmcv': (
            "MMCV_WITH_OPS=1 CFLAGS='-O3 -g0' pip install "
            '--no-build-isolation mmcv==2.1.0'
        ),
        'mmdet': 'pip install mmdet==3.3.0',
        'mmseg': 'pip install mmsegmentation==1.2.2 ftfy regex',
        'mmpretrain': 'pip install mmpretrain==1.2.0',
    },
    'maintained': {
        'mmengine': "pip install 'onedl-mmengine>=0.10.12'",
        'mmcv': (
            "CFLAGS='-O3 -g0' pip install --no-build-isolation "
            'onedl-mmcv==2.3.6'
        ),
        'mmdet': 'pip install onedl-mmdetection==3.5.1',
        'mmseg': 'pip install onedl-mmsegmentation==1.4.2',
        'mmpretrain': 'pip install onedl-mmpretrain==1.3.6',
    },
}
FORCE = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
HAS_ALLOW_LIST = hasattr(torch.serialization, 'add_safe_globals')


def installed_line() -> str:
    """Return 'official' or 'maintained': which OpenMMLab is installed.

    If neither is, the official line for torch 2.1, for which it was made,
    the maintained one for any later torch.
    """
    names = {
        str(found.metadata['Name']).lower()
        for found in metadata.distributions()
    }
    if any(name.startswith(MAINTAINED + 'mm') for name in names):
        return 'maintained'
    if names & {'mmengine', 'mmengine-lite', 'mmcv', 'mmcv-lite', 'mmdet'}:
        return 'official'
    is_later = _numbers(torch.__version__) >= (2, 2)
    return 'maintained' if is_later else 'official'


def install_command(package: str) -> str:
    """Return the command that installs a package of the installed line."""
    return INSTALL[installed_line()].get(package, f'pip install {package}')


def mmcv_problem() -> str:
    """Return one line about an mmcv without operators, or ''."""
    if importlib.util.find_spec('mmcv') is None:
        return f'mmcv is not installed. Run: {install_command("mmcv")}'
    if importlib.util.find_spec('mmcv._ext') is not None:
        return ''
    import mmcv

    return (
        f'mmdet needs the operators of mmcv, and mmcv {mmcv.__version__} was '
        'installed without them. Run: pip uninstall -y mmcv mmcv-lite '
        f'onedl-mmcv; {install_command("mmcv")}'
    )


def _numbers(text: str) -> tuple[int, ...]:
    """Return the release of a version, such as (2, 1, 2) of 2.1.2+cu121."""
    release = re.match(r'\d+(\.\d+)*', text)
    return tuple(map(int, release[0].split('.'))) if release else ()


def stack_problem(torch_version: str, numpy_version: str) -> str:
    """Return one line about a torch and a NumPy that do not work, or ''."""
    if _numbers(torch_version) < _numbers(OLDEST_TORCH):
        return (
            f'ws_mm needs torch>={OLDEST_TORCH} and found {torch_version}. '
            f"Run: pip install 'torch>={OLDEST_TORCH}'"
        )
    if _numbers(numpy_version) >= (2,) and _numbers(torch_version) < _numbers(
        OLDEST_TORCH_FOR_NUMPY_2
    ):
        return (
            f'torch {torch_version} cannot use NumPy {numpy_version}: it '
            f'needs numpy<2, NumPy 2 needs torch>={OLDEST_TORCH_FOR_NUMPY_2}. '
            "Run: pip install 'numpy<2' 'opencv-python<4.12'"
        )
    return ''


def check_stack() -> None:
    """Check the versions that ws_mm runs with.

    Raises:
        ImportError: one of them does not fit; the message names the versions
            found, those that fit and the command that installs them.
    """
    try:
        numpy_version = metadata.version('numpy')
    except metadata.PackageNotFoundError:
        numpy_version = '0'
    problem = stack_problem(torch.__version__, numpy_version)
    if problem:
        raise ImportError(problem)
    try:
        import mmengine

        found = str(mmengine.__version__)
        if _numbers(found) < _numbers(OLDEST_MMENGINE):
            raise ImportError(f'it is {found} and too old')
        import mmengine.runner
    except ImportError as error:
        command = install_command('mmengine')
        if getattr(error, 'name', '') == 'cv2':  # onedl-mmengine lacks it
            command = 'pip install opencv-python-headless'
        raise ImportError(
            f'ws_mm needs mmengine>={OLDEST_MMENGINE}, which cannot be '
            f'imported: {error}. Run: {command}'
        ) from error


def register_configs() -> None:
    """Let ``_base_ = 'package::folder/name.py'`` find the configs.

    For ws_mm, and for packages whose distribution the maintained line has
    renamed: mmengine looks for the old name and reports that the package is
    not installed.
    """
    from mmengine.config.utils import MODULE2PACKAGE

    for module, name in MODULE2PACKAGE.items():
        if module != name and importlib.util.find_spec(module):
            try:
                metadata.distribution(name)
            except metadata.PackageNotFoundError:
                MODULE2PACKAGE[module] = module
    # The value names a distribution or a module. A module is also found in
    # an editable installation, which has no configs beside its metadata.
    MODULE2PACKAGE['ws_mm'] = __name__


# torch


def check_triton() -> None:
    """Check that Triton is one that the kernels were tested with.

    Raises:
        ImportError: there is none, or an older one.
    """
    import triton

    if _numbers(triton.__version__) < _numbers(OLDEST_TRITON):
        raise ImportError(
            f'the kernels need triton>={OLDEST_TRITON}, which came with torch '
            f'2.4, and found {triton.__version__}'
        )


# torch 2.0 has no torch.compiler and is to reach check_stack() below.
is_compiling: Any = getattr(
    getattr(torch, 'compiler', None),
    'is_compiling',
    getattr(torch._utils, 'is_compiling', None),
)


# Asked while Dynamo traces, it is called and its answer is a constant: Dynamo
# itself takes is_exporting for true, whatever it traces for.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_exporting() -> bool:
    """Return whether ``torch.export`` runs; True where torch cannot say."""
    asked = getattr(torch.compiler, 'is_exporting', None)
    return asked is None or bool(asked())


# The dict behind os.environ, where a missing name raises nothing.
_key: Any = getattr(os.environ, 'encodekey', None)
_variables: Any = getattr(os.environ, '_data', None) if _key else None


def environment_variable(name: str, default: str) -> str:
    """Return ``os.environ.get(name, default)``, in a fifth of its time."""
    if _variables is not None and _key(name) not in _variables:
        return default
    return os.environ.get(name, default)


# Bound once: each layer asks them in each forward.
_trace: Any = getattr(torch._C, '_get_tracing_state', lambda: None)
_transforms: Any = getattr(
    torch._C, '_are_functorch_transforms_active', lambda: False
)
_mode: Any = getattr(torch._C, '_get_dispatch_mode', None)
_PROXY: Any = getattr(
    getattr(torch._C, '_TorchDispatchModeKey', None), 'PROXY', None
)


def is_tracing() -> bool:
    """Return whether ``torch.jit.trace`` or ``make_fx`` runs; else False.

    Both record operations, and would record an autograd function without its
    backward.
    """
    if _trace() is not None:
        return True
    if _mode is not None and _PROXY is not None:
        return _mode(_PROXY) is not None
    names = {type(each).__name__ for each in _dispatch_modes()}
    return 'ProxyTorchDispatchMode' in names


def is_recording() -> bool:
    """Return whether a compiler, an exporter or a tracer runs."""
    return bool(is_compiling()) or is_tracing()


def is_eager() -> bool:
    """Return whether operations run as they are called.

    Not so in a compiler, an exporter or a tracer, under a transform of
    ``torch.func``, and within ``forward_ad.dual_level``.
    """
    return not (
        is_compiling()
        or is_tracing()
        or _transforms()
        or getattr(torch.autograd.forward_ad, '_current_level', -1) >= 0
    )


# Of a tensor: whether a finished transform of ``torch.func`` has left it
# behind. True where torch cannot say.
is_left_over: Any = getattr(
    getattr(torch._C, '_functorch', None),
    'is_dead_tensor_wrapper',
    lambda x: True,
)


def gpu_driver() -> int:
    """Return the version of CUDA that the driver knows; 0 if unknown."""
    version = getattr(torch._C, '_cuda_getDriverVersion', None)
    return 0 if version is None else int(version())


COMPILES_SUBCLASSES = _numbers(torch.__version__) >= (2, 10)
Subclass = TypeVar('Subclass', bound=torch.Tensor)


def as_subclass(x: torch.Tensor, kind: type[Subclass]) -> Subclass:
    """Return ``x.as_subclass(kind)``; the modes of a dispatcher see nothing.

    Of torch 2.1 they return an object that no longer takes a class.
    """
    if is_compiling() and COMPILES_SUBCLASSES:
        return x.as_subclass(kind)
    made: Subclass = _uncompiled_subclass(x, kind)
    return made


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled_subclass(x: torch.Tensor, kind: Any) -> Any:
    if not _dispatch_modes():
        return x.as_subclass(kind)
    with _disable_current_modes():
        return x.as_subclass(kind)


def own_requires_grad(x: torch.Tensor) -> bool:
    """Return whether an object of a subclass requires grad itself."""
    with torch._C.DisableTorchFunctionSubclass():
        return bool(x.requires_grad)


def is_backward() -> bool:
    """Return whether this runs inside a backward, as recomputations do.

    False if torch cannot tell: a layer in an activation checkpoint then
    updates its running statistics twice.
    """
    task = getattr(torch._C, '_current_graph_task_id', None)
    return task is not None and task() != -1


def transposed_groups(node: Any) -> int:
    """Return the groups of a transposed convolution; 0 for others.

    Args:
        node: that of its output in the autograd graph. One without the
            attributes counts as not transposed.
    """
    is_transposed = getattr(node, '_saved_transposed', False)
    return node._saved_groups if is_transposed else 0


@cache
def has_half_batch_norm() -> bool:
    """Return whether a CPU's batch norm takes float16; since torch 2.2."""
    x = torch.zeros(1, 1, 1, dtype=torch.half)
    one = torch.ones(1)
    try:
        torch.batch_norm(x, one, one, one, one, False, 0.0, 0.0, False)
    except RuntimeError:
        return False
    return True


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype of autocast on a device type; None without it."""
    if hasattr(torch, 'get_autocast_dtype'):
        try:
            on = torch.is_autocast_enabled(device)
        except RuntimeError:  # a device that has no autocast, such as meta
            return None
        return torch.get_autocast_dtype(device) if on else None
    if device == 'cuda' and torch.is_autocast_enabled():
        return torch.get_autocast_gpu_dtype()
    if device == 'cpu' and torch.is_autocast_cpu_enabled():
        return torch.get_autocast_cpu_dtype()
    return None


def tree_leaves(tree: Any) -> list[Any]:
    """Return the leaves of nested tuples, lists and dicts."""
    leaves: list[Any] = tree_flatten(tree)[0]
    return leaves


# Checkpoints. Those of mmengine hold more than tensors: a history of scalars.


def _history_method(owner: Any, name: str) -> Any:
    """Stand in for ``getattr``: the methods that a history is saved with.

    From ``getattr`` itself all of ``builtins`` could be reached.
    """
    from mmengine.logging.history_buffer import HistoryBuffer

    if owner is not HistoryBuffer or not name.isalpha():
        raise pickle.UnpicklingError(
            f'Unsupported object: GLOBAL builtins.getattr of {owner!r}'
        )
    return getattr(owner, name)


# The name under which torch's allow list keeps it, in every version.
_history_method.__module__ = 'builtins'
_history_method.__qualname__ = _history_method.__name__ = 'getattr'


def _host_objects() -> list[Any]:
    """Return the objects in mmengine's checkpoints besides tensors."""
    import numpy as np
    from mmengine.logging.history_buffer import HistoryBuffer

    dtypes = getattr(np, 'dtypes', None)
    return [
        np.zeros(1).__reduce__()[0],  # its module differs between versions
        np.float64(0).__reduce__()[0],
        np.ndarray,
        np.dtype,
        *(getattr(dtypes, name) for name in getattr(dtypes, '__all__', ())),
        HistoryBuffer,
        slice,
        _history_method,
    ]


def _allow_host_objects() -> None:
    """Add mmengine's objects to torch's list, by NumPy's old names, too."""
    objects = _host_objects()
    if _numbers(torch.__version__) >= (2, 6):  # the first that takes names
        objects += [
            (value, name.replace('numpy._core', 'numpy.core'))
            for value in objects
            for name in [f'{value.__module__}.{value.__qualname__}']
            if name.startswith('numpy._core')
        ]
    torch.serialization.add_safe_globals(objects)


def read_checkpoint(
    path: str, map_location: Any = 'cpu', mmap: bool = False
) -> Any:
    """Read a file of ``torch.save`` without running code from it.

    Since torch 2.4 this is ``torch.load(weights_only=True)`` with mmengine's
    objects allowed. Older versions of ``weights_only`` cannot allow any:
    there Python's unpickler reads the file and resolves only names of
    torch's own list and mmengine's objects.

    Args:
        path: a local file.
        map_location: device of the tensors, as in ``torch.load``.
        mmap: leave the tensors on the disk.

    Raises:
        pickle.UnpicklingError: the file holds an object of another kind.
    """
    if HAS_ALLOW_LIST:
        _allow_host_objects()
        return torch.load(
            path, map_location=map_location, mmap=mmap, weights_only=True
        )
    reader = SimpleNamespace(
        __name__=__name__,
        Unpickler=_Unpickler,
        load=lambda file, **kwargs: _Unpickler(file, **kwargs).load(),
    )
    with _environment(None):  # it excludes an unpickler of one's own
        return torch.load(
            path, map_location=map_location, mmap=mmap, pickle_module=reader
        )


class _Unpickler(pickle.Unpickler):
    """Python's unpickler with a list of names, for torch before 2.4."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a name on the list."""
        from torch._weights_only_unpickler import _get_allowed_globals

        allowed = dict(_get_allowed_globals())
        # By encode NumPy's bytes are saved.
        for value in (*_host_objects(), codecs.encode):
            allowed[f'{value.__module__}.{value.__qualname__}'] = value
        # The other names of builtins, and NumPy's before and since NumPy 2.
        module = module.replace('__builtin__', 'builtins')
        key = f'{module}.{name}'
        other = key.replace('numpy._core.', 'numpy.core.')
        for known in (key, other):
            if known in allowed:
                return allowed[known]
        raise pickle.UnpicklingError(
            f'Unsupported object: GLOBAL {key} is not on the list of names '
            'that a checkpoint may hold'
        )


@contextmanager
def _environment(value: str | None) -> Iterator[None]:
    """Set or unset :data:`FORCE` meanwhile."""
    before = os.environ.pop(FORCE, None)
    if value is not None:
        os.environ[FORCE] = value
    try:
        yield
    finally:
        os.environ.pop(FORCE, None)
        if before is not None:
            os.environ[FORCE] = before


def forbid_code() -> None:
    """Run no code from any checkpoint that this process reads from now on.

    Since torch 2.4 torch itself rejects code, with mmengine's objects
    allowed. Before, mmengine reads local files by :func:`read_checkpoint`,
    and torch accepts only tensors and plain containers from elsewhere.
    """
    os.environ[FORCE] = '1'
    if HAS_ALLOW_LIST:
        _allow_host_objects()


@contextmanager
def weights_only() -> Iterator[None]:
    """Do as :func:`forbid_code`, within a block."""
    with _environment(os.environ.get(FORCE)):
        forbid_code()
        yield


def _read_local(filename: str, map_location: Any = None) -> Any:
    """Read a local checkpoint for mmengine, on torch before 2.4."""
    from mmengine.runner.checkpoint import load_from_local

    path = os.path.expanduser(filename)
    forced = os.environ.get(FORCE, '0').lower() in ('1', 'y', 'yes', 'true')
    if forced and os.path.isfile(path):
        return read_checkpoint(path, map_location)
    return load_from_local(filename, map_location)


def register_reader() -> None:
    """Let mmengine read its own checkpoints while code is forbidden."""
    from mmengine.runner import CheckpointLoader

    if not HAS_ALLOW_LIST:
        CheckpointLoader.register_scheme('', _read_local, force=True)


check_stack()
register_configs()
register_reader()
