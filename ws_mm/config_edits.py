"""Write the new layers into a config, with the settings that follow them."""

import contextlib
import copy
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from .config_fit import put
from .config_layers import Cfg, ConfigError, has_same_weights
from .config_parts import Key, Part, iter_dicts, short, spell
from .converted import CONVERTED
from .hooks import MEAN_TEACHER
from .running_statistics import RunningStatistics
from .shapes import WEIGHTS, no_weights

HOOK = dict(type='ws_mm.SyncEstimatesHook')
BASE_KEY: Key = ('auto_scale_lr', 'base_batch_size')
COUNTS_KEY: Key = ('optim_wrapper', 'accumulative_counts')
# That of semi-supervised training has its own, and a ratio of sources in it.
SAMPLER_KEY: Key = ('train_dataloader', 'sampler', 'batch_size')
# Of a scheduler; its other numbers are shares of the optimizer's rate.
ABSOLUTE_RATES = 'eta_min', 'eta_max'


class _Absent:
    """Value of a key that is not there."""

    def __repr__(self) -> str:
        return 'not set'


ABSENT = _Absent()


@dataclass(frozen=True)
class Change:
    """A value of the config that became another.

    Attributes:
        key: path from the top of the config.
        old: value before, or ``ABSENT``.
        new: value now.
        why: reason, or '' for the layers that were asked for.
    """

    key: Key
    old: Any
    new: Any
    why: str = ''

    def __str__(self) -> str:
        why = f'  ({self.why})' if self.why else ''
        return f'{spell(self.key)}: {self.old!r} -> {self.new!r}{why}'


@dataclass(frozen=True)
class LeftAlone:
    """A part of the config that stayed as it was.

    Attributes:
        key: path from the top of the config.
        why: reason.
    """

    key: Key
    why: str

    def __str__(self) -> str:
        return f'{spell(self.key)}: {self.why}'


class Draft:
    """Content of a config, and the report of its changes.

    Args:
        content: plain dicts and lists; they change.
    """

    def __init__(self, content: Cfg) -> None:
        self.content = content
        self.changes: list[Change] = []
        self.left: list[LeftAlone] = []

    def get(self, key: Key) -> Any:
        """Return the value of a key, or ``ABSENT``."""
        node: Any = self.content
        for name in key:
            if node is None or (isinstance(node, dict) and name not in node):
                return ABSENT
            node = node[name]
        return node

    def set(self, key: Key, value: Any, why: str = '') -> None:
        """Set a value and note the change, if it is one."""
        old = self.get(key)
        if old is ABSENT or old != value:
            # Its dicts may change, too.
            old = old if old is ABSENT else copy.deepcopy(old)
            self.changes.append(Change(key, old, copy.deepcopy(value), why))
            put(self.content, key, value)

    def leave(self, key: Key, why: str) -> None:
        """Note what stays as it was."""
        self.left.append(LeftAlone(key, why))


def write_parts(draft: Draft, parts: list[Part]) -> None:
    """Write the layers of parts, and let their norms train."""
    changed = [part for part in parts if not _keeps_weights(part)]
    for part in parts:
        for name, value in part.layers.items():
            reached = name in ('conv_cfg', 'norm_cfg')
            why = '' if reached else 'batch norms that no norm_cfg reaches'
            draft.set((*part.key, name), value, why)
        has_norm = 'norm_cfg' in part.layers
        if part.get('norm_eval') and (has_norm or part in changed):
            draft.set(
                (*part.key, 'norm_eval'),
                False,
                'the new norms are trained'
                if has_norm
                else 'the statistics belong to other convolutions',
            )
    if changed:
        _drop_weights(draft, changed)


def _keeps_weights(part: Part) -> bool:
    """Return whether weights from before mean the same after."""
    return part.layers.get('type') != CONVERTED and all(
        has_same_weights(part.get(name), cfg, part.scope)
        for name, cfg in part.layers.items()
    )


def _drop_weights(draft: Draft, changed: list[Part]) -> None:
    """Remove pretrained weights of changed parts, and freezing at them."""
    why = (
        'for the layers that were replaced; set it again if it is one of the '
        'new layers (tools/model_converters/convert_checkpoint.py makes it)'
    )
    keys = [part.key for part in changed]
    for key, value, _ in [*iter_dicts(draft.content['model'], ('model',))]:
        # A segmentor's own is the checkpoint of its backbone.
        for name in WEIGHTS:
            if value.get(name) and (key in keys or (*key, 'backbone') in keys):
                draft.set((*key, name), no_weights(value[name]), why)
        holds = any(other[: len(key)] == key for other in keys)
        if holds and loads(value.get('init_cfg')):
            draft.set((*key, 'init_cfg'), None, why)
    if draft.content.get('load_from'):
        draft.set(('load_from',), None, why)
    for part in changed:
        norm_cfg: Any = part.get('norm_cfg') or {}
        if (
            norm_cfg.get('requires_grad') is False
            and 'norm_cfg' not in part.layers  # else it was asked for
        ):
            draft.set(
                (*part.key, 'norm_cfg'),
                {**norm_cfg, 'requires_grad': True},
                'without pretrained weights no norm may stay as initialized',
            )
        frozen = part.get('frozen_stages')
        # What freezes nothing is another number in each class.
        default = part.accepts.get('frozen_stages')
        nothing = default if isinstance(default, int) else -1
        if isinstance(frozen, int) and frozen > nothing:
            draft.set(
                (*part.key, 'frozen_stages'),
                nothing,
                'without pretrained weights nothing may stay as initialized',
            )


def loads(init_cfg: Any) -> bool:
    """Return whether an init_cfg reads a checkpoint."""
    if isinstance(init_cfg, (list, tuple)):
        return any(map(loads, init_cfg))
    return isinstance(init_cfg, dict) and bool(init_cfg.get('checkpoint'))


def add_hook(draft: Draft, built: nn.Module) -> None:
    """Set the hooks that estimates need: of processes, of a teacher."""
    hooks = list(draft.content.get('custom_hooks') or ())
    if not any(
        isinstance(module, RunningStatistics) and module.estimating
        for module in built.modules()
    ):
        return
    for number, hook in enumerate(hooks):
        if short(hook.get('type')) == MEAN_TEACHER:
            why = 'the teacher needs the estimates of the student, too'
            draft.set(('custom_hooks', number, 'skip_buffer'), False, why)
    hooks = list(draft.content.get('custom_hooks') or ())
    if 'SyncEstimatesHook' not in [short(hook.get('type')) for hook in hooks]:
        why = 'several processes share their estimates'
        draft.set(('custom_hooks',), [*hooks, HOOK], why)


def note_lr(draft: Draft, filename: str | None) -> None:
    """Note the images that the learning rate is for, if the config says."""
    with contextlib.suppress(ConfigError):
        key, lr, counts = _lr_and_counts(draft)
        if isinstance(lr, (int, float)):
            base = _base_batch_size(draft, filename, lr, counts)
            draft.leave(
                key,
                f'{lr:g} is for {base} images in one step; --images-per-step '
                'N (images_per_step=N) scales it',
            )


def scale_lr(
    draft: Draft, filename: str | None, images: int | None, base: int | None
) -> None:
    """Scale the learning rate by the linear rule.

    Args:
        draft: config to change.
        filename: file of the config, whose name may hold the batch.
        images: images in one step of the optimizer.
        base: images per step that the learning rate is for, if given.
    """
    images = _count('images_per_step', images, '--images-per-step')
    if base is not None:
        base = _count('base_batch_size', base, '--base-batch-size')
    batch_key: Key = ('train_dataloader', 'batch_size')
    batch = draft.get(batch_key)
    lr_key, lr, counts = _lr_and_counts(draft)
    if not isinstance(lr, (int, float)):
        draft.leave(lr_key, 'not there, so the rate cannot be scaled')
        return
    base = base or _base_batch_size(draft, filename, lr, counts)
    if base == images:
        return
    if images % counts:
        raise ConfigError(
            f'images_per_step={images} must be a multiple of {counts}, the '
            f'iterations of one step ({spell(COUNTS_KEY)})'
        )
    why = f'linear rule: {images} images per step instead of {base}'
    draft.set(lr_key, _scaled(lr, images / base), why)
    for key, rate in _absolute_rates(draft):
        draft.set(key, _scaled(rate, images / base), why)
    draft.set(BASE_KEY, images, 'what the learning rate is for')
    at_once = images // counts  # of all processes
    if batch is not ABSENT and batch and at_once % batch:
        if draft.get(SAMPLER_KEY) is not ABSENT:
            raise ConfigError(
                f'images_per_step={images} must be a multiple of '
                f'{batch * counts}: a process has {batch} images, which its '
                f'sampler draws together ({spell(SAMPLER_KEY)})'
            )
        fits = math.gcd(at_once, batch)
        why = f'{at_once} images are {at_once // fits} processes of this many'
        draft.set(batch_key, fits, why)
    share = images / base
    draft.leave(
        ('param_scheduler',),
        f'iterations are as before: each has {share:g} times the images. '
        'Where max_iters, val_interval or a warm-up (end) count iterations, '
        f'multiply them by {1 / share:g}',
    )


def _lr_and_counts(draft: Draft) -> tuple[Key, Any, int]:
    """Return key and value of the rate, and the iterations of one step."""
    key: Key = ('optim_wrapper', 'optimizer', 'lr')
    counts = draft.get(COUNTS_KEY)
    if counts is ABSENT or not counts:
        counts = 1
    counts = _count(spell(COUNTS_KEY), counts, 'in the config')
    return key, draft.get(key), counts


def _scaled(rate: Any, share: float) -> Any:
    """Return a share of a rate, or of each in a list."""
    if isinstance(rate, (list, tuple)):
        return [_scaled(one, share) for one in rate]
    return float(f'{rate * share:.12g}')


def _absolute_rates(draft: Draft) -> list[tuple[Key, Any]]:
    """Return keys and values of rates that schedulers do not take from lr."""
    top: Key = ('param_scheduler',)
    schedulers: Any = draft.content.get('param_scheduler') or ()
    if not isinstance(schedulers, dict):
        places = [
            ((*top, number), one) for number, one in enumerate(schedulers)
        ]
    else:  # one, or those of each of several optimizers
        places = [(top, schedulers)] if 'type' in schedulers else []
    return [
        ((*place, name), scheduler[name])
        for place, scheduler in places
        for name in ABSOLUTE_RATES
        # The others change a momentum.
        if scheduler.get(name) and short(scheduler['type']).endswith('LR')
    ]


def _count(name: str, value: Any, where: str) -> int:
    """Return a count that was given, if it is one."""
    if isinstance(value, int) and value >= 1:
        return value
    raise ConfigError(
        f'{name}={value!r} must be a whole number of at least 1 ({where})'
    )


def _base_batch_size(
    draft: Draft, filename: str | None, lr: float, counts: int
) -> int:
    """Return the images per step that the config says its rate is for."""
    found: dict[str, int] = {}
    says = 'nothing in the config says'
    base = draft.get(BASE_KEY)
    if base is not ABSENT and base:
        base = _count(spell(BASE_KEY), base, 'in the config')
        found[f'{spell(BASE_KEY)}={base}'] = base
    name = os.path.basename(filename or '')
    if named := re.search(r'_(\d+)xb(\d+)', name):
        words = f'its name ({named[0][1:]})'
        images = int(named[1]) * int(named[2])
        # It may or may not count the iterations of a step.
        if counts == 1 or (found and base != images * counts):
            found[words] = images
        elif not found:
            says = f'{words} with {spell(COUNTS_KEY)}={counts} does not say'
    values = set(found.values())
    if len(values) == 1:
        return values.pop()
    if found:
        says = f'{" and ".join(found)} do not agree on'
    raise ConfigError(
        f'{says} how many images per step lr={lr:g} is for: give them, '
        '--base-batch-size N (base_batch_size=N)'
    )
