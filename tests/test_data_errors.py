"""Errors in data sets: one clear message, before a run."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from in_process import Script, load, tools  # noqa: F401
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner
from tiny_runs import SEG, write_config, write_data

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')


def test_data_that_is_not_there(refuses: Script, config: Path) -> None:
    nested = (
        'wrapped = dict(type="RepeatDataset", times=2, dataset=dict('
        'type="ConcatDataset", datasets=[dataset, dict(type="CocoDataset", '
        'data_root="no/coco", backend_args=dict(backend="local")), '
        'dict(type="CustomDataset", data_prefix="no/images")]))\n'
        'train_dataloader = dict(dataset=wrapped)\n'
        'test_dataloader["dataset"].update(ann_file="other.json")\n'
        'test_evaluator.update(ann_file="no/eval.json")\n'
    )
    config.write_text(config.read_text() + nested)
    folder = os.path.abspath('no/coco')
    refuses(
        r'train_dataloader\.dataset\.dataset\.datasets\.1\.data_root = '
        rf"'no/coco': no folder {folder}\n.*datasets\.2\.data_prefix = "
        rf"'no/images': nothing at {os.path.abspath('no/images')}\n(.*\n)*.*"
        r'python tools/dataset_converters/coco\.py -h$',
        *('train', config),
    )
    weights = config.parent / 'w.pth'
    torch.save({'state_dict': {'a': torch.ones(1)}}, weights)
    refuses(
        r"test_dataloader\.dataset\.ann_file = 'other\.json': nothing at "
        rf'{config.parent}/other\.json\n  test_evaluator\.ann_file = '
        r"'no/eval\.json'",
        *('test', config, weights),
    )


def test_converter_is_known_by_capitals_too(
    refuses: Script, tmp_path: Path
) -> None:
    config = write_config(
        write_data(tmp_path / 'VOC2012'),
        SEG,
        'dataset.update(data_prefix=dict(img_path="JPEGImages"))\n'
        'train_dataloader = dict(dataset=dataset)\n',
    )
    refuses(
        r'data_prefix\.img_path = .JPEGImages.: nothing at '
        r'(.*\n)*.*dataset_converters/voc12_aug\.py -h$',
        *('train', config),
    )


def test_data_elsewhere_is_not_looked_for(config: Path) -> None:
    remote = [
        dict(data_root='s3://bucket/coco', ann_file='a.json'),
        dict(data_root='/no/such', backend_args=dict(backend='petrel')),
        dict(ann_file='http://host/a.json', data_prefix=dict(img='s3://b/i')),
    ]
    cfg = Config(dict(train_dataloader=dict(dataset=dict(datasets=remote))))
    load('checks').check_data(cfg, ('train_dataloader', 'val_dataloader'))


def test_data_that_mmpretrain_downloads_is_not_looked_for() -> None:
    checks = load('checks')
    datasets = pytest.importorskip('mmpretrain.datasets')
    for kind in ('CIFAR10', 'mmpretrain.MNIST', datasets.FashionMNIST):
        dataset = ConfigDict(type=kind, data_root='no/data')
        cfg = Config(dict(train_dataloader=dict(dataset=dataset)))
        checks.check_data(cfg, ('train_dataloader',))
        cfg.train_dataloader.dataset.download = False
        with pytest.raises(checks.SetupError, match='no folder'):
            checks.check_data(cfg, ('train_dataloader',))


def test_validation_data_is_looked_for(refuses: Script, config: Path) -> None:
    with config.open('a') as file:
        file.write(
            'val_cfg = dict(type="ValLoop")\n'
            'val_evaluator = dict(test_evaluator)\n'
            'val_dataloader = dict(test_dataloader, dataset=dict(\n'
            '    test_dataloader["dataset"], ann_file="val.json"))\n'
        )
    refuses(
        r"val_dataloader\.dataset\.ann_file = 'val\.json'", 'train', config
    )
    empty = dict(images=[], annotations=[], categories=[])
    (config.parent / 'val.json').write_text(json.dumps(empty))
    refuses(
        r'No images for val_dataloader: val_dataloader\.dataset\.ann_file = '
        rf'{config.parent}/val\.json\.',
        *('train', config, '--work-dir', config.parent / 'work'),
    )


@pytest.mark.parametrize(
    ('content', 'match'),
    [
        (
            dict(images=[], annotations=[], categories=[]),
            r'No images for train_dataloader: .*instances\.json',
        ),
        (
            dict(
                images=[dict(id=1, file_name='a', width=9, height=9)],
                annotations=[],
                categories=[dict(id=1, name='square')],
            ),
            r'instances\.json has no object to train on\. It has 0 annot',
        ),
        (dict(categories=[]), 'Either the file lists none'),
        ('{"images": [', 'is not valid JSON'),
    ],
    ids=['no images', 'no objects', 'not COCO', 'truncated'],
)
def test_unusable_annotations(
    refuses: Script,
    config: Path,
    content: dict | str,
    match: str,
    tmp_path: Path,
) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (config.parent / 'instances.json').write_text(text)
    work = ('--work-dir', tmp_path / 'work')
    refuses(match, 'train', config, *work)


@pytest.fixture
def data_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Require the error of loading a config's data, None for no error.

    The model is no real one, which saves its seconds.
    """
    # Seconds of asking the compilers for their versions.
    monkeypatch.setattr(Runner, '_log_env', lambda *_: None)

    def run(match: str | None, config: Path, phase: str = 'train') -> None:
        launch = load('launch')
        cfg = Config.fromfile(config)
        cfg.update(
            work_dir=str(tmp_path), model=dict(type='torch.nn.Identity')
        )
        # The default one is that of any run of the same second.
        cfg.experiment_name = tmp_path.name
        runner = Runner.from_cfg(cfg)
        if match is None:
            launch.build_loops(runner, (phase,))
            return
        with pytest.raises(launch.SetupError, match=match):
            launch.build_loops(runner, (phase,))

    return run


def change(data: Path, **keys: object) -> None:
    """Set keys of every annotation, or delete them where they are None."""
    path = data / 'instances.json'
    content = json.loads(path.read_text())
    for entry in content['annotations']:
        entry |= keys
        for key in keys:
            if keys[key] is None:
                del entry[key]
    path.write_text(json.dumps(content))


CLASSES = "train_dataloader['dataset'].update(metainfo=dict(classes={}))\n"


@pytest.mark.parametrize(
    ('keys', 'extra', 'match'),
    [
        (
            dict(area=None),
            '',
            r"2 of 2 annotations have no 'area' \(id 1, 2\)",
        ),
        (dict(bbox=[]), '', r"2 of 2 annotations have no 'bbox' \(id 1, 2\)"),
        (
            dict(segmentation=[]),
            '',
            r"2 of 2 annotations have no polygon and no RLE in 'segmentation' "
            r'\(id 1, 2\).*Remove them',
        ),
        (
            dict(bbox=[1, 2, 3]),
            '',
            r'2 of 2 annotations have a bbox that is not four .*\(id 1, 2\)',
        ),
        # As json.dumps(default=str) writes numbers of NumPy.
        (dict(area='9'), '', r'or an area that is not a number \(id 1, 2\)'),
        (dict(id=7), '', r'1 ids of annotations are there several .*id 7'),
        (
            dict(image_id='0'),
            '',
            r'2 with an image_id that no image has \(the first has id 0\)',
        ),
        (
            dict(iscrowd=1),
            '',
            r'no object to train on\. It has 2 annotations: .*0 of no class .*'
            r' 2 crowds \(iscrowd=1\)',
        ),
        (dict(area=0), '', r'0 of no class .* 2 without an area, 0 crowds'),
        (
            {},
            CLASSES.format("('sqare',)"),
            r"no category is among metainfo\.classes = 'sqare'; the file has "
            r"'square'\. Set metainfo=dict\(classes=\('square',\)\)",
        ),
        (
            {},
            CLASSES.format("('circle', 'square')"),
            r"'circle' of metainfo\.classes is no category of the file",
        ),
        (
            {},
            "dataset['data_prefix'] = dict(img='masks/..')\n",
            r'there is no .*masks/\.\./0\.png, the first file .* data_prefix',
        ),
    ],
)
def test_annotations_that_cannot_be_trained_on(
    data_refused: Callable[..., None],
    config: Path,
    keys: dict,
    extra: str,
    match: str,
) -> None:
    change(config.parent, **keys)
    config.write_text(config.read_text() + extra)
    data_refused(match, config)


IMAGE = dict(id=1, file_name='a.png', width=9, height=9)


@pytest.mark.parametrize(
    ('content', 'match'),
    [
        (
            [dict(image_id=1, category_id=1, bbox=[1, 2, 3, 4], score=0.5)],
            r'instances\.json is no COCO file: .*list.*images, annotations',
        ),
        (dict(images=[IMAGE]), r"json has no 'categories'\. Add them"),
        (
            dict(images=[IMAGE], categories=[dict(id=1)]),
            r"json: 1 of 1 categories have no 'name' \(id 1\)",
        ),
        (
            dict(
                images=[IMAGE, IMAGE | dict(file_name='b.png')],
                categories=[dict(id=1, name='square')],
            ),
            r'json: 1 ids of images are there several times \(id 1\)',
        ),
    ],
    ids=['results', 'no categories', 'no names', 'images of one id'],
)
def test_a_file_that_the_host_cannot_read(
    data_refused: Callable[..., None],
    config: Path,
    content: dict | list,
    match: str,
) -> None:
    (config.parent / 'instances.json').write_text(json.dumps(content))
    data_refused(match, config)


def test_masks_that_no_step_loads_are_not_looked_for(
    data_refused: Callable[..., None], config: Path
) -> None:
    extra = "dataset['data_prefix'] |= dict(seg='nowhere')\n"
    config.write_text(config.read_text() + extra)
    data_refused(None, config)


def test_braces_in_the_name_of_a_folder(
    data_refused: Callable[..., None], tmp_path: Path
) -> None:
    data = write_data(tmp_path / '{0} {a}')
    change(data, area=None)
    data_refused(r"/\{0\} \{a\}/.* 2 of 2 .* no 'area'", write_config(data))


def test_an_evaluation_asks_for_more(
    data_refused: Callable[..., None], config: Path
) -> None:
    change(config.parent, iscrowd=None)
    data_refused(
        r"2 of 2 annotations have no 'iscrowd' \(id 1, 2\)\. pycocotools",
        *(config, 'test'),
    )
    # Nothing to find is no error.
    change(config.parent, iscrowd=1)
    data_refused(None, config, 'test')


def test_classes_of_a_head_and_of_the_data_differ(
    refuses: Script, config: Path, tmp_path: Path
) -> None:
    work = ('--work-dir', tmp_path / 'work', '--cfg-options')
    refuses(
        r"train_dataloader\.dataset\.metainfo\.classes = 'square' is a "
        r"string, .*write \('square',\), with the comma",
        *('train', config, *work),
        'train_dataloader.dataset.metainfo.classes=square',
    )
    refuses(
        r'model\.roi_head\.bbox_head\.num_classes = 80, but '
        r'train_dataloader has 1 classes: .*num_classes=1, or meta',
        *('train', config, *work, 'model.roi_head.bbox_head.num_classes=80'),
    )
    config = write_config(config.parent, SEG)
    refuses(
        r'model\.decode_head\.num_classes = 19, but train_dataloader has '
        r"2 classes: 'back', 'square'",
        *('train', config, *work, 'model.decode_head.num_classes=19'),
    )


def test_a_file_of_class_names_is_good(
    reaches: Callable[..., Config], config: Path
) -> None:
    names = config.with_name('names.txt')
    names.write_text('square')
    config.write_text(config.read_text() + CLASSES.format(repr(str(names))))
    reaches('train', config, '--work-dir', config.parent / 'work')


def test_panoptic_data_is_read_by_its_own_class(tmp_path: Path) -> None:
    datasets = pytest.importorskip('mmdet.datasets')
    part = dict(id=5, category_id=1, bbox=[0, 0, 4, 4], area=16, iscrowd=0)
    content = dict(
        images=[IMAGE],
        annotations=[
            dict(image_id=1, file_name='a.png', segments_info=[part])
        ],
        categories=[dict(id=1, name='square', isthing=1)],
    )
    (tmp_path / 'panoptic.json').write_text(json.dumps(content))
    data_checks = load('data_checks')
    with data_checks.checked_annotations('mmdet'):
        dataset = datasets.CocoPanopticDataset(
            ann_file=str(tmp_path / 'panoptic.json'),
            data_prefix=dict(img='', seg=''),
            metainfo=dict(
                classes=('square', 'sky'),
                thing_classes=('square',),
                stuff_classes=('sky',),
            ),
        )
    assert len(dataset) == 1
    head = torch.nn.Linear(1, 1)
    head.num_classes = 1
    model = torch.nn.ModuleDict(
        {'roi_head': torch.nn.ModuleDict({'bbox_head': head})}
    )
    data_checks.check_num_classes('train_dataloader', dataset, model)
    head.num_classes = 2
    with pytest.raises(data_checks.SetupError, match='num_classes = 2, but'):
        data_checks.check_num_classes('train_dataloader', dataset, model)


def test_annotations_of_images_without_labels_and_of_odd_kinds_are_good(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config.parent / 'instances.json'
    content = json.loads(path.read_text())
    first, second = content['annotations']
    second |= dict(iscrowd=1, segmentation=dict(size=[64, 64], counts=[4096]))
    content['annotations'] += [
        first | dict(id=100, bbox=[1, 1, 0.5, 3], segmentation=[]),
        dict(id=101, image_id=0, category_id=1, ignore=1),
        first | dict(id=102, category_id=9, segmentation=[]),
    ]
    content['categories'] = [
        *[dict(id=9, name='other'), dict(id=1, name='square')],
        dict(id=2, name='disc'),
    ]
    path.write_text(json.dumps(content))
    with config.open('a') as file:
        file.write("train_dataloader['num_workers'] = 0\n")
    seen: list = []

    def train(runner: Runner) -> None:
        seen.extend(runner.train_loop.dataloader)

    monkeypatch.setattr(Runner, 'train', train)
    work = ('--work-dir', str(tmp_path / 'work'))
    monkeypatch.setattr('sys.argv', ['train', str(config), *work])
    load('train').main()
    assert len(seen) == 2
    # The classes in another order than the categories: said, not refused.
    with config.open('a') as file:
        file.write(CLASSES.format("('disc', 'square')"))
        file.write(
            "for head in ('bbox_head', 'mask_head'):\n"
            "    model['roi_head'][head]['num_classes'] = 2\n"
        )
    load('train').main()
    logs = ''.join(p.read_text() for p in (tmp_path / 'work').rglob('*.log'))
    assert (
        "labels have that of the file: 'square', 'disc'. Names in logs" in logs
    )


MASKS = "dataset = train_dataloader['dataset']\ndataset.update({})\n"


@pytest.mark.parametrize(
    ('extra', 'match'),
    [
        (
            MASKS.format("img_suffix='.jpg'"),
            r"No images for train_dataloader: .* img_suffix is '\.jpg', and "
            r"\S+/images holds 2 \.png files: set img_suffix='\.png'",
        ),
        (
            MASKS.format("seg_map_suffix='_labels.png'"),
            r'train_dataloader: there is no \S+/masks/0_labels\.png, .*But '
            r"there is \S+/masks/0\.png: set seg_map_suffix='\.png' in place "
            r"of '_labels\.png'",
        ),
        (
            MASKS.format("img_suffix='.jpg', ann_file='names.txt'"),
            r"there is \S+/0\.png: set img_suffix='\.png' in place of '\.jpg'",
        ),
        (
            MASKS.format(
                "data_prefix=dict(img_path='images', seg_map_path='colours')"
            ),
            r'colours/0\.png has 3 channels: a label map has one',
        ),
        (
            MASKS.format(
                "data_prefix=dict(img_path='images', seg_map_path='gray')"
            ),
            r'gray/0\.png holds the label 40, and metainfo\.classes names 2 '
            r'classes: legal are 0 to 1, and 255 .*; reduce_zero_label=True',
        ),
        (
            MASKS.format(
                "reduce_zero_label=True, data_prefix=dict(img_path='images', "
                "seg_map_path='gray')"
            ),
            r'gray/0\.png holds the label 39, .* Fix the file or the cl\w+\.$',
        ),
        # Without classes, any number may be one.
        (
            MASKS.format(
                "metainfo={}, data_prefix=dict(img_path='images', "
                "seg_map_path='gray')"
            ),
            None,
        ),
        # Gray is what counts for nothing.
        (
            MASKS.format(
                "ignore_index=40, data_prefix=dict(img_path='images', "
                "seg_map_path='gray')"
            ),
            None,
        ),
        (
            MASKS.format("data_prefix=dict(img_path='empty')"),
            r'No images for train_dataloader: .* \S+/empty holds no files\.$',
        ),
        (
            MASKS.format("ann_file='empty.txt'"),
            r'ann_file = \S+/empty\.txt\. Either the file lists none',
        ),
        (
            MASKS.format("type='PascalVOCDataset', ann_file='names.txt'"),
            r'train_dataloader\.dataset\.metainfo: new classes .*is not a sub',
        ),
    ],
)
def test_masks_that_cannot_be_trained_on(
    data_refused: Callable[..., None],
    tmp_path: Path,
    extra: str,
    match: str | None,
) -> None:
    data = write_data(tmp_path / 'data')
    for name, pixels in (
        ('colours', np.zeros((64, 64, 3), np.uint8)),
        ('gray', np.full((64, 64), 40, np.uint8)),
    ):
        (data / name).mkdir()
        for index in range(2):
            cv2.imwrite(str(data / name / f'{index}.png'), pixels)
    (data / 'names.txt').write_text('0\n1\n')
    (data / 'empty.txt').touch()
    (data / 'empty').mkdir()
    data_refused(match, write_config(data, SEG, extra))


@pytest.mark.parametrize('object_label', [1, 255])
def test_masks_of_black_and_white_are_said(
    data_refused: Callable[..., None], tmp_path: Path, object_label: int
) -> None:
    data = write_data(tmp_path / 'data')
    pixels = np.zeros((64, 64), np.uint8)
    pixels[9:] = object_label
    cv2.imwrite(str(data / 'masks' / '0.png'), pixels)
    data_refused(None, write_config(data, SEG))
    logs = ''.join(path.read_text() for path in tmp_path.rglob('*.log'))
    said = 'masks/0.png holds the labels 0 and 255 alone, and 255 counts'
    assert (said in logs) == (object_label == 255)


def test_testing_without_images(
    refuses: Script, config: Path, tmp_path: Path
) -> None:
    empty = dict(images=[], annotations=[], categories=[])
    (config.parent / 'instances.json').write_text(json.dumps(empty))
    weights = {'state_dict': {'backbone.conv1.weight': torch.ones(1)}}
    torch.save(weights, tmp_path / 'w.pth')
    refuses(
        r'No images for test_dataloader: .*instances\.json',
        *('test', config, tmp_path / 'w.pth', '--work-dir', tmp_path / 'work'),
    )


def test_images_that_filter_cfg_left_none_of() -> None:
    launch = load('launch')
    cfg = Config(dict(test_dataloader=dict(dataset=dict(ann_file='a.json'))))
    loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=[]))
    runner = SimpleNamespace(cfg=cfg, _test_loop={}, test_loop=loop)
    with pytest.raises(
        launch.SetupError, match=r'ann_file = a\.json\. Either'
    ):
        launch.build_loops(runner, ('val', 'test'))


def test_what_is_not_understood_stays_as_it_is() -> None:
    launch = load('launch')

    class Runner:
        cfg = Config(dict(test_dataloader=dict(dataset=dict())))
        _test_loop: dict = {}  # noqa: RUF012

        @property
        def test_loop(self) -> None:
            raise ValueError('of a data set')

    with pytest.raises(ValueError, match='^of a data set$'):
        launch.build_loops(Runner(), ('test',))


def test_invalid_json_is_found_below_the_error_of_a_registry() -> None:
    launch = load('launch')

    class Runner:
        cfg = Config(dict(test_dataloader=dict(dataset=dict(ann_file='a.j'))))
        _test_loop: dict = {}  # noqa: RUF012

        @property
        def test_loop(self) -> None:
            # Some registries raise the type again, with a text alone.
            try:
                json.loads('{"images')
            except ValueError as error:
                raise type(error)(f'CocoDataset: {error}')  # noqa: B904

    with pytest.raises(launch.SetupError, match=r'ann_file = a\.j is not val'):
        launch.build_loops(Runner(), ('test',))
