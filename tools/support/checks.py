"""Check paths and data that a config or a command line names."""

import difflib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config

from support import ROOT

# What prepares or checks a data set, by a word in its path.
CONVERTERS = {
    'voc': 'tools/dataset_converters/voc12_aug.py',
    'coco': 'tools/dataset_converters/coco.py',
    'stardist': 'tools/demo.py',
}
# What the host's builders raise about a config.
BUILD_ERRORS = (
    *(AssertionError, AttributeError, ImportError),
    *(KeyError, TypeError, ValueError),
)


class SetupError(Exception):
    """The run cannot start; the message says why and what fixes it."""


def did_you_mean(path: str, pattern: str) -> str:
    """End of an error message about a file that is not there.

    Args:
        path: Path asked for; folder names may be misspelt, too.
        pattern: glob of the files that may be meant, such as ``'*.py'``.
    """
    if os.path.isdir(path):
        return ' It is a folder: name a file in it.'
    *folders, name = Path(path).parts or ['']
    here = Path()
    for folder in folders:
        if not (here / folder).is_dir():
            names = [p.name for p in here.glob('*') if p.is_dir()]
            close = difflib.get_close_matches(folder, names, 1)
            if not close:
                break
            folder = close[0]
        here = here / folder
    else:
        names = [file.name for file in here.glob(pattern)]
        close = difflib.get_close_matches(name, names, 3)
        if close:
            found = [str(here / name) for name in close]
            return f' Did you mean {" or ".join(found)}?'
    # Else the right name in a wrong folder: look through the checkout.
    known = {
        file.name: os.path.relpath(file)
        for file in (ROOT / 'configs').rglob(pattern)
        if '_base_' not in file.parts
    }
    found = [known[n] for n in difflib.get_close_matches(name, known, 3)]
    if found:
        return f' Did you mean {" or ".join(found)}?'
    return f' See what is in {here}.' if here.name else ''


def is_local(path: Any) -> bool:
    """Return whether ``path`` is on the disks of this machine."""
    return isinstance(path, (str, Path)) and '://' not in str(path)


def check_writable(folder: str, option: str) -> None:
    """Create ``folder`` and write a byte there.

    Args:
        folder: the folder that will take the outputs.
        option: option or config key that sets it, for the message.

    Raises:
        SetupError: it cannot be created or written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b'0')
    except OSError as error:
        raise SetupError(
            f'{option} {folder} is not writable ({error.strerror}). '
            f'Give another folder with {option}.'
        ) from error


def check_apart(outputs: list[Path], inputs: tuple[str, ...]) -> None:
    """See that no output would replace an input.

    Raises:
        SetupError: one would.
    """
    for out in outputs:
        for path in inputs:
            if out.exists() and os.path.samefile(out, path):
                raise SetupError(
                    f'{out} would replace {path}, which it is made of. Give '
                    'another place.'
                )


def type_name(node: Any) -> str:
    """The type that a dict of a config names, '' if none.

    In a pure Python config it is the class itself.
    """
    kind = node.get('type') if isinstance(node, dict) else None
    if isinstance(kind, type):
        return f'{kind.__module__}.{kind.__qualname__}'
    return kind if isinstance(kind, str) else ''


def short_name(node: Any) -> str:
    """The same without scope and modules."""
    return type_name(node).rpartition('.')[2]


def iter_nodes(key: str, node: Any) -> Iterator[tuple[str, Any]]:
    """Yield every value of a config, with its key."""
    yield key, node
    if isinstance(node, dict):
        for name, value in node.items():
            yield from iter_nodes(f'{key}.{name}'.lstrip('.'), value)
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from iter_nodes(f'{key}.{index}', value)


def iter_datasets(dataset: Any, key: str) -> Iterator[tuple[str, dict]]:
    """Innermost data sets of a config, each with its key path."""
    if isinstance(dataset, (list, tuple)):
        for index, item in enumerate(dataset):
            yield from iter_datasets(item, f'{key}.{index}')
    elif isinstance(dataset, dict):
        inner = [name for name in ('dataset', 'datasets') if name in dataset]
        for name in inner:
            yield from iter_datasets(dataset[name], f'{key}.{name}')
        if not inner:
            yield key, dataset


def _is_downloaded(dataset: dict) -> bool:
    """Return whether MMPretrain downloads a data set that is missing."""
    kinds = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')
    return short_name(dataset) in kinds and dataset.get('download', True)


def _missing_paths(dataset: dict, key: str) -> Iterator[str]:
    """One line per path of ``dataset`` that is not there."""
    root = dataset.get('data_root') or ''
    if root and not os.path.isdir(root) and not _is_downloaded(dataset):
        yield f'{key}.data_root = {root!r}: no folder {os.path.abspath(root)}'
        return
    named = {'ann_file': dataset.get('ann_file')}
    prefixes = dataset.get('data_prefix') or {}
    if isinstance(prefixes, str):
        named['data_prefix'], prefixes = prefixes, {}
    for name, prefix in prefixes.items():
        named[f'data_prefix.{name}'] = prefix
    for name, value in named.items():
        if not value or not is_local(value):
            continue
        path = os.path.abspath(os.path.join(root, value))
        if not os.path.exists(path):
            yield f'{key}.{name} = {value!r}: nothing at {path}'


def check_data(cfg: Config, loaders: tuple[str, ...]) -> None:
    """See that the folders and files of the data sets are there.

    Args:
        cfg: the whole config.
        loaders: keys of the dataloaders that the run will use.

    Raises:
        SetupError: something is missing; every missing path is named.
    """
    missing, words = [], ''
    for loader in loaders:
        datasets = iter_datasets(
            (cfg.get(loader) or {}).get('dataset'), f'{loader}.dataset'
        )
        evaluator = loader.replace('dataloader', 'evaluator')
        metrics = iter_datasets(cfg.get(evaluator), evaluator)
        for key, node in (*datasets, *metrics):
            backend = (node.get('backend_args') or {}).get('backend')
            if backend not in (None, 'local') or not is_local(
                node.get('data_root') or ''
            ):
                continue
            lines = list(_missing_paths(node, key))
            missing += lines
            if lines:
                words += f'{node.get("data_root")} {node.get("ann_file")} '
    if not missing:
        return
    message = 'Data that the config names is not there:\n  ' + '\n  '.join(
        missing
    )
    message += (
        '\nPut it there, or set the key in the config or with --cfg-options.'
    )
    for word, command in CONVERTERS.items():
        if word in words.lower():
            message += f'\nTo prepare or check this data: python {command} -h'
            break
    raise SetupError(message)


def require(paths: Iterable[Path], what: str, shown: int = 20) -> None:
    """See that files and folders are there.

    Args:
        paths: what a data set is made of; ``*`` in a name stands for any
            file, of which one is enough.
        what: Name of the data set for the message.
        shown: how many of those missing the message lists.

    Raises:
        SetupError: some are missing.
    """
    paths = list(paths)
    missing = [
        path
        for path in paths
        if next(path.parent.glob(path.name), None) is None
    ]
    if missing:
        more = f'\n  and {len(missing) - shown} more'
        raise SetupError(
            f'{what}: {len(missing)} of {len(paths)} are missing:\n  '
            + '\n  '.join(map(str, missing[:shown]))
            + more * (len(missing) > shown)
        )
