"""Compatibility with the supported versions."""

import ast
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import CheckpointLoader, Runner
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import ws_mm
from ws_mm import BCN, WSConv2d, compat

PACKAGE = Path(ws_mm.__file__).parent
# Names that some supported version lacks, or that torch keeps private.
PRIVATE = {
    *('_C', '_utils', '_pytree', '_weights_only_unpickler'),
    *('is_compiling', 'get_autocast_dtype', 'is_autocast_enabled'),
    *('add_safe_globals', 'get_torch_safe_globals', 'dtypes'),
    *('MODULE2PACKAGE', 'device_mesh'),
}


def names_in(path: Path) -> set[str]:
    """Every attribute and every part of an imported name in a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {*(node.module or '').split('.')}
            found |= {alias.name for alias in node.names}
    return found


def test_no_other_module_asks_for_a_version():
    for path in PACKAGE.rglob('*.py'):
        if '.mim' in path.parts or path.name == 'compat.py':
            continue
        # compat.is_compiling() and the like are how others ask.
        text = path.read_text()
        used = {
            name
            for name in names_in(path) & PRIVATE
            if f'compat.{name}' not in text
        }
        assert not used, path
    assert names_in(PACKAGE / 'compat.py') & PRIVATE


@pytest.mark.parametrize(
    ('torch_version', 'numpy_version', 'names'),
    [
        ('2.0.1+cu118', '1.26.4', ['torch>=2.1', '2.0.1+cu118']),
        ('1.13.1', '1.24.0', ['torch>=2.1', '1.13.1']),
        ('2.1.2', '2.0.0', ["pip install 'numpy<2'", '2.1.2', '2.0.0']),
        ('2.2.2+cpu', '2.2.6', ["pip install 'numpy<2'", '2.2.6', '2.2.2']),
        ('2.1.0', '1.26.4', []),
        ('2.3.0', '2.0.0', []),
        ('2.14.1+cu130', '2.4.1', []),
        ('2.16.0a0+git123', '2.4.1', []),
    ],
)
def test_unsupported_versions_are_one_line(
    torch_version, numpy_version, names
):
    problem = compat.stack_problem(torch_version, numpy_version)
    assert bool(problem) == bool(names)
    assert '\n' not in problem
    assert all(name in problem for name in names)


def run_with(folder: Path, code: str) -> str:
    """Run code with a folder before all installed packages."""
    done = subprocess.run(
        [sys.executable, '-c', code],
        env={**os.environ, 'PYTHONPATH': f'{folder}:{PACKAGE.parent}'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_an_old_mmengine_is_named_at_import(tmp_path):
    (tmp_path / 'mmengine').mkdir()
    (tmp_path / 'mmengine/__init__.py').write_text("__version__ = '0.7.4'")
    line = run_with(tmp_path, 'import ws_mm')
    assert line.startswith('ImportError: ws_mm needs mmengine>=')
    assert 'it is 0.7.4 and too old. Run: pip install ' in line


def test_a_missing_opencv_is_named_at_import(tmp_path):
    (tmp_path / 'cv2').mkdir()
    (tmp_path / 'cv2/__init__.py').write_text(
        "raise ModuleNotFoundError(\"No module named 'cv2'\", name='cv2')"
    )
    line = run_with(tmp_path, 'import ws_mm')
    assert line.endswith('Run: pip install opencv-python-headless')


class Net(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.conv = WSConv2d(3, 8, 3)
        self.norm = BCN(8, 4)

    def forward(self, *inputs, mode='tensor'):
        output = self.norm(self.conv(torch.stack(inputs)))
        return {'loss': (output - 1).square().mean()}


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint that mmengine's Runner and EMAHook wrote."""
    folder = tmp_path_factory.mktemp('run')
    model = Net()
    Runner(
        model,
        str(folder),
        train_dataloader=dict(
            dataset=[torch.randn(3, 8, 8) for _ in range(4)],
            batch_size=1,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='pseudo_collate'),
        ),
        train_cfg=dict(by_epoch=False, max_iters=4),
        optim_wrapper=OptimWrapper(
            torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        ),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=4, by_epoch=False)
        ),
        custom_hooks=[EMAHook()],
        experiment_name='compat',
    ).train()
    return folder / 'iter_4.pth'


def test_checkpoint_of_mmengine_is_read_whole(checkpoint):
    content = compat.read_checkpoint(str(checkpoint))
    assert content['meta']['iter'] == 4
    assert content['optimizer']['state']
    history = content['message_hub']['log_scalars']['train/loss']
    assert history.statistics('mean', 4) == history.mean(4)
    assert np.isfinite(history.data[0]).all()
    assert 'conv' in content['state_dict']._metadata
    mapped = compat.read_checkpoint(str(checkpoint), mmap=True)
    for name, values in content['state_dict'].items():
        assert torch.equal(values, mapped['state_dict'][name])


def test_mmengine_reads_it_with_code_forbidden(checkpoint):
    with compat.weights_only():
        content = CheckpointLoader.load_checkpoint(str(checkpoint), 'cpu')
    assert content['message_hub']['log_scalars']['train/loss'].current()


class OldNames(pickle._Pickler):
    """Writes the names that NumPy 1 has, which NumPy 2 still reads."""

    def save_global(self, obj, name=None):
        module = obj.__module__
        if module.startswith('numpy._core'):
            old = module.replace('numpy._core', 'numpy.core')
            self.write(pickle.GLOBAL + f'{old}\n{obj.__name__}\n'.encode())
            self.memoize(obj)
        else:
            super().save_global(obj, name)

    dispatch = pickle._Pickler.dispatch | {
        type(np.zeros(1).__reduce__()[0]): save_global
    }


def test_a_checkpoint_of_numpy_1_is_read(checkpoint, tmp_path):
    content = compat.read_checkpoint(str(checkpoint))
    path = tmp_path / 'w.pth'
    torch.save(content, path, pickle_module=PickleModule)
    raw = path.read_bytes()
    assert b'numpy.core.multiarray' in raw
    assert b'numpy._core' not in raw
    again = compat.read_checkpoint(str(path))
    name = 'train/loss'
    old, new = (
        each['message_hub']['log_scalars'][name].data
        for each in (again, content)
    )
    assert np.array_equal(old, new)


class PickleModule:
    """A pickle module for ``torch.save``."""

    Pickler = OldNames
    __name__ = 'pickle'


class Payload:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('old_format', [False, True])
@pytest.mark.parametrize('listed', [True, False])
@pytest.mark.parametrize(
    'kind', ['call', 'class', 'getattr', 'in history', 'builtins']
)
def test_no_other_object_is_built(
    tmp_path, kind, listed, old_format, monkeypatch
):
    from mmengine.logging.history_buffer import HistoryBuffer

    made = tmp_path / 'made'
    objects = {
        'call': Payload(os.mkdir, str(made)),
        'class': Path('.'),
        'getattr': Payload(getattr, HistoryBuffer, '__init__'),
        'in history': Payload(getattr, torch.Tensor, 'numpy'),
        # With it NumPy's functions could be replaced by exec.
        'builtins': Payload(getattr, getattr, '__self__'),
    }
    path = tmp_path / 'w.pth'
    torch.save(
        dict(state_dict=dict(w=torch.ones(1)), extra=objects[kind]),
        path,
        _use_new_zipfile_serialization=not old_format,
    )
    if not listed:  # the reader of torch before 2.4
        monkeypatch.setattr(compat, 'HAS_ALLOW_LIST', False)
    with pytest.raises(pickle.UnpicklingError, match='GLOBAL|Unsupported'):
        compat.read_checkpoint(str(path))
    assert not made.exists()


def test_the_reader_of_old_torch_reads_the_same(checkpoint, monkeypatch):
    expected = compat.read_checkpoint(str(checkpoint))
    monkeypatch.setattr(compat, 'HAS_ALLOW_LIST', False)
    monkeypatch.setenv(compat.FORCE, '1')
    content = compat.read_checkpoint(str(checkpoint))
    assert os.environ[compat.FORCE] == '1'
    assert content['meta'] == expected['meta']
    for name, values in expected['state_dict'].items():
        assert torch.equal(values, content['state_dict'][name])
    name = 'train/loss'
    old, new = (
        each['message_hub']['log_scalars'][name].data
        for each in (content, expected)
    )
    assert np.array_equal(old, new)


def test_mmengine_reads_as_before_with_code_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(compat, 'HAS_ALLOW_LIST', False)
    monkeypatch.setattr(
        CheckpointLoader, '_schemes', CheckpointLoader._schemes.copy()
    )
    compat.register_reader()
    path, made = tmp_path / 'w.pth', tmp_path / 'made'
    torch.save(dict(extra=Payload(os.mkdir, str(made))), path)
    with compat.weights_only(), pytest.raises(pickle.UnpicklingError):
        CheckpointLoader.load_checkpoint(str(path))
    assert not made.exists()
    monkeypatch.setenv(compat.FORCE, '0')
    if not hasattr(torch.serialization, 'add_safe_globals'):
        CheckpointLoader.load_checkpoint(str(path))  # mmengine's own reader
        assert made.exists()


def answers(asked: Callable[[], bool]) -> list[bool]:
    """Ask in eager mode, in two tracers, in two transforms, and again."""
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(asked())
        return x + 1

    x = torch.ones(1)
    function(x)
    torch.jit.trace(function, x, check_trace=False)
    make_fx(function)(x)
    torch.func.vmap(function)(x)
    with torch.autograd.forward_ad.dual_level():
        function(x)
    function(x)
    return seen


def test_is_tracing() -> None:
    assert answers(compat.is_tracing) == [False, True, True, *[False] * 3]


def test_is_eager() -> None:
    assert answers(compat.is_eager) == [True, *[False] * 4, True]
    compiled = torch.compile(lambda x: x + compat.is_eager(), backend='eager')
    assert compiled(torch.ones(1)) == 1


@pytest.mark.parametrize('known', [True, False])
def test_environment_variable(
    monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    if not known:  # a Python with another os.environ
        monkeypatch.setattr(compat, '_variables', None)
    name, seen = 'WS_MM_TEST_VARIABLE', []
    for value in (None, 'first', 'second', None):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
        seen.append(compat.environment_variable(name, 'default'))
    assert seen == ['default', 'first', 'second', 'default']


def test_is_backward():
    seen = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(compat.is_backward())
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(compat.is_backward())
            return grad

    Function.apply(torch.ones(1, requires_grad=True)).backward()
    assert seen == [False, True]


def test_an_old_triton_is_named(monkeypatch):
    triton = pytest.importorskip('triton')
    monkeypatch.setattr(triton, '__version__', '2.1.0')
    with pytest.raises(ImportError, match=r'triton>=3\.0.*found 2\.1\.0'):
        compat.check_triton()
    monkeypatch.setattr(triton, '__version__', '3.6.0')
    compat.check_triton()


def test_autocast_dtype():
    assert compat.autocast_dtype('cpu') is None
    assert compat.autocast_dtype('meta') is None
    with torch.autocast('cpu', torch.bfloat16):
        assert compat.autocast_dtype('cpu') is torch.bfloat16
        assert compat.autocast_dtype('cuda') is None
        assert compat.autocast_dtype('meta') is None
    with torch.autocast('cpu', enabled=False):
        assert compat.autocast_dtype('cpu') is None


def test_a_ws_conv_has_a_shape_on_the_meta_device():
    conv = WSConv2d(3, 8, 3, device='meta')
    output = conv(torch.empty(2, 3, 9, 9, device='meta'))
    assert output.shape == (2, 8, 7, 7)
    assert nn.Conv2d(3, 8, 3).weight.dtype == output.dtype


@pytest.mark.parametrize('import_it', ['import ws_mm', ''])
def test_configs_of_ws_mm_are_a_base(tmp_path, import_it):
    # mmengine evaluates _base_ alone, before the rest of the file.
    base = "'ws_mm::mask_rcnn/mask-rcnn_r50_fpn_bcn-ws-all_8xb2-2x_coco.py'"
    if not import_it:
        base = f"__import__('ws_mm') and {base}"
    (tmp_path / 'mine.py').write_text(f'_base_ = {base}\nwork_dir = "w"\n')
    code = (
        f'{import_it}\n'
        'from mmengine.config import Config\n'
        'cfg = Config.fromfile("mine.py")\n'
        'print(cfg.work_dir, cfg.model.backbone.norm_cfg.type)\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(PACKAGE.parent)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == 'w ws_mm.BCN\n', done.stderr


def test_the_scope_of_ws_mm_is_that_of_the_config(tmp_path):
    pytest.importorskip('mmdet')
    from mmengine.registry import MODELS, DefaultScope

    path = tmp_path / 'mine.py'
    path.write_text(
        "_base_ = 'ws_mm::mask_rcnn/"
        "mask-rcnn_r50_fpn_bcn-ws-all_8xb2-2x_coco.py'\n"
        'model = dict(backbone=dict(depth=18, init_cfg=None),'
        ' neck=dict(in_channels=[64, 128, 256, 512]))\n'
    )
    cfg = Config.fromfile(path)
    assert cfg.model._scope_ == 'ws_mm'
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    assert type(model).__module__.startswith('mmdet.')
    assert type(model.backbone).__module__ == 'mmdet.models.backbones.resnet'
    assert isinstance(model.backbone.conv1, WSConv2d)
