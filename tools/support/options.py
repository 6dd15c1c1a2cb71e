"""``--cfg-options``: take them, and see that each key is one."""

import argparse
import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

import mmengine.registry
from mmengine.config import Config, DictAction
from mmengine.registry import Registry
from mmengine.runner import LogProcessor, Runner
from torch import nn
from torch.utils.data import DataLoader

from support.checks import SetupError

# What the host builds of a dict that names no type.
IMPLIED: dict[str, Any] = {
    'optim_wrapper': 'OptimWrapper',
    'train_dataloader': DataLoader,
    'val_dataloader': DataLoader,
    'test_dataloader': DataLoader,
    'log_processor': LogProcessor,
    'randomness': Runner.set_randomness,
    '': Runner,
}
# What the Runner reads of the config besides its own arguments.
OF_RUNNER = {
    *('activation_checkpointing', 'compile', 'custom_imports'),
    *('efficient_conv_bn_eval', 'find_unused_parameters'),
    *('model_wrapper_cfg', 'runner_type', 'strategy', 'sync_bn'),
    *('tta_model', 'tta_pipeline'),
}


class KeyValues(DictAction):
    """``--cfg-options``, with an error for an item that has no ``=``."""

    def __call__(  # noqa: D102
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        for value in values:
            if '=' not in value:
                parser.error(
                    f'{option_string}: {value!r} is not of the form KEY=VALUE'
                )
        super().__call__(parser, namespace, values, option_string)


def check_keys(
    cfg: Config, options: Iterable[str], types: Mapping[str, Any]
) -> None:
    """Reject a key that is new but nearly an existing one.

    A key that the class takes which is built of the dict is none of these.

    Args:
        cfg: the config.
        options: keys of what is to be replaced.
        types: New types of dicts, by their keys.

    Raises:
        SetupError: a key looks like a typo.
    """
    for key in options:
        _check_key(cfg, key, types)


def _check_key(cfg: Config, key: str, types: Mapping[str, Any]) -> None:
    node: Any = cfg._cfg_dict
    parts = key.split('.')
    for depth, part in enumerate(parts):
        if isinstance(node, (list, tuple)) and part.isdecimal():
            if int(part) >= len(node):
                return
            node = node[int(part)]
            # mmengine merges entries as it does dicts.
            last = depth == len(parts) - 1
            if last and not isinstance(types.get(key), Mapping):
                whole = '.'.join(parts[:depth])
                raise SetupError(
                    f'--cfg-options: {key!r} is an entry of a list. Set the '
                    f'whole list, as in {whole}=[1,2], or a key of the entry.'
                )
            continue
        if not isinstance(node, dict):
            return
        if part in node:
            node = node[part]
            continue
        close = difflib.get_close_matches(part, list(node), 1, 0.85)
        above = '.'.join(parts[:depth])
        kind = types.get(f'{above}.type') or node.get('type')
        kind = kind or IMPLIED.get(above)
        scope = cfg.get('default_scope') or 'mmengine'
        if close and not takes(kind, part, scope):
            named = getattr(kind, '__name__', kind)
            raise SetupError(
                f'--cfg-options: the config has no {key!r}; did you mean '
                f'{".".join([*parts[:depth], close[0]])!r}? '
                + (f'{named} takes no {part!r}. ' if kind else '')
                + '(A key that is really new belongs in a config file.)'
            )
        return


def takes(kind: Any, name: str, scope: str) -> bool:
    """Return whether the class of a dict takes an argument.

    Args:
        kind: the ``type`` of a dict: a name, a class or a function.
        name: Name of the argument.
        scope: Registry scope to search first.
    """
    if kind is Runner and name in OF_RUNNER:
        return True
    return any(
        (legal := arguments(each)) is None or name in legal
        for each in _registered(kind, scope)
    )


def arguments(built: Callable) -> set[str] | None:
    """Names of the arguments of a class or a function; None for any.

    ``**kwargs`` of a class stand for the arguments of the next one above it.
    """
    if not isinstance(built, type):
        names, rest = _signature(built)
        return None if rest else names
    legal: set[str] = set()
    rest = False
    for owner in built.__mro__:
        if '__init__' not in vars(owner):
            continue
        if owner in (object, nn.Module):
            break
        names, rest = _signature(owner.__init__)
        legal |= names
        if not rest:
            break
    return None if rest else legal


def _signature(function: Callable) -> tuple[set[str], bool]:
    """Names that a function takes, and whether it takes others, too."""
    parameters = inspect.signature(function).parameters.values()
    others = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return (
        {each.name for each in parameters if each.kind not in others},
        any(each.kind is each.VAR_KEYWORD for each in parameters),
    )


def _registered(kind: Any, scope: str) -> Iterator[Callable]:
    """Yield the classes of a ``type`` in the host's registries."""
    if not isinstance(kind, str):
        if callable(kind):
            yield kind
        return
    with suppress(ImportError):  # the package of the host fills them
        import_module(f'{scope}.registry')
    for root in vars(mmengine.registry).values():
        if isinstance(root, Registry) and root.parent is None:
            with suppress(ImportError, KeyError):
                # A registry that was not filled yet is false.
                of_host = root._search_child(scope)
                found = (root if of_host is None else of_host).get(kind)
                if found is not None:
                    yield found
