"""Every config loads, builds, and fits its name and configs/README.md."""

import importlib.util
import logging
import re
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn

from ws_mm import BCN, WSConv2d
from ws_mm.shapes import build_without_memory

for name in ('mmdet', 'mmseg'):
    pytest.importorskip(f'{name}.registry', exc_type=ImportError)
CONFIGS = Path(__file__).parents[1] / 'configs'
LEAVES = {
    path.relative_to(CONFIGS).as_posix(): path
    for path in sorted(CONFIGS.rglob('*.py'))
    if '_base_' not in path.parts
}
NAME = re.compile(
    r'(?P<model>.+)_(?P<gpus>\d+)xb(?P<images>\d+)-(?P<schedule>[^_]+)'
    r'_(?P<data>[a-z0-9]+)(-(?P<height>\d+)x(?P<width>\d+))?'
)
STEPS = {
    '1x': (12, [8, 11]),
    '2x': (24, [16, 22]),
    '20-23-24e': (24, [20, 23]),
}
ROOTS = {
    'coco': 'data/coco/',
    'voc12aug': 'data/VOCdevkit/VOC2012',
    'nuclei': 'data/dsb2018_nuclei/',
    'stardist': 'data/demo/stardist/',
    'in1k': 'data/imagenet/',
    'cifar10': 'data/cifar10/',
    'cifar10subset': 'data/cifar10_subset/',
    'modelnet40': 'data/modelnet40_ply_hdf5_2048',
    'motions': 'data/photographs/',
    'sthv2': 'data/sthv2/',
    'solids': None,
}
CLASSES = {
    **{'coco': 80, 'voc12aug': 21, 'nuclei': None, 'stardist': None},
    **{'in1k': 1000, 'cifar10': 10, 'cifar10subset': 10},
    **{'modelnet40': 40, 'motions': 8, 'sthv2': 174, 'solids': 14},
}
# Learning rate for 16 images per step.
RATES = {'coco': 0.02, 'voc12aug': 0.007}
# Epochs at which the rate of a classifier falls, by the number of epochs.
FALLS = {90: [30, 60], 100: [30, 60, 90], 200: [100, 150]}
# Metrics in the README and in MMDetection or MMSegmentation, and the factor
# between them.
METRICS = {
    'box': 'coco/bbox_mAP',
    'box AP': 'coco/bbox_mAP',
    'mask AP': 'coco/segm_mAP',
    'mIoU': 'mIoU',
    'top-1': 'accuracy/top1',
    'top-5': 'accuracy/top5',
    'accuracy': 'accuracy',
    'class accuracy': 'class_accuracy',
}
SCALES = {'box': 100, 'box AP': 100, 'mask AP': 100}
# No norm follows these layers, as in the published models. '-all' leaves
# them out.
PLAIN = {
    'rpn_head.rpn_conv',
    'rpn_head.rpn_cls',
    'rpn_head.rpn_reg',
    'roi_head.mask_head.upsample',
    'roi_head.mask_head.conv_logits',
    'decode_head.conv_seg',
}
# Layers in the README; the first class that fits counts.
WORDS = {
    WSConv2d: 'WS',
    nn.modules.conv._ConvNd: 'conv',
    BCN: 'BCN',
    nn.GroupNorm: 'GN',
    nn.BatchNorm2d: 'BN',
    nn.SyncBatchNorm: 'SyncBN',
    nn.modules.batchnorm._NormBase: 'another norm',
    nn.LayerNorm: 'another norm',
}
# Names of pretrained weights, at OpenMMLab and at the BCN authors.
AUTHORS = 'https://www.cs.jhu.edu/~syqiao/BatchChannelNormalization/'
WEIGHTS = {
    'r50': ('resnet50', 'rn50'),
    'r101': ('resnet101', 'rn101'),
    'x50-32x4d': ('resnext50_32x4d', 'rx50'),
    'x101-32x4d': ('resnext101_32x4d', 'none'),
}

every_leaf = pytest.mark.parametrize('leaf', LEAVES)
every_published = pytest.mark.parametrize(
    'leaf',
    [
        leaf
        for leaf in LEAVES
        if not leaf.startswith(('demo/', 'classification/', 'dgcnn/', 'tsm/'))
    ],
)


@cache
def load(leaf: str) -> Config:
    return Config.fromfile(LEAVES[leaf])


def name_parts(leaf: str) -> dict[str, str]:
    match = NAME.fullmatch(LEAVES[leaf].stem)
    assert match, f'{leaf}: not named by the grammar of configs/README.md'
    return match.groupdict()


@cache
def build(leaf: str) -> nn.Module:
    """The leaf's model, at full size on the meta device."""
    cfg = load(leaf)
    if importlib.util.find_spec(cfg.default_scope) is None:
        pytest.skip(f'{cfg.default_scope} is not installed')
    return build_without_memory(cfg.model, cfg.default_scope)


def layers(model: nn.Module) -> dict[str, str]:
    """Every convolution and norm, with its name in the README."""
    found = {
        name: next((w for t, w in WORDS.items() if isinstance(module, t)), '')
        for name, module in model.named_modules()
    }
    return {name: word for name, word in found.items() if word}


def per_component(found: dict[str, str]) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for name, word in found.items():
        component = re.match(r'(roi_head\.)?\w+', name)[0]
        counts.setdefault(component, Counter())[word] += 1
    return counts


def readme_rows(first_column: str) -> list[dict[str, str]]:
    """Rows of all tables of the README with this first column."""
    rows, header = [], None
    for line in (CONFIGS / 'README.md').read_text().splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if not line.startswith('|'):
            header = None
        elif header is None:
            header = cells
        elif header[0] == first_column and set(line) - set('|-'):
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def expand(pattern: str) -> list[str]:
    """Expand braces as a shell does."""
    pieces = re.split(r'\{(.*?)\}', pattern)
    choices = [
        piece.split(',') if odd % 2 else [piece]
        for odd, piece in enumerate(pieces)
    ]
    return [''.join(choice) for choice in product(*choices)]


@cache
def stated_layers() -> dict[str, dict[str, Counter[str]]]:
    stated = {}
    for row in readme_rows('configs'):
        names = expand(row.pop('configs').strip('`'))
        counts = {
            component: Counter(
                {word: int(n) for n, word in re.findall(r'(\d+) (\w+)', cell)}
            )
            for component, cell in row.items()
        }
        for name in names:
            assert name not in stated, f'{name} has two rows'
            stated[name] = {c: count for c, count in counts.items() if count}
    return stated


@cache
def results() -> dict[str, dict[str, str]]:
    rows = {}
    for row in readme_rows('config'):
        match = re.fullmatch(r'\[(.+)\]\((.+)\)', row['config'])
        assert match, f'no link: {row["config"]}'
        assert Path(match[2]).stem == match[1]
        assert match[2] not in rows, f'{match[2]} has two rows'
        rows[match[2]] = row
    return rows


def find(node: Any, key: str) -> list[Any]:
    """All values of this key, at any depth."""
    found = []
    if isinstance(node, dict):
        found = [node[key]] if key in node else []
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            found += find(child, key)
    return found


@every_leaf
def test_dumped_config_equals_the_loaded_one(
    leaf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # yapf takes half a second for the layout of each dump.
    monkeypatch.setattr(
        'yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True)
    )
    cfg = load(leaf)
    again = Config.fromstring(cfg.pretty_text, '.py')
    assert again.to_dict() == cfg.to_dict()


@every_leaf
def test_layers_fit_the_readme(leaf: str) -> None:
    name = name_parts(leaf)['model']
    stated = stated_layers()
    assert name in stated, f'configs/README.md states no layers of {name}'
    assert per_component(layers(build(leaf))) == stated[name]


@pytest.mark.parametrize('leaf', [leaf for leaf in LEAVES if '-all_' in leaf])
def test_all_means_a_norm_after_every_convolution(leaf: str) -> None:
    conv = 'WS' if '-ws-all_' in leaf else 'conv'
    found = layers(build(leaf))
    claimed = {n: word for n, word in found.items() if n not in PLAIN}
    for component, counts in per_component(claimed).items():
        norms = counts.total() - counts[conv]
        assert counts[conv] == norms > 0, component


@every_leaf
def test_batch_fits_the_name(leaf: str) -> None:
    cfg, name = load(leaf), name_parts(leaf)
    images = int(name['images'])
    assert cfg.train_dataloader.batch_size == images
    total = int(name['gpus']) * images
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=total)


@every_published
def test_rate_follows_the_linear_rule(leaf: str) -> None:
    cfg, name = load(leaf), name_parts(leaf)
    total = int(name['gpus']) * int(name['images'])
    rate = RATES[name['data']] * total / 16
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(rate)
    assert cfg.auto_scale_lr.base_batch_size == total


def with_options(leaf: str, *options: str) -> Config:
    """The leaf with options of configs/README.md, parsed as train.py does."""
    text = (CONFIGS / 'README.md').read_text()
    cfg = Config.fromfile(LEAVES[leaf])
    for option in options:
        assert option in text, 'configs/README.md has other options'
        key, value = option.split('=', 1)
        cfg.merge_from_dict({key: DictAction._parse_iterable(value)})
    return cfg


def rate_of_eight_processes(cfg: Config) -> float:
    """The learning rate that mmengine sets with --auto-scale-lr."""
    optimizer = torch.optim.SGD(
        [nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr
    )
    runner = SimpleNamespace(
        world_size=8,
        train_dataloader=cfg.train_dataloader,
        _train_dataloader=cfg.train_dataloader,
        param_schedulers=None,
        logger=logging.getLogger(__name__),
    )
    rule = {**cfg.auto_scale_lr, 'enable': True}
    Runner.scale_lr(runner, OptimWrapper(optimizer), rule)
    return optimizer.param_groups[0]['lr']


@pytest.mark.parametrize('leaf', [leaf for leaf in LEAVES if '_8xb2-' in leaf])
def test_two_options_give_one_image_per_gpu(leaf: str) -> None:
    cfg = with_options(leaf, 'train_dataloader.batch_size=1')
    rate = rate_of_eight_processes(cfg)
    cfg.optim_wrapper.optimizer.lr = rate
    assert rate == pytest.approx(RATES[name_parts(leaf)['data']] / 2)
    one = leaf.replace('_8xb2-', '_8xb1-')
    expected = load(one if one in LEAVES else leaf).to_dict()
    if one not in LEAVES:
        expected['train_dataloader']['batch_size'] = 1
        expected['optim_wrapper']['optimizer']['lr'] = rate
    assert without_figures(cfg.to_dict()) == without_figures(expected)


def test_files_of_one_image_are_compared_with_the_options() -> None:
    ones = [leaf for leaf in LEAVES if '_8xb1-' in leaf]
    assert len(ones) == 5
    for leaf in ones:
        assert leaf.replace('_8xb1-', '_8xb2-') in LEAVES
        assert load(leaf).expected, 'without a published row, use the options'


@pytest.mark.parametrize('backbone', WEIGHTS)
def test_an_option_moves_the_steps(backbone: str) -> None:
    name = f'mask_rcnn/mask-rcnn_{backbone}_fpn_gn-ws-all_8xb2-{{}}_coco.py'
    cfg = with_options(name.format('2x'), 'param_scheduler.1.milestones=20,23')
    moved = load(name.format('20-23-24e')).to_dict()
    assert without_figures(cfg.to_dict()) == without_figures(moved)


def test_options_give_another_depth() -> None:
    name = 'mask_rcnn/mask-rcnn_{}_fpn_gn-ws-all_8xb2-2x_coco.py'
    cfg = with_options(
        name.format('r50'),
        'model.backbone.depth=101',
        'model.backbone.init_cfg.checkpoint=open-mmlab://jhu/resnet101_gn_ws',
    )
    deeper = load(name.format('r101')).to_dict()
    assert without_figures(cfg.to_dict()) == without_figures(deeper)


def without_figures(cfg: dict[str, Any]) -> dict[str, Any]:
    """A config without what only --verify and --auto-scale-lr read."""
    names = 'expected', 'auto_scale_lr'
    return {key: value for key, value in cfg.items() if key not in names}


@every_leaf
def test_schedule_fits_the_name(leaf: str) -> None:
    cfg, schedule = load(leaf), name_parts(leaf)['schedule']
    by_epoch = schedule.endswith(('x', 'e'))
    decays = [s for s in cfg.param_scheduler if s.type != 'LinearLR']
    if schedule in STEPS:
        length, milestones = STEPS[schedule]
        assert [decay.milestones for decay in decays] == [milestones]
    else:
        number, unit = re.fullmatch(r'(\d+)([eik])', schedule).groups()
        length = int(number) * (1000 if unit == 'k' else 1)
    limit = 'max_epochs' if by_epoch else 'max_iters'
    assert cfg.train_cfg[limit] == length
    for decay in decays:
        assert (decay.end, decay.by_epoch) == (length, by_epoch)


@pytest.mark.parametrize(
    'leaf', [leaf for leaf in LEAVES if leaf.startswith('classification/')]
)
def test_classifiers_have_the_schedule_of_their_source(leaf: str) -> None:
    cfg, name = load(leaf), name_parts(leaf)
    (falls,) = cfg.param_scheduler
    assert falls.milestones == FALLS[falls.end]
    assert cfg.optim_wrapper.optimizer.lr == 0.1
    total = int(name['gpus']) * int(name['images'])
    assert cfg.auto_scale_lr.base_batch_size == total
    backbone = cfg.model.backbone
    if name['data'] == 'in1k':
        # The BCN authors have eps inside the root, and begin with blocks
        # that add nothing; the WS authors have neither.
        bcn = backbone.norm_cfg.type == 'ws_mm.BCN'
        assert (backbone.conv_cfg.get('eps_mode') == 'inside') is bcn
        assert backbone.get('zero_init_residual', True) is bcn


@every_leaf
def test_data_fit_the_name(leaf: str) -> None:
    cfg, name = load(leaf), name_parts(leaf)
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        roots = set(find(cfg[loader].dataset, 'data_root'))
        assert roots == {ROOTS[name['data']]} - {None}
    if CLASSES[name['data']]:
        classes = set(find(cfg.model, 'num_classes'))
        assert classes == {CLASSES[name['data']]}
    if name['data'] == 'in1k':
        assert find(cfg.train_dataloader, 'scale') == [224]
    if name['height']:
        size = (int(name['height']), int(name['width']))
        assert cfg.model.data_preprocessor.size == size
        assert set(find(cfg.train_dataloader, 'crop_size')) == {size}


@every_leaf
def test_bcn_estimates_are_averaged_over_the_ranks(leaf: str) -> None:
    cfg, name = load(leaf), name_parts(leaf)['model']
    modes = {
        module.mode
        for module in build(leaf).modules()
        if isinstance(module, BCN)
    }
    named = re.search(r'_bcn(-sync|-batch)?-', name)
    if named:
        words = {'-sync': 'sync_batch', '-batch': 'batch', None: 'estimate'}
        assert modes == {words[named[1]]}
        if hasattr(build(leaf), 'backbone'):
            assert build(leaf).backbone.norm_eval is False
    hooks = find(cfg.get('custom_hooks', []), 'type')
    assert ('ws_mm.SyncEstimatesHook' in hooks) == ('estimate' in modes)


@every_leaf
def test_a_checkpoint_exists_while_the_next_is_written(leaf: str) -> None:
    # mmengine deletes the oldest checkpoint before it writes the next.
    assert load(leaf).default_hooks.checkpoint.max_keep_ckpts >= 2


@every_published
def test_pretrained_weights_fit_the_layers(leaf: str) -> None:
    cfg, model = load(leaf), build(leaf)
    init, pixels = cfg.model.backbone.init_cfg, cfg.model.data_preprocessor
    hub, authors = WEIGHTS[re.search(r'_([rx]\d+(-32x4d)?)', leaf)[1]]
    trained_with = {
        f'{AUTHORS}{authors}_bcn_ws.pth': {'WS', 'BCN'},
        f'open-mmlab://jhu/{hub}_gn_ws': {'WS', 'GN'},
        f'open-mmlab://detectron/{hub}_gn': {'conv', 'GN'},
        f'torchvision://{hub}': {'conv', 'BN'},
    }[init.checkpoint]
    conv, norm = model.backbone.conv1, model.backbone.norm1
    found = set(layers(model.backbone).values())
    if init.type == 'ws_mm.PretrainedGN':
        assert trained_with == {'WS', 'GN'}
        assert found == {'WS', 'BCN'}
        assert norm.outer_affine == 'channel'
    else:
        assert init.type == 'Pretrained'
        assert {word.removeprefix('Sync') for word in found} == trained_with
    if trained_with == {'WS', 'BCN'}:
        assert norm.outer_affine == 'group'
    if 'WS' in trained_with:
        # The authors' code has eps inside for ImageNet, outside for DeepLab.
        inside = 'BCN' in trained_with and cfg.default_scope == 'mmdet'
        assert conv.eps_mode == ('inside' if inside else 'outside')
    # Detectron's weights expect BGR without scaling.
    detectron = trained_with == {'conv', 'GN'}
    bgr = [103.53, 116.28, 123.675]
    assert pixels.bgr_to_rgb is not detectron
    assert pixels.mean == (bgr if detectron else bgr[::-1])
    assert pixels.std == ([1.0] * 3 if detectron else [58.395, 57.12, 57.375])


@every_leaf
def test_expected_figures_fit_the_readme(leaf: str) -> None:
    row, expected = results()[leaf], load(leaf).get('expected')
    if row['published'] == '-':
        # An inherited figure would be of another batch or norm.
        assert expected is None
        comment = LEAVES[leaf].read_text().split('_base_')[0]
        words = comment.replace('\n# ', ' ').lower()
        assert 'no published row' in words
        return
    assert expected.source == row['row it reproduces']
    stated = {}
    for part in row['published'].split(', '):
        value, what = part.split(' ', 1)
        stated[METRICS[what]] = pytest.approx(
            float(value) / SCALES.get(what, 1)
        )
    assert expected.metrics == stated
    tolerances = {'mIoU': 1.0, 'accuracy/top1': 0.5, 'accuracy': 1.0}
    assert expected.tolerance == tolerances.get(next(iter(stated)), 0.005)


def test_readme_lists_every_config() -> None:
    assert set(results()) == set(LEAVES)
    models = {name_parts(leaf)['model'] for leaf in LEAVES}
    assert set(stated_layers()) == models
