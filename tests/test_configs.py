"""Every shipped config loads, builds, and is what its name and README say."""

import re
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn

from ws_mm import BCN, WSConv2d

HOSTS = {
    name: pytest.importorskip(f'{name}.registry', exc_type=ImportError)
    for name in ('mmdet', 'mmseg')
}
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
}
CLASSES = {'coco': 80, 'voc12aug': 21, 'nuclei': None, 'stardist': None}
# Learning rate at 16 images, for the linear rule.
RATES = {'coco': 0.02, 'voc12aug': 0.007}
# The README's words for metrics, the hosts' names, and percent in both.
METRICS = {
    'box': 'coco/bbox_mAP',
    'box AP': 'coco/bbox_mAP',
    'mask AP': 'coco/segm_mAP',
    'mIoU': 'mIoU',
}
SCALES = {'box': 100, 'box AP': 100, 'mask AP': 100, 'mIoU': 1}
# No norm follows these, in the published models either: what '-all' omits.
PLAIN = {
    'rpn_head.rpn_conv',
    'rpn_head.rpn_cls',
    'rpn_head.rpn_reg',
    'roi_head.mask_head.upsample',
    'roi_head.mask_head.conv_logits',
    'decode_head.conv_seg',
}
# The README's words; the first class that fits, so subclasses come first.
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
# What the hubs and the BCN authors call the weights of each backbone.
AUTHORS = 'https://www.cs.jhu.edu/~syqiao/BatchChannelNormalization/'
WEIGHTS = {
    'r50': ('resnet50', 'rn50'),
    'r101': ('resnet101', 'rn101'),
    'x50-32x4d': ('resnext50_32x4d', 'rx50'),
    'x101-32x4d': ('resnext101_32x4d', 'none'),
}

every_leaf = pytest.mark.parametrize('leaf', LEAVES)
every_published = pytest.mark.parametrize(
    'leaf', [leaf for leaf in LEAVES if not leaf.startswith('demo/')]
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
    host = HOSTS[cfg.default_scope]
    with (
        DefaultScope.overwrite_default_scope(cfg.default_scope),
        torch.device('meta'),
    ):
        return host.MODELS.build(cfg.model)


def layers(model: nn.Module) -> dict[str, str]:
    """Name of every convolution and norm, and the README's word for it."""
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
    """Rows of all the README's tables whose first column is called so."""
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
    """The names that a shell makes of braces."""
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
    """All values under this key, at any depth."""
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
    # yapf takes half a second to lay out each dump, and changes nothing.
    monkeypatch.setattr(
        'yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True)
    )
    cfg = load(leaf)
    again = Config.fromstring(cfg.pretty_text, '.py')
    assert again.to_dict() == cfg.to_dict()


@every_leaf
def test_layers_are_those_the_readme_states(leaf: str) -> None:
    name = name_parts(leaf)['model']
    stated = stated_layers()
    assert name in stated, f'configs/README.md states no layers of {name}'
    assert per_component(layers(build(leaf))) == stated[name]


@pytest.mark.parametrize('leaf', [leaf for leaf in LEAVES if '-all_' in leaf])
def test_all_leaves_nothing_out(leaf: str) -> None:
    conv = 'WS' if '-ws-all_' in leaf else 'conv'
    found = layers(build(leaf))
    claimed = {n: word for n, word in found.items() if n not in PLAIN}
    for component, counts in per_component(claimed).items():
        norms = counts.total() - counts[conv]
        assert counts[conv] == norms > 0, component


@every_leaf
def test_batch_is_that_of_the_name(leaf: str) -> None:
    cfg, name = load(leaf), name_parts(leaf)
    images = int(name['images'])
    assert cfg.train_dataloader.batch_size == images
    if 'auto_scale_lr' in cfg:
        total = int(name['gpus']) * images
        assert cfg.auto_scale_lr.base_batch_size == total
        assert cfg.auto_scale_lr.enable is False


@every_published
def test_rate_follows_the_linear_rule(leaf: str) -> None:
    cfg, name = load(leaf), name_parts(leaf)
    total = int(name['gpus']) * int(name['images'])
    rate = RATES[name['data']] * total / 16
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(rate)
    assert cfg.auto_scale_lr.base_batch_size == total


@every_leaf
def test_schedule_is_that_of_the_name(leaf: str) -> None:
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


@every_leaf
def test_data_are_those_of_the_name(leaf: str) -> None:
    cfg, name = load(leaf), name_parts(leaf)
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        roots = set(find(cfg[loader].dataset, 'data_root'))
        assert roots == {ROOTS[name['data']]}
    if CLASSES[name['data']]:
        classes = set(find(cfg.model, 'num_classes'))
        assert classes == {CLASSES[name['data']]}
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
    named = re.search(r'_bcn(-sync)?-', name)
    if named:
        assert modes == {'sync_batch' if named[1] else 'estimate'}
        assert cfg.model.backbone.norm_eval is False
    hooks = find(cfg.get('custom_hooks', []), 'type')
    assert ('ws_mm.SyncEstimatesHook' in hooks) == ('estimate' in modes)


@every_leaf
def test_a_checkpoint_exists_while_the_next_is_written(leaf: str) -> None:
    # mmengine deletes the oldest one before it writes.
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
        # Of the authors' BCN code, ImageNet has it inside, DeepLab outside.
        inside = 'BCN' in trained_with and cfg.default_scope == 'mmdet'
        assert conv.eps_mode == ('inside' if inside else 'outside')
    # Detectron's weights take BGR and no scaling.
    detectron = trained_with == {'conv', 'GN'}
    bgr = [103.53, 116.28, 123.675]
    assert pixels.bgr_to_rgb is not detectron
    assert pixels.mean == (bgr if detectron else bgr[::-1])
    assert pixels.std == ([1.0] * 3 if detectron else [58.395, 57.12, 57.375])


@every_leaf
def test_expected_figures_are_those_the_readme_states(leaf: str) -> None:
    row, expected = results()[leaf], load(leaf).get('expected')
    if row['published'] == '-':
        # Inherited, a figure would be that of another batch or norm.
        assert expected is None
        comment = LEAVES[leaf].read_text().split('_base_')[0]
        words = comment.replace('\n# ', ' ').lower()
        assert 'no published row' in words
        return
    assert expected.source == row['row it reproduces']
    stated = {}
    for part in row['published'].split(', '):
        value, what = part.split(' ', 1)
        stated[METRICS[what]] = pytest.approx(float(value) / SCALES[what])
    assert expected.metrics == stated
    assert expected.tolerance == (1.0 if 'mIoU' in stated else 0.005)


def test_readme_lists_every_config() -> None:
    assert set(results()) == set(LEAVES)
