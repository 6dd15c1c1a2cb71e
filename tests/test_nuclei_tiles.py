"""The tiles of the demo: cut from one image, whole, in two parts."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('cv2')
rle = pytest.importorskip('pycocotools.mask')

from dataset_converters import nuclei_scenes, nuclei_tiles  # noqa: E402
from dataset_converters.nuclei_scenes import Scene  # noqa: E402


@pytest.fixture(scope='module', params=['generated', 'stardist'])
def scene(request: pytest.FixtureRequest) -> Scene:
    if request.param == 'generated':
        return nuclei_scenes.generated_scene()
    try:
        return nuclei_scenes.stardist_scene(nuclei_tiles.cache_dir())
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


@pytest.mark.parametrize('source', [None, '[1]', '{"camera": "mine"}'])
def test_a_foreign_folder_is_left_alone(
    tmp_path: Path, source: str | None
) -> None:
    (tmp_path / 'thesis.txt').write_text('mine')
    if source:
        (tmp_path / 'source.json').write_text(source)
    before = files_of(tmp_path)
    with pytest.raises(FileExistsError, match=r'left alone.*--out'):
        nuclei_tiles.write_dataset(nuclei_scenes.generated_scene(), tmp_path)
    assert files_of(tmp_path) == before


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
