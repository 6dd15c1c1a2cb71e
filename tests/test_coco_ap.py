"""coco_ap.py says what mmdet says, with more digits."""

import json

import pytest
import torch
from in_process import load, tools  # noqa: F401

pytest.importorskip('mmdet')

SIZE = 800


@pytest.fixture
def annotations(tmp_path):
    """One image of more objects than AP at 100 predictions looks at.

    Boxes are of medium size, masks, the upper halves, small.
    """
    objects = [
        dict(
            id=i + 1,
            image_id=1,
            category_id=7,
            bbox=[40 * (i % 20), 40 * (i // 20), 35, 35],
            area=35 * 17,
            iscrowd=0,
            segmentation=[polygon(40 * (i % 20), 40 * (i // 20))],
        )
        for i in range(150)
    ]
    content = dict(
        images=[dict(id=1, file_name='a.png', height=SIZE, width=SIZE)],
        categories=[dict(id=7, name='square')],
        annotations=objects,
    )
    path = tmp_path / 'truth.json'
    path.write_text(json.dumps(content))
    return path


def polygon(x, y):
    return [x, y, x + 35, y, x + 35, y + 17, x, y + 17]


@pytest.fixture
def metric(annotations, tmp_path):
    """mmdet's own, with its rounded figures and its files."""
    from mmdet.evaluation import CocoMetric
    from mmdet.structures.mask import encode_mask_results

    boxes = torch.tensor(
        [x['bbox'] for x in json.loads(annotations.read_text())['annotations']]
    ).float()
    boxes = boxes + torch.randint(-5, 6, boxes.shape)
    boxes[:, 2:] = boxes[:, :2].clamp_min(0) + 35
    boxes[:, :2].clamp_(min=0)
    masks = torch.zeros(len(boxes), SIZE, SIZE, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(
        masks, boxes.int().tolist(), strict=True
    ):
        mask[top : (top + bottom) // 2, left:right] = True
    found = dict(
        bboxes=boxes,
        scores=torch.rand(len(boxes)),
        labels=torch.zeros(len(boxes), dtype=torch.long),
        masks=encode_mask_results(masks.numpy()),
        mask_scores=torch.rand(len(boxes)),
    )
    coco = CocoMetric(
        ann_file=str(annotations),
        metric=['bbox', 'segm'],
        outfile_prefix=str(tmp_path / 'found'),
    )
    coco.dataset_meta = dict(classes=('square',))
    coco.process(
        {},
        [
            dict(
                img_id=1,
                ori_shape=(SIZE, SIZE),
                gt_instances={},
                pred_instances=found,
            )
        ],
    )
    return coco.evaluate(1)


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
@pytest.mark.usefixtures('tools')
def test_the_figures_are_those_of_mmdet(kind, metric, annotations, tmp_path):
    path = tmp_path / f'found.{kind}.json'
    actual = load('coco_ap').average_precision(str(annotations), str(path))
    names = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
    expected = [metric[f'coco/{kind}_{name}'] for name in names]
    assert 0 < expected[0] < expected[1]
    assert [round(value, 3) for value in actual] == expected
    assert [round(value, 3) for value in actual] != actual


@pytest.mark.usefixtures('metric')
def test_classes_of_the_model_alone(annotations, refuses, tmp_path):
    found = tmp_path / 'found.bbox.json'
    average = load('coco_ap').average_precision
    before = average(str(annotations), str(found))
    truth = json.loads(annotations.read_text())
    names = [one['name'] for one in truth['categories']]
    truth['categories'].append(dict(id=99, name='unseen'))
    truth['annotations'].append(
        {**truth['annotations'][0], 'id': 10**6, 'category_id': 99}
    )
    annotations.write_text(json.dumps(truth))
    assert average(str(annotations), str(found))[0] < before[0]
    assert average(str(annotations), str(found), names) == before
    arguments = annotations, found, '--classes', 'unseen', 'cow'
    refuses('--classes cow: the categories', 'coco_ap', *arguments)


@pytest.mark.usefixtures('metric')
def test_bad_files_are_named(annotations, refuses, tmp_path):
    found = tmp_path / 'found.bbox.json'
    refuses('must end with .bbox.json', 'coco_ap', annotations, annotations)
    other = tmp_path / 'no.segm.json'
    refuses('No file .*no.segm.json', 'coco_ap', annotations, other)
    other.write_text('[]')
    refuses('nothing was detected', 'coco_ap', annotations, other)
    other.write_text('[{"half')
    refuses('cannot be read as JSON', 'coco_ap', annotations, other)
    for text in ('{"a": 1}', '3', '[[1]]'):
        other.write_text(text)
        refuses('no list of detections', 'coco_ap', annotations, other)
    for text in ('3', '{"categories": [{"id": 7}]}', '{"categories": 3}'):
        other.write_text(text)
        refuses('no categories with names', 'coco_ap', other, found)
    refuses('No file .*none.json', 'coco_ap', tmp_path / 'none.json', found)
    truth = json.loads(annotations.read_text())
    truth['images'][0]['id'] = 2
    annotations.write_text(json.dumps(truth))
    refuses('does not belong to', 'coco_ap', annotations, found)
