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
    # Python 3.10 knows packages of those only that have a top_level.txt.
    name = next(iter(_distributions().get(package, ())), package)
    try:
        return name, metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
