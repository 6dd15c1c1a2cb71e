"""Fit the layers of a config's parts to the model that they build.

A part keeps its layers where the new ones do not build, or would standardize
a convolution that no norm follows.
"""

import copy
import math
import re
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from .checking import check
from .config_layers import Cfg, ConfigError, registered, unless_there
from .config_parts import Key, Part, is_named, iter_dicts, short, spell
from .converted import CONVERTED
from .running_statistics import RunningStatistics, channels_of
from .shapes import (
    build_without_memory,
    map_sizes,
)

ALONE = 'each changed part was built alone'
# It builds whatever the channels are, until the groups of a GN are known.
STAND_IN = dict(type='ws_mm.BCN', num_groups=1)


def settle(parts: list[Part], root: Part | None = None) -> nn.Module:
    """Lower parts until the model builds and every WS conv has a norm.

    All parts change at once. If that fails, they change one after the other,
    and each problem belongs to the part that changed last.

    Args:
        parts: of the model; their ``layers`` and ``why`` change.
        root: part to build, the first if None.

    Returns:
        The model. If a package for another part is missing, a module that
        holds only the changed parts, by their names.

    Raises:
        ConfigError: the model does not build with the layers that it has.
    """
    root = root or parts[0]
    built, problem = _attempt(root, parts)
    if built is not None:
        return built
    wanted = [part.layers for part in parts]
    for part in parts:
        part.layers = {}
    try:
        built = _build(root, parts)
    # Whatever a constructor may raise.
    except Exception as error:
        problem = _first_line(error)
        lacks = isinstance(error, ImportError) or 'install' in problem
        if lacks and root.key == ('model',):
            for part, layers in zip(parts, wanted, strict=True):
                part.layers = layers
            whole = _settle_apart(parts, problem)
            if any(part.layers for part in parts):
                return whole
        raise ConfigError(
            'the model of the config does not build as it is: '
            f'{problem}{_who_registers(root, problem)}'
        ) from error
    known = _mistakes(built)
    for part, layers in zip(parts, wanted, strict=True):
        part.layers = layers
        while part.layers:
            tried, problem = _attempt(root, parts, known)
            if tried is not None:
                built = tried
                break
            part.lower(problem)
    return built


def _settle_apart(parts: list[Part], problem: str) -> nn.Module:
    """Settle changed parts as if they were the model.

    One that stays but holds changed parts and builds, as the detector of a
    tracker, is built whole: then the maps of its heads can be measured.
    """
    whole = nn.Module()
    roots: list[Part] = []
    for part in parts[1:]:  # the first is the model
        if any(_holds(root, part) for root in roots):
            continue
        changes = any(one.layers for one in parts if _holds(part, one))
        if part.layers or (changes and _builds(part)):
            roots.append(part)
    for root in roots:
        try:
            built = settle([one for one in parts if _holds(root, one)], root)
        except ConfigError as error:
            cause = _first_line(error.__cause__ or error)
            root.why.append(f'stays as it is: {cause}')
            continue
        parent = whole
        for name in map(str, root.key[1:-1]):
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(str(root.key[-1]), built)
    parts[0].why.append(
        f'{ALONE}, since the model does not build here: {problem}'
    )
    return whole


def _who_registers(root: Part, problem: str) -> str:
    """Say what to do about a type that is in no registry; '' for the rest."""
    name = re.search(r'(\w+) is not in the', problem)
    for key, cfg, _ in iter_dicts(root.value, root.key):
        if name and short(cfg.get('type')) == name[1]:
            return (
                f'. Import the module that registers {spell((*key, "type"))} '
                f"= {cfg['type']!r}: custom_imports=dict(imports=['MODULE'])"
            )
    return ''


def _builds(part: Part) -> bool:
    try:
        _build(part, [])
    except Exception:
        return False
    return True


def _holds(root: Part, part: Part) -> bool:
    return part.key[: len(root.key)] == root.key


def _attempt(
    root: Part, parts: list[Part], known: Collection[str] = ()
) -> tuple[nn.Module | None, str]:
    """Build and check; return the model, or None and the problem.

    Args:
        root: part to build.
        parts: parts that give it their layers.
        known: convolutions that were wrong before, by name.
    """
    try:
        built = _build(root, parts)
    except Exception as error:
        return None, _first_line(error)
    wrong = [name for name in _mistakes(built) if name not in known]
    if wrong:
        more = f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''
        return None, f'{wrong[0]}{more} would have no norm after it'
    return built, ''


def _build(root: Part, parts: list[Part]) -> nn.Module:
    value = copy.deepcopy(root.value)
    for part in parts:
        for name, layer in part.layers.items():
            if _lacks_groups(layer, part.scope):
                layer = STAND_IN
            put(value, (*part.key[len(root.key) :], name), layer)
    built = build_without_memory(value, root.scope)
    student = getattr(built, 'student', None)
    if 'detector' in value and isinstance(student, nn.Module):
        # It builds model.detector twice. A module is listed once, by its
        # first name: here by that of its key.
        others = built._modules
        built._modules = {'detector': student, **others, 'teacher': student}
    return built


def _mistakes(built: nn.Module) -> list[str]:
    return [conv.name for conv in check(built) if conv.mistake]


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    first = ' '.join(text[0].split()) if text else ''
    return f'{type(error).__name__}: {first}'


def put(content: Any, key: Key, value: Any) -> None:
    """Set a value, and the dicts above it where there is nothing."""
    for name in key[:-1]:
        if isinstance(content, dict) and content.get(name) is None:
            content[name] = {}
        content = content[name]
    content[key[-1]] = copy.deepcopy(value)


def fit(parts: list[Part], built: nn.Module, names: Sequence[str]) -> bool:
    """Fit the layers of each part to the channels and maps of the model.

    GN gets as many groups as suit a part. It replaces a norm with estimates
    that runs on every level of a pyramid: they would mix the levels and move
    once per level. A part that reads the weight of a convolution itself, as
    TOOD's head does, keeps plain ones.

    Args:
        parts: of the model.
        built: model from :func:`settle`.
        names: parts that were asked for; they get what was asked for.

    Returns:
        True if a part gets other layers now.
    """
    before = [part.layers.copy() for part in parts]
    scope = parts[0].scope
    shared: set[str] = set()
    uncalled: list[str] = []
    # Trackers hold a detector, too.
    inner = getattr(built, 'detector', None)
    model, above = (inner, 'detector.') if inner else (built, '')
    # Segmentors and heads of proposals run on one size.
    if scope != 'mmseg' and not hasattr(model, 'roi_head'):
        sizes, uncalled = map_sizes(model, scope)
        shared = {above + name for name in sizes if len(sizes[name]) > 1}
        uncalled = [above + name for name in uncalled]
    for part in parts:
        raw = [one for one in uncalled if one.startswith(f'{part.name}.')]
        if raw and 'conv_cfg' in part.layers:
            part.lower(
                f'{raw[0]} is not called where its module runs, and its '
                'weight would be read as it is, without standardization'
            )
        norm = part.layers.pop('norm_cfg', None)
        if norm is None:
            continue
        is_open = _lacks_groups(norm, part.scope)
        layers = layers_of(part, STAND_IN if is_open else norm, built, parts)
        if not (is_open or is_named(part, names)) and any(
            isinstance(layers[name], RunningStatistics)
            for name in shared & layers.keys()
        ):
            kind = short(norm['type'])
            part.why.append(
                f'GN instead of {kind}: its norms are shared over pyramid '
                f'levels, whose estimates {kind} would mix. --parts with its '
                f'key gives it {kind}'
            )
            old, is_open = part.get('norm_cfg'), True
            norm = unless_there(dict(type='GN'), old, part.scope)
        if norm and is_open:
            norm = {**norm, 'num_groups': _groups(part, layers.values())}
        if norm:
            part.layers['norm_cfg'] = norm
    return before != [part.layers for part in parts]


def layers_of(
    part: Part, cfg: Cfg, built: nn.Module, parts: list[Part]
) -> dict[str, Any]:
    """Return the layers of a cfg's type in a part by their names.

    Those of parts in it that have a norm of their own belong to these.
    """
    inner = tuple(
        f'{one.name}.'
        for one in parts
        if one.name.startswith(f'{part.name}.')
        and (one.layers.get('norm_cfg') or one.value.get('norm_cfg'))
    )
    module, cls = part.find(built), registered(cfg.get('type'), part.scope)
    if module is None:
        return {}
    layers = module.named_modules(prefix=part.name)
    return {
        name: layer
        for name, layer in layers
        if type(layer) is cls and not name.startswith(inner)
    }


def _lacks_groups(cfg: Any, scope: str) -> bool:
    """Return whether a cfg is a GN without ``num_groups``."""
    return (
        isinstance(cfg, dict)
        and 'num_groups' not in cfg
        and registered(cfg.get('type'), scope) is nn.GroupNorm
    )


def _groups(part: Part, norms: Collection[nn.Module]) -> int:
    """Return the most groups up to 32 that suit all norms of a part.

    A group has at least two channels: on a map of one pixel, such as behind
    a global pooling, it would else have one value.
    """
    channels = list(map(channels_of, norms)) or [64]
    common, most = math.gcd(*channels), max(1, min(channels) // 2)
    groups = next(n for n in range(min(32, most), 0, -1) if common % n == 0)
    if groups < 32:
        odd = sorted({n for n in channels if n % 32 or n < 64})
        part.why.append(
            f'{groups} groups instead of 32, which do not make groups of two '
            f'or more of its {", ".join(map(str, odd))} channels'
        )
    return groups


def check_groups(built: nn.Module, scope: str, parts: list[Part]) -> None:
    """Reject groups of one channel where the map has one pixel.

    Args:
        built: the model.
        scope: of its types.
        parts: those that get a norm.

    Raises:
        ConfigError: some group would have one value, which is its own mean.
    """
    single = {
        name: layer.num_channels
        for name, layer in built.named_modules()
        if isinstance(layer, nn.GroupNorm)
        and layer.num_groups == layer.num_channels
        and any(name.startswith(f'{part.name}.') for part in parts)
    }
    sizes = map_sizes(built, scope)[0] if single else {}
    for name, channels in single.items():
        if any(size.numel() == 1 for size in sizes[name]):
            raise ConfigError(
                f'num_groups={channels}: {name} has {channels} channels and '
                'runs on maps of one pixel, so each group would have one '
                f'value. Give at most {max(1, channels // 2)} '
                '(--norm-options num_groups=...)'
            )


def prune(parts: list[Part], built: nn.Module, everything: list[Part]) -> None:
    """Remove settings from parts that build no layer from them."""
    for part in parts:
        if part.find(built) is None:
            continue
        wanted = part.layers
        part.layers = {
            name: cfg
            for name, cfg in wanted.items()
            if layers_of(part, cfg, built, everything)
        }
        unused = wanted.keys() - part.layers.keys()
        if 'conv_cfg' in unused:
            part.why.append('builds no convolution from conv_cfg')
        if 'norm_cfg' in unused and not part.layers:
            part.why = [
                f'{part.cls.__name__} builds neither a convolution nor a '
                'norm from its settings'
            ]


def owners_of(parts: list[Part], names: list[str]) -> dict[Key, list[str]]:
    """Group layers by the innermost part with a type that holds them."""
    owners: dict[Key, list[str]] = {}
    for name in names:
        inside = [
            part.key
            for part in parts
            if 'type' in part.value and name.startswith(f'{part.name}.')
        ]
        key = max(inside, key=len, default=('model',))
        owners.setdefault(key, []).append(name)
    return owners


def finish(parts: list[Part], names: list[str], norm: Cfg) -> bool:
    """Convert the batch norms of these names, which parts still build.

    Returns:
        True if there are such parts.
    """
    owners = owners_of(parts, names)
    found = [part for part in parts if part.key in owners]
    for part in found:
        part.layers |= dict(of=part.value['type'], type=CONVERTED)
        if norm != dict(type='ws_mm.BCN'):
            part.layers['norm'] = norm
    return bool(found)
