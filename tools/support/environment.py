"""Versions of what takes part in a measurement."""

import functools
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata


def versions(*packages: str) -> dict[str, str | None]:
    """Return ``__version__`` of each package; None for a missing one."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = str(import_module(name).__version__)
        except ImportError:
            found[name] = None
    return found


@functools.cache
def _distributions() -> Mapping[str, Sequence[str]]:
    return metadata.packages_distributions()


def distribution(package: str) -> tuple[str, str] | None:
    """Return name and version of the distribution that has a package.

    The hosts' packages come in two, such as ``mmdet`` and
    ``onedl-mmdetection``. None if none is installed.
    """
    names = _distributions().get(package)
    return (names[0], metadata.version(names[0])) if names else None
