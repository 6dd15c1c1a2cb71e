"""Files from others: no code in them runs, whichever tool opens them."""

import importlib.util
import os
import pickle
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from in_process import load, tools, write_bad_checkpoint  # noqa: F401
from mmengine.model import Sequential
from mmengine.runner import CheckpointLoader
from safetensors.torch import save_file
from test_convert_checkpoint import host, source_of
from tiny_runs import DET, SEG, write_config, write_data
from torch import nn

from ws_mm import BCN, PretrainedGN, WSConv2d
from ws_mm.compat import FORCE, weights_only

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

Script = Callable[..., None]
KINDS = ('code', 'old code')


@pytest.fixture(params=KINDS)
def payload(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint that makes a folder when it is opened the unsafe way."""
    path = tmp_path / 'w.pth'
    write_bad_checkpoint(request.param, path)
    return path


def test_the_payload_is_live(payload: Path) -> None:
    torch.load(payload, weights_only=False)
    assert payload.with_name('ran').exists()


def test_the_host_runs_it(payload: Path) -> None:
    CheckpointLoader.load_checkpoint(str(payload))
    assert payload.with_name('ran').exists()


def test_bake_and_convert_do_not_run_it(
    payload: Path,
    refuses: Script,
    tmp_path: Path,
) -> None:
    match = r'holds a \w+\.mkdir, which only running code'
    out = tmp_path / 'out'
    config = write_config(tmp_path, SEG.replace('ws_mm.BCN', 'GN'))
    # First what reads no config, which shuts the door for all.
    new = tmp_path / 'new.pth'
    refuses(match, 'convert_checkpoint', payload, new)
    refuses(match, 'bake', config, payload, out)
    assert not payload.with_name('ran').exists()
    assert not out.exists()
    assert not new.exists()


@pytest.mark.parametrize(
    'kind', ['empty', 'truncated', 'old truncated', 'no state_dict', 'list']
)
def test_broken_files_write_nothing(
    kind: str,
    refuses: Script,
    tmp_path: Path,
) -> None:
    path, out = tmp_path / 'w.pth', tmp_path / 'out'
    write_bad_checkpoint(kind, path)
    config = write_config(tmp_path, SEG.replace('ws_mm.BCN', 'GN'))
    match = 'w.pth is (truncated|not a checkpoint)'
    refuses(match, 'convert_checkpoint', path, tmp_path / 'new.pth')
    refuses(match, 'bake', config, path, out)
    if importlib.util.find_spec('onnx'):
        refuses(match, 'export', config, path, tmp_path / 'new.onnx')
    refuses(match, 'publish', path, out, '--name', 'new')
    assert sorted(tmp_path.iterdir()) == sorted((path, config))


def test_pretrained_gn_does_not_run_it(payload: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), BCN(8, outer_affine='channel'))
    before = os.environ.get(FORCE)
    with pytest.raises(pickle.UnpicklingError, match='mkdir'):
        PretrainedGN(str(payload))(net)
    assert not payload.with_name('ran').exists()
    assert os.environ.get(FORCE) == before


def test_the_door_is_as_it_was_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(FORCE)
    with weights_only():
        assert os.environ[FORCE] == '1'
    assert FORCE not in os.environ


def test_resuming_passes_over_it(payload: Path) -> None:
    path, broken = load('checkpoints').newest_checkpoint(str(payload.parent))
    assert path is None
    assert 'mkdir' in broken[0]
    assert not payload.with_name('ran').exists()


@pytest.mark.parametrize('script', ['train', 'test', 'check_model'])
@pytest.mark.usefixtures('tools')
def test_the_host_cannot_run_it_within_the_tools(
    script: str,
    payload: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # Where a URL leads, no tool looks beforehand; this is how it is read.
    config = write_config(write_data(tmp_path / 'data'), DET)
    url = ['https://host/w.pth'] if script == 'test' else []
    monkeypatch.setattr('sys.argv', [script, str(config), *url])
    module = load(script)
    name = 'build_model' if script == 'check_model' else 'build_runner'
    owner = module.models if script == 'check_model' else module.launch

    def read(cfg: object) -> None:
        CheckpointLoader.load_checkpoint(str(payload))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(owner, name, read)
    with pytest.raises(pickle.UnpicklingError, match='mkdir'):
        module.main()
    assert not payload.with_name('ran').exists()


@pytest.mark.usefixtures('tools')
def test_code_is_one_line_to_the_user(
    capsys: pytest.CaptureFixture, payload: Path
) -> None:
    def main() -> None:
        with weights_only():
            torch.load(payload)

    with pytest.raises(SystemExit, match='1'):
        load('launch').run(main)
    assert 'error: ' in capsys.readouterr().err


@pytest.mark.usefixtures('tools')
def test_a_pickle_named_safetensors_is_refused(
    payload: Path,
    tmp_path: Path,
) -> None:
    path = payload.rename(tmp_path / 'w.safetensors')
    checkpoints = load('checkpoints')
    with pytest.raises(
        checkpoints.SetupError, match='safetensors did not write'
    ):
        checkpoints.read_checkpoint(path)
    with pytest.raises(Exception, match='(?i)header'):
        CheckpointLoader.load_checkpoint(str(path))
    assert not (tmp_path / 'ran').exists()


@pytest.mark.usefixtures('tools')
def test_safetensors_are_read_and_written(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    source = source_of('bn', centered=True)
    old, new = (tmp_path / f'{n}.safetensors' for n in 'ab')
    # As Hugging Face and timm write them.
    save_file(source.state_dict(), old, metadata={'format': 'pt'})
    convert = load('convert_checkpoint')
    for out in (new, tmp_path / 'b.pth'):
        monkeypatch.setattr('sys.argv', ['x', str(old), str(out)])
        convert.main()
    expected = torch.load(tmp_path / 'b.pth', weights_only=True)['state_dict']
    # The host takes it where it takes a checkpoint; it needs torch's names.
    read = CheckpointLoader.load_checkpoint(str(new), 'cpu')['state_dict']
    torch.testing.assert_close(dict(read), dict(expected), rtol=0, atol=0)
    host(read, dict(type='BN'), 'outside')
    # Both say that these filters are standardized ones.
    for state in (read, expected):
        assert state._metadata['layer1.0.conv1']['version'] == 2
    plain = CheckpointLoader.load_checkpoint(str(old))['state_dict']
    assert not hasattr(plain, '_metadata')


@pytest.mark.usefixtures('tools')
def test_safetensors_are_loaded_by_a_config(tmp_path: Path) -> None:
    source = Sequential(WSConv2d(3, 8, 1))
    path = tmp_path / 'w.safetensors'
    save_file(source.state_dict(), path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    net = Sequential(WSConv2d(3, 8, 1), init_cfg=init_cfg)
    net.init_weights()
    torch.testing.assert_close(net.state_dict(), source.state_dict())
    load('checkpoints').check_weights_fit(str(path), net)


@pytest.mark.parametrize('kind', ['home', 'url', 'function'])
def test_safetensors_are_read_where_mmengine_reads(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    # Files of many networks have this name.
    others = [tmp_path / name / 'model.safetensors' for name in 'ab']
    for index, path in enumerate(others):
        path.parent.mkdir()
        save_file({'weight': torch.full((1,), float(index))}, path)
    downloaded, download = [], torch.hub.download_url_to_file
    monkeypatch.setattr(
        'torch.hub.download_url_to_file',
        lambda url, *args, **options: (
            downloaded.append(url) or download(url, *args, **options)
        ),
    )
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        base = {
            'home': '~',
            'url': f'http://127.0.0.1:{server.server_port}',
            'function': str(tmp_path),
        }[kind]
        # As torch.load takes them.
        where = {
            'home': {'cuda:0': 'cpu'},
            'url': 'cpu',
            'function': lambda storage, _: storage,
        }[kind]
        for index, path in enumerate(others):
            name = f'{base}/{path.relative_to(tmp_path)}'
            for _ in range(2):
                found = CheckpointLoader.load_checkpoint(name, where)
                assert found['state_dict'] == {'weight': index}
        server.shutdown()
    assert len(downloaded) == (2 if kind == 'url' else 0)
