"""A grid of experiments: one file that says which runs there are.

A grid file is an mmengine config with

    tasks = dict(NAME=dict(
        config=...,        config of the task, seen from the repository
        images=...,        training images that every run sees
        lr=..., at=...,    learning rate at so many images per step; other
                           batches follow the linear rule
        metric=...,        key of the final metric
        validations=...))  over a run, the last at its end (default: 4)
    cells = [dict(task=..., norm=..., images=..., seeds=[...]), ...]

and in a cell, optionally, lists of values under images, norm, lr_factor
(times the rule's rate), accumulation (steps whose gradients make one update,
counted by the rule), norm_cfg (a dict of changed settings), hooks (beside
those of the task), options (a dict of config keys) and name (what the tables
call the row).
"""

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.norms import apply, parts_of
from mmengine.config import Config
from support.checks import SetupError
from support.options import check_keys

ROOT = Path(__file__).resolve().parents[2]
TASK_KEYS = {'config', 'images', 'lr', 'at', 'metric'}
TASK_OPTIONS = {'validations': 4}
DEFAULTS = {'images': 1, 'lr_factor': 1.0, 'accumulation': 1}
LISTED = ('task', 'norm', *DEFAULTS)
OTHERS = ('norm_cfg', 'hooks', 'options', 'name')
CELL_KEYS = {*LISTED, 'seeds', *OTHERS}
# Added later: records from before them are found, too.
ADDED = {'accumulation': 1, 'hooks': []}
WARM_UP = 0.1  # share of the steps
SAVES = 4  # over a run


@dataclass(frozen=True)
class Cell:
    """One run."""

    task: str
    norm: str
    images: int = 1
    seed: int = 0
    lr_factor: float = 1.0
    accumulation: int = 1
    norm_cfg: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    name: str = ''
    hooks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Name in tables."""
        return self.name or self.norm

    @property
    def key(self) -> str:
        """A file name that tells it from all others."""
        told = {
            name: value
            for name, value in asdict(self).items()
            if name not in ADDED or value != ADDED[name]
        }
        text = json.dumps(told, sort_keys=True)
        words = f'{self.task}_{self.label}_b{self.images}_s{self.seed}'
        safe = ''.join(c if c.isalnum() else '-' for c in words.lower())
        return f'{safe}_{hashlib.sha256(text.encode()).hexdigest()[:8]}'


class GridError(Exception):
    """The grid file is wrong; the message is for its author."""


@dataclass
class Grid:
    """Tasks and the runs over them."""

    path: Path
    tasks: dict[str, dict[str, Any]]
    cells: list[Cell]


def load(path: str | Path) -> Grid:
    """Read a grid file.

    Raises:
        GridError: it is missing or wrong; the message names key and value.
    """
    path = Path(path)
    try:
        raw = Config.fromfile(path)
    except Exception as error:
        raise GridError(f'{path} cannot be read: {error}') from error
    tasks = _plain(raw.get('tasks') or {})
    if not tasks:
        raise GridError(f'{path} has no tasks; {__doc__}')
    for name, task in tasks.items():
        _check_keys(
            f'tasks.{name}', task, {*TASK_KEYS, *TASK_OPTIONS}, TASK_KEYS
        )
        if not (ROOT / task['config']).is_file():
            raise GridError(
                f'tasks.{name}.config={task["config"]!r} is no file'
            )
    cells: dict[str, Cell] = {}
    rows: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for index, entry in enumerate(_plain(raw.get('cells') or [])):
        where = f'cells.{index}'
        _check_keys(where, entry, CELL_KEYS, {'task', 'norm'})
        seeds = entry.get('seeds', [0])
        if not isinstance(seeds, list) or not all(
            isinstance(seed, int) for seed in seeds
        ):
            raise GridError(f'{where}.seeds={seeds!r} must be a list of ints')
        for cell in _expand(entry):
            if cell.task not in tasks:
                raise GridError(
                    f'{where}.task={cell.task!r} is not one of '
                    f'{", ".join(map(repr, tasks))}'
                )
            try:
                parts_of(cell.norm)
            except ValueError as error:
                raise GridError(f'{where}: {error}') from None
            for key in ('images', 'accumulation'):
                value = getattr(cell, key)
                if not isinstance(value, int) or value < 1:
                    raise GridError(
                        f'{where}.{key}={value!r} must be at least 1'
                    )
            if not isinstance(cell.hooks, list) or not all(
                isinstance(hook, dict) and 'type' in hook
                for hook in cell.hooks
            ):
                raise GridError(
                    f'{where}.hooks={cell.hooks!r} must be a list of '
                    'dict(type=..., ...)'
                )
            cells[cell.key] = cell
            row = cell.task, cell.label, cell.images
            row = *row, cell.accumulation, cell.lr_factor
            settings = cell.norm, cell.norm_cfg, cell.options
            if rows.setdefault(row, settings) != settings:
                raise GridError(
                    f'{where}: another cell of tasks.{cell.task} has the name '
                    f'{cell.label!r} and other settings, so that tables would '
                    'mix them. Give one a name: dict(..., name=...)'
                )
    if not cells:
        raise GridError(f'{path} has no cells')
    return Grid(path, tasks, list(cells.values()))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _check_keys(
    where: str, entry: dict, legal: set[str], needed: set[str]
) -> None:
    unknown = sorted(set(entry) - legal)
    if unknown:
        raise GridError(
            f'{where}.{unknown[0]} is unknown: use {", ".join(sorted(legal))}'
        )
    missing = sorted(needed - set(entry))
    if missing:
        raise GridError(f'{where}.{missing[0]} is missing')


def _expand(entry: dict[str, Any]) -> list[Cell]:
    lists = [
        value if isinstance(value, list) else [value]
        for value in (entry.get(key, DEFAULTS.get(key)) for key in LISTED)
    ]
    common = {key: entry[key] for key in OTHERS if key in entry}
    return [
        Cell(**dict(zip(LISTED, values, strict=True)), seed=seed, **common)
        for *values, seed in itertools.product(*lists, entry.get('seeds', [0]))
    ]


def config_of(cell: Cell, task: dict[str, Any]) -> Config:
    """The whole config of a run: equal images, equal schedule rule.

    Raises:
        GridError: the task has no norm_cfg to set, or an option is misspelt.
    """
    cfg = Config.fromfile(ROOT / task['config'])
    if not apply(cfg.model, cell.norm, **cell.norm_cfg):
        raise GridError(
            f'{task["config"]} has no norm_cfg in its model: give it one '
            'wherever experiments shall put theirs'
        )
    task = {**TASK_OPTIONS, **task}
    steps = max(1, round(task['images'] / cell.images))
    cfg.train_dataloader.batch_size = cell.images
    cfg.train_dataloader.sampler = {'type': 'InfiniteSampler'}
    cfg.train_dataloader.pop('batch_sampler', None)
    cfg.train_cfg = {
        'type': 'IterBasedTrainLoop',
        'max_iters': steps,
        'val_interval': -(-steps // task['validations']),
    }
    update = cell.images * cell.accumulation
    cfg.optim_wrapper.optimizer.lr = (
        task['lr'] * update / task['at'] * cell.lr_factor
    )
    cfg.optim_wrapper.accumulative_counts = cell.accumulation
    warm = max(1, round(steps * WARM_UP))
    cfg.param_scheduler = [
        {
            'type': 'LinearLR',
            'start_factor': 0.1,
            'by_epoch': False,
            'begin': 0,
            'end': warm,
        },
        {
            'type': 'CosineAnnealingLR',
            'by_epoch': False,
            'begin': warm,
            'end': steps,
            'T_max': max(1, steps - warm),
        },
    ]
    cfg.randomness = {'seed': cell.seed, 'deterministic': True}
    cfg.default_hooks = {
        **cfg.get('default_hooks', {}),
        'checkpoint': {
            'type': 'CheckpointHook',
            'by_epoch': False,
            'interval': -(-steps // SAVES),
            'max_keep_ckpts': 2,
        },
        'logger': {
            'type': 'LoggerHook',
            'interval': max(1, steps // 100),
            'log_metric_by_epoch': False,
        },
    }
    cfg.log_processor = {
        'type': 'LogProcessor',
        'window_size': max(1, steps // 100),
        'by_epoch': False,
    }
    cfg.custom_imports = {
        'imports': [
            *(cfg.get('custom_imports') or {}).get('imports', []),
            'experiments.hooks',
            'experiments.update_rate',
            'experiments.variants',
        ],
        'allow_failed_imports': False,
    }
    cfg.custom_hooks = [
        *(cfg.get('custom_hooks') or []),
        *cell.hooks,
        {'type': 'StopWhenDiverged'},
    ]
    try:
        check_keys(cfg, cell.options, cell.options)
    except SetupError as error:
        raise GridError(f'options of {cell.label!r}: {error}') from error
    cfg.merge_from_dict(cell.options)
    return cfg
