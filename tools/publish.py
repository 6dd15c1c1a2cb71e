"""Prepare a checkpoint for others: weights and meta, named by their hash.

Optimizer, schedulers, message hub and, unless --ema, the averaged copy of the
weights stay behind. OUT_DIR/NAME-<first 8 digits of the sha256>.pth appears
whole or not at all.
"""

import argparse
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import checks
import launch
import torch
from checks import SetupError

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
        action='store_true',
        help='publish the weights that EMAHook averaged',
    )
    return parser.parse_args()


def published(content: dict, ema: bool = False) -> tuple[dict, list[str]]:
    """What is kept of a checkpoint, and the keys that are not.

    Args:
        content: the checkpoint.
        ema: take the averaged weights.

    Raises:
        SetupError: it has no weights, or no averaged ones.
    """
    weights = content.get('state_dict')
    if not weights:
        raise SetupError(
            'The checkpoint has no state_dict: it is none of a training. '
            f'It holds {", ".join(map(str, list(content)[:8])) or "nothing"}.'
        )
    if ema:
        averaged = content.get('ema_state_dict')
        if not averaged:
            raise SetupError(
                '--ema: the checkpoint has no ema_state_dict; leave --ema '
                'out, or train with custom_hooks = [dict(type="EMAHook")].'
            )
        # EMAHook keeps its own model and the number of its steps.
        weights = {
            name.removeprefix('module.'): values
            for name, values in averaged.items()
            if name != 'steps'
        }
    import ws_mm

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
    # A view would drag all of its storage along.
    weights = {name: values.clone() for name, values in weights.items()}
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
    content = checks.read_checkpoint(args.checkpoint)
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
    print(f'left behind: {", ".join(left) or "nothing"}')
    print(f'sha256: {digest}')
    print(target)


if __name__ == '__main__':
    launch.run(main)
