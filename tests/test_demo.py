"""The demo: its data, its pictures, and that it can be stopped anywhere."""

import json
import os
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image

pytest.importorskip('mmdet')
rle = pytest.importorskip('pycocotools.mask')

TOOLS = Path(__file__).parents[1] / 'tools'

import demo  # noqa: E402
from dataset_converters import nuclei_scenes, nuclei_tiles  # noqa: E402
from dataset_converters.nuclei_scenes import Scene  # noqa: E402
from support import demo_figures  # noqa: E402
from support.checks import SetupError  # noqa: E402


@pytest.fixture(scope='module', params=['generated', 'stardist'])
def scene(request: pytest.FixtureRequest) -> Scene:
    if request.param == 'generated':
        return nuclei_scenes.generated_scene()
    try:
        return nuclei_scenes.stardist_scene(nuclei_scenes.cache_dir())
    except nuclei_scenes.DownloadError as error:
        pytest.skip(f'the stardist wheel cannot be had: {error}')


@pytest.fixture(scope='module')
def dataset(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp('data') / scene.name
    assert nuclei_tiles.write_dataset(scene, target)
    return target


def read_part(dataset: Path, part: str) -> dict:
    path = dataset / 'annotations' / f'instances_{part}.json'
    return json.loads(path.read_text())


def tile_of(array: np.ndarray, file_name: str) -> np.ndarray:
    """The window that a tile's name says it shows."""
    top, left = int(file_name[1:4]), int(file_name[6:9])
    return array[top : top + 128, left : left + 128]


def test_no_nucleus_is_in_both_parts(scene: Scene, dataset: Path) -> None:
    nuclei = {}
    for part, count in (('train', 12), ('val', 4)):
        images = read_part(dataset, part)['images']
        assert len(images) == count
        # From the pixels, not from what the annotations say.
        nuclei[part] = set()
        for image in images:
            nuclei[part] |= set(
                np.unique(tile_of(scene.labels, image['file_name'])).tolist()
            ) - {0}
        annotated = read_part(dataset, part)['annotations']
        assert {entry['nucleus'] for entry in annotated} == nuclei[part]
    assert len(nuclei['train']) > 60
    assert len(nuclei['val']) > 20
    assert not nuclei['train'] & nuclei['val']


def test_parts_that_share_a_nucleus_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(nuclei_tiles.ROWS, 'train', (0, 128, 256))
    scene = nuclei_scenes.generated_scene()
    with pytest.raises(ValueError, match=r'nuclei \[\d.*held-out tiles'):
        nuclei_tiles.write_dataset(scene, tmp_path / 'tiles')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('part', ['train', 'val'])
def test_every_mask_round_trips(
    scene: Scene, dataset: Path, part: str
) -> None:
    content = read_part(dataset, part)
    names = {entry['id']: entry['file_name'] for entry in content['images']}
    for entry in content['annotations']:
        labels = tile_of(scene.labels, names[entry['image_id']])
        mask = rle.decode(entry['segmentation']).astype(bool)
        np.testing.assert_array_equal(mask, labels == entry['nucleus'])
        rows, columns = np.nonzero(mask)
        left, top, width, height = entry['bbox']
        assert entry['area'] == mask.sum()
        assert (left, top) == (columns.min(), rows.min())
        assert (left + width, top + height) == (
            columns.max() + 1,
            rows.max() + 1,
        )


@pytest.mark.parametrize('part', ['train', 'val'])
def test_semantic_masks_are_the_union_of_the_instances(
    scene: Scene, dataset: Path, part: str
) -> None:
    content = read_part(dataset, part)
    for image in content['images']:
        union = np.zeros((128, 128), np.uint8)
        for entry in content['annotations']:
            if entry['image_id'] == image['id']:
                union |= rle.decode(entry['segmentation'])
        path = dataset / 'semantic' / part / image['file_name']
        with Image.open(path) as mask:
            assert mask.mode == 'P'
            np.testing.assert_array_equal(np.array(mask), union)
        with Image.open(dataset / part / image['file_name']) as picture:
            np.testing.assert_array_equal(
                np.array(picture), tile_of(scene.image, image['file_name'])
            )


def test_generated_shapes_depend_on_the_seed_alone() -> None:
    first, again, other = map(nuclei_scenes.generated_scene, (3, 3, 4))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert (first.labels != other.labels).any()
    assert 'GENERATED' in first.origin


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file()
    }


@pytest.mark.parametrize('before', [False, True])
def test_interrupted_writing_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    target = tmp_path / 'tiles'
    if before:
        nuclei_tiles.write_dataset(nuclei_scenes.generated_scene(1), target)
    kept = files_of(tmp_path)
    write_part = nuclei_tiles.write_part

    def interrupted(scene: Scene, name: str, folder: Path) -> set[int]:
        if name == 'val':
            raise KeyboardInterrupt
        return write_part(scene, name, folder)

    scene = nuclei_scenes.generated_scene(0)
    with monkeypatch.context() as patch:
        patch.setattr(nuclei_tiles, 'write_part', interrupted)
        with pytest.raises(KeyboardInterrupt, match=r'^$'):
            nuclei_tiles.write_dataset(scene, target)
    assert files_of(tmp_path) == kept
    # What a kill leaves, where no clean-up runs.
    (tmp_path / '.tiles.part/train').mkdir(parents=True)
    assert nuclei_tiles.write_dataset(scene, target)
    assert not nuclei_tiles.write_dataset(scene, target)
    assert [path.name for path in tmp_path.iterdir()] == ['tiles']
    assert len(files_of(target)) == 2 * (12 + 4) + 3


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / 'thesis.txt').write_text('mine')
    with pytest.raises(FileExistsError, match=r'left alone.*--out'):
        nuclei_tiles.write_dataset(nuclei_scenes.generated_scene(), tmp_path)
    assert files_of(tmp_path) == {'thesis.txt': b'mine'}


@pytest.mark.parametrize('kind', ['junk', 'other image'])
def test_a_wrong_wheel_is_an_error(tmp_path: Path, kind: str) -> None:
    wheel = tmp_path / 'stardist-0.9.2-any.whl'
    wheel.write_text('junk')
    if kind == 'other image':
        with zipfile.ZipFile(wheel, 'w') as archive:
            for member in nuclei_scenes.MEMBERS:
                archive.writestr(member, 'another')
    with pytest.raises(ValueError, match=r'stardist-0\.9\.2.*delete'):
        nuclei_scenes.stardist_scene(tmp_path)


# The stages, with children that write what the real ones write.


class Children:
    """Stands in for demo.run_child; remembers what it was asked to run."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.real = demo.run_child
        self.dies_in: str | None = None

    def __call__(
        self,
        command: list[str],
        log: Path,
        each: Callable[[str], None] = str,
    ) -> int:
        script = Path(command[1]).name
        self.commands.append(command)
        if script == 'nuclei_tiles.py':
            return self.real(command, log, each)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text('first line\nlast line\n')
        if self.dies_in and self.dies_in in ' '.join(command):
            return 1
        work_dir = Path(command[command.index('--work-dir') + 1])
        stamp = work_dir / '20260101_000000'
        if script == 'train.py':
            each('Iter(train) [10/20]  eta: 0:01:02  loss: 1.5  loss_mask: 1')
            stamp.joinpath('vis_data').mkdir(parents=True, exist_ok=True)
            write_scalars(stamp / 'vis_data/scalars.json', (10, 20))
            steps = next(
                word.removeprefix('train_cfg.max_iters=')
                for word in command
                if word.startswith('train_cfg.max_iters=')
            )
            (work_dir / f'iter_{steps}.pth').touch()
            return 0
        (option,) = (
            word.split('=') for word in command if 'predictions' in word
        )
        metrics = {'coco/bbox_mAP': 0.4, 'coco/segm_mAP': 0.5}
        if option[0] == 'test_evaluator.output_dir':
            metrics = {'mIoU': 75.0, 'mDice': 85.0}
        write_predictions(self.data, Path(option[1]))
        stamp.mkdir(parents=True)
        (stamp / 'result.json').write_text(json.dumps(metrics))
        return 0

    @property
    def data(self) -> Path:
        """Data set that the last converter wrote."""
        written = [c for c in self.commands if 'nuclei_tiles.py' in c[1]]
        return Path(written[-1][written[-1].index('--out') + 1])

    def scripts(self) -> list[str]:
        """Scripts run since the last call."""
        names = [Path(command[1]).name for command in self.commands]
        self.seen, names = len(names), names[getattr(self, 'seen', 0) :]
        return names


def write_scalars(path: Path, steps: tuple[int, ...]) -> None:
    lines = [json.dumps({'loss': 10 / step, 'step': step}) for step in steps]
    path.write_text('\n'.join(lines) + '\n')


def write_predictions(dataset: Path, target: Path) -> None:
    """The truth, in the formats of mmdet and mmseg."""
    target.mkdir(parents=True)
    for path in (dataset / 'semantic/val').iterdir():
        with Image.open(path) as mask:
            Image.fromarray(np.array(mask)).save(target / path.name)
    truth = read_part(dataset, 'val')['annotations']
    found = [{**entry, 'score': 0.9} for entry in truth]
    found.append({**truth[0], 'score': 0.1})
    target.with_suffix('.segm.json').write_text(json.dumps(found))


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    fake = Children()
    monkeypatch.setattr(demo, 'run_child', fake)
    return fake


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the pictures out, which take seconds."""
    monkeypatch.setattr(demo_figures, 'draw_results', lambda *given: [])


@pytest.fixture
def args(tmp_path: Path) -> Namespace:
    return Namespace(
        work_dir=tmp_path / 'work',
        data_root=tmp_path / 'data',
        offline=True,
        compare=False,
        iters_det=20,
        iters_seg=20,
    )


def run_demo(args: Namespace) -> dict:
    args.work_dir.mkdir(exist_ok=True)
    demo.Demo(args)()
    return json.loads((args.work_dir / 'summary.json').read_text())


FULL = ['nuclei_tiles.py', 'train.py', 'test.py', 'train.py', 'test.py']


def test_a_whole_demo_and_a_second_one(
    args: Namespace,
    children: Children,
    capfd: pytest.CaptureFixture[str],
) -> None:
    summary = run_demo(args)
    assert children.scripts() == FULL
    assert [run['metrics'] for run in summary['runs']] == [
        {'box AP': 0.4, 'segm AP': 0.5},
        {'mIoU': 75.0, 'mDice': 85.0},
    ]
    for run in summary['runs']:
        assert (run['norm'], run['steps'], run['seed']) == ('bcn-ws', 20, 0)
    assert summary['versions'].keys() >= {'torch', 'ws_mm', 'python'}
    names = [Path(picture).name for picture in summary['pictures']]
    assert names == ['instances.png', 'semantic.png', 'losses.png']
    for picture in summary['pictures']:
        assert imread(picture).std() > 0.05
    train = next(c for c in children.commands if 'train.py' in c[1])
    assert 'train_cfg.max_iters=20' in train
    assert f'train_dataloader.dataset.data_root={children.data}/' in train
    shown = capfd.readouterr()
    assert 'step 10 of 20, loss 1.5, 0:01:02 to go' in shown.out
    assert shown.out.count('GENERATED SHAPES') == 2
    assert 'GENERATED' in summary['data']['origin']
    assert summary['data']['fallback_because'] == '--offline'

    again = run_demo(args)
    assert children.scripts() == ['nuclei_tiles.py']
    assert again['runs'] == summary['runs']


def test_compare_draws_every_norm_in_one_figure(
    args: Namespace, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    args.compare = True
    drawn = []
    draw = demo_figures.draw_comparison
    monkeypatch.setattr(
        demo_figures,
        'draw_comparison',
        lambda *given: drawn.append(draw(*given)),
    )
    summary = run_demo(args)
    assert len(children.scripts()) == 1 + 2 * 2 * 4
    assert summary['pictures'][-1].endswith('comparison.png')
    axes = np.reshape(drawn[0].axes, (2, 2))
    norms = ['bcn-ws', 'gn-ws', 'gn', 'bn']
    for losses, bars in axes.T:
        assert [line.get_label() for line in losses.lines] == norms
        assert [text.get_text() for text in bars.get_xticklabels()] == norms
        heights = [bar.get_height() for bar in bars.patches]
        assert len(heights) == 2 * len(norms)
        assert min(heights) > 0
    assert imread(summary['pictures'][-1]).std() > 0.05


@pytest.mark.usefixtures('undrawn')
def test_a_failed_child_is_named_and_the_next_run_continues(
    args: Namespace, children: Children
) -> None:
    children.dies_in = 'tools/train.py configs/demo/deeplabv3'
    with pytest.raises(
        SetupError, match=r'(?s)DeepLabV3.*bcn-ws.*last line.*train\.log'
    ):
        run_demo(args)
    assert children.scripts() == FULL[:4]
    assert not (args.work_dir / 'summary.json').exists()
    children.dies_in = None
    run_demo(args)
    assert children.scripts() == [FULL[0], 'train.py', 'test.py']


@pytest.mark.usefixtures('undrawn')
def test_other_settings_start_again(
    args: Namespace, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_demo(args)
    children.scripts()
    args.iters_det = 30
    assert run_demo(args)['runs'][0]['steps'] == 30
    assert children.scripts() == FULL[:3]
    left = [path.name for path in args.work_dir.glob('mask-rcnn*/*.pth')]
    assert left == ['iter_30.pth']
    monkeypatch.setattr(demo, 'versions', lambda: {'ws_mm': 'edited'})
    run_demo(args)
    assert children.scripts() == FULL


def test_a_foreign_run_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / 'thesis.txt').write_text('mine')
    with pytest.raises(SetupError, match=r'left alone.*--work-dir'):
        demo.claim(tmp_path, {'config': ''})
    assert files_of(tmp_path) == {'thesis.txt': b'mine'}


@pytest.mark.usefixtures('undrawn')
def test_without_network_the_demo_says_so_and_falls_back(
    args: Namespace,
    children: Children,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args.offline = False
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path))
    summary = run_demo(args)
    reason = summary['data']['fallback_because']
    assert 'pip download stardist==0.9.2 failed: ERROR' in reason
    # When it is decided, and again beside the results.
    assert capsys.readouterr().out.count(f'Reason: {reason}') == 2
    assert summary['data']['name'] == 'generated'
    assert not list((tmp_path / 'cache/ws_mm').iterdir())


def test_no_fallback_for_another_failure(
    args: Namespace,
    children: Children,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args.offline = False
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    (tmp_path / 'ws_mm').mkdir()
    (tmp_path / 'ws_mm/stardist-0.9.2-any.whl').write_text('junk')
    with pytest.raises(SetupError, match=r'(?s)Preparing.*whl.*delete'):
        run_demo(args)
    assert not (args.data_root / 'generated').exists()


def test_an_interrupted_demo_stops_its_child(tmp_path: Path) -> None:
    command = [
        *(sys.executable, '-c'),
        'import os, time; print(os.getpid(), flush=True); time.sleep(60)',
    ]
    pids = []

    def interrupt(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r'^$'):
        demo.run_child(command, tmp_path / 'log', interrupt)
    with pytest.raises(ProcessLookupError, match='No such process'):
        os.kill(pids[0], 0)


# Pictures.


def test_a_curve_joins_the_parts_of_a_resumed_training(tmp_path: Path) -> None:
    for name, steps in (('20260101_1', (10, 20)), ('20260101_2', (15, 30))):
        (tmp_path / name / 'vis_data').mkdir(parents=True)
        write_scalars(tmp_path / name / 'vis_data/scalars.json', steps)
    with (tmp_path / '20260101_1/vis_data/scalars.json').open('a') as file:
        file.write('{"loss": 3.0, "st')
    steps, losses = demo_figures.read_curve(tmp_path)
    assert steps == [10, 15, 20, 30]
    assert losses == [10 / step for step in steps]


@pytest.mark.parametrize('scene', ['generated'], indirect=True)
def test_predictions_are_drawn_beside_the_truth(
    dataset: Path, tmp_path: Path
) -> None:
    write_predictions(dataset, tmp_path / 'predictions')
    figures = [
        demo_figures.draw_instances(
            dataset,
            tmp_path / 'predictions.segm.json',
            'instances',
            tmp_path / 'instances.png',
        ),
        demo_figures.draw_semantic(
            dataset,
            tmp_path / 'predictions',
            'semantic',
            tmp_path / 'semantic.png',
        ),
    ]
    for figure in figures:
        assert imread(tmp_path / f'{figure.get_suptitle()}.png').std() > 0.05
        for row in np.reshape(figure.axes, (4, 3)):
            picture, truth, predicted = (
                axis.images[0].get_array() for axis in row
            )
            np.testing.assert_array_equal(truth, predicted)
            assert truth.shape != picture.shape or (truth != picture).any()
    assert not list(tmp_path.glob('.part*'))
