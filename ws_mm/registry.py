"""The scope that ``_base_ = 'ws_mm::...'`` gives to a config.

mmengine looks up the types of an inherited config in the package that the
config comes from. The configs of ws_mm hold types of MMDetection,
MMSegmentation or MMPretrain, so this scope looks them up in the
``default_scope`` of the config that inherits, but for those of ws_mm itself.
"""

from contextlib import suppress
from importlib import import_module
from typing import Any

import mmengine.registry
from mmengine.registry import DefaultScope, Registry

SCOPE = 'ws_mm'


class _ConfigScope(Registry):
    """Looks up a type in the scope that was the default before this one."""

    def get(self, key: str) -> Any:
        """Return the registered type, None if there is none."""
        own = self._get_root_registry().module_dict.get(key)
        if own is not None and f'{own.__module__}.'.startswith(f'{SCOPE}.'):
            return own  # whatever the host has of that name
        scopes = [
            instance.scope_name
            for instance in DefaultScope._instance_dict.values()
            if instance.scope_name != SCOPE
        ]
        if scopes and '.' not in key:
            with suppress(ImportError):  # importing fills the registry
                import_module(f'{scopes[-1]}.registry')
            host = self._get_root_registry()._search_child(scopes[-1])
            if host is not None:
                return host.get(key)
        return super().get(key)


for _root in list(vars(mmengine.registry).values()):
    if isinstance(_root, Registry) and _root.parent is None:
        _ConfigScope(_root.name, parent=_root, scope=SCOPE, locations=[SCOPE])
