"""Change a config as its user does for small data: odd_data.py's.

The new config inherits from the old one and holds what must change: the data
sets, the numbers of classes, small images, three iterations of one image, and
no weights that would have to be downloaded.
"""

import math
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmengine.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from proofs import odd_data
from support import launch
from support.checks import SetupError, iter_datasets, iter_nodes

# Pixels of the shorter side of an image.
SIDE = 96
SIZES = {
    *('scale', 'scales', 'img_scale', 'crop_size', 'size', 'stride'),
    *('random_size_range', 'max_size'),
}


def smaller(value: Any, factor: float) -> Any:
    """Sizes in pixels, scaled to multiples of 32; fractions stay."""
    if isinstance(value, (list, tuple)):
        return type(value)(smaller(item, factor) for item in value)
    if type(value) is int and value > 0:
        return max(32, round(value * factor / 32) * 32)
    return value


def shrink(node: Any, factor: float) -> None:
    """Make the images of pipelines and preprocessors smaller, in place."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in SIZES:
                node[key] = smaller(value, factor)
            else:
                shrink(value, factor)
    elif isinstance(node, (list, tuple)):
        for item in node:
            shrink(item, factor)


def smallest(value: Any) -> float:
    """The smallest of nested numbers of pixels; infinite without any."""
    if isinstance(value, (list, tuple)):
        return min(map(smallest, value), default=math.inf)
    is_size = type(value) is int and value > 0
    return value if is_size else math.inf


def shrink_images(cfg: Config) -> None:
    """Make what the model is trained and tested on small, in place."""
    factors = {}
    for key in ('train_dataloader', 'test_dataloader'):
        sizes = [
            smallest(node[name])
            for node in _dicts(cfg[key])
            for name in SIZES & set(node)
        ]
        factors[key] = min(1.0, SIDE / min(sizes, default=math.inf))
        shrink(cfg[key], factors[key])
    for key in ('data_preprocessor', 'test_cfg'):
        shrink(cfg.model.get(key), factors['train_dataloader'])


def fit_model(node: Any, counts: dict[str, int], classes: int = 0) -> None:
    """Set the numbers of classes and drop downloads, in place.

    Args:
        node: Node of the model's config.
        counts: number of classes by their key.
        classes: Former number of classes of the node's part.
    """
    if isinstance(node, (list, tuple)):
        for item in node:
            fit_model(item, counts, classes)
    if not isinstance(node, dict):
        return
    init = node.get('init_cfg')
    if isinstance(init, dict) and init.get('type') == 'Pretrained':
        node['init_cfg'] = None
    if node.get('pretrained'):
        node['pretrained'] = None
    classes = sum(node.get(key) or 0 for key in counts) or classes
    for key, value in node.items():
        if key in counts and isinstance(value, int) and value > 1:
            node[key] = counts[key]
        elif key == 'class_weight' and isinstance(value, (list, tuple)):
            # One per class and, in some, one of no object at the end.
            count = counts['num_classes']
            node[key] = [*value[:count], *value[classes:]]
        elif key == 'semantic_head':
            # The maps have the background, too.
            count = counts['num_classes'] + 1
            fit_model(value, {**counts, 'num_classes': count}, classes)
        else:
            fit_model(value, counts, classes)


def fit_data(cfg: Config, data: Path) -> None:
    """Let the dataloaders and evaluators read the odd data, in place."""
    panoptic = False
    for key in ('train_dataloader', 'test_dataloader'):
        loader = cfg[key]
        loader.update(batch_size=1, num_workers=0, persistent_workers=False)
        for node in _dicts(loader):
            if 'times' in node:
                node.times = 1
            # Ids of ADE20K begin at 1, and polygons cannot hold run lengths.
            for name, value in (
                ('reduce_zero_label', False),
                ('poly2mask', True),
            ):
                if name in node:
                    node[name] = value
            if node.get('with_seg'):
                # OpenCV would read the colors of a palette.
                node.imdecode_backend = 'pillow'
            if node.get('type') == 'LoadPanopticAnnotations':
                # It needs a package that no registry has.
                panoptic = True
                node.update(
                    type='LoadAnnotations',
                    with_bbox=True,
                    with_mask=True,
                    with_seg=True,
                    imdecode_backend='pillow',
                )
        for _, node in iter_datasets(loader.dataset, key):
            old = dict(node)
            node.clear()
            node.update(data_root=str(data), pipeline=old['pipeline'])
            if cfg.default_scope == 'mmseg':
                node.update(
                    type='BaseSegDataset',
                    data_prefix=dict(img_path='images', seg_map_path='masks'),
                    img_suffix='.png',
                    seg_map_suffix='.png',
                    metainfo=dict(
                        classes=(odd_data.BACKGROUND, *odd_data.THINGS),
                        palette=[list(color) for color in odd_data.PALETTE],
                    ),
                )
                continue
            prefix = dict(img='images')
            if 'seg' in old.get('data_prefix', {}):
                prefix['seg'] = 'masks'
            node.update(
                type='CocoDataset',
                ann_file='instances.json',
                data_prefix=prefix,
                metainfo=dict(classes=odd_data.THINGS),
                # The image without an object takes part.
                filter_cfg=dict(filter_empty_gt=False),
                test_mode=key != 'train_dataloader',
            )
    for node in _dicts(cfg.test_evaluator):
        if 'ann_file' in node:
            node.ann_file = str(data / 'instances.json')
    if panoptic:
        cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    for name in ('dataloader', 'evaluator', 'cfg'):
        cfg[f'val_{name}'] = deepcopy(cfg[f'test_{name}'])
    if cfg.val_cfg:
        cfg.val_cfg.type = 'ValLoop'


def _dicts(node: Any) -> list[Any]:
    """Every dict of a config."""
    return [each for _, each in iter_nodes('', node) if isinstance(each, dict)]


def fit(cfg: Config, data: Path) -> Config:
    """A config as a user changes it for small data of his own."""
    new = deepcopy(cfg)
    shrink_images(new)
    fit_data(new, data)
    things = len(odd_data.THINGS)
    semantic = new.default_scope == 'mmseg'
    fit_model(
        new.model,
        dict(
            num_classes=things + semantic,
            num_things_classes=things,
            num_stuff_classes=1,
        ),
    )
    for node in _dicts(new.model):
        # Masks of 100 objects are most of the time of a test, and a small
        # map has no 900 places for queries.
        for name, most in (('max_per_img', 10), ('num_queries', 100)):
            if name in node:
                node[name] = min(node[name], most)
    new.load_from = None
    # test.py evaluates.
    new.train_cfg.val_begin = 10**6
    if new.train_cfg.get('max_iters'):
        new.train_cfg.max_iters = len(odd_data.OBJECTS)
    else:
        new.train_cfg.max_epochs = 1
    new.default_hooks.logger.interval = 1
    new.randomness = dict(seed=0)
    return new


def difference(old: dict, new: dict) -> dict:
    """Return the settings that turn config ``old`` into ``new``."""
    if set(old) - set(new):
        return dict(new, _delete_=True)
    result = {}
    for key, value in new.items():
        before = old.get(key)
        if key in old and before == value:
            continue
        if isinstance(before, dict) and isinstance(value, dict):
            result[key] = difference(before, value)
        elif key in old and isinstance(value, dict):
            # A dict cannot be merged into what is none.
            result[key] = dict(value, _delete_=True)
        else:
            result[key] = value
    return result


def write_user_config(base: str, path: Path, data: Path) -> None:
    """Write a config on the odd data that inherits from another.

    Args:
        base: name that ``_base_`` gets.
        path: New config.
        data: folder of the data set.

    Raises:
        SetupError: it does not load as what it should be.
    """
    header = f'_base_ = {base!r}\n'
    path.write_text(header)
    cfg = launch.read_config(path)
    new = fit(cfg, data)
    child = difference(cfg._cfg_dict.to_dict(), new._cfg_dict.to_dict())
    path.write_text(header + Config(child).pretty_text)
    loaded = launch.read_config(path)
    for key, value in new._cfg_dict.items():
        if loaded._cfg_dict.get(key) != value:
            raise SetupError(f'{path} loads with another {key} than meant.')
