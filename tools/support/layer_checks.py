"""Name the config keys of layers that cannot be built."""

import difflib
import re
import traceback
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from support.checks import SetupError, iter_nodes
from ws_mm.arguments import arguments

DELETE = ' (if a parent config sets it, add _delete_=True to {})'


def explain(cfg: Config, error: Exception) -> str:
    """Name the config keys behind an error in building the model.

    Returns:
        The end of a message; '' where nothing in the config stands out and
        the error has a text of its own.
    """
    text = str(error)
    channels, groups = _misfit(error)
    named = re.search(r"argument '(\w+)'", text)
    ours = re.search(r'\b((?:norm|conv)_cfg)=dict\((\w+)=', text)
    found = []
    for key, node in iter_nodes('model', cfg.get('model')):
        part = key.rpartition('.')[2]
        is_layer = part.endswith(('norm_cfg', 'conv_cfg'))
        if not isinstance(node, dict):
            if is_layer and node is not None:
                found.append(f'{key} = {node!r}: give a dict(type=...)')
            continue
        if node.get('dcn') and node.get('conv_cfg') and 'DCN' in text:
            found.append(
                f'{key}.conv_cfg and {key}.dcn exclude each other: set one '
                f'of them to None, or keep dcn and set {key}.type='
                f"'ws_mm.Converted', of={node.get('type')!r}, conv={{}}"
            )
        kind = node.get('type')
        if is_layer and 'Cannot find' in text and _unknown(kind):
            names = {name: _spelt(name) for name in MODELS.module_dict}
            names |= {name: name for name in names.values()}
            close = difflib.get_close_matches(str(kind), names, 1)
            meant = f'; did you mean {names[close[0]]!r}?' if close else ''
            found.append(f'{key}.type = {kind!r}{meant}')
        if is_layer and channels and node.get('num_groups') == groups:
            found.append(
                f'{key}.num_groups = {groups}, where a layer has {channels} '
                f'channels: set one of {divisors(channels)}, or take '
                "type='ws_mm.BCN', which takes the largest that fits"
            )
        argument = ours[2] if ours else named and named[1]
        if argument in node and (is_layer or not ours):
            words = f'{key}.{argument} = {node[argument]!r}'
            if part.endswith(ours[1]) if ours else not is_layer:
                found.append(words)
            elif not ours and not _takes(kind, argument):
                found.append(words + DELETE.format(key))
    more = f' and {len(found) - 4} more' if len(found) > 4 else ''
    where = '' if text else _where(error)
    return where + (
        f'. In the config: {"; ".join(found[:4])}{more}' if found else ''
    )


def _spelt(name: str) -> str:
    """The name of a layer in a config; those of ws_mm need no import so."""
    is_ours = MODELS.module_dict[name].__module__.startswith('ws_mm.')
    return f'ws_mm.{name}' if is_ours else name


def _where(error: Exception) -> str:
    """The line that raised an error without a text."""
    line = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f'{type(error).__name__} at {line.filename}:{line.lineno}: {line.line}'
    )


def _misfit(error: Exception) -> tuple[int, int]:
    """Channels and groups of a GroupNorm that cannot be; else zeros."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        known = frame.f_locals
        if isinstance(known.get('self'), nn.GroupNorm):
            channels, groups = known.get('num_channels'), known['num_groups']
            if channels and groups and channels % groups:
                return channels, groups
    return 0, 0


def divisors(count: int) -> str:
    """The numbers that divide a count, as a list in words."""
    return ', '.join(str(n) for n in range(1, count + 1) if count % n == 0)


def check_norms(cfg: Config) -> None:
    """Reject a GN without groups, of which the host says nothing.

    Raises:
        SetupError: with its key.
    """
    for key, node in iter_nodes('model', cfg.get('model')):
        if not key.endswith('norm_cfg') or not isinstance(node, dict):
            continue
        if node.get('type') == 'GN' and 'num_groups' not in node:
            raise SetupError(
                f'{key} is a GN without num_groups: set {key}.num_groups=32, '
                'or another number that divides the channels of each layer'
            )


def _takes(kind: Any, argument: str) -> bool:
    if _unknown(kind) or not isinstance(kind, str):
        return False
    return argument in arguments(MODELS.get(kind))


def _unknown(kind: Any) -> bool:
    try:
        return isinstance(kind, str) and MODELS.get(kind) is None
    except (ImportError, KeyError):
        return True
