"""One page of several runs: ours, a host's, one that died."""

import base64
import json
import os
import runpy
import shutil
import subprocess
import sys
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from in_process import load, tools  # noqa: F401
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, DefaultScope
from support import page, runs
from support.checks import SetupError
from tiny_runs import DET, SEG, write_config, write_data

pytest.importorskip('mmdet')
mmseg = pytest.importorskip('mmseg')

VALIDATED = """
val_dataloader, val_evaluator = test_dataloader, test_evaluator
val_cfg = dict(type='ValLoop')
default_hooks['visualization'].update(draw=True, interval=1)
"""
DETECTOR = """
train_cfg.update(max_epochs=2, val_interval=1)
custom_hooks = [
    dict(type='ws_mm.SingularitiesHook', interval=2, num_batches=1)
]
"""
SAID = 'the <b>model</b> & its data'


class Bomb(Hook):
    """An error in the fourth iteration."""

    def after_train_iter(self, runner, batch_idx, **more):
        if runner.iter == 3:
            raise RuntimeError(SAID)


class Page(HTMLParser):
    """Sources of a page, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.words = ''
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        named = dict(attributes)
        self.sources += [named[k] for k in ('src', 'href') if k in named]

    def handle_data(self, data):
        self.words += data


@pytest.fixture(scope='module')
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work dirs: of train.py, of the host's, and of a run that dies."""
    folder = tmp_path_factory.mktemp('runs')
    data = write_data(folder / 'data')
    text = VALIDATED + 'train_cfg.update(max_iters=4, val_interval=2)\n'
    bomb = "custom_hooks = [dict(type='Bomb')]\n"
    host = Path(mmseg.__file__).parent / '.mim/tools/train.py'
    ours = Path(load('train').__file__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DefaultScope, '_instance_dict', {})
        patch.setattr(torch.cuda, 'is_available', lambda: False)
        patch.setitem(HOOKS.module_dict, 'Bomb', Bomb)
        patch.setenv('LOCAL_RANK', '0')
        patch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')
        for name, script, content in (
            ('ours', ours, DET + VALIDATED + DETECTOR),
            ('host', host, SEG + text),
            ('dead', ours, SEG + text + bomb),
        ):
            # Each its name: experiments of one second would be one.
            config = write_config(data, content).rename(data / f'{name}.py')
            words = [str(config), '--work-dir', str(folder / name)]
            patch.setattr('sys.argv', [str(script), *words])
            patch.setattr('sys.path', [str(script.parent), *sys.path])
            dies = pytest.raises(RuntimeError, match='model')
            with dies if name == 'dead' else nullcontext():
                runpy.run_path(str(script), run_name='__main__')
    return folder


def report(
    monkeypatch: pytest.MonkeyPatch, out: Path, *words: object
) -> tuple[Page, str]:
    """Write the page of some work dirs."""
    arguments = [*map(str, words), '--out', str(out)]
    monkeypatch.setattr('sys.argv', ['report_runs.py', *arguments])
    load('report_runs').main()
    text = out.read_text()
    return Page(text), text


def lines_of(folder: Path, key: str) -> list[dict]:
    """Lines of scalars that have a key."""
    (path,) = folder.glob('*/vis_data/scalars.json')
    lines = map(json.loads, path.read_text().splitlines())
    return [line for line in lines if key in line]


def test_the_page_shows_all_and_needs_no_network(
    work: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folders = [work / name for name in ('ours', 'host', 'dead')]
    shown, text = report(monkeypatch, tmp_path / 'all.html', *folders)
    assert all(source.startswith('data:') for source in shown.sources)
    assert not {'script', 'link rel', 'iframe'} & set(shown.tags)
    assert 'url(http' not in text
    pictures = [s for s in shown.sources if s.startswith('data:image')]
    every = [p for f in folders for p in f.rglob('*.png')]
    assert len(pictures) == len(every) == 4 + 4 + 2
    for picture in pictures:
        content = base64.b64decode(picture.partition(',')[2])
        image = cv2.imdecode(np.frombuffer(content, np.uint8), 1)
        assert image.shape == (64, 128, 3)  # ground truth and prediction
    for key in ('loss_mask', 'decode.loss_ce', 'coco/bbox_mAP', 'mIoU'):
        assert shown.words.count(key) >= 3  # a panel for each axis
    value = lines_of(work / 'host', 'mIoU')[-1]['mIoU']
    assert f'{value:g}, highest' in shown.words
    assert 'singularities/kl' in shown.words
    assert 'size of running_var' in shown.words
    assert f'PyTorch{torch.__version__}' in shown.words.replace('\n', '')
    assert 'train_cfg.max_epochs2--' in shown.words
    # What a run says is no part of the page.
    assert '<b>' not in text
    assert shown.words.count(f'RuntimeError: {SAID}') == 2


def test_curves_are_those_of_the_files(work: Path) -> None:
    for name, loss in (('ours', 'loss_mask'), ('host', 'decode.loss_ce')):
        run = runs.read_run(work / name)
        lines = lines_of(work / name, loss)
        assert run.train[loss] == {x['step']: x[loss] for x in lines}
        assert len(lines) == 4
        assert run.ended
    # Its lines of validation say epoch 0.
    mean = [line['mIoU'] for line in lines_of(work / 'host', 'mIoU')]
    assert run.metrics['mIoU'] == dict(zip((2, 4), mean, strict=True))
    seconds = np.cumsum([line['time'] for line in lines]) / 3600
    assert list(run.hours().values()) == pytest.approx(seconds.tolist())
    assert run.images == 1
    assert run.progress == 'iteration 4 of 4'


def test_images_are_those_of_all_processes(work: Path) -> None:
    run = runs.read_run(work / 'ours')
    run.environment['GPU number'] = '8'
    run.config.train_dataloader.batch_size = 3
    curve = {5: 0.5, 7: 0.25}
    over = load('report_runs').over
    assert over(run, 'images seen', curve) == {120: 0.5, 168: 0.25}
    run.config.train_dataloader.pop('batch_size')
    assert over(run, 'images seen', curve) == {}


def test_a_dead_run_says_where(work: Path) -> None:
    run = runs.read_run(work / 'dead')
    assert not run.ended
    assert run.progress == 'iteration 3 of 4'
    assert 'Iter' in run.tail or 'Epoch(train)' in run.tail
    assert run.traceback.splitlines()[0] == runs.TRACEBACK
    assert run.traceback.splitlines()[-1] == f'RuntimeError: {SAID}'
    assert 'after_train_iter' in run.traceback


def test_a_run_that_died_before_it_logged(work: Path, tmp_path: Path) -> None:
    folder = tmp_path / 'dead'
    (log,) = (work / 'dead').glob('*/*.log')
    place = folder / log.parent.name
    place.mkdir(parents=True)
    said = log.read_text()
    first = runs.PROGRESS.search(said).start()
    trace = said[said.index('The training ended by') :]
    (place / log.name).write_text(f'{said[:first]}\n{trace}')
    run = runs.read_run(folder)
    assert not run.ended
    assert run.traceback.splitlines()[-1] == f'RuntimeError: {SAID}'


def test_a_test_in_a_folder_of_its_own(work: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(work / 'ours', tmp_path / 'ours')
    places = '20990101_000001', 'test/20990102_000001'
    for place, value in zip(places, (0.25, 0.5), strict=True):
        (folder / place).mkdir(parents=True)
        path = folder / place / f'{place[-15:]}.json'
        path.write_text(json.dumps({'coco/bbox_mAP': value}) + '\n')
    assert runs.read_run(folder).tests == {'coco/bbox_mAP': 0.5}
    assert 'PyTorch built with:' not in run_environment(folder)


def run_environment(folder: Path) -> list[str]:
    return list(runs.read_run(folder).environment.values())


def test_a_killed_run_of_a_host(work: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(work / 'host', tmp_path / 'host')
    (path,) = folder.glob('*/vis_data/scalars.json')
    text = path.read_text()
    whole = text.splitlines()
    cut = text.index(whole[3]) + len(whole[3]) // 2
    path.write_text(text[:cut])
    (log,) = folder.glob('*/*.log')
    said = log.read_text()
    log.write_text(said[: said.index('Saving checkpoint at 3')])
    run = runs.read_run(folder)
    steps = [json.loads(line)['step'] for line in whole[:3]]
    assert sorted(run.train['loss']) == [s for s in steps if s]
    assert not run.ended
    assert run.traceback == ''
    (folder / 'console.out').write_text(
        'Traceback (most recent call last):\n  File\nMemoryError\n'
    )
    assert runs.read_run(folder).traceback.endswith('MemoryError')


def test_the_newest_whole_checkpoint_counts(tmp_path: Path) -> None:
    for number in (9, 10):
        state = {'0.running_mean': torch.full((2,), float(number))}
        torch.save(dict(state_dict=state), tmp_path / f'iter_{number}.pth')
        os.utime(tmp_path / f'iter_{number}.pth', (number, number))
    whole = (tmp_path / 'iter_10.pth').read_bytes()
    (tmp_path / 'iter_11.pth').write_bytes(whole[: len(whole) // 2])
    found = runs.statistics(tmp_path)
    assert found == {'size of running_mean, median, last': {1: 10.0}}


def write_start(folder: Path, time: str, lines: list[dict]) -> None:
    path = folder / time / 'vis_data/scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(map(json.dumps, lines)))


def test_a_resumed_run_is_one_and_a_new_one_is_new(tmp_path: Path) -> None:
    def line(step: int, loss: float) -> dict:
        return dict(iter=step, step=step, loss=loss)

    write_start(tmp_path, '1', [line(10, 1.0), line(20, 2.0)])
    metric = dict(mIoU=7.0, time=1.0, step=1)
    write_start(tmp_path, '2', [line(20, 3.0), line(30, 4.0), metric])
    run = runs.read_run(tmp_path)
    assert run.train['loss'] == {10: 1.0, 20: 3.0, 30: 4.0}
    assert run.metrics == {'mIoU': {30: 7.0}}
    write_start(tmp_path, '3', [line(10, 5.0)])
    run = runs.read_run(tmp_path)
    assert run.train['loss'] == {10: 5.0}
    assert run.metrics == {}
    # Of another log interval.
    write_start(tmp_path, '4', [line(4, 6.0), line(8, 7.0)])
    write_start(tmp_path, '5', [line(8, 8.0)])
    assert runs.read_run(tmp_path).train['loss'] == {4: 6.0, 8: 8.0}


def test_a_panel_draws_its_points() -> None:
    values = {0: 0.0, 5: float('nan'), 10: 5.0}
    shown = page.panel('a<b', 'iterations', {1: values})
    assert 'a&lt;b (1 NaN or infinite)' in shown
    line = shown.partition('points="')[2].partition('"')[0]
    assert line == '60.0,220.0 400.0,15.0'
    # Decades of what is positive and far apart.
    shown = page.panel('v', 'layer', {0: {1: 1.0, 2: 100.0, 3: 1e4}})
    line = shown.partition('points="')[2].partition('"')[0]
    heights = [float(point.split(',')[1]) for point in line.split()]
    assert heights == [220, 117.5, 15]
    assert '>10000</text>' in shown
    nothing = page.panel('v', 'layer', {0: {1: float('inf')}})
    assert 'no value' in nothing
    many = [(float(x), float(x == 1234)) for x in range(5000)]
    kept = page.thinned(many)
    assert len(kept) < 1000
    assert (1234.0, 1.0) in kept


def test_a_loss_that_is_not_finite_is_said(
    work: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = shutil.copytree(work / 'host', tmp_path / 'host')
    (path,) = folder.glob('*/vis_data/scalars.json')
    line = dict(iter=4, step=4, loss=float('nan'))
    path.write_text(f'{path.read_text()}{json.dumps(line)}\n')
    shown, _ = report(monkeypatch, tmp_path / 'a.html', folder)
    assert 'the loss is nan in iteration 4' in shown.words


def test_a_config_is_compared_with_its_base(
    work: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = (work / 'data/host.py').read_text()
    base = tmp_path / 'base.py'
    step = "dict(type='RandomFlip', prob=0.5)"
    base.write_text(
        text.replace('lr=0.01', 'lr=0.5')
        + f"train_dataloader['dataset']['pipeline'].insert(1, {step})\n"
    )
    shown, _ = report(
        monkeypatch, tmp_path / 'a.html', work / 'host', '--base', base
    )
    words = shown.words.replace('\n', '')
    assert 'optim_wrapper.optimizer.lr0.50.01' in words
    assert 'train_dataloader.dataset.pipeline[RandomFlip].prob0.5-' in words
    # The steps behind the one that is new are the same.
    assert 'PackSegInputs' not in words
    # Dumped without a name that the packages know.
    shown, _ = report(monkeypatch, tmp_path / 'b.html', work / 'host')
    assert 'no config of its name' in shown.words
    named = 'deeplabv3_r50-d16_gn-ws-all_8xb2-50e_voc12aug-513x513.py'
    (tmp_path / named).touch()
    assert runs.base_of(tmp_path).parent.name == 'deeplabv3'


def test_flat_keys_of_a_config() -> None:
    steps = [dict(type='A', x=1), dict(type='B'), dict(type='A', x=(2, 3))]
    config = Config(dict(a=dict(steps=steps, empty={}, n=[1, 2])))
    assert dict(runs.flat(config._cfg_dict)) == {
        'a.steps[A].type': 'A',
        'a.steps[A].x': 1,
        'a.steps[B].type': 'B',
        'a.steps[A 2].type': 'A',
        'a.steps[A 2].x': [2, 3],
        'a.empty': {},
        'a.n': [1, 2],
    }


def test_what_is_no_work_dir_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match='is no work dir of a training'):
        runs.read_run(tmp_path)


def test_a_folder_is_no_page(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SetupError, match='--out .* is a folder'):
        report(monkeypatch, work, work / 'host')


def test_lines_of_another_form_are_passed_over(tmp_path: Path) -> None:
    scalars = tmp_path / 'a/vis_data/scalars.json'
    scalars.parent.mkdir(parents=True)
    lines = [dict(iter=1, step=1, loss=2.0), dict(iter=2, loss=1.0)]
    scalars.write_text('\n'.join(map(json.dumps, lines)))
    (tmp_path / 'a/20260101_000000.log').write_text('')
    assert runs.read_run(tmp_path).train['loss'][1] == 2.0
    (tmp_path / 'singularities.jsonl').write_text('{"step": 3}\n')
    assert runs.layers(tmp_path) == {}


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / 'a.png').write_bytes(b'PNG')
    assert 'a&amp;b cannot be read' in page.picture(tmp_path / 'a.png', 'a&b')
    wide = np.zeros((40, 3000, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'b.png'), wide)
    (source,) = Page(page.picture(tmp_path / 'b.png', 'b')).sources
    content = base64.b64decode(source.partition(',')[2])
    assert cv2.imdecode(np.frombuffer(content, np.uint8), 1).shape[1] == 1000


def test_a_browser_shows_it_without_a_complaint(
    work: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ('chromium', 'chromium-browser', 'google-chrome')
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f'none of {", ".join(names)} is installed')
    out = tmp_path / 'all.html'
    # More columns than a narrow screen is wide.
    links = [tmp_path / f'link {n}' for n in range(5)]
    for link in links:
        link.symlink_to(work / 'dead')
    _, text = report(monkeypatch, out, work / 'ours', *links)
    # Says in the title which pictures have pixels, and what is drawn.
    out.write_text(
        text + '<script>onload = () => { const i = [...document.images];'
        'const drawn = i.filter(each => each.naturalWidth).length;'
        'const seen = [...document.querySelectorAll("polyline")].filter('
        'each => each.getBoundingClientRect().width).length;'
        'document.title = `${drawn} of ${i.length}, ${seen > 0}, `'
        '+ (document.body.scrollWidth <= innerWidth) }</script>'
    )
    done = subprocess.run(
        [
            *(browser, '--headless', '--no-sandbox', '--disable-gpu'),
            *('--enable-logging=stderr', '--window-size=400,800'),
            *(f'--user-data-dir={tmp_path / "profile"}', '--dump-dom'),
            out.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert '<title>14 of 14, true, true</title>' in done.stdout, done.stderr
    assert 'CONSOLE' not in done.stderr
