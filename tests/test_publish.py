"""publish.py, and the index of models for mim."""

import hashlib
import math
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from in_process import load, tools  # noqa: F401
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
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
            iter=40,
            seed=3,
            time='20251121_111213',
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
@pytest.mark.parametrize('options', [[], ['--ema'], ['--no-ema']])
def test_published_filters_are_known_as_standardized(
    publish, tmp_path, options
):
    state = torch.nn.Sequential(ws_mm.WSConv2d(3, 8, 1)).state_dict()
    averaged = torch.nn.DataParallel(
        torch.nn.Sequential(ws_mm.WSConv2d(3, 8, 1))
    ).state_dict()
    write(tmp_path / 'old.pth', state_dict=state, ema_state_dict=averaged)
    published = torch.load(publish(*options), weights_only=True)['state_dict']
    assert published._metadata['0']['version'] == ws_mm.checkpoint.STANDARDIZED


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
    assert [meta[key] for key in ('epoch', 'iter', 'seed')] == [4, 40, 3]
    assert meta['time'] == '20251121_111213'
    assert meta['experiment_name'] == 'some_config_20251121_101112'
    assert meta['mmengine_version'] == '0.10.12'
    assert meta['ws_mm_version'] == ws_mm.__version__
    assert meta['torch_version'] == str(torch.__version__)
    assert 'somebody' not in str(meta)
    storage = content['state_dict']['weight'].untyped_storage()
    assert storage.nbytes() == 12
    told = capsys.readouterr().out
    left = 'message_hub, optimizer, param_schedulers, ema_state_dict'
    assert f'left behind: {left}' in told


class Net(BaseModel):
    """A WS convolution and a BCN, whose estimates are buffers."""

    def __init__(self):
        super().__init__()
        self.conv = ws_mm.WSConv2d(3, 4, 1)
        self.norm = ws_mm.BCN(4, num_groups=2)
        self.double()

    def forward(self, inputs, data_samples=None, mode='tensor'):
        """Loss with a random cotangent, or predictions."""
        outputs = self.norm(self.conv(inputs))
        if mode != 'loss':
            return list(outputs)
        return dict(loss=(outputs * torch.randn_like(outputs)).sum())


class Seen(Hook):
    """The weights of the optimizer after each iteration."""

    def __init__(self, states):
        self.states = states

    def after_train_iter(self, runner, *args, **kwargs):
        """Copy them before anything is swapped."""
        self.states.append(deepcopy(runner.model.state_dict()))


class Score(BaseMetric):
    """Worse with every validation, so that the first stays the best."""

    default_prefix = 'own'
    runs = 0

    def process(self, data_batch, data_samples):
        """Nothing of the samples counts."""
        self.results.append(0)

    def compute_metrics(self, results):
        """Fall."""
        Score.runs += 1
        return dict(score=-float(Score.runs))


def train_with_ema(work_dir, states, iterations, **ema):
    """Train with the host's own Runner and hooks; go on where files are."""
    images = torch.randn(4, 3, 5, 5, dtype=torch.double)
    loader = dict(
        dataset=[dict(inputs=image) for image in images],
        batch_size=2,
        sampler=dict(type='DefaultSampler', shuffle=True),
        collate_fn=dict(type='default_collate'),
    )
    runner = Runner(
        Net(),
        str(work_dir),
        train_dataloader=loader,
        val_dataloader=loader,
        train_cfg=dict(by_epoch=False, max_iters=iterations, val_interval=2),
        val_cfg=dict(),
        val_evaluator=[Score()],
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook',
                by_epoch=False,
                interval=1,
                save_best='own/score',
                rule='greater',
            )
        ),
        custom_hooks=[dict(type='EMAHook', **ema), Seen(states)],
        resume=True,
        experiment_name=f'{work_dir.parent.name}_{iterations}',
    )
    runner.train()


def averages(states, kind, update_buffers, momentum, gamma=2000):
    """The running averages by their formula, one after each iteration."""
    buffers = dict(Net().named_buffers())
    found = [states[0]]
    for steps, state in enumerate(states[1:], 1):
        rate = momentum
        if kind == 'mmdet.ExpMomentumEMA':
            rate += (1 - momentum) * math.exp(-(1 + steps) / gamma)
        found.append(
            {
                name: values
                if name in buffers and not update_buffers
                else found[-1][name] + rate * (values - found[-1][name])
                for name, values in state.items()
            }
        )
    return found


@pytest.mark.usefixtures('tools')
@pytest.mark.parametrize(
    ('kind', 'update_buffers'),
    [
        ('ExponentialMovingAverage', False),
        ('ExponentialMovingAverage', True),
        ('mmdet.ExpMomentumEMA', True),
    ],
)
def test_averaged_weights_of_a_run(
    kind, update_buffers, tmp_path, capsys, monkeypatch
):
    ema = dict(ema_type=kind, update_buffers=update_buffers, momentum=0.3)
    if '.' in kind:
        pytest.importorskip('mmdet.models')
        ema['gamma'] = 2
    run, states = tmp_path / 'run', []
    train_with_ema(run, states, 2, **ema)
    train_with_ema(run, states, 4, **ema)  # resumes
    assert len(states) == 4
    del ema['ema_type']
    means = averages(states, kind, **ema)
    publish = load('publish')
    (best,) = run.glob('best_*.pth')
    for path, step in (
        *((run / f'iter_{n}.pth', n - 1) for n in (1, 2, 3, 4)),
        (best, 1),
    ):
        content = torch.load(path, weights_only=False)
        for asked, expected in (
            (None, means[step]),
            (True, means[step]),
            (False, states[step]),
        ):
            found = publish.weights_of(content, asked)
            assert set(found) == set(expected)
            for name, values in expected.items():
                torch.testing.assert_close(found[name], values)
            assert found._metadata['conv']['version'] == 2
    # No pair of them is alike, so that a mix-up shows.
    assert not torch.allclose(
        means[3]['conv.weight'], states[3]['conv.weight']
    )
    for number, option in enumerate(('--ema', '--no-ema')):
        out = tmp_path / option
        monkeypatch.setattr(
            'sys.argv',
            ['publish', str(run / 'iter_4.pth'), str(out), option],
        )
        publish.main()
        (path,) = out.iterdir()
        weights = torch.load(path, weights_only=True)['state_dict']
        torch.testing.assert_close(
            weights['conv.weight'], (means, states)[number][3]['conv.weight']
        )
    said = capsys.readouterr().out
    assert 'weights: averaged, of a training with EMAHook' in said
    assert 'weights: moved by the optimizer, of a training' in said


@pytest.mark.parametrize(
    ('change', 'options', 'match'),
    [
        (dict(ema_state_dict={}), ('--ema',), '^--ema: .*no ema_state_dict'),
        (dict(ema_state_dict={}), ('--no-ema',), '^--no-ema: .* leave the'),
        (dict(meta={}), (), 'give --name'),
        (dict(meta=dict(experiment_name='a_name_own')), (), 'give --name'),
        (dict(meta=dict(experiment_name='a_2025_own')), (), 'give --name'),
        ({}, ('--name', 'a/b'), 'not a path'),
    ],
)
def test_refused(change, options, match, refuses, tmp_path):
    old = write(tmp_path / 'old.pth', **change)
    refuses(match, 'publish', old, tmp_path / 'out', *options)
    assert not (tmp_path / 'out').exists()


def test_bare_weights_are_refused(refuses, tmp_path):
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
        units = r'([0-9.]+) (box|mask|mIoU|top-1)'
        for value, unit in re.findall(units, figures):
            is_ap = unit in ('box', 'mask')
            metric = f'{unit} AP' if is_ap else unit
            scale = 100 if is_ap else 1
            expected[name][metric] = round(scale * float(value), 1)
    assert seen == expected
