"""The experiment runner on real, tiny trainings."""

import contextlib
import inspect
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('mmcv')

ROOT = Path(__file__).resolve().parents[1]
from experiments import (  # noqa: E402
    figures,
    grid,
    norms,
    paired,
    records,
    report,
    run,
    tables,
    which,
)

GRIDS = sorted((ROOT / 'tools/experiments/grids').glob('*.py'))
TASK = 'tools/experiments/tasks/cifar_resnet8.py'
VGG = 'tools/experiments/tasks/cifar_vgg6.py'
# More of them wait for each other where tests run side by side.
ONE_THREAD = ['--processes', str(os.cpu_count())]
HOOKS = [
    dict(type='SmoothnessHook', interval=5),
    dict(type='ws_mm.SingularitiesHook', interval=6, num_batches=1),
    dict(type='AveragedHook'),
]


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    """Two classes of images, dark and bright, in folders."""
    folder = tmp_path_factory.mktemp('images')
    random = np.random.default_rng(0)
    for split, count in (('train', 6), ('test', 4)):
        for label, level in (('bright', 170), ('dark', 30)):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = random.normal(level, 20, (32, 32, 3)).clip(0, 255)
                image = Image.fromarray(pixels.astype('uint8'))
                image.save(folder / split / label / f'{i}.png')
    return folder


def options(images: Path, **more) -> dict:
    return {
        'train_dataloader.dataset.data_root': str(images / 'train'),
        'val_dataloader.dataset.data_root': str(images / 'test'),
        'model.width': 16,
        'model.num_classes': 2,
        'log_level': 'WARNING',
        **more,
    }


def write_grid(path: Path, cells: list[dict], images: int = 24) -> Path:
    tiny = dict(config=TASK, images=images, lr=0.05, at=1, metric='accuracy')
    tasks = dict(tiny=tiny, vgg={**tiny, 'config': VGG})
    path.write_text(f'tasks = {tasks!r}\ncells = {cells!r}\n')
    return path


def call(*arguments: object) -> subprocess.CompletedProcess:
    """Call run.py's main; each training is a process of its own."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run.main([*map(str, arguments), *ONE_THREAD])
        except SystemExit as stop:
            # As Python does with what a script ends with.
            code = stop.code if isinstance(stop.code, int) else 1
            print(stop.code, file=err)
    return subprocess.CompletedProcess(
        arguments, code, out.getvalue(), err.getvalue()
    )


def refusal(*arguments: object) -> str:
    """The message of a call that ends with an error."""
    done = call(*arguments)
    assert done.returncode == 1
    return str(done.stderr)


@pytest.fixture(scope='module')
def finished(images, tmp_path_factory):
    """One call over a run of each kind of end."""
    folder = tmp_path_factory.mktemp('out')
    own = options(images)
    path = write_grid(
        folder / 'grid.py',
        [
            dict(
                task='tiny',
                norm='BCN+WS',
                images=2,
                options=own,
                hooks=HOOKS,
            ),
            dict(task='tiny', norm='GN', lr_factor=1e38, options=own),
            # A stage of one pixel at one image: no batch statistics.
            dict(
                task='vgg',
                norm=['BN', 'mean-only BN'],
                options={
                    **own,
                    'model.stages': [1, 1, 1, 1, 1, 1],
                },
            ),
        ],
    )
    return folder, call(path, folder / 'out')


def test_every_end_has_its_record(finished):
    folder, done = finished
    found, bad = records.read_all(folder / 'out/records')
    assert not bad
    ends = {record['cell']['norm']: record for record in found}
    assert set(ends) == {'BCN+WS', 'GN', 'BN', 'mean-only BN'}, done.stdout
    good = ends['BCN+WS']
    assert good['status'] == 'done'
    assert good['metrics'][-1]['step'] == 12
    assert good['metric'] == good['metrics'][-1]['accuracy']
    # What the hooks measured at the same step is in the same entry.
    assert 0 <= good['metrics'][-1]['train_mode/accuracy'] <= 100
    assert good['metrics'][-1]['singularities/kl'] > 0
    layers = good['layers']
    assert len(layers) == 4
    total = sum(layer['kl'] for layer in layers.values())
    assert total / 4 == pytest.approx(good['metrics'][-1]['singularities/kl'])
    turns = figures.curve_of(good, 'smoothness/change')
    assert [seen for seen, _ in turns] == [2, 12, 22]
    assert good['curve'][-1][0] == 12
    # A step has two images.
    loss = figures.curve_of(good, 'loss')
    assert loss == [[2 * step, y] for step, y in good['curve']]
    assert good['seconds'] > 0
    assert good['peak_bytes'] > 1e8
    assert good['versions']['torch'] == torch.__version__
    assert ends['GN']['status'] == 'diverged'
    assert 'at iteration' in ends['GN']['reason']
    assert ends['BN']['status'] == 'impossible'
    assert 'more than 1 value per channel' in ends['BN']['reason']
    assert ends['mean-only BN']['status'] == 'impossible'
    assert 'more than one value per' in ends['mean-only BN']['reason']
    assert done.returncode == 0
    assert '[4/4]' in done.stdout
    assert 'left' in done.stdout


def test_finished_runs_are_not_run_again(finished):
    folder, _ = finished
    path = folder / 'out/records'
    before = {p: p.stat().st_mtime_ns for p in path.iterdir()}
    again = call(folder / 'grid.py', folder / 'out')
    assert again.returncode == 0
    assert {p: p.stat().st_mtime_ns for p in path.iterdir()} == before


def test_a_long_curve_is_drawn_as_means_of_its_parts():
    curve = [[step, step % 2] for step in range(1, 111)]
    drawn = figures.smoothed(curve, most=10)
    assert drawn == [[6.0 + 11 * i, (5 + (i + 1) % 2) / 11] for i in range(10)]
    assert figures.smoothed(curve[:4], most=10) == curve[:4]
    assert figures.smoothed([]) == []


def test_report_shows_every_end(finished, capsys, tmp_path):
    folder, _ = finished
    figure = tmp_path / 'figure.png'
    report.main([str(folder / 'out'), '--figure', str(figure)])
    shown = capsys.readouterr().out
    layers = tmp_path / 'layers.png'
    draw = ['--layers', 'kl', '--figure', str(layers)]
    report.main([str(folder / 'out'), *draw])
    assert capsys.readouterr().out == shown
    assert layers.read_bytes() != figure.read_bytes()
    points = tmp_path / 'points.png'
    draw = ['--points', '--figure', str(points)]
    report.main([str(folder / 'out'), *draw])
    assert capsys.readouterr().out == shown
    assert points.stat().st_size > 5000
    with pytest.raises(SystemExit):
        report.main([str(folder / 'out'), '--layers', 'kll'])
    assert 'there are empirical_below' in capsys.readouterr().err
    assert 'diverged: at iteration' in shown
    assert 'impossible:' in shown
    assert '(n=1)' in shown
    assert figure.stat().st_size > 5000
    collection = tmp_path / 'all.json'
    report.main([str(folder / 'out'), '--publish', str(collection)])
    assert capsys.readouterr().out == shown
    report.main([str(collection)])
    assert capsys.readouterr().out == shown
    keys = ['accuracy', 'train_mode/accuracy']
    report.main([str(collection), '--task', 'tiny', '--metrics', *keys])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == f'| tiny | {" | ".join(keys)} |'
    assert rows[2].startswith('| BCN+WS, 2 per step | ')
    assert rows[3].startswith('| GN, 1 per step, lr x1e+38 | diverged')
    report.main([str(collection), '--metrics', 'loss', '--average'])
    row = capsys.readouterr().out.splitlines()[2]
    (good,) = (r for r in records.read_all(collection)[0] if r['metric'])
    mean = np.mean([loss for _, loss in good['curve']])
    assert row == f'| BCN+WS, 2 per step | {mean:.4g} (n=1) |'
    with pytest.raises(SystemExit):
        report.main([str(collection), '--metrics', 'acuracy'])
    assert 'there are accuracy' in capsys.readouterr().err
    collection.write_text('[{}]')
    with pytest.raises(SystemExit):
        report.main([str(collection)])
    assert 'record 0 lacks cell' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main([str(folder / 'out'), '--task', 'tiny', 'other'])
    assert "'tiny'" in capsys.readouterr().err


def made(label, images=1, factor=1.0, metric=0.5):
    cell = dict(task='t', label=label, images=images, lr_factor=factor)
    return dict(cell=cell, status='done', metric=metric)


def test_rates_are_columns_only_where_a_norm_has_several():
    found = [made('A', 1, 10.0), made('B'), made('B', 16, 3.0)]
    assert tables.table('t', found).splitlines() == [
        '| t | 1 per step | 16 per step |',
        '|---|---|---|',
        '| A | 0.5 (n=1), lr x10 | not run |',
        '| B | 0.5 (n=1) | 0.5 (n=1), lr x3 |',
    ]
    found[1]['cell']['accumulation'] = 4
    assert 'B | not run | 0.5 (n=1), lr x3 | 0.5 (n=1) |' in tables.table(
        't', found
    )
    assert list(tables.groups_of(found))[1] == 'B, 1 per step, 4 steps'
    del found[1]['cell']['accumulation']
    found.append(made('A', 1, 1.0, 0.25))
    assert tables.table('t', found).splitlines() == [
        '| t | 1 per step, lr x1 | 1 per step, lr x10 | 16 per step, lr x3 |',
        '|---|---|---|---|',
        '| A | 0.25 (n=1) | 0.5 (n=1) | not run |',
        '| B | 0.5 (n=1) | not run | 0.5 (n=1) |',
    ]


def test_a_grid_picks_its_runs_from_a_shared_folder(finished, capsys):
    folder, _ = finished
    other = folder / 'other.py'
    text = (folder / 'grid.py').read_text()
    tasks, cells = text.splitlines()
    kept = eval(cells.split('=', 1)[1])[1::-1]  # two of them, turned round
    kept[0]['seeds'] = [0, 7]
    other.write_text(f'{tasks}\ncells = {kept!r}\n')
    report.main([str(folder / 'out'), '--grid', str(other)])
    shown = capsys.readouterr()
    rows = shown.out.splitlines()
    assert [row.split(' | ')[0] for row in rows[2:4]] == ['| GN', '| BCN+WS']
    assert 'vgg' not in shown.out
    assert shown.err.startswith('not run: tiny-gn-b1-s7_')
    with pytest.raises(SystemExit):
        report.main([str(folder / 'out'), '--grid', 'missing.py'])
    assert 'missing.py cannot be read' in capsys.readouterr().err


def test_killed_and_half_written_runs_are_resumed(images, tmp_path):
    cells = [dict(task='tiny', norm='BCN+WS', options=options(images))]
    path = write_grid(tmp_path / 'grid.py', cells, images=80)
    (cell,) = grid.load(path).cells
    process = subprocess.Popen(
        [
            *(sys.executable, ROOT / 'tools/experiments/run.py'),
            *(path, tmp_path / 'out', *ONE_THREAD),
        ],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    work_dir = tmp_path / 'out/runs' / cell.key
    deadline = time.monotonic() + 600
    while not list(work_dir.glob('iter_*.pth')):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (cut,) = run.attempts_of(work_dir)
    assert cut['seconds'] > 1
    record = tmp_path / 'out/records' / f'{cell.key}.json'
    assert not record.exists()
    record.parent.mkdir(exist_ok=True)
    record.write_text('{"schema": 1, "cell":')
    done = call(path, tmp_path / 'out')
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'is not whole' in done.stdout
    log = (work_dir / 'output.log').read_text()
    assert 'Resuming from' in log
    found = records.read(record)
    steps = [step for step, _ in found['curve']]
    assert steps == list(range(1, 81))
    first, last = run.attempts_of(work_dir)
    assert first == cut
    assert found['seconds'] == cut['seconds'] + last['seconds']
    assert found['peak_bytes'] == last['peak_bytes'] > 1e8
    assert not list(work_dir.glob('*.pth'))


def test_a_failure_leaves_no_record_and_the_exit_code_says_so(
    images, tmp_path
):
    cells = [
        dict(
            task='tiny',
            norm='GN',
            options=options(images, **{'model.unheard_of': 3}),
        )
    ]
    path = write_grid(tmp_path / 'grid.py', cells)
    done = call(path, tmp_path / 'out')
    assert done.returncode == 1
    assert 'unheard_of' in done.stdout
    assert '1 of 1 runs failed' in done.stderr
    assert not list((tmp_path / 'out').glob('records/*'))
    # What it has trained is not taken for another task's.
    path = write_grid(tmp_path / 'grid.py', cells, images=48)
    assert 'was begun as tasks.tiny=' in refusal(path, tmp_path / 'out')


def test_a_misspelt_option_is_refused_before_any_run(images, tmp_path):
    cell = dict(task='tiny', norm='GN')
    wrong = options(images, **{'optim_wraper.optimizer.lr': 3})
    cells = [cell, dict(cell, name='wide', options=wrong)]
    path = write_grid(tmp_path / 'grid.py', cells)
    said = refusal(path, tmp_path / 'out')
    assert "options of 'wide': " in said
    assert "'optim_wrapper'" in said
    assert not list((tmp_path / 'out/runs').glob('*/*.log'))


def test_a_training_that_outlives_its_runner_keeps_the_folder(
    images, tmp_path
):
    cells = [dict(task='tiny', norm='GN', options=options(images))]
    path = write_grid(tmp_path / 'grid.py', cells, images=100000)
    command = [sys.executable, run.__file__, path, tmp_path / 'out']
    runs = tmp_path / 'out/runs'
    until = time.monotonic() + 600
    with subprocess.Popen(command, start_new_session=True) as runner:
        try:
            # Written by the training itself, which runs from then on.
            while not [*runs.glob('*/*/vis_data')]:
                assert runner.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
            runner.kill()
            runner.wait()
            said = refusal(path, tmp_path / 'out')
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(runner.pid, signal.SIGKILL)
    assert 'a training that a killed' in said


def test_a_detector_that_finds_nothing_has_0(tmp_path):
    evaluation = pytest.importorskip('mmdet.evaluation')
    assert run.NOTHING in inspect.getsource(evaluation.CocoMetric)
    log = 'Iter(train)\nThe testing results of the whole dataset is empty.\n'
    (tmp_path / 'output.log').write_text(log)
    (tmp_path / 'attempts.jsonl').write_text(
        '{"started": 0, "seconds": 1, "peak_bytes": 1}\n'
    )
    entries = dict(step=1, loss=2.0), dict(step=1, time=1.0)
    scalars = tmp_path / 'a/vis_data/scalars.json'
    scalars.parent.mkdir(parents=True)
    scalars.write_text(''.join(json.dumps(e) + '\n' for e in entries))
    task = dict(metric='coco/segm_mAP')
    found = run.outcome(grid.Cell('t', 'GN'), task, tmp_path, 0)
    assert (found['status'], found['metric']) == ('done', 0)
    assert found['metrics'][-1]['coco/segm_mAP'] == 0
    (tmp_path / 'output.log').write_text(log + 'Iter(train)\nmore\n')
    assert run.outcome(grid.Cell('t', 'GN'), task, tmp_path, 0) is None


def test_records_of_another_task_are_not_taken_for_this_one(finished):
    folder, _ = finished
    path = write_grid(folder / 'other.py', [], images=48)
    cells = (folder / 'grid.py').read_text().split('\n', 1)[1]
    path.write_text(path.read_text().split('\n', 1)[0] + '\n' + cells)
    said = refusal(path, folder / 'out')
    assert "'images': 48" in said
    assert 'give another OUT_DIR' in said


def test_a_second_call_is_kept_out(images, tmp_path):
    (tmp_path / 'out').mkdir()
    path = write_grid(tmp_path / 'grid.py', [dict(task='tiny', norm='GN')])
    with run.alone(tmp_path / 'out'):
        said = refusal(path, tmp_path / 'out')
    assert 'another call is at work' in said


@pytest.mark.parametrize(
    ('cell', 'message'),
    [
        (
            dict(task='tinny', norm='GN'),
            "task='tinny' is not one of 'tiny', 'vgg'",
        ),
        (dict(task='tiny', norm='GM'), "norm='GM' is not one of .*'GN'"),
        (dict(task='tiny', nrom='GN'), 'cells.0.nrom is unknown'),
        (dict(task='tiny'), 'cells.0.norm is missing'),
        (dict(task='tiny', norm='GN', images=0), 'images=0 must be'),
        (
            dict(task='tiny', norm='GN', accumulation=[1, 2.5]),
            'cells.0.accumulation=2.5 must be',
        ),
        (
            dict(task='tiny', norm='GN', hooks=dict(type='EMAHook')),
            r"cells.0.hooks=\{'type': 'EMAHook'\} must be a list",
        ),
        (
            dict(task='tiny', norm='GN', hooks=['EMAHook']),
            r"cells.0.hooks=\['EMAHook'\] must be a list",
        ),
        (dict(task='tiny', norm='GN', seeds=3), 'seeds=3 must be a list'),
    ],
)
def test_a_wrong_grid_is_refused(cell, message, tmp_path):
    path = write_grid(tmp_path / 'grid.py', [cell])
    with pytest.raises(grid.GridError, match=message):
        grid.load(path)


def test_rows_of_other_settings_need_a_name(tmp_path):
    cell = dict(task='tiny', norm='BCN+WS')
    other = dict(cell, norm_cfg=dict(momentum=0.1))
    path = write_grid(tmp_path / 'grid.py', [cell, other])
    with pytest.raises(grid.GridError, match='cells.1.*Give one a name'):
        grid.load(path)
    path = write_grid(tmp_path / 'grid.py', [cell, dict(other, name='fast')])
    assert len(grid.load(path).cells) == 2


def test_a_collection_keeps_the_settings_of_its_runs(tmp_path):
    cell = grid.Cell('tiny', 'GN', lr_factor=1 / 3)
    record = dict(cell=asdict(cell), task=dict(lr=1 / 3), metric=1 / 3)
    records.collect([record], tmp_path / 'all.json')
    (found,) = json.loads((tmp_path / 'all.json').read_text())
    assert grid.Cell(**found['cell']).key == cell.key
    assert found['metric'] == 0.333333


def test_a_rate_that_loses_seeds_is_not_the_best():
    def record(factor, seed, metric):
        cell = dict(lr_factor=factor, seed=seed)
        status = 'diverged' if metric is None else 'done'
        return dict(cell=cell, status=status, metric=metric)

    found = [record(3.0, 0, 50.0)]
    lost = [record(10.0, seed, v) for seed, v in enumerate([60.0, 61.0, None])]
    assert which.best(found + lost) == '50.0 x3'
    assert which.best(lost) == '60.5 ± 0.7 (n=2) x10; 1 lost'


def test_equal_images_one_rule_for_the_rate():
    task = dict(config=TASK, images=160, lr=0.1, at=8, metric='accuracy')
    for images, factor, steps in ((1, 1.0, 1), (16, 0.5, 1), (2, 1.0, 4)):
        cell = grid.Cell('tiny', 'BCN+WS', images, 3, factor, steps)
        cfg = grid.config_of(cell, task)
        assert cfg.train_cfg.max_iters * images == 160
        rate = cfg.optim_wrapper.optimizer.lr
        assert rate == pytest.approx(0.1 * images * steps / 8 * factor)
        assert cfg.optim_wrapper.accumulative_counts == steps
        assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_iters
        assert cfg.param_scheduler[0].end == cfg.param_scheduler[1].begin
        assert cfg.randomness.seed == 3
        assert cfg.train_dataloader.batch_size == images


def test_records_from_before_a_setting_are_found():
    cell = grid.Cell('cifar_resnet8', 'GN')
    assert cell.key == 'cifar-resnet8-gn-b1-s0_4f9f6fd8'
    for setting in (dict(accumulation=2), dict(hooks=HOOKS)):
        changed = grid.Cell('cifar_resnet8', 'GN', **setting)
        assert changed.key != cell.key


def test_hooks_of_a_cell_come_beside_those_of_its_task():
    task = dict(config=TASK, images=160, lr=0.1, at=8, metric='accuracy')
    own = grid.config_of(grid.Cell('tiny', 'GN'), task).custom_hooks
    kinds = {hook['type'] for hook in own}
    assert kinds == {
        'TrainModeGapHook',
        'RecalibratedHook',
        'StopWhenDiverged',
    }
    cfg = grid.config_of(grid.Cell('tiny', 'GN', hooks=HOOKS), task)
    assert [h for h in cfg.custom_hooks if h not in own] == HOOKS
    assert all(hook in cfg.custom_hooks for hook in own)


def test_norms_reach_every_norm_cfg_and_nothing_else():
    model = {
        'a': {'norm_cfg': None, 'conv_cfg': 1, 'width': 2},
        'b': [{'norm_cfg': {'type': 'GN'}}, {'c': {}}],
    }
    assert norms.apply(model, 'BCN+WS', momentum=0.3) == 2
    assert model['a']['norm_cfg']['momentum'] == 0.3
    assert model['a']['width'] == 2
    assert model['b'][0]['conv_cfg'] == norms.WS
    assert model['b'][1] == {'c': {}}
    assert norms.BCN['momentum'] == 0.01


@pytest.mark.parametrize('path', GRIDS, ids=lambda path: path.stem)
def test_grids_load_and_every_cell_has_a_config(path):
    loaded = grid.load(path)
    for cell in {(c.task, c.norm): c for c in loaded.cells}.values():
        cfg = grid.config_of(cell, loaded.tasks[cell.task])
        assert cfg.train_cfg.max_iters > 0


def test_norms_are_compared_seed_by_seed():
    def record(label, seed, metric):
        own = dict(label=label, images=1, lr_factor=1.0, seed=seed)
        return dict(cell=own, status='done', metric=metric, metrics=[])

    # Seeds that differ by tens, a norm that is ahead by one.
    base = [record('GN', seed, 10.0 * seed) for seed in range(8)]
    other = [
        record('BCN', seed, 10.0 * seed + gain)
        for seed, gain in enumerate([1, 1, 1, 1, 1, 1, 1, -1])
    ]
    one = [record('BN', 9, 5.0)]
    shown = paired.paired_table(
        'task', base + other + one, 'GN', 'score', lambda r, key: r['metric']
    ).splitlines()
    assert shown[0].split(' | ')[2] == 'minus GN, 1 per step: median'
    assert shown[2:] == [
        '| GN, 1 per step | 35 (0 to 70), n=8 | - | - | - |',
        '| BCN, 1 per step | 36 (1 to 69), n=8 | +1 | +1 to +1 | 7 of 8 |',
        '| BN, 1 per step | 5 (5 to 5), n=1 | - | - | - |',
    ]
    lost = dict(record('BN', 8, None), status='diverged')
    shown = paired.paired_table(
        'task', [*base, lost, *one], 'GN', 's', lambda r, key: r['metric']
    )
    assert '| BN, 1 per step | 5 (5 to 5), n=1, 1 lost |' in shown
    with pytest.raises(ValueError, match='several runs of one seed'):
        paired.paired_table('task', base + base, 'GN', 's', tables.last)
    with pytest.raises(ValueError, match="'X' is the name of 0 rows of task"):
        paired.paired_table('task', base, 'X', 'score', tables.last)


def test_an_interval_covers_the_medians_of_resampled_pairs():
    differences = [-2.0, -1.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
    random = np.random.default_rng(1)
    medians = np.median(random.choice(differences, (20000, 8)), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    middle, interval, higher = paired.compared(differences)
    assert (middle, higher) == ('+1.25', '6 of 8')
    found = [float(word) for word in interval.split(' to ')]
    assert found == pytest.approx([low, high], abs=0.3)


def test_cell_means_and_spreads():
    def record(metric, status='done', reason=''):
        return dict(metric=metric, status=status, reason=reason)

    shown = tables.cell(
        [record(0.1), record(0.3), record(None, 'diverged', 'x')]
    )
    assert shown == '0.2 ± 0.141 (n=2); diverged: x (n=1)'
    assert tables.cell([]) == 'not run'
