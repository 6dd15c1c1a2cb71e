"""Convert a config to other convolutions and norms.

The signature of a part's registered class says which layers it accepts. The
changed model, built without memory for its weights, shows what it does with
them: a part keeps plain convolutions if no norm would follow them.
"""

import copy
from collections.abc import Sequence
from typing import Any

from mmengine.config import Config
from torch import nn

from .arguments import first_names
from .checking import check
from .config_backbones import (
    ease_in,
    freeze_norms,
    is_eased,
    kept_backbones,
    outside,
    trained_batch_norms,
)
from .config_edits import (
    Change,
    Draft,
    LeftAlone,
    add_hook,
    note_lr,
    scale_lr,
    write_parts,
)
from .config_fit import (
    check_groups,
    finish,
    fit,
    owners_of,
    prune,
    put,
    settle,
)
from .config_layers import (
    ConfigError,
    Layer,
    asked_layer,
    is_replaceable,
    registered,
)
from .config_parts import (
    Key,
    Part,
    decide,
    is_named,
    iter_dicts,
    read_parts,
    select,
)
from .replacement import BATCH_NORMS
from .running_statistics import RunningStatistics


def apply_norm(
    cfg: Config,
    conv: Layer = 'auto',
    norm: Layer = 'GN',
    parts: Sequence[str] | None = None,
    *,
    images_per_step: int | None = None,
    base_batch_size: int | None = None,
    remaining: bool = False,
    backbone: str = 'auto',
) -> tuple[list[Change], list[LeftAlone]]:
    """Change a config so that its model is made of other layers.

    Every part whose class accepts ``norm_cfg`` gets the norm, and the
    convolution if it accepts ``conv_cfg``, too. A backbone, neck or head
    without norms gets both, since standardized convolutions need a norm; a
    part where some convolution would then have none keeps plain ones. With
    the layers change what no longer fits them: pretrained weights, stages
    frozen at them, frozen statistics, the hooks and, if asked, the learning
    rate.

    Formula, for ``images_per_step``:
        lr = lr * images_per_step / base
        base = base_batch_size, else what the config says:
            auto_scale_lr.base_batch_size, and G * B of a file name with _GxbB
    and so are eta_min and eta_max of the schedulers.

    One step has ``optim_wrapper.accumulative_counts`` iterations. With more
    than one, a file name alone is not enough.

    Args:
        cfg: config; changed in place, or not at all where this raises.
            Applied a second time, nothing changes.
        conv: registered type of a convolution, such as 'WSConv2d', or its
            class; a ``conv_cfg``; 'keep' or None; or 'auto', which is the
            convolution that the norm was published with, for most WSConv2d.
        norm: registered type of a norm, such as 'BCN', 'GN', 'BN' or
            'SyncBN', or its class; a ``norm_cfg``; or 'keep' or None. Without
            ``num_groups``, GN gets the largest count up to 32 that divides
            the channels of all norms of a part.
        parts: 'backbone', 'neck', 'heads' or keys below ``model``, such as
            ``'roi_head.mask_head'``; the whole model if none.
        images_per_step: images of all processes in one step of the
            optimizer.
        base_batch_size: images in one step that the learning rate of the
            config is for.
        remaining: let :class:`~ws_mm.converted.Converted` replace the batch
            norms that no ``norm_cfg`` reaches, on the built model.
        backbone: 'convert' as any other part; 'freeze' to keep its weights
            and layers, with ``norm_eval=True``; or 'auto', which is 'freeze'
            where no parts are named and the backbone loads a checkpoint and
            has batch norms, unless its class takes ``norm_cfg`` and no
            ``norm_eval``. A class without ``norm_eval`` is frozen by
            :class:`~ws_mm.converted.Converted`. 'ease' keeps its weights and
            function, too, and lets :class:`~ws_mm.zoo.EasedBCN` continue its
            batch norms.

    Returns:
        What changed, and what was left alone.

    Raises:
        ConfigError: a layer or part is unknown; or the config does not say
            what its learning rate is for, or twice; or it has no model, or
            one that does not build as it is; or ``remaining`` with
            a norm without running statistics of its own; or ``backbone`` is
            another word, or cannot be, or is among the ``parts``.
    """
    changes, left, _ = convert_config(
        cfg,
        conv,
        norm,
        parts,
        images_per_step=images_per_step,
        base_batch_size=base_batch_size,
        remaining=remaining,
        backbone=backbone,
    )
    return changes, left


def convert_config(
    cfg: Config,
    conv: Layer = 'auto',
    norm: Layer = 'GN',
    parts: Sequence[str] | None = None,
    *,
    images_per_step: int | None = None,
    base_batch_size: int | None = None,
    remaining: bool = False,
    backbone: str = 'auto',
) -> tuple[list[Change], list[LeftAlone], nn.Module]:
    """Do what :func:`apply_norm` does, and return the built model, too.

    Its weights take no memory and have no values.
    """
    if isinstance(parts, str):
        parts = [parts]
    names = parts or ()
    draft = Draft(_plain(cfg._cfg_dict))
    model = draft.content.get('model')
    if not isinstance(model, dict):
        raise ConfigError(
            'the config has no model: it is a part that other configs build '
            'on. Give one that trains'
        )
    scope = draft.content.get('default_scope') or _scope_of(model.get('type'))
    everything = read_parts(copy.deepcopy(model), scope)
    new_norm = asked_layer(norm, 'norm', scope) or {}
    norm_cls = registered(new_norm.get('type'), scope)
    filters = getattr(norm_cls, 'filters', 'WSConv2d')
    new_conv = asked_layer(conv, 'conv', scope, auto=filters)
    if remaining and not issubclass(norm_cls or nn.Module, RunningStatistics):
        raise ConfigError(
            'remaining=True gives batch norms BCN or another norm with '
            f'running statistics of its own; norm={norm!r} is none '
            '(--remaining goes with --norm BCN)'
        )
    selected = select(everything, names)
    kept = kept_backbones(everything, names, backbone)
    selected = outside(selected, kept)
    for part in selected:
        decide(part, new_conv, new_norm or None, is_named(part, names))
    eased = [one for one in kept if backbone == 'ease' or is_eased(one)]
    frozen = [part for part in kept if part not in eased]
    for part in eased:
        ease_in(part)
    selected += eased
    built = settle(everything)
    if fit(everything, built, names):
        built = settle(everything)
    if 'num_groups' in new_norm:
        changed = [part for part in selected if 'norm_cfg' in part.layers]
        check_groups(built, scope, changed)
    prune(selected, built, everything)
    if remaining and finish(
        [part for part in selected if not _holds(part.key, frozen)],
        trained_batch_norms(built, frozen),
        new_norm,
    ):
        built = settle(everything)
    write_parts(draft, selected)
    freeze_norms(draft, frozen)
    _note_parts(draft, selected, built)
    if norm_cls is not None:
        _note_norms(draft, selected, frozen, everything, norm_cls, built)
    add_hook(draft, built)
    if images_per_step is not None or base_batch_size is not None:
        scale_lr(draft, cfg.filename, images_per_step, base_batch_size)
    elif draft.changes:
        note_lr(draft, cfg.filename)
    for change in draft.changes:
        put(cfg._cfg_dict, change.key, change.new)
    return draft.changes, draft.left, built


def _holds(key: Key, parts: list[Part]) -> bool:
    """Return whether one of the parts is at a key, or below it."""
    return any(part.key[: len(key)] == key for part in parts)


def _plain(value: Any) -> Any:
    """Copy to plain dicts. Types of a pure Python config stay classes."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return value


def _scope_of(kind: Any) -> str:
    """The package of a class; pure Python configs have no default_scope."""
    if isinstance(kind, type):
        return kind.__module__.partition('.')[0]
    return 'mmengine'


def _note_parts(draft: Draft, parts: list[Part], built: nn.Module) -> None:
    """Note for each part what stayed as it was, and why."""
    plain = [
        conv.name
        for conv in check(built)
        if not conv.standardized and conv.norms
    ]
    for part in parts:
        for why in dict.fromkeys(part.why):
            draft.leave(part.key, why)
        for name, value in part.value.items():
            if name.endswith('_config') and isinstance(value, str):
                why = f'{value} is a config of its own: convert that'
                draft.leave((*part.key, name), why)
        mine = [name for name in plain if name.startswith(f'{part.name}.')]
        found = part.find(built) is not None
        if mine and found and 'conv_cfg' in part.layers:
            draft.leave(
                part.key,
                f'{len(mine)} convolutions stay plain under their norm, '
                f'since no conv_cfg reaches them: {first_names(mine)}',
            )


def _note_norms(
    draft: Draft,
    parts: list[Part],
    frozen: list[Part],
    everything: list[Part],
    norm: type,
    built: nn.Module,
) -> None:
    """Note the norms that stayed as they were."""
    # Batch norms need more than two images.
    if not issubclass(norm, BATCH_NORMS):
        rest = trained_batch_norms(built, frozen)
        mine = [part.key for part in parts]
        for key, names in owners_of(everything, rest).items():
            if key not in mine:
                continue
            how = '--remaining (remaining=True)'
            if _holds(key, frozen):
                how += " with --backbone convert (backbone='convert')"
            draft.leave(
                key,
                f'{len(names)} batch norms remain, since no norm_cfg reaches '
                f'them ({first_names(names)}): {how} converts them to BCN on '
                'the built model',
            )
    explained = [part.key for part in parts if part.why]
    explained += [part.key for part in frozen]
    model, scope = draft.content['model'], everything[0].scope
    for key, cfg, inner in iter_dicts(model, ('model',), scope):
        if (
            str(key[-1]).endswith(('norm_cfg', 'bn_cfg'))
            and key[:-1] not in explained
            and any(key[: len(part.key)] == part.key for part in parts)
            and is_replaceable(cfg, inner)
            and registered(cfg['type'], inner) is not norm
        ):
            draft.leave(key, f'{cfg["type"]} remains')
