"""Look into data sets before a training or an evaluation reads them."""

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.logging import print_log
from torch import nn

from support.checks import SetupError, is_local, iter_datasets

GIVE = 'Give it to each.'
# What MMDetection reads of each entry of an annotation file.
IMAGE_KEYS = ('file_name', 'height', 'width')
ANNOTATION_KEYS = {
    'category_id': 'Give each the id of one of the categories.',
    'bbox': 'Give each a bbox: left, top, width and height in pixels.',
    'area': (
        'MMDetection leaves objects out by it: give each the area of its '
        'mask, or the width times the height of its bbox.'
    ),
}
EVALUATION_KEYS = {
    'iscrowd': (
        'pycocotools asks each for it when it evaluates: give each 0, or 1 '
        'to a crowd.'
    )
}
# Heads whose number of classes is that of the data set. Others count things
# and stuff, foreground alone, or the words of a text.
HEADS = re.compile(r'((roi_head\.)?(bbox|mask)|decode)_head(\.\d+)?|head')


def check_class_lists(cfg: Config) -> None:
    """See that the classes of the data sets are lists of names.

    Raises:
        SetupError: one is a string, whose letters would be the classes.
    """
    for phase in ('train', 'val', 'test'):
        loader = f'{phase}_dataloader'
        dataset = (cfg.get(loader) or {}).get('dataset')
        for key, node in iter_datasets(dataset, f'{loader}.dataset'):
            classes = (node.get('metainfo') or {}).get('classes')
            if isinstance(classes, str) and not os.path.isfile(classes):
                raise SetupError(
                    f'{key}.metainfo.classes = {classes!r} is a string, so '
                    'that each letter would be a class, and no file of that '
                    f"name is there: write ('{classes}',), with the comma."
                )


@contextmanager
def checked_annotations(scope: str | None) -> Iterator[None]:
    """Look into each COCO file that MMDetection loads meanwhile.

    The host reads it once and keeps no categories.

    Args:
        scope: ``default_scope`` of the config.
    """
    if scope != 'mmdet':
        yield
        return
    from mmdet.datasets import CocoDataset

    load, host = CocoDataset.load_data_list, CocoDataset.COCOAPI

    def load_and_check(dataset: Any) -> list[dict]:
        # Of other layouts their own classes know.
        if dataset.COCOAPI is host:
            dataset.COCOAPI = partial(_read_annotations, dataset, host)
        try:
            return load(dataset)
        finally:
            vars(dataset).pop('COCOAPI', None)

    CocoDataset.load_data_list = load_and_check
    try:
        yield
    finally:
        CocoDataset.load_data_list = load


def _read_annotations(dataset: Any, host: Any, path: str) -> Any:
    """Load a file as the host does, then look into it."""
    where = dataset.ann_file
    try:
        coco = host(path)
    except KeyError as error:
        raise SetupError(
            f'{where}: an entry has no {error}, which every image, category '
            'and annotation needs.'
        ) from error
    except AssertionError as error:  # such as a file of results
        raise SetupError(
            f'{where} is no COCO file: {error}. Give one that has a dict of '
            'images, annotations and categories.'
        ) from error
    content = coco.dataset
    images = content.get('images', [])
    annotations = content.get('annotations', [])
    if 'categories' not in content:
        raise SetupError(
            f"{where} has no 'categories'. Add them, each with id and name."
        )
    if not images:
        return coco  # the host says it
    _require(where, 'categories', content['categories'], 'name', GIVE)
    for key in IMAGE_KEYS:
        _require(where, 'images', images, key, GIVE)
    # MMDetection reads no further where an entry is to be ignored.
    read = [entry for entry in annotations if not entry.get('ignore')]
    for key, fix in ANNOTATION_KEYS.items():
        _require(where, 'annotations', read, key, fix)
    _refuse(
        where,
        f'{{}} of {len(read)} annotations have a bbox that is not four '
        'numbers, or an area that is not a number ({}). Write numbers: of a '
        'bbox left, top, width and height in pixels.',
        [entry for entry in read if not _has_numbers(entry)],
    )
    if dataset.test_mode:
        for key, fix in EVALUATION_KEYS.items():
            _require(where, 'annotations', annotations, key, fix)
    _check_categories(where, content['categories'], dataset.metainfo)
    # Of two files of one id, the host loads one, with the objects of both.
    named = {(entry['id'], entry['file_name']) for entry in images}
    _check_ids(where, 'images', (number for number, _ in named))
    if dataset.ANN_ID_UNIQUE:
        numbers = (entry['id'] for entry in annotations)
        _check_ids(where, 'annotations', numbers)
    _check_objects(dataset, content['categories'], images, annotations)
    return coco


def _require(
    where: str, what: str, entries: list[dict], key: str, fix: str
) -> None:
    _refuse(
        where,
        f'{{}} of {len(entries)} {what} have no {key!r} ({{}}). {fix}',
        [entry for entry in entries if entry.get(key) in (None, [])],
    )


def _has_numbers(entry: dict) -> bool:
    """Return whether bbox and area are of numbers."""
    box = entry['bbox']
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(one, (int, float)) for one in (*box, entry['area']))
    )


def _refuse(where: str, message: str, entries: list[dict]) -> None:
    """Reject entries, if there are any; the message takes count and ids."""
    if entries:
        ids = ', '.join(str(entry.get('id')) for entry in entries[:3])
        more = ', ...' if len(entries) > 3 else ''
        said = message.format(len(entries), f'id {ids}{more}')
        raise SetupError(f'{where}: {said}')


def _check_ids(where: str, what: str, numbers: Iterable[Any]) -> None:
    counts = Counter(numbers)
    _refuse(
        where,
        f'{{}} ids of {what} are there several times ({{}}). Number the '
        f'{what} anew.',
        [dict(id=number) for number, count in counts.items() if count > 1],
    )


def _check_categories(
    where: str, categories: list[dict], metainfo: dict
) -> None:
    """Compare the names of the file with those of the data set.

    Labels count the categories of the file that are among the classes, in
    the order of the file.
    """
    names = [category['name'] for category in categories]
    classes = list(metainfo.get('classes') or ())
    found = [name for name in names if name in classes]
    there = f'the file has {_short(names)}'
    fix = (
        f'Set metainfo=dict(classes={tuple(names[:10])}'
        f'{" and so on" if len(names) > 10 else ""}) in the data sets and '
        'num_classes in the heads.'
    )
    if not found:
        raise SetupError(
            f'{where}: no category is among metainfo.classes = '
            f'{_short(classes)}; {there}. {fix}'
        )
    lacking = [name for name in classes if name not in names]
    if lacking:
        raise SetupError(
            f'{where}: {_short(lacking)} of metainfo.classes is no category '
            f'of the file, so that labels would count without it; {there}. '
            f'Fix the name, add the category to the file, or: {fix}'
        )
    if found != classes:
        print_log(
            f'{where}: its categories are in another order than '
            f'metainfo.classes, and labels have that of the file: '
            f'{_short(found)}. Names in logs and pictures will be wrong, and '
            'all numbers where two files differ. Write the classes in that '
            'order.',
            'current',
            logging.WARNING,
        )


def _check_objects(
    dataset: Any,
    categories: list[dict],
    images: list[dict],
    annotations: list[dict],
) -> None:
    """See that there is something to learn, and a mask where one is read."""
    where = dataset.ann_file
    ids = {
        category['id']
        for category in categories
        if category['name'] in dataset.metainfo['classes']
    }
    listed = {image['id'] for image in images}
    placed = [entry for entry in annotations if entry['image_id'] in listed]
    boxed = [
        entry
        for entry in placed
        if not entry.get('ignore') and entry['category_id'] in ids
    ]
    sized = [
        entry
        for entry in boxed
        if entry['area'] > 0 and min(entry['bbox'][2:]) >= 1
    ]
    objects = [entry for entry in sized if not entry.get('iscrowd')]
    steps = getattr(dataset.pipeline, 'transforms', ())
    # Images without labels have a loader of another name.
    reads = any(type(step).__name__ == 'LoadAnnotations' for step in steps)
    if reads and not dataset.test_mode and not objects:
        number = images[0]['id']
        raise SetupError(
            f'{where} has no object to train on. It has {len(annotations)} '
            f'annotations: {len(annotations) - len(placed)} with an image_id '
            f'that no image has (the first has id {number!r}), '
            f'{len(placed) - len(boxed)} of no class of metainfo.classes or '
            f'to be ignored, {len(boxed) - len(sized)} without an area, '
            f'{len(sized)} crowds (iscrowd=1), which training leaves out.'
        )
    if any(getattr(step, 'with_mask', False) for step in steps):
        _refuse(
            where,
            f'{{}} of {len(annotations)} annotations have no '
            "polygon and no RLE in 'segmentation' ({}), and the pipeline "
            'reads masks (LoadAnnotations.with_mask). Remove them, give them '
            'one, or train boxes alone, without masks in model and pipeline.',
            [entry for entry in sized if not entry.get('segmentation')],
        )


def _short(names: list) -> str:
    """A list of names, cut after ten."""
    more = f' and {len(names) - 10} more' if len(names) > 10 else ''
    return ', '.join(map(repr, names[:10])) + more


def innermost(dataset: Any) -> Iterator[Any]:
    """The built data sets within the host's wrappers."""
    inner = getattr(dataset, 'datasets', None) or [
        getattr(dataset, 'dataset', None)
    ]
    for each in inner:
        if each is None:
            yield dataset
        else:
            yield from innermost(each)


def check_samples(loader: str, dataset: Any) -> None:
    """See that the first sample of each data set is there, and its labels.

    Args:
        loader: key of the dataloader.
        dataset: as it was built.

    Raises:
        SetupError: it is not, or its label map is none of class indices.
    """
    for each in innermost(dataset):
        if not hasattr(each, 'get_data_info') or not len(each):
            continue
        info = each.get_data_info(0)
        steps = getattr(getattr(each, 'pipeline', None), 'transforms', ())
        loads = [
            step
            for step in steps
            if hasattr(step, '_load_seg_map')
            and getattr(step, 'with_seg', True)
        ]
        names = {'img_path': 'img_suffix'}
        if loads:
            names['seg_map_path'] = 'seg_map_suffix'
        for name, suffix in names.items():
            path = info.get(name)
            if (
                isinstance(path, str)
                and is_local(path)
                and getattr(each, 'backend_args', None) is None
                and not os.path.exists(path)
            ):
                raise SetupError(
                    f'{loader}: there is no {path}, the first file that the '
                    'data set names. '
                    + _another_suffix(path, suffix, getattr(each, suffix, ''))
                )
        if info.get('seg_map_path') and hasattr(each, 'label_map'):
            for step in loads:
                _check_labels(info, step, each)


def _another_suffix(path: str, key: str, suffix: str) -> str:
    """Return a hint that fixes the name of a missing file."""
    stem = Path(path.removesuffix(suffix))
    there = suffix and sorted(stem.parent.glob(f'{glob.escape(stem.name)}*'))
    if not there:
        return 'Fix data_root or data_prefix, or fetch it.'
    ending = there[0].name.removeprefix(stem.name)
    return (
        f'But there is {there[0]}: set {key}={ending!r} in place of '
        f'{suffix!r}.'
    )


def suffixes_there(dataset: dict) -> str:
    """List the suffixes of files that ``img_suffix`` does not match.

    Returns:
        The end of a message; '' where this is no data set of folders.
    """
    prefix = (dataset.get('data_prefix') or {}).get('img_path')
    if prefix is None or dataset.get('ann_file'):
        return ''
    folder = Path(dataset.get('data_root') or '', prefix)
    found = Counter(path.suffix for path in folder.rglob('*') if path.suffix)
    if not found:
        return f' {folder} holds no files.'
    wanted = dataset.get('img_suffix')
    listed = ', '.join(f'{n} {name}' for name, n in found.most_common(3))
    return (
        f' img_suffix is {repr(wanted) if wanted else "that of the type"}, '
        f'and {folder} holds {listed} files: set '
        f'img_suffix={found.most_common(1)[0][0]!r}.'
    )


def _check_labels(info: dict, load: Any, dataset: Any) -> None:
    """See that a label map holds class indices, read as the host reads it."""
    path, classes = info['seg_map_path'], dataset.metainfo.get('classes') or ()
    read = {**info, 'seg_fields': []}
    try:
        load._load_seg_map(read)
    except Exception:
        return  # the host says it
    labels = read['gt_seg_map']
    if labels.ndim != 2:
        raise SetupError(
            f'{path} has {labels.shape[-1]} channels: a label map has one, '
            'of class indices. Colours are to be translated into indices '
            'first.'
        )
    legal = {*range(len(classes)), 255, dataset.ignore_index}
    found = set(np.unique(labels).tolist())
    if found == {0, 255}:
        print_log(
            f'{path} holds the labels 0 and 255 alone, and 255 counts for '
            'nothing: where it means an object, write the index of its class.',
            'current',
            logging.WARNING,
        )
    wrong = sorted(found - legal)
    if classes and wrong:
        raise SetupError(
            f'{path} holds the label {wrong[0]}, and metainfo.classes names '
            f'{len(classes)} classes: legal are 0 to {len(classes) - 1}, and '
            '255 where nothing counts. Fix the file or the classes'
            + (
                '.'
                if dataset.reduce_zero_label
                else '; reduce_zero_label=True is for labels from 1 on.'
            )
        )


def check_num_classes(loader: str, dataset: Any, model: nn.Module) -> None:
    """Compare the number of classes of heads and data.

    Args:
        loader: key of the dataloader.
        dataset: as it was built.
        model: the network alone.

    Raises:
        SetupError: a head has another number.
    """
    meta = getattr(dataset, 'metainfo', None) or {}
    # Of panoptic data, stuff is the business of other heads.
    classes = meta.get('thing_classes') or meta.get('classes')
    if not classes or isinstance(classes, str):
        return
    if hasattr(model, 'language_model') or hasattr(model, 'text_encoder'):
        return  # its heads score words
    for name, part in model.named_modules():
        count = getattr(part, 'num_classes', None)
        if (
            HEADS.fullmatch(name)
            and isinstance(count, int)
            and count != len(classes)
        ):
            raise SetupError(
                f'model.{name}.num_classes = {count}, but {loader} has '
                f'{len(classes)} classes: {_short(list(classes))}. Set '
                f'model.{name}.num_classes={len(classes)}, or '
                f'metainfo.classes of the data set.'
            )
