"""Layers that ``conv_cfg`` and ``norm_cfg`` name.

A type is looked up in mmengine's registry, so every registered class can be
asked for: a convolution is a subclass of torch's, a norm takes
``num_features`` or ``num_channels``. Both are built small and run on a map.
"""

import contextlib
import difflib
import warnings
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from .arguments import arguments
from .checking import CONVS
from .conv import WSConv2d
from .replacement import standardizes, ws_type
from .running_statistics import RunningStatistics

Cfg: TypeAlias = dict[str, Any]
Layer: TypeAlias = str | type[Any] | Mapping[str, Any] | None

# Those that messages name.
KNOWN = dict(conv=('WSConv2d',), norm=('BCN', 'GN', 'BN', 'SyncBN'))


class ConfigError(ValueError):
    """The config cannot be converted; the message says why."""


def registered(name: Any, scope: str) -> type[nn.Module] | None:
    """Return the module class of a ``type``, None for anything else."""
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


def map_layer(cfg: Mapping[str, Any], scope: str) -> Any:
    """Build the layer of a cfg with few channels, as mmcv would.

    Args:
        cfg: ``conv_cfg`` or ``norm_cfg``.
        scope: registry that its type is looked up in.

    Returns:
        A convolution or norm of maps (N, C, H, W), None for other modules.

    Raises:
        TypeError: an argument is unknown.
        ValueError: an argument has an illegal value.
    """
    cls: Any = registered(cfg.get('type'), scope)
    options, channels, size = dict(cfg), 2, 2
    for name in ('type', 'requires_grad'):
        options.pop(name, None)
    takes = arguments(cls) if cls else {}
    names = [n for n in ('num_features', 'num_channels') if n in takes]
    if cls and issubclass(cls, CONVS):
        layer = cls(channels, channels, 3, **options)
    elif names:
        if cls is nn.GroupNorm:
            options.setdefault('num_groups', 32)
        options.setdefault('eps', 1e-5)
        groups = options.get('num_groups')
        channels, size = 64, 4
        if isinstance(groups, int) and groups > 0:
            channels = 2 * groups
        elif cls is nn.GroupNorm:
            raise ValueError(
                f'num_groups={groups!r} must be a whole number of at least 1'
            )
        try:
            layer = cls(**{names[0]: channels}, **options)
        except RuntimeError as error:  # torch 2.1: there is no process group
            raise ValueError(str(error)) from error
    else:
        return None
    # Whatever a layer may raise that is for something else.
    with contextlib.suppress(Exception), torch.no_grad():
        output = layer.eval()(torch.zeros(1, channels, 4, 4))
        if output.shape == (1, channels, size, size):
            return layer
    return None


def asked_layer(
    asked: Layer, kind: str, scope: str, auto: str | None = None
) -> Cfg | None:
    """Return the cfg of a layer that was asked for, None to keep.

    Args:
        asked: registered type or class, cfg, 'keep' or None.
        kind: 'conv' or 'norm'.
        scope: registry that the type is looked up in.
        auto: what the type 'auto' stands for; it stands for nothing if None.

    Raises:
        ConfigError: no such layer of maps is registered, or its arguments
            are wrong.
    """
    if asked is None or asked == 'keep':
        return None
    cfg = dict(asked if isinstance(asked, Mapping) else {'type': asked})
    if auto is not None and cfg.get('type') == 'auto':
        cfg['type'] = auto
    try:
        layer = map_layer(cfg, scope)
    except (TypeError, ValueError) as error:
        why = str(error)
        if 'unexpected keyword' in why:
            takes = arguments(registered(cfg['type'], scope) or nn.Module)
            why += f'. It takes {", ".join(takes)}'
        raise ConfigError(
            f'{kind}={asked!r}: {why} (--{kind}-options)'
        ) from error
    if layer is None or isinstance(layer, CONVS) != (kind == 'conv'):
        words = [*KNOWN[kind], 'keep', *(['auto'] if auto else [])]
        raise ConfigError(
            f'{kind}={asked!r} must be one of '
            f'{", ".join(map(repr, words))}, or the registered '
            f'type of another {kind} of maps (--{kind})'
            f'{_did_you_mean(cfg.get("type"))}'
        )
    if hasattr(layer, 'wrapper'):
        raise ConfigError(
            f'{kind}={asked!r} is for the last layer of a head alone: give '
            f"this head the type '{layer.wrapper}' (docs/zoo.md)"
        )
    if type(layer).__module__.startswith('ws_mm.'):
        cfg['type'] = f'ws_mm.{type(layer).__name__}'
    return cfg


def _did_you_mean(name: Any) -> str:
    short = str(name).rpartition('.')[2]
    ours = {
        key.lower(): key
        for key, cls in MODELS.module_dict.items()
        if cls.__module__.startswith('ws_mm.')
    }
    close = difflib.get_close_matches(short.lower(), ours, 1)
    return f'. Did you mean {ours[close[0]]!r}?' if close else ''


def unless_there(new: Cfg | None, old: Cfg | None, scope: str) -> Cfg | None:
    """Return ``new``, or None where ``old`` has its type and options."""
    if new is None or old is None:
        return new
    same = registered(old.get('type'), scope) is registered(new['type'], scope)
    options = new.keys() - {'type'}
    there = all(old.get(name) == new[name] for name in options)
    # One that shall be frozen is to stay so where weights go.
    return None if same and there and 'requires_grad' not in options else new


def is_replaceable(cfg: Cfg | None, scope: str) -> bool:
    """Return whether another layer may replace the one of a config.

    It may replace a norm of maps, a plain convolution, and a convolution
    that standardizes the weights of a plain one. Only the type counts. Layer
    norms stay: they work with any batch, and ConvNeXt's take channels last.
    """
    if cfg is None:
        return True
    kind = cfg.get('type')
    try:
        layer = map_layer(dict(type=kind), scope)
    except (TypeError, ValueError):
        # A norm that wants more, as mmcv's SyncBatchNorm a process group.
        cls = registered(kind, scope)
        return cls is not None and not issubclass(cls, CONVS)
    if not isinstance(layer, CONVS):
        return layer is not None and not isinstance(layer, nn.LayerNorm)
    more = layer.state_dict().keys() - {'weight', 'bias'}
    return ws_type(layer) is WSConv2d or (standardizes(layer) and not more)


def _formula(conv: nn.Module | None) -> Any:
    """The function that makes a convolution's filters of its weight."""
    if conv is None or not standardizes(conv):
        return None
    of_ws = WSConv2d.standardized_weight
    return getattr(type(conv), 'standardized_weight', of_ws)


def has_same_weights(old: Cfg | None, new: Cfg, scope: str) -> bool:
    """Return whether weights of the old layer mean the same in the new."""
    was, layer = None, map_layer(new, scope)
    with contextlib.suppress(TypeError, ValueError):
        was = map_layer(dict(type=(old or {}).get('type')), scope)
    if isinstance(layer, CONVS):
        formula = _formula(was)
        keeps = formula is None and getattr(layer, 'keeps_plain', False)
        return keeps or formula is _formula(layer)
    return _is_batch_norm(was) and (
        _is_batch_norm(layer) or getattr(layer, 'continues_batch_norm', False)
    )


def _is_batch_norm(layer: nn.Module | None) -> bool:
    return (
        layer is not None
        and 'running_var' in layer.state_dict()
        and not isinstance(layer, RunningStatistics)
    )
