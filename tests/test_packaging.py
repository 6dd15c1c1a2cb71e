"""The wheel: what is in it, and that it is all a user needs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from mmengine import load
from mmengine.utils import digit_version

ROOT = Path(__file__).resolve().parents[1]
OTHER_TASKS = 'point_clouds/dgcnn.py', 'video/tsm.py'


@pytest.fixture(scope='module')
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of this checkout."""
    import setuptools

    folder = tmp_path_factory.mktemp('wheel')
    # pip builds in the checkout, where it would leave a folder.
    # Caches change meanwhile, where other tests run.
    ignored = shutil.ignore_patterns(
        *('.git', '.venv*', 'work_dirs', 'data'),
        *('__pycache__', '.hypothesis', '.*_cache'),
    )
    shutil.copytree(ROOT, folder / 'ws_mm', symlinks=True, ignore=ignored)
    # One is there nevertheless, that the wheel has to leave out.
    for package in 'ws_mm', 'tools':
        cache = folder / 'ws_mm' / package / '__pycache__'
        cache.mkdir()
        (cache / 'stale.cpython-311.pyc').touch()
    options = ['--no-deps', '-q', '-w', str(folder)]
    old = digit_version(setuptools.__version__) < digit_version('77')
    if not old:
        options += ['--no-index', '--no-build-isolation']
    done = subprocess.run(
        [sys.executable, '-m', 'pip', 'wheel', *options, folder / 'ws_mm'],
        capture_output=True,
        text=True,
    )
    # What pip says where the index gives nothing at all.
    if old and '(from versions: none)' in done.stderr:
        pytest.skip(
            'an old setuptools builds with one from PyPI, which is not reached'
        )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob('*.whl')
    return built


@pytest.fixture(scope='module')
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a folder of its own."""
    folder = tmp_path_factory.mktemp('site')
    options = ['--no-deps', '--no-index', '-q', '--target', str(folder)]
    command = [sys.executable, '-m', 'pip', 'install', *options, str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run(site: Path, folder: Path, code: str) -> str:
    """Run code outside the checkout with the wheel alone."""
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=folder,
        env={**os.environ, 'PYTHONPATH': str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    files = {name.removeprefix('ws_mm/') for name in names}
    assert {'py.typed', '.mim/model-index.yml', '.mim/tools/train.py'} <= files
    tools = {file for file in files if file.startswith('.mim/tools/')}
    assert '.mim/tools/dist_train.sh' in tools
    assert '.mim/tools/support/torchrun.sh' in tools
    assert '.mim/tools/deployment/export.py' in tools
    assert {f'.mim/tools/{f}' for f in OTHER_TASKS} <= tools
    assert not {file for file in tools if 'proofs' in file}
    assert '.mim/tools/bootstrap.py' not in tools
    wanted = {
        f'.mim/{path.relative_to(ROOT)}'
        for pattern in ('*.py', '*.yml')
        for path in (ROOT / 'configs').rglob(pattern)
        if '__pycache__' not in path.parts
    }
    assert wanted
    assert wanted <= files
    assert any(name.endswith('licenses/LICENSE') for name in names)
    assert not any('tests' in name or '.pyc' in name for name in names)
    sizes = [info.file_size for info in zipfile.ZipFile(wheel).infolist()]
    assert sum(sizes) < 2e6


def test_beside_an_editable_checkout(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip('setuptools', minversion='77')
    # Its folder is called ws_mm, too, and holds no __init__.py.
    checkout = wheel.parent / 'ws_mm'
    words = f'-m pip install -q --no-deps --no-index --prefix {tmp_path}'
    words += f' --no-build-isolation -e {checkout}'
    done = subprocess.run(
        [sys.executable, *words.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.rglob('site-packages')
    code = (
        f'import site, sys; site.addsitedir({str(path)!r})\n'
        'import ws_mm; print(ws_mm.__file__)'
    )
    found = run(path, wheel.parent, code)
    assert found == str(checkout / 'ws_mm/__init__.py')


def test_it_is_typed_and_has_a_version(site: Path, tmp_path: Path) -> None:
    code = (
        'import ws_mm, pathlib\n'
        'folder = pathlib.Path(ws_mm.__file__).parent\n'
        'print(folder.parent, ws_mm.__version__, '
        '(folder / "py.typed").is_file())'
    )
    where, version, typed = run(site, tmp_path, code).split()
    assert Path(where) == site
    text = (ROOT / 'pyproject.toml').read_text()
    assert f"\nversion = '{version}'\n" in text
    assert typed == 'True'


def test_the_index_names_files_that_are_there(site: Path) -> None:
    mim = site / 'ws_mm/.mim'
    index = load(mim / 'model-index.yml')
    models = [
        model
        for path in index['Import']
        for model in load(mim / path)['Models']
    ]
    assert models
    for model in models:
        assert (mim / model['Config']).is_file(), model['Name']


def test_configs_are_bases_of_others(site: Path, tmp_path: Path) -> None:
    (tmp_path / 'mine.py').write_text(
        "_base_ = 'ws_mm::deeplabv3/"
        "deeplabv3_r50-d16_bcn-ws-all_8xb2-50e_voc12aug-513x513.py'\n"
        'train_dataloader = dict(batch_size=1)\n'
    )
    code = (
        'import ws_mm\n'
        'from mmengine.config import Config\n'
        'cfg = Config.fromfile("mine.py")\n'
        'print(cfg.train_dataloader.batch_size, cfg.model.type, '
        'cfg.model.decode_head.norm_cfg.type)'
    )
    assert run(site, tmp_path, code) == '1 EncoderDecoder ws_mm.BCN'


def test_tools_run_from_it(site: Path, tmp_path: Path) -> None:
    pytest.importorskip('mmseg')
    mim = site / 'ws_mm/.mim'
    done = subprocess.run(
        [
            *(sys.executable, mim / 'tools/analysis_tools/check_model.py'),
            mim / 'configs/demo'
            '/deeplabv3_r18-d16_bcn-ws-all_1xb1-300i_stardist.py',
        ],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 'WSConv2d' in done.stdout


def test_links_are_those_of_the_checkout() -> None:
    mim = ROOT / 'ws_mm/.mim'
    for name in ('configs', 'tools', 'model-index.yml'):
        assert (mim / name).resolve() == ROOT / name
