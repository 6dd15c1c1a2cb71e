"""Read checkpoints safely, and compare them with the model."""

import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import BaseModule
from torch import nn

from support.checks import (
    SetupError,
    did_you_mean,
    is_local,
    iter_nodes,
)

HOST_INIT = BaseModule.init_weights


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
    from ws_mm.checkpoint import load_from_safetensors
    from ws_mm.compat import read_checkpoint as read_safely

    with open(path, 'rb') as file:
        head = file.read(4)
    is_zip = zipfile.is_zipfile(path)
    if head == b'PK\x03\x04' and not is_zip:
        raise SetupError(
            f'Checkpoint {path} is truncated: the end of the file is missing. '
            'Its download or its saving was cut short; use another one.'
        )
    try:
        if path.endswith('.safetensors'):
            content = load_from_safetensors(path)
        else:
            # Files older than torch 1.6 are no zip and cannot be mapped.
            content = read_safely(path, mmap=is_zip)
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
        why = f'it has no state_dict; it holds {keys}'
        for key, value in content.items():
            if isinstance(value, dict) and any(
                isinstance(one, torch.Tensor) for one in value.values()
            ):
                raise _no_checkpoint(
                    path,
                    f'{why}. {key!r} holds tensors; if those are the weights, '
                    "name them so: torch.save({'state_dict': torch.load("
                    f'old){[key]!r}}}, new)',
                )
        raise _no_checkpoint(path, why)
    return content


def _no_checkpoint(path: str, why: str) -> SetupError:
    return SetupError(
        f'{path} is not a checkpoint: {why}. Give a .pth or .safetensors '
        'file that training saved or a released one.'
    )


# Of a teacher, too. timm reads its checkpoint_path itself, in more formats.
NAMED = ('.checkpoint', '.pretrained', '.teacher_ckpt')


def named_checkpoints(cfg: Config) -> list[tuple[str, str]]:
    """List the checkpoints that a config names, each with its key."""
    first = '--resume' if cfg.get('resume') else 'load_from'
    named = [
        (first, cfg.get('load_from')),
        *iter_nodes('model', cfg.get('model')),
    ]
    return [
        (key, value)
        for key, value in named
        if value
        and isinstance(value, str)
        and (key == first or key.endswith(NAMED))
    ]


def check_checkpoints(cfg: Config) -> None:
    """Look into every local checkpoint that the config names.

    Raises:
        SetupError: from :func:`read_checkpoint`, with the config key; or
            weights alone are to be resumed.
    """
    for key, path in named_checkpoints(cfg):
        if is_local(path):
            try:
                content = read_checkpoint(path)
            except SetupError as error:
                raise SetupError(f'{key}: {error}') from error
            if key == '--resume' and not _can_be_continued(content):
                raise SetupError(
                    f'--resume: {path} has weights alone, without the place '
                    'in the training (message_hub, meta.epoch, meta.iter). '
                    'To start a training from them, replace --resume by '
                    f'--cfg-options resume=False load_from={path}'
                )


def _can_be_continued(content: dict) -> bool:
    """Return whether a checkpoint has what mmengine resumes from."""
    meta = content.get('meta') or {}
    return 'message_hub' in content and {'epoch', 'iter'} <= set(meta)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network in what processes and test-time augmentation wrap it in."""
    while isinstance(getattr(model, 'module', None), nn.Module):
        model = model.module
    return model


def check_weights_fit(
    path: str | None, model: nn.Module, key: str = '', prefix: str = ''
) -> None:
    """Reject a checkpoint that shares no parameter name with the model.

    The host loads leniently: a foreign checkpoint would leave the model as
    it was initialised and only log the names.

    Args:
        path: the checkpoint.
        model: the network, or the part of it that is loaded.
        key: Key of the ``init_cfg`` with the checkpoint; '' for all of the
            network.
        prefix: Prefix of ``init_cfg``; names without it are not loaded.

    Raises:
        SetupError: no name is shared.
    """
    if not path or not is_local(path):
        return
    from ws_mm.checkpoint import differing_prefixes

    content = read_checkpoint(path)
    names = {str(name) for name in content.get('state_dict', content)}
    theirs = {name.removeprefix('module.') for name in names}
    if prefix:
        prefix = f'{prefix.rstrip(".")}.'
        theirs = {
            name.removeprefix(prefix)
            for name in names
            if name.startswith(prefix)
        }
    ours = set(model.state_dict())
    # Data-parallel wrappers and test-time augmentation prefix the names.
    ours |= {name.removeprefix('module.') for name in ours}
    ours |= {name.removeprefix('module.') for name in ours}
    if theirs & ours:
        return
    what = f'{key}: checkpoint' if key else 'Checkpoint'
    message = (
        f'{what} {path} shares no parameter with the model: it has '
        f'{min(theirs or names)!r}..., the model {min(ours)!r}.... '
    )
    extra, part = differing_prefixes(names, ours)
    if not extra and not part:
        raise SetupError(f'{message}It belongs to another config.')
    message += (
        f'The names are equal without the prefix {extra!r} of the checkpoint '
        f'and the prefix {part!r} of the model. '
    )
    if key and not part:
        raise SetupError(f'{message}Set {key}.prefix={extra!r}.')
    above = key.partition('init_cfg')[0] or 'model.'
    option = f', prefix={extra!r}' if extra else ''
    raise SetupError(
        f'{message}To start a training from it, set {above}{part}init_cfg='
        f"dict(type='Pretrained', checkpoint={path!r}{option}) in place of "
        f'{key or "load_from"}; to evaluate it, rename them.'
    )


def check_parts_fit(model: nn.Module) -> None:
    """Do as :func:`check_weights_fit` for what parts of the model load.

    Parts with an ``init_weights`` of their own may rename what they load.

    Raises:
        SetupError: a part shares no name with the checkpoint of its
            ``init_cfg``.
    """
    for name, part in unwrapped(model).named_modules():
        if getattr(type(part), 'init_weights', None) is not HOST_INIT:
            continue
        listed = isinstance(part.init_cfg, (list, tuple))
        for index, init in enumerate(
            part.init_cfg if listed else [part.init_cfg]
        ):
            if isinstance(init, dict) and init.get('checkpoint'):
                key = f'model.{name}.init_cfg'.replace('..', '.')
                check_weights_fit(
                    init['checkpoint'],
                    part,
                    f'{key}.{index}' if listed else key,
                    init.get('prefix') or '',
                )


def check_weights_complete(path: str, model: nn.Module) -> None:
    """Reject a checkpoint that leaves a part of the model as initialised.

    The model itself says what is missing, after its layers have mapped other
    layouts to theirs.

    Raises:
        SetupError: a tensor of the model is in no way in the checkpoint.
    """
    if not is_local(path):
        return
    from ws_mm.checkpoint import without_prefix

    content = read_checkpoint(path)
    state = without_prefix(content.get('state_dict', content))
    model = unwrapped(model)
    try:
        with warnings.catch_warnings():
            # The model may be one without values (launch.model_of).
            warnings.filterwarnings('ignore', '.*copying from a non-meta')
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
    folder: str, with_optimizer: bool = True, work_dir: str = ''
) -> tuple[str | None, list[str]]:
    """Checkpoint to continue from, and what was passed over.

    That is the one which ``last_checkpoint`` names. Where it is gone or
    broken, the one saved last by what it says itself: an earlier run may
    have left more iterations in the same folder.

    Args:
        folder: Folder of the checkpoints.
        with_optimizer: Skip files that hold weights only, which is
            what ``save_best`` writes.
        work_dir: Folder of ``last_checkpoint``; default: ``folder``.

    Returns:
        The path or None, and one line per file that was passed over because
        it is broken.
    """
    named, last = Path(work_dir or folder, 'last_checkpoint'), ''
    if named.is_file():
        # The work dir may have been moved since.
        last = Path(named.read_text().strip()).name
    best, broken = None, []
    for path in sorted(Path(folder).glob('*.pth')):
        try:
            content = read_checkpoint(path)
        except SetupError as error:
            broken.append(str(error))
            continue
        if not _can_be_continued(content):
            continue
        if with_optimizer and 'optimizer' not in content:
            continue
        time, iteration = content['meta'].get('time'), content['meta']['iter']
        # Several may be saved within the second that the time is exact to.
        place = path.name == last, time or '', iteration, str(path)
        best = max(best or place, place)
    return best and best[-1], broken
