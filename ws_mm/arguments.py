"""Arguments of classes, and errors about those that a config sets."""

import difflib
import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any


def arguments(cls: type) -> dict[str, Any]:
    """Return the arguments of a class with defaults, through ``**kwargs``."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if '__init__' not in vars(base):
            continue
        parameters = inspect.signature(vars(base)['__init__']).parameters
        for name, one in parameters.items():
            if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
                default = None if one.default is one.empty else one.default
                found.setdefault(name, default)
        kinds = {one.kind for one in parameters.values()}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    found.pop('self', None)
    return found


def reject_unknown(
    layer: str, key: str, unknown: Mapping[str, Any], legal: Collection[str]
) -> None:
    """Reject arguments that a layer does not have.

    Args:
        layer: class name of the layer.
        key: key of the config, 'norm_cfg' or 'conv_cfg', or an argument that
            takes a dict.
        unknown: arguments left over.
        legal: names that the layer takes.

    Raises:
        TypeError: there are any; the message names a close match.
    """
    if not unknown:
        return
    name, value = next(iter(unknown.items()))
    close = difflib.get_close_matches(name, legal, 1)
    meant = (
        f'did you mean {close[0]!r}?'
        if close
        else f'it takes {", ".join(sorted(legal))}.'
    )
    message = (
        f'{layer} has no argument {name!r}; {meant} Fix or remove '
        f'{key}=dict({name}={value!r})'
    )
    if key.endswith('_cfg'):
        message += '; _delete_=True removes the keys of an inherited config'
    raise TypeError(message)


def check_choice(
    name: str, value: Any, legal: Collection[Any], key: str
) -> None:
    """Reject a value that is not one of the legal ones."""
    if value not in legal:
        raise ValueError(
            f'{name}={value!r} must be one of {", ".join(map(repr, legal))} '
            f'({key}=dict({name}=...))'
        )


def check_share(name: str, value: Any, key: str) -> None:
    """Reject a number outside (0, 1]."""
    is_legal = 0 < _number(value) <= 1
    _check_number(name, value, is_legal, '(0, 1]', key)


def check_eps(value: Any, key: str, positive: bool = False) -> None:
    """Reject an eps that is not a finite number of at least 0, or above."""
    if positive and value == 0:
        _check_number('eps', value, False, '(0, inf)', key)
    check_number('eps', value, 0, key)


def check_momentum(value: Any, key: str) -> None:
    """Reject a momentum outside (0, 1]."""
    check_share('momentum', value, key)


def check_number(name: str, value: Any, least: float, key: str) -> None:
    """Reject a value that is not a finite number of at least ``least``."""
    is_legal = least <= _number(value) < math.inf
    _check_number(name, value, is_legal, f'[{least}, inf)', key)


def check_count(name: str, value: Any, least: int, key: str) -> None:
    """Reject a value that is not a whole number of at least ``least``."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < least:
        raise ValueError(
            f'{name}={value!r} must be a whole number of at least {least} '
            f'({key}=dict({name}=...))'
        )


def first_names(names: Sequence[str]) -> str:
    """The first three of many, for a message."""
    return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')


def counted(names: Sequence[str], noun: str = 'layer') -> str:
    """Their number, the noun, and the first three, for a message."""
    plural = '' if len(names) == 1 else 's'
    return f'{len(names)} {noun}{plural} ({first_names(names)})'


def _number(value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number else math.nan


def _check_number(
    name: str, value: Any, is_legal: bool, interval: str, key: str
) -> None:
    if not is_legal:
        raise ValueError(
            f'{name}={value!r} must be a number in {interval} '
            f'({key}=dict({name}=...))'
        )
