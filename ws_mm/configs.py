"""Give a config the layers of this package: decide what has to change.

What a part of a model accepts is read from the signature of its registered
class. What it does with it is seen by building the changed model without
memory for its weights: a part whose convolutions would be standardized
without a norm behind them keeps plain ones.
"""

import contextlib
import inspect
import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.overrides import TorchFunctionMode

from .conv import WSConv2d
from .norm import BCN
from .surgery import check

Key: TypeAlias = tuple[str | int, ...]
Layer: TypeAlias = str | Mapping[str, Any] | None

# What may be asked for by its short name; 'keep' leaves that kind alone.
CONV_TYPES: dict[str, dict[str, Any]] = {
    'WSConv2d': dict(type='ws_mm.WSConv2d'),
    'keep': {},
}
NORM_TYPES: dict[str, dict[str, Any]] = {
    'BCN': dict(type='ws_mm.BCN'),
    'GN': dict(type='GN', num_groups=32),
    'BN': dict(type='BN'),
    'SyncBN': dict(type='SyncBN'),
    'keep': {},
}
PARTS = ('backbone', 'neck', 'heads')
# Plain, or standardized by the formula of WSConv2d.
REPLACED_CONVS = {None, 'Conv2d', 'Conv', 'ConvWS', 'WSConv2d'}
SAME_FORMULA = {'ConvWS', 'WSConv2d'}
# Norms of maps (N, C, H, W) by channels or groups of them.
REPLACED_NORMS = {
    'BN',
    'BN2d',
    'SyncBN',
    'MMSyncBN',
    'GN',
    'IN',
    'IN2d',
    'BCN',
}
LAYERS: dict[str, Callable[..., nn.Module]] = {
    'ws_mm.WSConv2d': WSConv2d,
    'ws_mm.BCN': BCN,
    'GN': nn.GroupNorm,
    'BN': nn.BatchNorm2d,
    'SyncBN': nn.SyncBatchNorm,
}
NORM_CLASSES = {
    'ws_mm.BCN': {'BCN'},
    'GN': {'GroupNorm'},
    'BN': {'BatchNorm2d', 'BatchNorm1d'},
    'SyncBN': {'SyncBatchNorm'},
}
# Keys below which there is no part of the model.
NO_PARTS = {
    'act_cfg',
    'conv_cfg',
    'data_preprocessor',
    'init_cfg',
    'norm_cfg',
    'test_cfg',
    'train_cfg',
}
# In place, by torch.nn.init or directly.
INITIALIZERS = {
    'constant_',
    'fill_',
    'kaiming_normal_',
    'kaiming_uniform_',
    'normal_',
    'ones_',
    'trunc_normal_',
    'uniform_',
    'xavier_normal_',
    'xavier_uniform_',
    'zero_',
    'zeros_',
}
ALONE = 'each changed part was built alone'
HOOK = dict(type='ws_mm.SyncEstimatesHook')


class ConfigError(ValueError):
    """The config cannot be converted; the message says why."""


class _Absent:
    """The value of a key that is not there."""

    def __repr__(self) -> str:
        return 'not set'


ABSENT = _Absent()


@dataclass(frozen=True)
class Change:
    """A value of the config that became another.

    Attributes:
        key: its path from the top of the config.
        old: value before, or ``ABSENT``.
        new: value now.
        why: the reason, or '' for the layers that were asked for.
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
        key: its path from the top of the config.
        why: the reason.
    """

    key: Key
    why: str

    def __str__(self) -> str:
        return f'{spell(self.key)}: {self.why}'


@dataclass
class _Part:
    """A module of the model that a dict of the config describes."""

    key: Key
    value: dict[str, Any]
    accepts: dict[str, Any]
    role: str
    is_root: bool
    cls: type
    scope: str
    conv: dict[str, Any] | None = None
    norm: dict[str, Any] | None = None
    # 2: convolutions and norms change, 1: norms, 0: nothing.
    most: int = 0
    level: int = 0
    why: list[str] = field(default_factory=list)

    def get(self, name: str) -> Any:
        """A setting, or what the class takes without it."""
        return self.value.get(name, self.accepts.get(name))


def apply_norm(
    cfg: Config,
    conv: Layer = 'WSConv2d',
    norm: Layer = 'BCN',
    parts: Sequence[str] | None = None,
    *,
    images_per_step: int | None = None,
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
        base = auto_scale_lr.base_batch_size, else G * B of a file name with
            _GxbB, else 8 * train_dataloader.batch_size

    Args:
        cfg: the config; changed in place, or not at all where this raises.
            Applied a second time, nothing changes.
        conv: a name of ``CONV_TYPES``, a ``conv_cfg``, or None to keep.
        norm: a name of ``NORM_TYPES``, a ``norm_cfg``, or None to keep.
            Without ``num_groups``, GN gets the largest count up to 32 that
            divides the channels of all norms of a part.
        parts: names of ``PARTS`` or keys below ``model``, such as
            ``'roi_head.mask_head'``; the whole model if none.
        images_per_step: images of all processes in one step of the
            optimizer.

    Returns:
        What changed, and what was left alone.

    Raises:
        ConfigError: a layer or part is unknown; or the config has no model,
            or one that does not build as it is.
    """
    changes, left, _ = convert_config(cfg, conv, norm, parts, images_per_step)
    return changes, left


def convert_config(
    cfg: Config,
    conv: Layer = 'WSConv2d',
    norm: Layer = 'BCN',
    parts: Sequence[str] | None = None,
    images_per_step: int | None = None,
) -> tuple[list[Change], list[LeftAlone], nn.Module]:
    """What :func:`apply_norm` does, and the model that it was judged by.

    The weights of the model take no memory and have no values.
    """
    new_conv = _layer(conv, CONV_TYPES, 'conv')
    new_norm = _layer(norm, NORM_TYPES, 'norm')
    if not isinstance(cfg.get('model'), dict):
        raise ConfigError(
            'the config has no model: it is a part that other configs build '
            'on. Give one that trains'
        )
    content: dict[str, Any] = _plain(cfg._cfg_dict.to_dict())
    scope = content.get('default_scope') or 'mmengine'
    changes: list[Change] = []
    left: list[LeftAlone] = []
    everything = list(_iter_parts(content['model'], ('model',), scope, ''))
    if not everything:
        raise ConfigError(
            f'model.type={content["model"].get("type")!r} is not in the '
            f'registry of {scope} (default_scope). Install or import what '
            'registers it (custom_imports)'
        )
    selected = _select(everything, parts)
    for part in selected:
        _decide(part, new_conv, new_norm)
    if norm == 'GN':
        built = _settle_groups(content['model'], everything, scope)
    else:
        built = _settle(content['model'], everything, scope)
    _prune(selected, built)
    for part in selected:
        _write(content, part, changes)
    changed = {
        part.key: part
        for part in selected
        if part.level and not _same_weights(part)
    }
    if changed:
        _drop_weights(content, changed, changes)
    _note(selected, built, left)
    uses_estimates = any(
        isinstance(module, BCN) and module.mode == 'estimate'
        for module in built.modules()
    )
    hooks = list(content.get('custom_hooks') or ())
    named = {_short(hook.get('type')) for hook in hooks}
    if uses_estimates and 'SyncEstimatesHook' not in named:
        _set(
            content,
            ('custom_hooks',),
            [*hooks, dict(HOOK)],
            changes,
            'several processes share their estimates',
        )
    if images_per_step is not None:
        _scale_lr(content, cfg.filename, images_per_step, changes, left)
    if any(c.key[-1] in ('frozen_stages', 'norm_eval') for c in changes):
        _check_final(content['model'], scope, left)
    for change in changes:
        _put(cfg._cfg_dict, change.key, _plain(change.new))
    return changes, left, built


def _check_final(
    model: dict[str, Any], scope: str, left: list[LeftAlone]
) -> None:
    """See that the changed model still builds with its other settings."""
    if any(one.why.startswith(ALONE) for one in left):
        return
    try:
        build_without_memory(model, scope)
    except Exception as error:
        raise ConfigError(
            'the converted model does not build with the settings that go '
            f'with its layers: {_first_line(error)}'
        ) from error


def spell(key: Key) -> str:
    """A path of keys as in ``--cfg-options``."""
    return '.'.join(map(str, key))


def build_without_memory(model: Mapping[str, Any], scope: str) -> nn.Module:
    """Build a model whose weights take no memory and have no values.

    Pretrained weights are not looked for, and nothing is printed.

    Args:
        model: of a config.
        scope: its ``default_scope``.
    """
    bare = _without_weights(_plain(model))
    with (
        DefaultScope.overwrite_default_scope(scope),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter('ignore')
        try:
            with _WeightsOnMeta():
                return MODELS.build(ConfigDict(_plain(bare)))  # type: ignore[no-any-return]
        except (NotImplementedError, RuntimeError) as error:
            # A constructor that computes with the values of its weights.
            if 'meta' not in str(error):
                raise
            return MODELS.build(ConfigDict(_plain(bare)))  # type: ignore[no-any-return]


class _WeightsOnMeta(TorchFunctionMode):
    """Put what layers allocate on the meta device.

    Other factories stay on the CPU: constructors read numbers from them.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Values that nobody will read: most of the time of a build.
        if (
            getattr(func, '__name__', '') in INITIALIZERS
            and args
            and isinstance(args[0], torch.Tensor)
            and args[0].is_meta
        ):
            return args[0]
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get('device') is None:
            kwargs['device'] = 'meta'
        return func(*args, **kwargs)


def _layer(
    asked: Layer, known: Mapping[str, dict[str, Any]], name: str
) -> dict[str, Any] | None:
    """The cfg of a layer that was asked for; None to keep what is there."""
    if isinstance(asked, str):
        if asked not in known:
            raise ConfigError(
                f'{name}={asked!r} must be one of '
                f'{", ".join(map(repr, known))}, or a dict with a type '
                f'(--{name})'
            )
        return dict(known[asked]) or None
    if asked is None:
        return None
    short = _short(asked.get('type'))
    if known.get(short or '') is None:
        raise ConfigError(
            f'{name}={dict(asked)!r}: its type must be one of '
            f'{", ".join(map(repr, known))} (--{name})'
        )
    layer = {**asked, 'type': known[short or '']['type']}
    options = {
        key: value
        for key, value in asked.items()
        if key not in ('type', 'requires_grad')
    }
    size = options.get('num_groups', 32) if name == 'norm' else 1
    sizes = {'conv': (1, 1, 3), 'norm': (size,)}[name]
    if layer['type'] == 'GN':
        options.setdefault('num_groups', 32)
        options['num_channels'], sizes = size, ()
    try:
        LAYERS[layer['type']](*sizes, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f'{name}={dict(asked)!r}: {error} (--{name}-options)'
        ) from error
    return layer


def _iter_parts(
    value: Any, key: Key, scope: str, role: str
) -> Iterator[_Part]:
    """Every module that the config of a model describes."""
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _iter_parts(item, (*key, index), scope, role)
        return
    if not isinstance(value, dict):
        return
    scope = value.get('_scope_') or scope
    names = [name for name in key if isinstance(name, str)]
    own = _role(names[-1])
    cls = _registered(value.get('type'), scope)
    if cls is not None:
        yield _Part(
            key, value, _arguments(cls), own or role, bool(own), cls, scope
        )
    for name, inner in value.items():
        if name not in NO_PARTS:
            yield from _iter_parts(inner, (*key, name), scope, own or role)


def _role(name: str) -> str:
    """Which of ``PARTS`` a key of a model is, '' if none."""
    if name.endswith('backbone'):
        return 'backbone'
    if name.endswith('neck'):
        return 'neck'
    return 'heads' if name.endswith('head') else ''


def _registered(name: Any, scope: str) -> type | None:
    """The module class of a ``type``; None if it is none, or unknown."""
    if isinstance(name, str):
        with (
            DefaultScope.overwrite_default_scope(scope),
            MODELS.switch_scope_and_registry(None) as registry,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter('ignore')
            try:
                name = registry.get(name)
            # Losses, assigners and optional packages; the build will tell.
            except (ImportError, KeyError, AttributeError, ValueError):
                return None
    if isinstance(name, type) and issubclass(name, nn.Module):
        return name
    return None


def _arguments(cls: type) -> dict[str, Any]:
    """What a class takes by name, with defaults, through ``**kwargs``."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if '__init__' not in vars(base):
            continue
        parameters = inspect.signature(vars(base)['__init__']).parameters
        for name, parameter in parameters.items():
            if parameter.kind in (
                parameter.POSITIONAL_OR_KEYWORD,
                parameter.KEYWORD_ONLY,
            ):
                default = parameter.default
                found.setdefault(
                    name, None if default is parameter.empty else default
                )
        kinds = {parameter.kind for parameter in parameters.values()}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    found.pop('self', None)
    return found


def _select(
    everything: list[_Part], parts: Sequence[str] | None
) -> list[_Part]:
    """The parts of the model that were asked for."""
    if not parts:
        return everything
    selected: list[_Part] = []
    for name in parts:
        path = tuple(name.removeprefix('model.').split('.'))
        found = [
            part
            for part in everything
            if part.role == name
            or tuple(map(str, part.key[1 : len(path) + 1])) == path
        ]
        if not found:
            roles = sorted({part.role for part in everything} - {''})
            keys = [spell(p.key[1:]) for p in everything if p.is_root]
            raise ConfigError(
                f'parts={name!r} selects nothing: the model has '
                f'{", ".join((*roles, *keys)) or "no parts"} (--parts)'
            )
        selected += [part for part in found if part not in selected]
    return selected


def _decide(
    part: _Part, conv: dict[str, Any] | None, norm: dict[str, Any] | None
) -> None:
    """Say what a part could take; its build will say whether it works."""
    is_leaf = part.is_root and not any(
        _role(str(name)) and isinstance(value, (dict, list))
        for name, value in part.value.items()
    )
    old_norm, old_conv = part.get('norm_cfg'), part.get('conv_cfg')
    name = part.cls.__name__
    if 'norm_cfg' not in part.accepts:
        if is_leaf:
            part.why.append(f'{name} takes no norm_cfg')
        return
    norm_type = _short((old_norm or {}).get('type'))
    if old_norm is not None and norm_type not in REPLACED_NORMS:
        part.why.append(
            f'its norm {norm_type} is not one of channels of a map'
        )
        return
    takes_conv = 'conv_cfg' in part.accepts
    conv_type = _short((old_conv or {}).get('type'))
    can_conv = conv is not None and takes_conv
    if can_conv and conv_type not in REPLACED_CONVS:
        can_conv = False
        part.why.append(f'its convolutions stay {conv_type} (conv_cfg)')
    if conv is not None and not takes_conv and old_norm is not None:
        part.why.append(
            f'its convolutions stay plain: {name} takes no conv_cfg'
        )
    if old_norm is None and (not can_conv or not is_leaf or norm is None):
        if is_leaf:
            part.why.append('has no norm that could be replaced')
        return
    if can_conv:
        part.conv = _unless_there(conv, old_conv)
    part.norm = _unless_there(norm, old_norm)
    part.most = part.level = (
        2 if part.conv is not None else 1 if part.norm is not None else 0
    )


def _unless_there(
    new: dict[str, Any] | None, old: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """``new``, or None where the old layer has that type and options."""
    if new is None or old is None:
        return new
    if _short(old.get('type')) == 'ConvWS':
        return new
    asked = {
        key: value
        for key, value in new.items()
        if key != 'type' and (key, value) != ('num_groups', 32)
    }
    if _short(old.get('type')) == _short(new['type']) and all(
        old.get(key) == value for key, value in asked.items()
    ):
        return None
    return new


def _settle(
    model: dict[str, Any], parts: list[_Part], scope: str
) -> nn.Module:
    """Lower the levels until the model builds and every WS conv has a norm."""
    built, problem, wrong = _try(model, parts, scope, set())
    if built is not None:
        return built
    # Mostly it is one part, or those that the names tell.
    for part in _suspects(parts, wrong):
        level, why = part.level, list(part.why)
        _lower(part, problem)
        built, other, left = _try(model, parts, scope, set())
        if built is not None:
            return built
        if wrong and len(left) < len(wrong):
            problem, wrong = other, left
        else:
            part.level, part.why = level, why
    wanted = [part.level for part in parts]
    for part in parts:
        part.level = 0
    known: set[str] = set()
    try:
        built = _build(model, parts, scope)
    # Whatever a constructor may raise.
    except Exception as error:
        problem = _first_line(error)
        if isinstance(error, ImportError) or 'install' in problem:
            for part, level in zip(parts, wanted, strict=True):
                part.level = level
            apart = _settle_apart(model, parts, scope, problem)
            if any(part.level for part in parts):
                return apart
        raise ConfigError(
            f'the model of the config does not build as it is: {problem}'
        ) from error
    known = {conv.name for conv in check(built) if conv.mistake}
    for part, level in zip(parts, wanted, strict=True):
        part.level = level
        while part.level:
            tried, problem, _ = _try(model, parts, scope, known)
            if tried is not None:
                built = tried
                break
            _lower(part, problem)
    return built


def _settle_apart(
    model: dict[str, Any], parts: list[_Part], scope: str, problem: str
) -> nn.Module:
    """Settle each part alone, where a package for another one is missing.

    Returns:
        A model that holds these parts by their names, and nothing else.
    """
    whole = nn.Module()
    changed = [part for part in parts if part.level]
    for part in changed:
        others = [one for one in changed if one is not part]
        if any(part.key[: len(one.key)] == one.key for one in others):
            continue
        group = [
            one for one in changed if one.key[: len(part.key)] == part.key
        ]
        inner = part.scope
        built, why, _ = _try(model, group, inner, set(), part.key)
        for one in group:
            while built is None and one.level:
                _lower(one, why)
                built, why, _ = _try(model, group, inner, set(), part.key)
        if built is None or not any(one.level for one in group):
            continue
        parent = whole
        for name in map(str, part.key[1:-1]):
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(str(part.key[-1]), built)
    parts[0].why.append(
        f'{ALONE}, since the model does not build here: {problem}'
    )
    return whole


def _suspects(parts: list[_Part], wrong: list[str]) -> list[_Part]:
    """Parts that may be to blame for a problem, the likely ones first."""
    changed = [part for part in parts if part.level]
    if not wrong:
        return [part for part in changed if part.level == 2][:3]
    owners = {}
    for name in wrong:
        inside = [
            part
            for part in changed
            if f'{name}.'.startswith(spell(part.key[1:]) + '.')
        ]
        if inside:
            part = max(inside, key=lambda part: len(part.key))
            owners[part.key] = part
    return list(owners.values())


def _lower(part: _Part, problem: str) -> None:
    """Let a part keep its convolutions, or its norms, too."""
    what = 'convolutions' if part.level == 2 else 'norms'
    part.why.append(f'its {what} stay as they are: {problem}')
    part.level -= 1
    # Norms alone are no use where there were none.
    if part.norm is None or part.get('norm_cfg') is None:
        part.level = 0


def _try(
    model: dict[str, Any],
    parts: list[_Part],
    scope: str,
    known: set[str],
    only: Key = ('model',),
) -> tuple[nn.Module | None, str, list[str]]:
    """Build at the parts' levels.

    Returns:
        The model; or None, the reason and the standardized convolutions
        without a norm, other than the ``known`` ones.
    """
    try:
        built = _build(model, parts, scope, only)
    except Exception as error:
        return None, _first_line(error), []
    wrong = [
        conv.name
        for conv in check(built)
        if conv.mistake and conv.name not in known
    ]
    if wrong:
        more = f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''
        return None, f'{wrong[0]}{more} would have no norm after it', wrong
    return built, '', []


def _build(
    model: dict[str, Any],
    parts: list[_Part],
    scope: str,
    only: Key = ('model',),
) -> nn.Module:
    """Build the model, or one part of it, at the parts' levels."""
    changed: Any = {'model': _plain(model)}
    for part in parts:
        for name, value in _settings(part).items():
            _put(changed, (*part.key, name), _plain(value))
    for key in only:
        changed = changed[key]
    return build_without_memory(changed, scope)


def _settings(part: _Part) -> dict[str, dict[str, Any]]:
    """The layers that a part gets at its level."""
    settings = {}
    if part.level == 2 and part.conv is not None:
        settings['conv_cfg'] = part.conv
    if part.level >= 1 and part.norm is not None:
        settings['norm_cfg'] = part.norm
    return settings


def _settle_groups(
    model: dict[str, Any], parts: list[_Part], scope: str
) -> nn.Module:
    """Settle with GN: lower its groups to what fits the channels of a part."""
    asked = [part.norm for part in parts]
    for part in parts:
        # BCN builds whatever the channels are.
        if part.norm is not None:
            part.norm = dict(NORM_TYPES['BCN'])
    built = _settle(model, parts, scope)
    for part, norm in zip(parts, asked, strict=True):
        part.norm = norm
        module = _module_of(built, part)
        if norm is None or module is None:
            continue
        channels = [
            layer.num_channels
            for layer in module.modules()
            if isinstance(layer, BCN)
        ]
        common = math.gcd(*channels)
        groups = next(n for n in range(32, 0, -1) if common % n == 0)
        part.norm = {**norm, 'num_groups': groups}
        if groups < 32 and channels:
            odd = sorted({n for n in channels if n % 32})
            part.why.append(
                f'{groups} groups instead of 32, which do not divide its '
                f'{", ".join(map(str, odd))} channels'
            )
    return _settle(model, parts, scope)


def _prune(parts: list[_Part], built: nn.Module) -> None:
    """Take back settings of parts that build no layer from them."""
    kinds = {
        part.key: _kinds_of(_module_of(built, part))
        for part in parts
        if part.level
    }
    for part in parts:
        found = kinds.get(part.key)
        if not part.level or not found:
            continue
        if part.conv is not None and 'WSConv2d' not in found:
            part.conv = None
            if part.level == 2:
                part.why.append('builds no convolution from conv_cfg')
        if (
            part.norm is not None
            and not found & NORM_CLASSES[part.norm['type']]
        ):
            part.norm = None
        if not _settings(part):
            part.level = 0
            part.why = [
                f'{part.cls.__name__} builds neither a convolution nor a '
                'norm from its settings'
            ]


def _kinds_of(module: nn.Module | None) -> set[str]:
    """Class names of the layers in a module; empty without a module."""
    if module is None:
        return set()
    return {type(one).__name__ for one in module.modules()}


def _module_of(built: nn.Module, part: _Part) -> nn.Module | None:
    """The module of a part, where the model calls it as the config does."""
    try:
        module = built.get_submodule(spell(part.key[1:]))
    except AttributeError:
        return None
    return module if isinstance(module, part.cls) else None


def _write(
    content: dict[str, Any], part: _Part, changes: list[Change]
) -> None:
    """Put a part's layers, and what goes with them, into the config."""
    for name, value in _settings(part).items():
        _set(content, (*part.key, name), dict(value), changes)
    if part.level and part.norm is not None and part.get('norm_eval'):
        _set(
            content,
            (*part.key, 'norm_eval'),
            False,
            changes,
            'the new norms are trained',
        )


def _same_weights(part: _Part) -> bool:
    """Whether weights from before mean the same after."""
    conv = _short((part.get('conv_cfg') or {}).get('type'))
    return 'norm_cfg' not in _settings(part) and (
        'conv_cfg' not in _settings(part) or conv in SAME_FORMULA
    )


def _drop_weights(
    content: dict[str, Any],
    changed: Mapping[Key, _Part],
    changes: list[Change],
) -> None:
    """Take out pretrained weights of what changed, and freezing at them."""
    why = 'of other layers; see tools/convert_checkpoint.py'
    stack: list[tuple[Key, Any]] = [(('model',), content['model'])]
    while stack:
        key, value = stack.pop()
        if isinstance(value, (list, tuple)):
            stack += [((*key, i), item) for i, item in enumerate(value)]
        if not isinstance(value, dict):
            continue
        stack += [((*key, name), item) for name, item in value.items()]
        if not any(other[: len(key)] == key for other in changed):
            continue
        for name in ('pretrained', 'init_cfg'):
            old = value.get(name)
            if old and (name == 'pretrained' or _loads(old)):
                _set(content, (*key, name), None, changes, why)
    if content.get('load_from'):
        _set(content, ('load_from',), None, changes, why)
    for key, part in changed.items():
        frozen = part.get('frozen_stages')
        # What freezes nothing is another number in each class.
        default = part.accepts.get('frozen_stages')
        nothing = default if isinstance(default, int) else -1
        if isinstance(frozen, int) and frozen > nothing:
            _set(
                content,
                (*key, 'frozen_stages'),
                nothing,
                changes,
                'without pretrained weights nothing may stay as initialized',
            )


def _loads(init_cfg: Any) -> bool:
    """Whether an init_cfg reads a checkpoint."""
    if isinstance(init_cfg, (list, tuple)):
        return any(map(_loads, init_cfg))
    return isinstance(init_cfg, dict) and bool(init_cfg.get('checkpoint'))


def _note(parts: list[_Part], built: nn.Module, left: list[LeftAlone]) -> None:
    """Say what stayed as it was, and why."""
    plain = [
        conv.name
        for conv in check(built)
        if not conv.standardized and conv.norms
    ]
    for part in parts:
        left += [LeftAlone(part.key, why) for why in part.why]
        for name, value in part.value.items():
            if name.endswith('_config') and isinstance(value, str):
                left.append(
                    LeftAlone(
                        (*part.key, name),
                        f'{value} is a config of its own: convert that',
                    )
                )
        module = _module_of(built, part)
        if module is None or part.level == 0:
            continue
        prefix = spell(part.key[1:]) + '.'
        mine = [name for name in plain if name.startswith(prefix)]
        if part.level == 2 and part.conv is not None and mine:
            left.append(
                LeftAlone(
                    part.key,
                    f'{len(mine)} convolutions stay plain under their norm, '
                    f'since no conv_cfg reaches them: {", ".join(mine[:3])}'
                    + (', ...' if len(mine) > 3 else ''),
                )
            )
        fewer = sorted(
            {
                (layer.num_channels, layer.num_groups)
                for layer in module.modules()
                if isinstance(layer, BCN)
                and layer.num_groups
                < (part.get('norm_cfg') or {}).get('num_groups', 32)
            }
        )
        if fewer:
            counts = ', '.join(f'{g} for {c} channels' for c, g in fewer)
            left.append(LeftAlone(part.key, f'groups of BCN: {counts}'))


def _scale_lr(
    content: dict[str, Any],
    filename: str | None,
    images_per_step: int,
    changes: list[Change],
    left: list[LeftAlone],
) -> None:
    """Scale the learning rate by the linear rule."""
    if images_per_step < 1:
        raise ConfigError(
            f'images_per_step={images_per_step} must be at least 1 '
            '(--images-per-step)'
        )
    batch = (content.get('train_dataloader') or {}).get('batch_size')
    base = (content.get('auto_scale_lr') or {}).get('base_batch_size')
    named = re.search(r'_(\d+)xb(\d+)', os.path.basename(filename or ''))
    if not base and named:
        base = int(named[1]) * int(named[2])
    base = base or (8 * batch if batch else None)
    optimizer = (content.get('optim_wrapper') or {}).get('optimizer') or {}
    key: Key = ('optim_wrapper', 'optimizer', 'lr')
    if not base or not isinstance(optimizer.get('lr'), (int, float)):
        lacks = key if base else ('auto_scale_lr', 'base_batch_size')
        left.append(
            LeftAlone(
                lacks, 'not there, so the learning rate cannot be scaled'
            )
        )
        return
    if base == images_per_step:
        return
    lr = float(f'{optimizer["lr"] * images_per_step / base:.12g}')
    _set(
        content,
        key,
        lr,
        changes,
        f'linear rule: {images_per_step} images per step instead of {base}',
    )
    _set(
        content,
        ('auto_scale_lr', 'base_batch_size'),
        images_per_step,
        changes,
        'what the learning rate is for',
    )
    if batch and images_per_step % batch:
        fits = math.gcd(images_per_step, batch)
        _set(
            content,
            ('train_dataloader', 'batch_size'),
            fits,
            changes,
            f'{images_per_step} images are {images_per_step // fits} '
            'processes of this many',
        )
    left.append(
        LeftAlone(
            ('param_scheduler',),
            'schedule and absolute rates (eta_min) are as before',
        )
    )


def _set(
    content: dict[str, Any],
    key: Key,
    value: Any,
    changes: list[Change],
    why: str = '',
) -> None:
    """Set a value and note the change, if it is one."""
    node: Any = content
    for name in key:
        if isinstance(node, dict) and name not in node:
            node = ABSENT
            break
        node = node[name]
    if node is not ABSENT and node == value:
        return
    changes.append(Change(key, _plain(node), _plain(value), why))
    _put(content, key, value)


def _put(content: Any, key: Key, value: Any) -> None:
    for name in key[:-1]:
        if isinstance(content, dict) and content.get(name) is None:
            content[name] = {}
        content = content[name]
    content[key[-1]] = value


def _without_weights(value: Any) -> Any:
    """A model's config that names no checkpoint."""
    if isinstance(value, dict):
        return {
            key: None
            if key in ('pretrained', 'init_cfg', 'teacher_ckpt')
            else _without_weights(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_without_weights(item) for item in value]
    return value


def _plain(value: Any) -> Any:
    """A copy of dicts and lists in which nothing is shared."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return value


def _short(name: Any) -> str | None:
    """A type without its scope."""
    if name is None:
        return None
    return getattr(name, '__name__', None) or str(name).rpartition('.')[2]


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    first = ' '.join(text[0].split()) if text else ''
    return f'{type(error).__name__}: {first}'
