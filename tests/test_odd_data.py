"""The tiny data set is as odd as it says, as the hosts read it."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from proofs import odd_data
from proofs.odd_data import ALPHA, EMPTY, GRAY, IMAGE_IDS, OBJECTS, SIZES


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return odd_data.write(tmp_path_factory.mktemp('odd'))


def test_images_have_the_channels_that_they_should(data: Path) -> None:
    shapes = {
        name: cv2.imread(str(data / 'images' / name), cv2.IMREAD_UNCHANGED)
        for name in IMAGE_IDS
    }
    assert shapes[GRAY].ndim == 2
    assert shapes[ALPHA].shape == (*SIZES[ALPHA], 4)
    assert shapes[EMPTY].shape == (*SIZES[EMPTY], 3)
    assert not GRAY.isascii()
    assert all(' ' in name for name in (GRAY, EMPTY))


def test_pycocotools_reads_every_form_of_mask(data: Path) -> None:
    coco = pytest.importorskip('pycocotools.coco').COCO(
        str(data / 'instances.json')
    )
    ids = list(coco.imgs)
    assert ids != sorted(ids)
    assert max(ids) > 2**32
    assert not coco.getAnnIds([IMAGE_IDS[EMPTY]])
    categories = coco.getCatIds()
    assert categories != sorted(categories)
    assert max(categories) > len(categories)
    found = set()
    for name, objects in OBJECTS.items():
        annotations = coco.loadAnns(coco.getAnnIds([IMAGE_IDS[name]]))
        assert len(annotations) == len(objects)
        for one, (kind, form, polygons) in zip(
            annotations, objects, strict=True
        ):
            (category,) = coco.loadCats([one['category_id']])
            assert category['name'] == kind
            assert one['iscrowd'] == (form == 'crowd')
            mask = coco.annToMask(one)
            expected = odd_data.mask_of(polygons, SIZES[name])
            if isinstance(one['segmentation'], list):
                found.add(f'{len(polygons)} polygons')
                # The outline itself is drawn by cv2 alone.
                assert (mask != expected).mean() < 0.02
            else:
                found.add(type(one['segmentation']['counts']).__name__)
                np.testing.assert_array_equal(mask, expected)
                assert one['area'] == mask.sum()
    assert found == {'1 polygons', '2 polygons', 'str', 'list'}


def test_runs_of_a_mask_that_starts_with_ones() -> None:
    coder = pytest.importorskip('pycocotools.mask')
    mask = np.zeros((5, 7), np.uint8)
    mask[:3, :2] = 1
    runs = odd_data.segmentation('numbers', [], mask)
    assert runs['counts'][0] == 0
    decoded = coder.decode(coder.frPyObjects(runs, *mask.shape))
    np.testing.assert_array_equal(decoded, mask)


def test_mmdet_reads_it(data: Path) -> None:
    datasets = pytest.importorskip('mmdet.datasets')
    dataset = datasets.CocoDataset(
        data_root=str(data),
        ann_file='instances.json',
        data_prefix=dict(img='images', seg='masks'),
        metainfo=dict(classes=odd_data.THINGS),
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(
                type='mmdet.LoadAnnotations',
                with_bbox=True,
                with_mask=True,
                with_seg=True,
                imdecode_backend='pillow',
            ),
        ],
    )
    assert len(dataset) == 3
    for index in range(3):
        sample = dataset[index]
        name = Path(sample['img_path']).name
        kinds = [kind for kind, _, _ in OBJECTS[name]]
        assert sample['img_id'] == IMAGE_IDS[name]
        assert sample['img'].shape == (*SIZES[name], 3)
        assert [
            odd_data.THINGS[label] for label in sample['gt_bboxes_labels']
        ] == kinds
        ignored = [form == 'crowd' for _, form, _ in OBJECTS[name]]
        assert sample['gt_ignore_flags'].tolist() == ignored
        # Of a crowd and of run lengths, too.
        assert all(mask.any() for mask in sample['gt_masks'].masks)
        assert set(np.unique(sample['gt_seg_map'])) <= {0, 1, 2, 3, 255}


def test_mmseg_reads_it(data: Path) -> None:
    datasets = pytest.importorskip('mmseg.datasets')
    dataset = datasets.BaseSegDataset(
        data_root=str(data),
        img_suffix='.png',
        seg_map_suffix='.png',
        data_prefix=dict(img_path='images', seg_map_path='masks'),
        metainfo=dict(
            classes=(odd_data.BACKGROUND, *odd_data.THINGS),
            palette=[list(color) for color in odd_data.PALETTE],
        ),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='mmseg.LoadAnnotations'),
        ],
    )
    assert len(dataset) == 3
    for index in range(3):
        sample = dataset[index]
        name = Path(sample['img_path']).name
        kinds = {kind for kind, _, _ in OBJECTS[name]}
        expected = {odd_data.THINGS.index(kind) + 1 for kind in kinds}
        # 255 is ignored, in the image with a palette as well.
        assert set(np.unique(sample['gt_seg_map'])) == {0, 255, *expected}
        assert sample['img'].shape == (*SIZES[name], 3)
