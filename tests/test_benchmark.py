"""The benchmarks run, describe themselves, and are what the documents show."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comparison import HALF_ON_CPU

pytest.importorskip('mmcv')

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / 'tools/benchmark'

from benchmark import (  # noqa: E402
    agreement,
    implementations,
    layers,
    model,
    race,
    result,
    scaling,
    table,
)

SUITES = ['layers', 'model', 'scaling']
RESULTS = [BENCHMARK / f'results/{suite}--cpu.json' for suite in SUITES]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, BENCHMARK / script, *arguments],
        capture_output=True,
        text=True,
    )


def rows_of(folder: Path) -> dict[str, dict]:
    (path,) = folder.glob('*.json')
    measured = json.loads(path.read_text())
    result.check(measured)
    return {r['contender']: r for r in measured['cases'][0]['rows']}


def test_one_case_of_the_layers(tmp_path):
    arguments = '--rounds', '2', '--only', 'pooled 1x256x1x1'
    done = run('layers.py', str(tmp_path), *arguments)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path)
    if not HALF_ON_CPU:
        pytest.skip('this torch has no float16 autocast on a CPU')
    # One value per channel: an error row, not a crash.
    assert 'more than 1 value' in rows['BatchNorm2d']['error']
    assert rows['GroupNorm']['ratio'] == 1
    assert rows['BCN estimate']['ms_p20'] > 0
    assert rows['BCN estimate']['saved_bytes'] > 0
    assert rows['BCN estimate']['page_faults'] >= 0
    assert rows['copy']['gigabytes_per_second'] > 0


# A fresh process: what was freed before would be taken first.
PAGES = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from benchmark import race
x = torch.randn(1 << 22)
for new in (True, False):
    race.choose_pages(new)
    for _ in range(16):
        x.clone()
    before = race.page_faults()
    for _ in range(4):
        x.clone()
    print(race.page_faults() - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc has the choice')
def test_memory_is_new_or_reused():
    done = subprocess.run(
        [sys.executable, '-c', PAGES, BENCHMARK.parent],
        capture_output=True,
        text=True,
    )
    new, reused = map(int, done.stdout.split())
    assert new > 4 * (reused + 1)  # 16,388 to 0 in pages of 4 kB


def test_the_probe_of_a_gpu_runs_dry(tmp_path):
    pytest.importorskip('triton', '3.0')
    done = run('gpu_probe.py', str(tmp_path), '--rounds', '1', '--dry')
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob('gpu_probe--cpu.json')
    measured = json.loads(path.read_text())
    result.check(measured)
    assert measured['what'].startswith('dry, no figures')
    assert measured['command'].endswith(' --dry')
    errors = {
        (case['name'], row['contender']): row['error']
        for case in measured['cases']
        for row in case['rows']
        if 'error' in row
    }
    # All else runs, and its kernels are right.
    assert {*errors} <= {('graph', 'captured')}
    names = {case['name'] for case in measured['cases']}
    assert {'check', 'repeat', 'host', 'detector fp32 NCHW'} <= names


def test_ranks_count_their_collectives(tmp_path):
    arguments = '--rounds', '1', '--only', 'ranks 2'
    done = run('scaling.py', str(tmp_path), *arguments)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path)
    assert rows['BatchNorm2d']['collectives'] == 0
    assert rows['BCN estimate']['collectives'] == 1
    # 20 norms, one each way.
    assert rows['BCN sync_batch']['collectives'] == 40
    if not torch.cuda.is_available():
        assert 'only work with GPU' in rows['SyncBatchNorm']['error']


def test_slope_of_a_power():
    points = [(math.log(x), math.log(5 * x**0.7)) for x in (2, 9, 40, 41)]
    assert scaling.slope(points) == pytest.approx(0.7)
    rows = [{'contender': 'BCN', 'ms': 3.0}]
    more = [{'contender': 'BCN', 'ms': 6.0}]
    cases = [
        {'name': 'images 1', 'rows': rows},
        {'name': 'images 4', 'rows': more},
    ]
    assert scaling.slopes(cases)['slopes'] == {
        'pixels': {},
        'channels': {},
        'images': {'BCN': pytest.approx(0.5)},
    }


def test_a_segmentor_as_users_train_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model, 'SEGMENTATION', (65, 65))
    names = ('GN', 'BN', 'GN+WS', 'BCN+WS')
    few = {name: model.MODELS[name] for name in names}
    monkeypatch.setattr(model, 'MODELS', few)
    argv = ['model.py', str(tmp_path), '--rounds', '1', '--only', 'DeepLab']
    monkeypatch.setattr(sys, 'argv', argv)
    model.main()
    (path,) = tmp_path.glob('*.json')
    train, infer = json.loads(path.read_text())['cases']
    rows = {row['contender']: row for row in train['rows']}
    # One image: BN cannot do the pooled branch of the head.
    assert 'more than 1 value' in rows['BN']['error']
    assert rows['GN+WS']['saved_bytes'] > rows['GN']['saved_bytes']
    assert all('ratio' in row for row in infer['rows'])
    assert path.with_suffix('.png').exists()


def test_every_detector_gets_the_same_rois(monkeypatch):
    monkeypatch.setattr(model, 'DETECTION', (128, 128))
    batch = model.Detection('cpu')
    for contender in ('GN+WS', 'BCN+WS'):
        detector = model.build(model.MASK_RCNN, contender, 'cpu')
        seen = []
        detector.roi_head.mask_head.convs[0].register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(len(args[0]))
        )
        # The heads behind do not matter here.
        detector.roi_head.mask_head.convs[0].forward = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError), torch.no_grad():
            batch.loss(detector.train())
        assert seen == [model.POSITIVES]


@pytest.mark.parametrize('contender', [*model.MODELS, 'frozen BN'])
def test_contenders_are_built_as_named(contender):
    names = {
        'GN': {'Conv2d', 'GroupNorm'},
        'GN + mmcv ConvWS': {'ConvWS2d', 'GroupNorm', 'Conv2d'},
        'BN': {'Conv2d', 'BatchNorm2d'},
        'frozen BN': {'Conv2d', 'BatchNorm2d'},
        'GN+WS': {'WSConv2d', 'GroupNorm', 'Conv2d'},
        'BCN+WS': {'WSConv2d', 'BCN', 'Conv2d'},
    }
    with torch.device('meta'):
        cfg = model.config_of(model.MASK_RCNN, contender)
        detector = model.build_model(cfg)
    built = {
        type(module).__name__
        for module in detector.modules()
        if 'Conv' in type(module).__name__ or 'N' in type(module).__name__
    }
    kinds = {'Conv2d', 'ConvWS2d', 'WSConv2d', 'BCN'}
    kinds |= {'GroupNorm', 'BatchNorm2d', 'SyncBatchNorm'}
    assert built & kinds == names[contender]


@pytest.mark.parametrize('suite', [layers, model, scaling])
@pytest.mark.parametrize(
    ('options', 'match'),
    [
        (('--only', 'nothing'), "--only='nothing' names no case of"),
        (('--rounds', '0'), '--rounds=0'),
    ],
)
def test_wrong_options_are_rejected(
    suite, options, match, tmp_path, monkeypatch, capsys
):
    argv = [suite.__name__, str(tmp_path / 'out'), *options]
    monkeypatch.setattr(sys, 'argv', argv)
    with pytest.raises(SystemExit, match='2'):
        suite.main()
    assert match in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_failing_contender_is_an_error_row():
    def fails():
        raise RuntimeError('no\nway')

    rows = race.race({'a': int, 'b': fails}, 'b', 2, 'cpu')
    assert rows[1] == {'contender': 'b', 'error': 'RuntimeError: no'}
    assert 'ms' in rows[0]
    assert 'ratio' not in rows[0]


def test_ratios_pair_the_rounds(monkeypatch):
    clock = iter([1.0, 2.0, 10.0, 30.0, 4.0, 16.0])
    monkeypatch.setattr(race, 'clock', lambda *_: (next(clock), True))
    monkeypatch.setattr(race.random, 'shuffle', lambda order: None)
    rows = race.race({'a': int, 'b': int}, 'a', 3, 'cpu', warm_up=0)
    assert rows[0]['ms'] == 4
    assert rows[1]['ratio'] == 3
    # Of 2, 3 and 4: a fifth of the way, and four fifths.
    found = rows[1]['ratio_p20'], rows[1]['ratio_p80']
    assert found == pytest.approx((2.4, 3.6))


@pytest.mark.parametrize('text', [None, '{"half', '3', '{"suite": "x"}'])
def test_what_is_no_result_is_said(text, tmp_path, monkeypatch, capsys):
    path = tmp_path / 'x.json'
    if text:
        path.write_text(text)
    monkeypatch.setattr(sys, 'argv', ['table.py', str(path)])
    with pytest.raises(SystemExit, match='2'):
        table.main()
    assert f'{path} is no result of a benchmark' in capsys.readouterr().err


def test_a_time_with_that_of_the_host_says_so(monkeypatch):
    ends = {'a': (1.0, True), 'b': (1.0, False)}
    monkeypatch.setattr(race, 'clock', lambda run, device: ends[run()])
    contenders = {'a': lambda: 'a', 'b': lambda: 'b'}
    rows = race.race(contenders, 'a', 1, 'cpu')
    assert ['waits_for_host' in row for row in rows] == [False, True]


def test_what_was_measured_is_kept(tmp_path, monkeypatch):
    def fails():
        raise KeyboardInterrupt

    def good(rounds=1):
        return race.race({'a': int}, 'a', rounds, 'cpu')

    suite = {name: ('a', good) for name in ('one', 'two')}
    argv = [str(tmp_path), '--rounds', '1']
    result.run('x', 'time', suite, result.arguments('', 1, argv))
    whole = (tmp_path / 'x--cpu.json').read_text()
    assert 'not_run' not in json.loads(whole)
    only = [*argv, '--only', 'two']
    result.run('x', 'time', suite, result.arguments('', 1, only))
    assert (tmp_path / 'x--cpu.json').read_text() == whole
    (case,) = json.loads((tmp_path / 'x--cpu--part.json').read_text())['cases']
    assert case['name'] == 'two'
    suite = {'one': ('a', good), 'bad': ('a', fails), 'two': ('a', good)}
    with pytest.raises(KeyboardInterrupt):
        result.run('y', 'time', suite, result.arguments('', 1, argv))
    kept = json.loads((tmp_path / 'y--cpu.json').read_text())
    assert [case['name'] for case in kept['cases']] == ['one']
    assert kept['not_run'] == ['bad', 'two']
    result.check(kept)


def test_bytes_are_those_of_the_form_that_was_timed(monkeypatch):
    names = ('BCN estimate', 'BCN plain', 'GroupNorm')
    monkeypatch.setattr(
        layers,
        'norms',
        lambda *a: {k: v for k, v in all_norms(*a).items() if k in names},
    )
    all_norms = implementations.norms
    monkeypatch.setenv(race.VARIABLE, 'fused')
    found = layers.time_norms((1, 64, 40, 40), 1, 'cpu')
    kept = {row['contender']: row.get('saved_bytes', 0) for row in found}
    assert kept['BCN plain'] > 1.9 * kept['BCN estimate']


POISONED = """
import sys, torch
sys.path.insert(0, 'tools')
sys.path.insert(0, 'tools/benchmark')
import gpu_probe
from ws_mm.kernels import self_check

def wrong(*args):
    raise self_check.WrongResult('planted')

calls = []
self_check.filters_forward = wrong
rows = gpu_probe.check(1, 'cpu')
for row in rows:
    assert ('error' in row) == ('WS' in row['contender']), row
assert {'planted' in row['error'] for row in rows if 'error' in row} == {True}
own = self_check.norm_forward
self_check.norm_forward = lambda *args: calls.append(1) or own(*args)
gpu_probe.os.environ['WS_MM_KERNELS'] = 'triton'
step = gpu_probe.step_of(
    gpu_probe.ws_mm.BCN(64), (1, 64, 5, 4), torch.float32, gpu_probe.NCHW
)
step()
assert not calls, 'later parts are checked, too'
"""


def test_a_wrong_kernel_is_an_error_of_its_own():
    pytest.importorskip('triton', '3.0')
    done = subprocess.run(
        [sys.executable, '-c', POISONED, '--dry'],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


def test_compiled_contenders_are_compiled_at_every_shape():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for count, channels in enumerate(range(32, 32 * 13, 32), 1):
        contender = implementations.compiled(
            torch.nn.GroupNorm(32, channels), backend
        )
        contender(torch.randn(1, channels, 2, 2))
        assert len(graphs) == count


def test_liger_gets_three_dimensions():
    class Inner(torch.nn.Module):
        def forward(self, x):
            assert x.shape == (2, 6, 20)
            return x * 2

    x = torch.randn(2, 6, 4, 5)
    assert torch.equal(implementations.Flat(Inner())(x), x * 2)


def test_kernels_that_cannot_run_do_not_agree_with_themselves(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setenv(race.VARIABLE, 'auto')
    seen = []

    def results():
        seen.append(os.environ[race.VARIABLE])
        raise RuntimeError('no compiler')

    with pytest.raises(RuntimeError, match='no compiler'):
        agreement.agreement(results, torch.half)
    assert seen == ['triton']
    assert os.environ[race.VARIABLE] == 'auto'


def test_a_race_on_a_gpu_forces_the_kernels(monkeypatch):
    monkeypatch.setenv(race.VARIABLE, 'auto')
    monkeypatch.setattr(race, 'clock', lambda run, _: (run() or 1.0, True))
    monkeypatch.setattr(race, 'peak_bytes', lambda run: 0)
    monkeypatch.setattr(race, 'host_ms', lambda run: 0.1)
    seen = set()

    def run(name):
        return lambda: seen.add((name, os.environ[race.VARIABLE]))

    rows = race.race(
        {name: run(name) for name in ('BCN', 'BCN plain')}, 'BCN', 1, 'cuda'
    )
    assert seen == {('BCN', 'triton'), ('BCN plain', 'plain')}
    assert rows[0]['host_ms'] == 0.1


def test_the_environment_without_mmcv(monkeypatch):
    for name in ('mmcv', 'timm'):
        monkeypatch.setitem(sys.modules, name, None)
    found = result.environment()
    assert found['mmcv'] is None
    assert found['torch'] == torch.__version__


@pytest.mark.parametrize('path', RESULTS, ids=lambda path: path.stem)
def test_results_describe_themselves(path):
    measured = json.loads(path.read_text())
    result.check(measured)
    assert path.stem.startswith(measured['suite'] + '--')
    assert path.with_suffix('.png').exists()
    del measured['cases'][0]['rows'][0]['ms_p20']
    name = measured['cases'][0]['name']
    with pytest.raises(ValueError, match=f'{name}.*lacks a time'):
        result.check(measured)
    del measured['environment']
    with pytest.raises(ValueError, match="lacks 'environment'"):
        result.check(measured)
    with pytest.raises(ValueError, match=rf'schema=1 .*{path.stem[:5]}'):
        result.check({**json.loads(path.read_text()), 'schema': 1})


def test_contenders_compute_what_they_claim():
    pytest.importorskip('mmcv')
    pytest.importorskip('timm')
    weight = torch.randn(8, 4, 3, 3)
    functions = implementations.standardizers()
    torch.testing.assert_close(
        functions['WS'](weight), functions['mmcv ConvWS'](weight)
    )
    # Another convention (biased, 1e-6 inside), up to one constant.
    constant = (36 / 35) ** 0.5
    torch.testing.assert_close(
        functions['WS'](weight) * constant,
        functions['timm StdConv2d'](weight),
        rtol=1e-3,
        atol=1e-3,
    )
    x = torch.randn(2, 64, 5, 5) * 3 + 1
    contenders = implementations.norms(64, 'cpu')
    outputs = [
        contenders[name]()(x) for name in ('BCN estimate', 'authors BCN')
    ]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_a_difference_of_the_implementations_is_said(monkeypatch):
    one, other = torch.tensor([4.0, -8.0]), torch.tensor([4.0, -10.0])

    def results():
        return {'x': one if os.environ[race.VARIABLE] == 'fused' else other}

    monkeypatch.setenv(race.VARIABLE, 'plain')
    assert agreement.agreement(results, torch.half) == {
        'tolerance': 4e-3,
        'differences': {'x': pytest.approx(0.2)},
    }
    assert os.environ[race.VARIABLE] == 'plain'


# Those of test_kernels.py are small; the largest are for the whole suite.
CASES = [(name, {}) for name in layers.ACTIVATIONS]
CASES += [
    (name, how) for name in layers.VARIED for how in layers.VARIANTS.values()
]
CASES = [
    case for case in CASES if math.prod(layers.ACTIVATIONS[case[0]]) < 5e6
]


@pytest.mark.parametrize(('name', 'how'), CASES)
@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_fused_and_plain_agree_where_they_are_timed(name, how, mode):
    shape = layers.ACTIVATIONS[name]
    if mode == 'batch' and math.prod(shape) <= 2 * shape[1]:
        pytest.skip('one value has no variance, two have no gradient')
    dtype = how.get('dtype', torch.float32)
    layout = how.get('layout', torch.contiguous_format)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    kind = implementations.norms(shape[1], 'cpu')[f'BCN {mode}']
    found = agreement.agreement(
        layers.results_of(
            kind, x, torch.randn_like(x), how.get('training', True)
        ),
        dtype,
    )
    assert max(found['differences'].values()) <= found['tolerance']
    names = 'output', 'input', 'bn_bias', 'bias', 'running_var'
    assert {*names} <= found['differences'].keys()


def test_fused_and_plain_agreed_in_the_published_run():
    (path,) = (path for path in RESULTS if 'layers' in path.stem)
    compared = 0
    for case in json.loads(path.read_text())['cases']:
        for row in case['rows']:
            if 'tolerance' in row:
                compared += 1
                worst = max(row['differences'].values())
                assert worst <= row['tolerance'], case['name']
    assert compared > 60


@pytest.mark.parametrize('suite', ['model', 'layers'])
def test_documents_show_the_results(suite):
    path = BENCHMARK / f'results/{suite}--cpu.json'
    shown = table.table(json.loads(path.read_text()))
    documents = [ROOT / 'README.md', ROOT / 'docs/benchmark.md']
    assert any(shown in document.read_text() for document in documents), (
        f'paste this into docs/benchmark.md:\n{shown}'
    )


def test_rows_of_the_layers_in_the_readme_are_those_of_the_result():
    path = BENCHMARK / 'results/layers--cpu.json'
    shown = table.table(json.loads(path.read_text())).splitlines()
    lines = [line for line in shown if line.startswith('|')]
    cases = {line.split('|')[1] for line in lines if line[1:4] != '---'}
    for line in (ROOT / 'README.md').read_text().splitlines():
        if line.startswith('|') and line.split('|')[1] in cases:
            assert line in lines
