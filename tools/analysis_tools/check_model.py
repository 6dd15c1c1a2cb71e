"""List what normalizes each convolution of a config's model.

Exits with 1 if a standardized convolution has no normalization after it.
Batch norms are named, too.
"""

import argparse
import sys
from pathlib import Path

from mmengine.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import launch, models
from support.checks import iter_nodes

from ws_mm.config_edits import loads
from ws_mm.shapes import WEIGHTS, batch_norms


def parse_args() -> argparse.Namespace:
    """Command line of the check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--size',
        type=launch.positive,
        default=128,
        help='height and width in pixels of the image that is run '
        '(default: 128)',
    )
    launch.add_common_options(parser)
    return parser.parse_args()


def loads_weights(cfg: Config) -> bool:
    """Return whether a config names a checkpoint anywhere."""
    return bool(cfg.get('load_from')) or any(
        isinstance(node, dict)
        and (loads(node.get('init_cfg')) or any(map(node.get, WEIGHTS)))
        for _, node in iter_nodes('model', cfg.model)
    )


def report_on(cfg: Config, size: int) -> list[str]:
    """Print the table of a config's model and return its mistakes."""
    model = models.build_model(cfg)
    report, note = models.judge(cfg, model, size)
    if note:
        print(note)
    print(report)
    print(
        'known: proven, as the model ran on an image, or guessed from names '
        'and order'
    )
    for mistake in report.mistakes:
        print(f'mistake: {mistake}')
    model.train()  # norm_eval of a backbone acts here
    every = batch_norms(model)
    names = [name for name in every if model.get_submodule(name).training]
    if names:
        print(
            f'{len(names)} batch norms: {", ".join(names)}. With one or two '
            'images per process they train on poor statistics. '
            'tools/model_converters/apply_norm.py replaces them, with '
            '--remaining those that no norm_cfg reaches.'
        )
    if len(every) > len(names):
        weights = (
            'right for the pretrained weights that the config loads'
            if loads_weights(cfg)
            else 'wrong here, since the config loads no checkpoint (init_cfg, '
            'load_from), without which they normalize nothing'
        )
        print(
            f'{len(every) - len(names)} batch norms normalize by their '
            'running statistics in training, too (norm_eval, '
            f'frozen_stages): {weights}.'
        )
    if not report.mistakes:
        count = sum(conv.standardized for conv in report)
        print(f'A norm follows each of {count} standardized convolutions.')
    return report.mistakes


def main() -> None:
    """Check one config."""
    args = parse_args()
    cfg = launch.load_config(args, ('model',))
    sys.exit(1 if report_on(cfg, args.size) else 0)


if __name__ == '__main__':
    launch.run(main)
