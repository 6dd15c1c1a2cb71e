"""Run the scripts of tools/ within the process of the tests."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import ManagerMixin
from tiny_runs import script_of, write_config, write_data

Script = Callable[..., None]


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what the scripts do to the process."""
    for name in (
        *('LOCAL_RANK', 'RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE'),
        *('SLURM_PROCID', 'SLURM_LOCALID', 'MASTER_ADDR', 'MASTER_PORT'),
    ):
        monkeypatch.setenv(name, '0')
        monkeypatch.delenv(name)
    # Set by the scripts for their process; monkeypatch takes it back.
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    # Layout of a printed config takes a large part of a short run.
    monkeypatch.setattr(
        'yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True)
    )


@pytest.fixture(autouse=True)
def tools(process: None) -> None:
    """Do so for all tests of a module that imports this."""


def load(name: str) -> ModuleType:
    """A module of tools/; Python has another one that is called test."""
    path = script_of(f'{name}.py')
    spec = importlib.util.spec_from_file_location(f'tools_{name}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_started(
    patch: pytest.MonkeyPatch, script: str, arguments: tuple[object, ...]
) -> None:
    """Set the arguments of a script, and forget earlier runs.

    Runs of files of one name that start within one second are one to
    mmengine: the second would get the scope, log and visualizer of the first.
    """
    patch.setattr('sys.argv', [script, *map(str, arguments)])
    kinds: list[type] = [ManagerMixin]
    for kind in kinds:
        patch.setattr(kind, '_instance_dict', {})
        kinds += kind.__subclasses__()


@pytest.fixture
def refuses(monkeypatch: pytest.MonkeyPatch, process: None) -> Script:
    """Run a script's main with arguments and require its error."""

    def run(match: str, script: str, *args: object) -> None:
        as_started(monkeypatch, script, args)
        module = load(script)
        with pytest.raises(module.SetupError, match=f'(?s){match}'):
            module.main()

    return run


@pytest.fixture
def script(
    monkeypatch: pytest.MonkeyPatch, process: None
) -> Callable[..., int]:
    """Run a script's main with arguments; return its exit code."""

    def run(name: str, *args: object) -> int:
        as_started(monkeypatch, name, args)
        try:
            load(name).main()
        except SystemExit as stop:
            return stop.code
        return 0

    return run


class Reached(Exception):
    """A script has come to building the Runner, with this config."""


@pytest.fixture
def reaches(
    monkeypatch: pytest.MonkeyPatch, process: None
) -> Callable[..., Config]:
    """Run a script's main up to the Runner and return the Runner's config."""

    def stop(cfg: Config) -> None:
        raise Reached(cfg)

    def run(script: str, *args: object) -> Config:
        as_started(monkeypatch, script, args)
        module = load(script)
        monkeypatch.setattr(module.launch, 'build_runner', stop)
        with pytest.raises(Reached) as reached:
            module.main()
        return reached.value.args[0]

    return run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A detection config with its data."""
    return write_config(write_data(tmp_path / 'data'))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A well-formed checkpoint, of no model in particular."""
    path = tmp_path / 'weights.pth'
    torch.save({'state_dict': {'some.weight': torch.ones(2)}}, path)
    return path


class Payload:
    """Pickled, it runs a command when it is loaded the unsafe way."""

    def __init__(self, proof: Path) -> None:
        """Remember the file that the command would make."""
        self.proof = proof

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.proof),)


def write_bad_checkpoint(kind: str, path: Path) -> None:
    """A file that is not a checkpoint, in one of the ways known."""
    weights = {'state_dict': {'a.weight': torch.ones(9)}}
    old = dict(_use_new_zipfile_serialization=False)
    if kind == 'text':
        path.write_text('<html>404</html>')
    elif kind == 'empty':
        path.touch()
    elif kind == 'list':
        torch.save([1, 2], path)
    elif kind == 'no state_dict':
        torch.save({'epoch': 3}, path)
    elif kind == 'another key':
        torch.save({'model': weights['state_dict'], 'epoch': 3}, path)
    elif kind == 'state_dict of a list':
        torch.save({'state_dict': [torch.ones(1)]}, path)
    elif kind == 'code':
        torch.save(weights | {'x': Payload(path.with_name('ran'))}, path)
    elif kind == 'old code':
        payload = {'x': Payload(path.with_name('ran'))}
        torch.save(weights | payload, path, **old)
    else:
        torch.save(weights, path, **(old if 'old' in kind else {}))
        os.truncate(path, path.stat().st_size - 30)


def backbone_weights(config: Path) -> dict[str, torch.Tensor]:
    """Weights of the backbone of a config, by their names in it."""
    cfg = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model.backbone).state_dict()


def save_run(path: Path, iteration: int, **more: object) -> None:
    """A checkpoint as training writes it."""
    content = dict(
        meta=dict(iter=iteration, epoch=0),
        state_dict={'a': torch.ones(1)},
        message_hub=dict(),
        optimizer=dict(state={}),
    )
    content |= more
    torch.save({k: v for k, v in content.items() if v is not None}, path)
