"""Say which norm to use, with the edit and the figures behind it.

    python tools/misc/recommend.py --start bn --images 1
    python tools/misc/recommend.py --start none --images 2 --processes 8

Prints layers, the command that edits a config, the learning rate, our
measurements, and memory. docs/which_norm.md explains them.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import records
from experiments.which import best
from support import ROOT, launch
from support.checks import SetupError

RECORDS = Path('docs/results/records.json')
MEMORY = Path('tools/benchmark/results/model--cpu.json')
MEMORY_CASE = 'Mask R-CNN train 1x3x800x1344'
STARTS = {
    'bn': 'a backbone pretrained with BN',
    'ws': 'a backbone pretrained with GN+WS or BCN+WS',
    'none': 'random weights',
}
# Images of one statistic with which BN was measured to work.
ENOUGH = 16


@dataclass(frozen=True)
class Advice:
    """What to use.

    Attributes:
        use: layers, and where.
        options: of apply_norm.py.
        rate: learning rate.
        why: one sentence.
        page: with the tables.
        compared: task, images per step and rows of those tables.
    """

    use: str
    options: str
    rate: str
    why: str
    page: str
    compared: Sequence[tuple[str, int, Sequence[str]]]


LINEAR = "your config's, scaled to the images of a step (--images-per-step)"
SMALL = f'{LINEAR}; 3 to 10 times that was better in our small models'
EASED = (
    'frozen BN, GN+WS in the heads',
    'BN to BCN, eased in, GN+WS in the heads',
)
REPLACED = ('BN to BCN, eased in, learned', 'BN', 'BN to GN+WS', 'BN to BCN')
FROZEN = Advice(
    use='the backbone as it is, its BN frozen; GN+WS in neck and heads. '
    'Compare EasedBCN in the backbone (--backbone ease)',
    options='',
    rate=f'{LINEAR}; with frozen BN a third of that was better on both of '
    'our tasks',
    why='Few images spoil pretrained statistics, and other norms or '
    'standardized filters compute another function than was pretrained. '
    'BCN that is eased in was ahead on one of our two tasks. With two '
    'images (one seed) the order is the same; more we have not measured.',
    page='docs/results/pretrained.md',
    compared=[
        (task, images, EASED if images == 2 else (*EASED, *REPLACED))
        for images in (1, 2)
        for task in ('voc_masks', 'person_instances')
    ],
)
WS = Advice(
    use='the layers of the checkpoint in backbone, neck and heads',
    options='--backbone convert --norm GN',
    rate=LINEAR,
    why='Layers must be those that were pretrained: --norm BCN for a BCN+WS '
    'checkpoint. The tool removes the old checkpoint, so set yours in '
    'NEW.py: model.backbone.init_cfg=dict(type="Pretrained", '
    'checkpoint=...). We have not compared such starts; the authors did.',
    page='configs/README.md',
    compared=[],
)
FEW = Advice(
    use='GN+WS everywhere',
    options='--backbone convert',
    rate=SMALL,
    why='It computes the same in training and testing. With one image it '
    'was about five points behind the best of all norms, which is another '
    'one on each task. With 2 to 15 images we have short runs of one seed '
    'only.',
    page='docs/results.md and docs/zoo.md',
    compared=[
        ('cifar_resnet8', 1, ('BN', 'GN', 'GN+WS', 'BCN+WS')),
        ('nuclei_masks', 1, ('GN', 'GN+WS', 'BCN+WS')),
        *(
            (task, images, ('BN', 'GN+WS', 'BCN+WS', 'MABN'))
            for images in (2, 4)
            for task in ('cifar_resnet8_short', 'nuclei_masks_short')
        ),
    ],
)
MANY = Advice(
    use='BCN+WS in batch mode everywhere, or BN, on several GPUs SyncBN '
    '(--norm SyncBN --conv keep)',
    options='--backbone convert --norm BCN --norm-options mode=sync_batch '
    'momentum=0.1',
    rate=SMALL,
    why='With so many images the statistics of the batch are good.',
    page='docs/results.md',
    compared=[('cifar_resnet8', 16, ('BCN+WS batch', 'BN', 'GN+WS'))],
)


def advise(start: str, images: int, processes: int) -> Advice:
    """Choose from what a user has.

    Args:
        start: key of STARTS.
        images: per process and step.
        processes: that share statistics (SyncBN, ``mode='sync_batch'``).
    """
    if start == 'ws':
        return WS
    if start == 'bn':
        return FROZEN
    return MANY if images * processes >= ENOUGH else FEW


def from_checkout(path: Path) -> Path:
    """Return a file of the repository.

    Raises:
        SetupError: it is not there.
    """
    if not (ROOT / path).is_file():
        raise SetupError(
            f'{ROOT / path} is not there: the figures are in the checkout, '
            'not in an installed ws_mm. Run this tool from there.'
        )
    return ROOT / path


def evidence(advice: Advice) -> list[str]:
    """One line for each task: the metric of each row, at its best rate."""
    if not advice.compared:
        return []
    found, _ = records.read_all(from_checkout(RECORDS))
    lines = []
    for task, images, names in advice.compared:
        words = []
        for name in names:
            own = [
                one
                for one in found
                if one['cell']['task'] == task
                and one['cell']['images'] == images
                and one['cell']['label'] == name
                and one['cell'].get('accumulation', 1) == 1
            ]
            if own:
                words.append(f'{name} {best(own)}')
        lines.append(f'{task}, {images} per step: {"; ".join(words)}')
    return lines


def memory() -> dict[str, float]:
    """MiB that one image keeps for the backward, R50 Mask R-CNN, by norm."""
    text = from_checkout(MEMORY).read_text()
    cases: list[dict[str, Any]] = json.loads(text)['cases']
    (case,) = (one for one in cases if one['name'] == MEMORY_CASE)
    return {
        row['contender']: row['saved_bytes'] / 2**20
        for row in case['rows']
        if 'saved_bytes' in row
    }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    starts = '; '.join(f'{key}: {text}' for key, text in STARTS.items())
    parser.add_argument('--start', choices=STARTS, required=True, help=starts)
    parser.add_argument(
        '--images', type=int, required=True, help='images per process (GPU)'
    )
    parser.add_argument(
        '--processes', type=int, default=1, help='of the training (GPUs)'
    )
    args = parser.parse_args(argv)
    for name in ('images', 'processes'):
        if getattr(args, name) < 1:
            parser.error(f'--{name}={getattr(args, name)} must be at least 1')
    return args


def main() -> None:
    """Print the advice."""
    args = parse_args()
    advice = advise(args.start, args.images, args.processes)
    total = args.images * args.processes
    measured, kept = evidence(advice), memory()
    plural = 's' if total > 1 else ''
    print(f'From {STARTS[args.start]}, {total} image{plural} per step:')
    print(f'  use      {advice.use}')
    options = f' {advice.options}' if advice.options else ''
    print(
        '  edit     python tools/model_converters/apply_norm.py CONFIG NEW.py '
        f'--images-per-step {total}{options}'
    )
    print(
        f'  batch    train_dataloader.batch_size={args.images} in NEW.py, '
        f'on {args.processes} process{"es" if args.processes > 1 else ""}'
    )
    print(f'  rate     {advice.rate}')
    print(f'  because  {advice.why}')
    for line in measured:
        print(f'  measured {line}')
    print(f'  tables   {advice.page}')
    sizes = ', '.join(f'{name} {size:.0f}' for name, size in kept.items())
    print(
        '  memory   MiB that an image of 800x1344 keeps in Mask R-CNN R50: '
        f'{sizes} (frozen BN: heads without norm). Of your config: '
        'doctor.py NEW.py --memory'
    )


if __name__ == '__main__':
    launch.run(main)
