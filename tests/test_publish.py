"""publish.py, and the index of models for mim."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
import yaml
from test_tools_errors import load, refuses, tools  # noqa: F401
from tiny_runs import ROOT

import ws_mm


def write(path: Path, **more) -> Path:
    """A checkpoint as the Runner writes it."""
    whole = torch.arange(100.0)
    content = dict(
        meta=dict(
            cfg='model = dict()',
            dataset_meta=dict(classes=('nucleus',)),
            experiment_name='some_config_20251121_101112',
            mmengine_version='0.10.12',
            hook_msgs=dict(best_ckpt='/home/somebody/best.pth'),
            epoch=4,
        ),
        state_dict=dict(weight=whole[:3]),
        message_hub=dict(),
        optimizer=dict(state=whole),
        param_schedulers=[],
        ema_state_dict={'module.weight': whole[3:6], 'steps': torch.ones(1)},
    )
    torch.save(content | more, path)
    return path


@pytest.fixture
def publish(monkeypatch, tmp_path):
    def run(*args):
        out = tmp_path / 'out'
        command = ['publish', tmp_path / 'old.pth', out, *args]
        monkeypatch.setattr('sys.argv', [*map(str, command)])
        load('publish').main()
        (path,) = out.iterdir()
        return path

    return run


@pytest.mark.usefixtures('tools')
def test_weights_and_meta_under_their_hash(publish, tmp_path, capsys):
    write(tmp_path / 'old.pth')
    path = publish()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f'some_config-{digest[:8]}.pth'
    content = torch.load(path, weights_only=True)
    assert set(content) == {'meta', 'state_dict'}
    assert torch.equal(content['state_dict']['weight'], torch.arange(3.0))
    meta = content['meta']
    assert meta['cfg'] == 'model = dict()'
    assert meta['dataset_meta'] == dict(classes=('nucleus',))
    assert meta['epoch'] == 4
    assert meta['mmengine_version'] == '0.10.12'
    assert meta['ws_mm_version'] == ws_mm.__version__
    assert meta['torch_version'] == str(torch.__version__)
    assert 'somebody' not in str(meta)
    storage = content['state_dict']['weight'].untyped_storage()
    assert storage.nbytes() == 12
    told = capsys.readouterr().out
    left = 'message_hub, optimizer, param_schedulers, ema_state_dict'
    assert f'left behind: {left}' in told


@pytest.mark.usefixtures('tools')
def test_averaged_weights(publish, tmp_path):
    write(tmp_path / 'old.pth')
    content = torch.load(publish('--ema', '--name', 'mine'))
    assert list(content['state_dict']) == ['weight']
    assert torch.equal(content['state_dict']['weight'], torch.arange(3.0, 6))


@pytest.mark.parametrize(
    ('change', 'options', 'match'),
    [
        (dict(ema_state_dict={}), ('--ema',), 'no ema_state_dict'),
        (dict(meta={}), (), 'give --name'),
        ({}, ('--name', 'a/b'), 'not a path'),
    ],
)
def test_refused(change, options, match, refuses, tmp_path):  # noqa: F811
    old = write(tmp_path / 'old.pth', **change)
    refuses(match, 'publish', old, tmp_path / 'out', *options)
    assert not (tmp_path / 'out').exists()


def test_bare_weights_are_refused(refuses, tmp_path):  # noqa: F811
    torch.save(dict(weight=torch.ones(2)), tmp_path / 'old.pth')
    match = 'no state_dict: it is none of a training. It holds weight'
    refuses(match, 'publish', tmp_path / 'old.pth', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.usefixtures('tools')
def test_nothing_half_written_stays(publish, tmp_path, monkeypatch):
    write(tmp_path / 'old.pth')

    def fails(content, path):
        Path(path).write_text('half')
        raise OSError('disk is full')

    monkeypatch.setattr(torch, 'save', fails)
    with pytest.raises(OSError, match='full'):
        publish()
    assert not list((tmp_path / 'out').iterdir())


INDEX = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
# What the table of configs/README.md says of ours: box, mask AP or mIoU.
ROW = re.compile(r'^\| \[([^]]+)\]\((\S+)\) \|.*\| (\d[^|]*) \|$', re.M)


def test_every_metafile_is_imported_once():
    found = sorted((ROOT / 'configs').rglob('metafile.yml'))
    assert INDEX == [str(path.relative_to(ROOT)) for path in found]


def test_every_config_is_listed_and_every_result_is_ours():
    text = (ROOT / 'configs/README.md').read_text()
    told = {name: figures for name, _, figures in ROW.findall(text)}
    assert len(told) > 8
    listed, seen = [], {}
    for name in INDEX:
        content = yaml.safe_load((ROOT / name).read_text())
        collections = [one['Name'] for one in content['Collections']]
        for one in content['Collections']:
            assert (ROOT / one['README']).is_file()
            assert one['Paper']['URL'].startswith('https://arxiv.org/abs/')
        for model in content['Models']:
            assert model['In Collection'] in collections
            # Nothing is published for download yet.
            assert 'Weights' not in model
            config = ROOT / model['Config']
            assert config.stem == model['Name']
            assert config.parent == (ROOT / name).parent
            listed.append(config)
            metrics = {}
            for result in model.get('Results', ()):
                metrics |= result['Metrics']
            if metrics:
                seen[model['Name']] = metrics
    there = (ROOT / 'configs').glob('*/*.py')
    assert sorted(listed) == sorted(
        path for path in there if path.parent.name != '_base_'
    )
    expected = {}
    for name, figures in told.items():
        expected[name] = {}
        for value, unit in re.findall(r'([0-9.]+) (box|mask|mIoU)', figures):
            metric = unit if unit == 'mIoU' else f'{unit} AP'
            scale = 1 if unit == 'mIoU' else 100
            expected[name][metric] = round(scale * float(value), 1)
    assert seen == expected
