"""Prepare a checkpoint for others: weights and meta, named by their hash.

Optimizer, schedulers and message hub stay behind. Of a training with EMAHook
the averaged weights are published, which are those that it validated.
OUT_DIR/NAME-<first 8 digits of the sha256>.pth appears whole or not at all.
"""

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import checkpoints, checks, launch
from support.checks import SetupError

# The only part of a name that a host checks, after download.
DIGITS = 8


def parse_args() -> argparse.Namespace:
    """Command line of publishing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', help='checkpoint of a training')
    parser.add_argument('out_dir', help='folder for the new file')
    parser.add_argument(
        '--name', help='of the new file; default: that of its config'
    )
    parser.add_argument(
        '--ema',
        action=argparse.BooleanOptionalAction,
        help='publish the weights that EMAHook averaged (--ema), or those '
        'that the optimizer moved (--no-ema); default: the averaged ones '
        'where there are any',
    )
    return parser.parse_args()


def weights_of(content: dict, ema: bool | None = None) -> dict:
    """The weights of a checkpoint that are asked for.

    EMAHook swaps while it saves: ``state_dict`` holds the average and
    ``ema_state_dict`` what the optimizer moved.

    Args:
        content: the checkpoint.
        ema: True for the averaged weights, False for the others, None for
            the averaged ones where there are any.

    Raises:
        SetupError: it has no weights, or none of two kinds to choose from.
    """
    from ws_mm.checkpoint import without_prefix

    weights = content.get('state_dict')
    if not weights:
        raise SetupError(
            'The checkpoint has no state_dict: it is none of a training. '
            f'It holds {", ".join(map(str, list(content)[:8])) or "nothing"}.'
        )
    other = content.get('ema_state_dict')
    if ema is not None and not other:
        raise SetupError(
            f'--{"" if ema else "no-"}ema: the checkpoint has no '
            'ema_state_dict, so its weights were not averaged: leave the '
            'option out, or train with custom_hooks = [dict(type="EMAHook")].'
        )
    if ema is False:
        # EMAHook keeps the number of its steps beside its model.
        weights = without_prefix(other)
        weights.pop('steps', None)
        return weights
    return without_prefix(weights, '')


def published(
    content: dict, ema: bool | None = None
) -> tuple[dict, list[str]]:
    """Return the published part of a checkpoint and the other keys.

    Args:
        content: the checkpoint.
        ema: which weights, see :func:`weights_of`.

    Raises:
        SetupError: from :func:`weights_of`.
    """
    import ws_mm

    weights = weights_of(content, ema)
    meta: dict[str, Any] = dict(content.get('meta') or {})
    kept = {
        key: meta[key]
        for key in (
            *('cfg', 'dataset_meta', 'experiment_name', 'seed'),
            *('epoch', 'iter', 'mmengine_version', 'time'),
        )
        if key in meta
    }
    kept['ws_mm_version'] = ws_mm.__version__
    kept['torch_version'] = str(torch.__version__)
    for name, values in weights.items():
        # A view would drag all of its storage along.
        weights[name] = values.clone()
    new = dict(meta=kept, state_dict=weights)
    return new, [str(key) for key in content if key not in new]


def default_name(content: dict) -> str:
    """The name of the config that a checkpoint was trained with.

    Raises:
        SetupError: the checkpoint does not know it.
    """
    name = (content.get('meta') or {}).get('experiment_name') or ''
    # The Runner appends date and time.
    stem, _, last = str(name).rpartition('_')
    stem, _, day = stem.rpartition('_')
    if not (stem and day.isdecimal() and last.isdecimal()):
        raise SetupError(
            'The checkpoint does not name its config: give --name.'
        )
    return stem


def main() -> None:
    """Read, strip, hash, write."""
    args = parse_args()
    content = checkpoints.read_checkpoint(args.checkpoint)
    new, left = published(content, args.ema)
    name = args.name or default_name(content)
    if os.path.basename(name) != name:
        raise SetupError(f'--name {name}: a name, not a path.')
    checks.check_writable(args.out_dir, 'OUT_DIR')
    folder = Path(args.out_dir)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.writing-') as made:
        # The name of the archive in the file is that of the file.
        path = Path(made, 'weights.pth')
        torch.save(new, path)
        sha = hashlib.sha256()
        with open(path, 'rb') as file:
            # hashlib.file_digest is not in Python 3.10.
            for block in iter(lambda: file.read(1 << 20), b''):
                sha.update(block)
        digest = sha.hexdigest()
        target = folder / f'{name}-{digest[:DIGITS]}.pth'
        os.replace(path, target)
    if 'ema_state_dict' in content:
        kind = 'moved by the optimizer' if args.ema is False else 'averaged'
        print(f'weights: {kind}, of a training with EMAHook')
    print(f'left behind: {", ".join(left) or "nothing"}')
    print(f'sha256: {digest}')
    print(target)


if __name__ == '__main__':
    launch.run(main)
