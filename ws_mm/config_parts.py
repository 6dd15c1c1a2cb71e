"""Parts of a config's model, and the settings that their classes take.

A part is a dict with the type of a registered module; the signature of the
class says whether it takes ``conv_cfg`` and ``norm_cfg``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import nn

from .arguments import arguments
from .config_layers import (
    Cfg,
    ConfigError,
    is_replaceable,
    registered,
    unless_there,
)

Key: TypeAlias = tuple[str | int, ...]

ROLES = dict(backbone='backbone', neck='neck', head='heads')
# In the reason of a part that refused its new layers.
REFUSED = 'stay as they are'


@dataclass
class Part:
    """A module of the model that a dict of the config describes.

    Attributes:
        key: path from the top of the config.
        value: the dict.
        cls: class of its type; ``nn.Module`` if the part above chooses it.
        accepts: arguments of the class, with their defaults.
        scope: registry that its types are looked up in.
        layers: settings that it gets.
        why: reasons for what stays as it is.
    """

    key: Key
    value: Cfg
    cls: type[nn.Module]
    accepts: Cfg
    scope: str
    layers: dict[str, Any] = field(default_factory=dict)
    why: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Path below the model, as modules and ``parts`` spell it."""
        return spell(self.key[1:])

    @property
    def roles(self) -> list[str]:
        """Roles of the names in its key, '' for a name without one."""
        return [role_of(name) for name in self.key if isinstance(name, str)]

    @property
    def is_leaf(self) -> bool:
        """True for a backbone, neck or head that holds no other."""
        return bool(self.roles[-1]) and not any(
            role_of(name) and isinstance(value, (dict, list))
            for name, value in self.value.items()
        )

    def get(self, name: str) -> Any:
        """Return a setting, or the default of the class."""
        return self.value.get(name, self.accepts.get(name))

    def find(self, built: nn.Module) -> nn.Module | None:
        """Return its module if the model has one of that name, else None."""
        try:
            module = built.get_submodule(self.name)
        except AttributeError:
            return None
        return module if isinstance(module, self.cls) else None

    def lower(self, problem: str) -> None:
        """Keep its old convolutions; the second time, its old norms, too."""
        what = 'convolutions' if 'conv_cfg' in self.layers else 'norms'
        self.why.append(f'its {what} {REFUSED}: {problem}')
        # Norms alone are no use where there were none.
        if what == 'norms' or self.get('norm_cfg') is None:
            self.layers = {}
        self.layers.pop('conv_cfg', None)


def spell(key: Key) -> str:
    """Write a path of keys as in ``--cfg-options``."""
    return '.'.join(map(str, key))


def role_of(name: str) -> str:
    """Return the role of a name in a model, '' without one."""
    return next((ROLES[end] for end in ROLES if name.endswith(end)), '')


def short(name: Any) -> str:
    """Return a type without its scope."""
    return getattr(name, '__name__', None) or str(name).rpartition('.')[2]


def iter_dicts(
    value: Any, key: Key, scope: str = ''
) -> Iterator[tuple[Key, Cfg, str]]:
    """Yield every dict in a value with its scope, outer ones first."""
    items: Any = ()
    if isinstance(value, dict):
        scope = value.get('_scope_') or scope
        yield key, value, scope
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for name, inner in items:
        yield from iter_dicts(inner, (*key, name), scope)


def read_parts(model: Cfg, scope: str) -> list[Part]:
    """List the modules that a config describes, the model first.

    Raises:
        ConfigError: neither the model nor a part of it is registered, or
            ``conv_cfg`` or ``norm_cfg`` of a part is no dict.
    """
    parts: list[Part] = []
    for key, value, inner in iter_dicts(model, ('model',), scope):
        cls = registered(value.get('type'), inner)
        if cls is not None or key == ('model',):
            takes = arguments(cls) if cls else {}
            parts.append(Part(key, value, cls or nn.Module, takes, inner))
        elif 'type' not in value and isinstance(value.get('norm_cfg'), dict):
            # Arguments of a module that the class above chooses itself.
            takes = dict.fromkeys({'conv_cfg', 'norm_cfg'} & value.keys())
            parts.append(Part(key, value, nn.Module, takes, inner))
    for part in parts:
        for name in ('conv_cfg', 'norm_cfg'):
            layer = part.get(name) if name in part.accepts else None
            if layer is not None and not isinstance(layer, dict):
                raise ConfigError(
                    f'{spell((*part.key, name))}={layer!r} must be a dict, '
                    f'such as dict(type={layer!r})'
                )
    if not parts[1:] and parts[0].cls is nn.Module:
        raise ConfigError(
            f'model.type={model.get("type")!r} is not in the registry of '
            f'{scope} (default_scope). Install or import what registers it '
            '(custom_imports)'
        )
    return parts


def select(everything: list[Part], names: Sequence[str]) -> list[Part]:
    """Return the parts that were asked for, or all without names."""
    selected: list[Part] = []
    for name in names:
        path = f'{name.removeprefix("model.")}.'
        found = [
            part
            for part in everything
            if (name and f'{part.name}.'.startswith(path))
            or name == next(filter(None, reversed(part.roles)), None)
        ]
        if not found:
            roles = sorted({r for p in everything for r in p.roles} - {''})
            keys = [part.name for part in everything if part.roles[-1]]
            raise ConfigError(
                f'parts={name!r} selects nothing: the model has '
                f'{", ".join(dict.fromkeys((*roles, *keys))) or "no parts"}'
                ' (--parts)'
            )
        selected += [part for part in found if part not in selected]
    return selected if names else everything


def is_named(part: Part, names: Sequence[str]) -> bool:
    """Return whether a part was asked for by its own key."""
    return part.name in [name.removeprefix('model.') for name in names]


def decide(
    part: Part, conv: Cfg | None, norm: Cfg | None, named: bool
) -> None:
    """Give a part the layers that its class takes.

    Args:
        part: any; its ``layers`` and ``why`` are set.
        conv: ``conv_cfg`` that was asked for, None to keep.
        norm: ``norm_cfg`` that was asked for, None to keep.
        named: whether the part was asked for by its key.
    """
    cls, scope = part.cls.__name__, part.scope
    old_norm, old_conv = part.get('norm_cfg'), part.get('conv_cfg')
    takes_conv = 'conv_cfg' in part.accepts
    if 'norm_cfg' not in part.accepts:
        if part.is_leaf:
            part.why.append(f'{cls} takes no norm_cfg')
        return
    if not is_replaceable(old_norm, scope):
        kind = short(old_norm.get('type'))
        part.why.append(f'its norm {kind} is not one of channels of a map')
        return
    if conv and takes_conv and not is_replaceable(old_conv, scope):
        kind, conv = short(old_conv.get('type')), None
        part.why.append(f'its convolutions stay {kind} (conv_cfg)')
    elif conv and not takes_conv:
        conv = None
        if old_norm is not None:
            part.why.append(
                f'its convolutions stay plain: {cls} takes no conv_cfg'
            )
    gets_norm = part.is_leaf and norm and (conv or named)
    if old_norm is None and not gets_norm:
        if part.is_leaf:
            part.why.append(
                'has no norm that could be replaced; --parts with its key '
                'gives it one'
            )
        return
    for name, new, old in (
        ('conv_cfg', conv, old_conv),
        ('norm_cfg', norm, old_norm),
    ):
        layer = unless_there(new, old, scope)
        if layer is not None:
            part.layers[name] = layer
