"""Point clouds and video: features, data, and training by the tools."""

import importlib.util
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('mmcv')
from point_clouds import dgcnn, modelnet, solids
from point_clouds.clouds import sample_surface
from support.checks import SetupError
from support.classifier import ClassAccuracy
from video import motions, something, tsm

CONFIGS = Path(__file__).parents[1] / 'configs'
SHORT = [
    *('train_cfg.max_iters=2', 'train_cfg.val_interval=2'),
    *('val_dataloader.dataset.length=28', 'train_dataloader.num_workers=0'),
]


def test_edge_features_are_those_of_the_nearest_points() -> None:
    x = torch.randn(2, 5, 9, dtype=torch.double)
    found = dgcnn.edge_features(x, 4)
    for cloud, features in zip(x, found, strict=True):
        for i, own in enumerate(cloud.T):
            distances = [(own - other).square().sum() for other in cloud.T]
            nearest = sorted(range(9), key=distances.__getitem__)[:4]
            expected = [torch.cat([own, cloud[:, j] - own]) for j in nearest]
            torch.testing.assert_close(features[:, i].T, torch.stack(expected))


@pytest.mark.parametrize('channels', [8, 19])
def test_shift_moves_two_eighths_of_the_channels(channels: int) -> None:
    x = torch.randn(2 * 5, channels, 3, 2, dtype=torch.double)
    expected, fold = x.clone(), channels // 8
    for row in range(10):
        for channel in range(2 * fold):
            step = 1 if channel < fold else -1
            outside = not 0 <= row % 5 + step < 5
            value = torch.zeros(3, 2) if outside else x[row + step, channel]
            expected[row, channel] = value
    assert torch.equal(tsm.shift(x, 5), expected)


def test_points_are_uniform_on_a_surface() -> None:
    corners = np.array([[[0, 0, 0], [1, 0, 0], [0, 3, 0]]] * 2, float)
    corners[1] += 10  # shifted, and of three times the area
    corners[1, 1, 0] += 2
    points = sample_surface(corners, 4000, np.random.default_rng(0))
    second = points[:, 2] > 5
    assert second.mean() == pytest.approx(0.75, abs=0.02)
    centre = corners[1].mean(0)
    np.testing.assert_allclose(points[second].mean(0), centre, atol=0.05)


def test_solids_depend_on_the_seed_alone() -> None:
    data, again, other = (solids.Solids(28, s) for s in (3, 3, 4))
    assert len(data.metainfo['classes']) == 14
    for index in range(14):
        points, label = data[index]
        assert label == index
        assert points.shape == (256, 3)
        assert points.norm(dim=1).max() == pytest.approx(1)
        assert torch.equal(points, again[index][0])
        assert not torch.equal(points, data[index + 14][0])
        assert not torch.equal(points, other[index][0])


def test_rounds_and_blocks_have_their_size() -> None:
    """The closed surfaces have the volume of their formula."""
    volumes = {
        'sphere': 4 / 3 * np.pi,
        'cylinder': np.pi * 2 * solids.LOW,
        'cone': np.pi * 2 / 3,
        'torus': 2 * np.pi**2 * 0.35**2,
        'cube': 4 * solids.LOW,
        'pyramid': 4 / 3,
    }
    for name, volume in volumes.items():
        corners = solids.SOLIDS[name]
        # The halves of a cell are turned against each other.
        sign = np.repeat([1, -1], len(corners) // 2)
        found = abs((sign * np.linalg.det(corners)).sum() / 6)
        assert found == pytest.approx(volume, rel=0.04), name


def test_no_single_frame_tells_the_class() -> None:
    rng = np.random.default_rng(0)
    drawn = [
        np.stack([motions.poses(label, 8, rng) for _ in range(1000)])
        for label in range(8)
    ]
    for label in range(0, 8, 2):
        still = np.delete(drawn[label], label // 2, 2)
        assert (still == still[:, :1]).all()
        moving = drawn[label][..., label // 2]
        assert (np.diff(moving) > 0).all()
        assert (drawn[label + 1][:, ::-1, label // 2] == moving).all()
    for clips in drawn:
        for values in clips.reshape(-1, 4).T:
            share = np.unique(values, return_counts=True)[1] / len(values)
            np.testing.assert_allclose(share, 1 / 8, atol=0.05)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Noise in files, of another place at each seed."""
    rng = np.random.default_rng(0)
    for part in ('train', 'val'):
        (tmp_path / part).mkdir()
        for i in range(2):
            noise = rng.integers(0, 255, (9, 12, 3), dtype='uint8')
            image = Image.fromarray(noise).resize((120, 90))
            image.save(tmp_path / part / f'{i}.jpg')
    return tmp_path


def test_a_motion_is_the_reversal_of_its_pair(photographs: Path) -> None:
    """Pixels move as the name says."""
    where = dict(data_root=photographs, data_prefix=dict(img='train'))
    data = motions.MovingPhotographs(length=8, **where)
    clip, label = data[0]
    assert data.metainfo['classes'][label] == 'pan right'
    assert clip.shape == (8, 3, 24, 24)
    step = round(2 * motions.REACH[0] * 24 / 7)  # pixels of one frame
    inner = slice(4, 20)
    for before, after in pairwise(clip):
        found = [
            (before[:, inner, 4 + d : 20 + d] - after[:, inner, inner])
            .abs()
            .mean()
            for d in (step, 0, -step)
        ]
        assert np.argmin(found) == 0


SQUARE = '0 0 {0}\n1 0 {0}\n1 1 {0}\n0 1 {0}\n'
MESH = SQUARE.format(0) + SQUARE.format(1) + '3 0 1 2\n3 0 2 3\n4 4 5 6 7\n'


@pytest.mark.parametrize(
    'head', ['OFF\n8 3 0\n', 'OFF8 3 0\n', 'OFF # x\n\n8 3 0\n']
)
def test_off_files_are_read(head: str, tmp_path: Path) -> None:
    for split in ('train', 'test'):
        path = tmp_path / 'chair' / split / 'chair_0001.off'
        path.parent.mkdir(parents=True)
        path.write_text(head + MESH)
    corners = modelnet.read_off(path)
    assert corners[:, :, 2].tolist() == [[0] * 3] * 2 + [[1] * 3] * 2
    sides = corners[:, 1:] - corners[:, :1]
    areas = np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1) / 2
    np.testing.assert_allclose(areas, 0.5)
    data = modelnet.ModelNetOFF(tmp_path, 'test', ['chair'], num_points=64)
    points, label = data[0]
    assert (points.shape, label) == ((64, 3), 0)
    assert torch.equal(points, data[0][0])
    with pytest.raises(SetupError, match='(?s)39 of 40 .*airplane/test/.*off'):
        modelnet.ModelNetOFF(tmp_path, 'test')
    path.write_text(head + MESH[:-10])
    with pytest.raises(SetupError, match='0001.off is not whole: '):
        data[0]
    # A face may have a colour behind its corners.
    path.write_text(head + MESH.replace('0 1 2\n', '0 1 2 0.5 0.5 0.5\n'))
    np.testing.assert_array_equal(modelnet.read_off(path), corners)
    for old, new in (('0 1 2', '0 -1 2'), ('0 1 2', '0 1 8'), ('4 4', '5 4')):
        path.write_text(head + MESH.replace(old, new))
        with pytest.raises(SetupError, match='0001.off is not whole: face'):
            data[0]
    faces = MESH.split('\n')[8:]
    path.write_text(head + '\n'.join(['0 0 0'] * 8 + faces))
    with pytest.raises(SetupError, match='0001.off has no surface'):
        data[0]


def test_hdf5_files_are_read(tmp_path: Path) -> None:
    h5py = pytest.importorskip('h5py')
    clouds = np.random.default_rng(0).normal(size=(5, 30, 3)).astype('float32')
    listed = tmp_path / 'train_files.txt'
    listed.write_text('data/modelnet40_ply_hdf5_2048/a.h5\ndata/m/b.h5\n')
    parts = {'a.h5': slice(0, 2), 'b.h5': slice(2, 5)}
    for name, part in parts.items():
        with pytest.raises(SetupError, match=f'(?s)missing:.*{name}'):
            modelnet.ModelNetH5(tmp_path, 'train', 20)
        with h5py.File(tmp_path / name, 'w') as file:
            file['data'] = clouds[part]
            file['label'] = np.arange(5, dtype='uint8')[part, None]
    data = modelnet.ModelNetH5(tmp_path, 'train', 20)
    assert [label for _, label in map(data.__getitem__, range(5))] == [
        *range(5)
    ]
    expected = clouds[3, :20] - clouds[3, :20].mean(0)
    expected = expected / np.linalg.norm(expected, axis=1).max()
    np.testing.assert_allclose(data[3][0], expected, rtol=1e-4, atol=1e-6)
    changed = modelnet.ModelNetH5(tmp_path, 'train', 20, augment=True)
    assert not torch.equal(changed[3][0], changed[3][0])
    with pytest.raises(
        SetupError, match=r'a.h5 has data of \(2, 30, 3\).* 31'
    ):
        modelnet.ModelNetH5(tmp_path, 'train', 31)


@pytest.fixture
def something_v2(
    tmp_path: Path,
) -> Callable[..., something.SomethingSomething]:
    """Two clips: one of three frames in a folder; builds the data set."""
    labels = {'Holding something': '1', 'Pushing something': '0'}
    (tmp_path / 'labels.json').write_text(json.dumps(labels))
    clips = [
        {
            'id': '7',
            'label': 'holding a cup',
            'template': 'Holding [something]',
        }
    ]
    (tmp_path / 'train.json').write_text(json.dumps(clips))

    def build(**more: object) -> something.SomethingSomething:
        settings = dict(data_prefix=dict(img='frames'), size=28, frames=3)
        return something.SomethingSomething(
            tmp_path, 'train.json', 'labels.json', **{**settings, **more}
        )

    return build


def test_frames_of_something_are_read(something_v2, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r'(?s)1 of 1 .*frames/7/\*.jpg'):
        something_v2()
    (tmp_path / 'frames/7').mkdir(parents=True)
    for i in range(6):
        image = Image.new('RGB', (48, 32), (40 * i, 0, 0))
        # From 8 to 13: as text 10 would be the first.
        image.save(tmp_path / f'frames/7/{i + 8}.jpg', quality=95)
    clip, label = something_v2()[0]
    assert (clip.shape, label) == ((3, 3, 28, 28), 1)
    red = clip[:, 0].mean((1, 2)) * something.STD[0] + something.MEAN[0]
    np.testing.assert_allclose(red, [40, 120, 200], atol=3)
    several = something_v2(frames=12, augment=True)[0][0]
    assert (several[:, 0].mean((1, 2)).diff() >= -0.05).all()
    (tmp_path / 'labels.json').write_text('{"Pushing something": "0"}')
    with pytest.raises(SetupError, match="1 templates .*'Holding something'"):
        something_v2()


def test_videos_of_something_are_read(something_v2, tmp_path: Path) -> None:
    av = pytest.importorskip('av')
    where = dict(data_prefix=dict(video='videos'))
    with pytest.raises(SetupError, match='(?s)1 of 1 .*videos/7.webm'):
        something_v2(**where)
    (tmp_path / 'videos').mkdir()
    with av.open(str(tmp_path / 'videos/7.webm'), 'w') as file:
        stream = file.add_stream('libvpx-vp9', rate=12)
        stream.width, stream.height = 48, 32
        for i in range(6):
            image = Image.new('RGB', (48, 32), (40 * i, 0, 0))
            file.mux(stream.encode(av.VideoFrame.from_image(image)))
        file.mux(stream.encode())
    clip, label = something_v2(**where)[0]
    assert (clip.shape, label) == ((3, 3, 28, 28), 1)
    red = clip[:, 0].mean((1, 2)) * something.STD[0] + something.MEAN[0]
    np.testing.assert_allclose(red, [40, 120, 200], atol=12)


def test_missing_packages_are_named(
    something_v2, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ('h5py', 'av'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SetupError, match='pip install h5py'):
        modelnet.ModelNetH5(tmp_path, 'train')
    with pytest.raises(SetupError, match='pip install av'):
        something.decoded(tmp_path / '7.webm')


def test_accuracy_of_all_and_of_classes() -> None:
    metric = ClassAccuracy()
    pairs = [(0, 0), (0, 0), (0, 1), (1, 0)]
    metric.process(None, [dict(label=y, predicted=p) for y, p in pairs])
    found = metric.compute_metrics(metric.results)
    expected = {'accuracy': 50.0, 'class_accuracy': (200 / 3 + 0) / 2}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('model.k=300', '256 points are fewer than k=300'),
        ('model.num_classes=9', 'A label is 13, and model.num_classes=9'),
    ],
)
def test_clouds_that_do_not_fit(
    option: str, message: str, refuses, tmp_path
) -> None:
    config = CONFIGS / 'dgcnn/dgcnn_k10_gn-ws-all_1xb1-4k_solids.py'
    batch = 'train_dataloader.batch_size=14'
    refuses(
        message,
        *('train', config, '--work-dir', tmp_path),
        *(
            '--cfg-options',
            *SHORT,
            batch,
            option,
            'train_dataloader.sampler.shuffle=False',
        ),
    )


def test_clips_that_do_not_fit() -> None:
    model = tsm.TSM(dict(type='mmseg.ResNet', depth=18), 512, 8, frames=4)
    with pytest.raises(SetupError, match=r'\(B, 4, 3, H, W\), not \(2, 5, 3'):
        model.scores(torch.zeros(2, 5, 3, 8, 8))
    with pytest.raises(SetupError, match='CGNet has no residual blocks'):
        tsm.TSM(dict(type='mmseg.CGNet'), 256, 8)


def test_solids_are_trained_and_evaluated(script, tmp_path, capsys) -> None:
    config = CONFIGS / 'dgcnn/dgcnn_k10_gn-ws-all_1xb1-4k_solids.py'
    common = '--work-dir', tmp_path, '--cfg-options', *SHORT
    assert script('train', config, *common) == 0
    weights = tmp_path / 'iter_2.pth'
    more = 'test_dataloader.dataset.length=28'
    assert script('test', config, weights, *common, more) == 0
    assert 'class_accuracy' in capsys.readouterr().out


def test_motions_are_trained_and_evaluated(
    script, photographs: Path, tmp_path: Path, capsys
) -> None:
    config = CONFIGS / 'tsm/tsm_r18_gn-ws-all_1xb1-4k_motions.py'
    # Every host's ResNet will do.
    here = importlib.util.find_spec('mmpretrain')
    other = ['default_scope=mmseg', 'model.backbone.type=ResNet']
    common = ['--work-dir', tmp_path, '--cfg-options', *SHORT]
    common += [] if here else other
    for loader in ('train', 'val', 'test'):
        key = f'{loader}_dataloader.dataset'
        common += [f'{key}.data_root={photographs}', f'{key}.length=8']
    assert script('train', config, *common) == 0
    assert script('test', config, tmp_path / 'iter_2.pth', *common) == 0
    assert 'class_accuracy' in capsys.readouterr().out
