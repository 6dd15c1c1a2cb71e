"""Look at everything a run will need before it starts, and say what lacks."""

import difflib
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS

ROOT = Path(__file__).resolve().parents[1]
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
    """The run cannot start; the message says why and what mends it."""


def did_you_mean(path: str, pattern: str) -> str:
    """End of an error message about a file that is not there.

    Args:
        path: what was asked for; folder names may be misspelt, too.
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
    """Whether ``path`` names something on this machine's disks."""
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


def _missing_paths(dataset: dict, key: str) -> Iterator[str]:
    """One line per path of ``dataset`` that is not there."""
    root = dataset.get('data_root') or ''
    if root and not os.path.isdir(root):
        yield f'{key}.data_root = {root!r}: no folder {os.path.abspath(root)}'
        return
    named = {'ann_file': dataset.get('ann_file')}
    prefixes = dataset.get('data_prefix') or {}
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


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint's structure; tensors stay on disk.

    Nothing in the file is executed: only tensors, containers, numbers and
    what mmengine's own checkpoints hold are accepted.

    Args:
        path: a local file.

    Raises:
        SetupError: missing, truncated, not a checkpoint, or holding objects
            that only running code from the file could restore.
    """
    path = str(path)
    if not os.path.isfile(path):
        raise SetupError(
            f'No checkpoint file {path}.{did_you_mean(path, "*.pth")}'
        )
    # ws_mm may be found only after launch has looked for it.
    from ws_mm.checkpoint import allow_host_objects, load_from_safetensors

    with open(path, 'rb') as file:
        head = file.read(4)
    is_zip = zipfile.is_zipfile(path)
    if head == b'PK\x03\x04' and not is_zip:
        raise SetupError(
            f'Checkpoint {path} is truncated: the end of the file is missing. '
            'Its download or its saving was cut short; use another one.'
        )
    allow_host_objects()
    try:
        if path.endswith('.safetensors'):
            content = load_from_safetensors(path)
        else:
            # Files older than torch 1.6 are no zip and cannot be mapped.
            content = torch.load(
                path, map_location='cpu', mmap=is_zip, weights_only=True
            )
    # A damaged old-format file can fail in any way the unpickler knows.
    except Exception as error:
        name = re.search(r'GLOBAL ([\w.]+)', str(error))
        if isinstance(error, pickle.UnpicklingError) and name:
            raise SetupError(
                f'Checkpoint {path} holds a {name[1]}, which only running '
                'code from the file could restore, so it was not opened. If '
                'you trust its source, keep its weights alone: torch.save({'
                "'state_dict': torch.load(old, weights_only=False)"
                "['state_dict']}, new)"
            ) from error
        writer = 'safetensors' if '.safet' in path else 'torch.save'
        raise _no_checkpoint(path, f'{writer} did not write it') from error
    if not isinstance(content, dict):
        raise _no_checkpoint(
            path, f'it holds a {type(content).__name__}, no state_dict'
        )
    weights = content.get('state_dict', content)
    if not isinstance(weights, dict) or not any(
        isinstance(value, torch.Tensor) for value in weights.values()
    ):
        keys = ', '.join(map(repr, list(content)[:5])) or 'nothing'
        raise _no_checkpoint(path, f'it has no state_dict; it holds {keys}')
    return content


def _no_checkpoint(path: str, why: str) -> SetupError:
    return SetupError(
        f'{path} is not a checkpoint: {why}. Give a .pth or .safetensors '
        'file that training saved or a released one.'
    )


def check_checkpoints(cfg: Config) -> None:
    """Look into every local checkpoint that the config names.

    Raises:
        SetupError: from :func:`read_checkpoint`, with the config key.
    """
    named = [('load_from', cfg.get('load_from'))]
    stack = [('model', cfg.get('model'))]
    while stack:
        key, node = stack.pop()
        if isinstance(node, dict):
            if node.get('checkpoint'):
                named.append((f'{key}.checkpoint', node['checkpoint']))
            stack += [(f'{key}.{name}', node[name]) for name in node]
        elif isinstance(node, (list, tuple)):
            stack += [(f'{key}.{i}', item) for i, item in enumerate(node)]
    for key, path in named:
        if path and is_local(path):
            try:
                read_checkpoint(path)
            except SetupError as error:
                raise SetupError(f'{key}: {error}') from error


def explain(cfg: Config, error: Exception) -> str:
    """Which keys of a config an error while building its model is about.

    Returns:
        The end of a message; '' where nothing in the config stands out.
    """
    text = str(error)
    named = re.search(r"argument '(\w+)'", text)
    ours = re.search(r'\b((?:norm|conv)_cfg)=dict\((\w+)=', text)
    found = []
    for key, node in _nodes('model', cfg.get('model')):
        part = key.rpartition('.')[2]
        is_layer = part.endswith(('norm_cfg', 'conv_cfg'))
        if not isinstance(node, dict):
            if is_layer and node is not None:
                found.append(f'{key} = {node!r}: give a dict(type=...)')
            continue
        if node.get('dcn') and node.get('conv_cfg') and 'DCN' in text:
            found.append(
                f'{key}.conv_cfg and {key}.dcn exclude each other: set one '
                'of them to None'
            )
        kind = node.get('type')
        if is_layer and 'Cannot find' in text and _unknown(kind):
            names = [*MODELS.module_dict, 'ws_mm.BCN', 'ws_mm.WSConv2d']
            close = difflib.get_close_matches(str(kind), names, 1)
            meant = f'; did you mean {close[0]!r}?' if close else ''
            found.append(f'{key}.type = {kind!r}{meant}')
        argument = ours[2] if ours else named and named[1]
        if argument in node and (is_layer or not ours):
            if not ours or part.endswith(ours[1]):
                found.append(f'{key}.{argument} = {node[argument]!r}')
    more = f' and {len(found) - 4} more' if len(found) > 4 else ''
    return f'. In the config: {"; ".join(found[:4])}{more}' if found else ''


def _unknown(kind: Any) -> bool:
    try:
        return isinstance(kind, str) and MODELS.get(kind) is None
    except (ImportError, KeyError):
        return True


def _nodes(key: str, node: Any) -> Iterator[tuple[str, Any]]:
    """Every value of a config, with its key."""
    yield key, node
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _nodes(f'{key}.{name}', value)
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _nodes(f'{key}.{index}', value)


def check_weights_fit(path: str | None, model: torch.nn.Module) -> None:
    """Refuse a checkpoint that shares no parameter name with the model.

    The host loads leniently: a foreign checkpoint would leave the model as
    it was initialised and only log the names.

    Raises:
        SetupError: no name is shared.
    """
    if not path or not is_local(path):
        return
    content = read_checkpoint(path)
    theirs = {
        name.removeprefix('module.')
        for name in content.get('state_dict', content)
    }
    ours = set(model.state_dict())
    # Data-parallel wrappers and test-time augmentation prefix the names.
    ours |= {name.removeprefix('module.') for name in ours}
    ours |= {name.removeprefix('module.') for name in ours}
    if not theirs & ours:
        raise SetupError(
            f'Checkpoint {path} shares no parameter with the model: it has '
            f'{sorted(theirs)[0]!r}..., the model {sorted(ours)[0]!r}.... '
            'It belongs to another config.'
        )


def check_weights_complete(path: str, model: torch.nn.Module) -> None:
    """Refuse a checkpoint that leaves a part of the model as initialised.

    The model itself says what is missing, after its layers have mapped other
    layouts to theirs.

    Raises:
        SetupError: a tensor of the model is in no way in the checkpoint.
    """
    if not is_local(path):
        return
    content = read_checkpoint(path)
    state = {
        name.removeprefix('module.'): values
        for name, values in content.get('state_dict', content).items()
    }
    while isinstance(getattr(model, 'module', None), torch.nn.Module):
        model = model.module  # of processes, of test-time augmentation
    try:
        missing = model.load_state_dict(state, strict=False).missing_keys
    except RuntimeError:
        return  # of another shape: the host says which
    if missing:
        raise SetupError(
            f'Checkpoint {path} lacks {len(missing)} of '
            f'{len(model.state_dict())} tensors of the model, such as '
            f'{missing[0]}: they would be evaluated as initialised. It '
            'belongs to another config, or training stopped half-way '
            'through a change of it; --allow-missing evaluates it all the '
            'same.'
        )


def newest_checkpoint(
    folder: str, with_optimizer: bool = True
) -> tuple[str | None, list[str]]:
    """Newest whole checkpoint of a work dir, and what was passed over.

    A killed run leaves a truncated file or a stale ``last_checkpoint``, so
    every file is opened and the one with the most iterations wins.

    Args:
        folder: where training saved.
        with_optimizer: pass over files that hold weights only, which is
            what ``save_best`` writes.

    Returns:
        The path or None, and one line per file that was passed over because
        it is broken.
    """
    best, broken = (-1, -1, None), []
    for path in sorted(Path(folder).glob('*.pth')):
        try:
            content = read_checkpoint(path)
        except SetupError as error:
            broken.append(str(error))
            continue
        meta = content.get('meta') or {}
        if 'message_hub' not in content or 'iter' not in meta:
            continue
        if with_optimizer and 'optimizer' not in content:
            continue
        best = max(best, (meta['iter'], meta.get('epoch', 0), str(path)))
    return best[2], broken
