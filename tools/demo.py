"""Train Mask R-CNN and DeepLab with WS and BCN on real images, in minutes.

Every step is an ordinary command of this repository, and is printed. Stop it
at any time: the same command continues where it was.
"""

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dataset_converters.nuclei_tiles import NO_DOWNLOAD
from mmengine.config import Config
from support import ROOT, launch
from support.checks import SetupError, check_writable

CONFIGS = ROOT / 'configs/demo'
CONVERTER = 'dataset_converters/nuclei_tiles.py'
NEXT = """
Everything runs. The tiles are alike, and do not show which norm is better:
docs/results.md does. Go on with docs/tutorials/one_image.md, in this
environment: source {activate}"""
# Without --compare only the first.
NORMS = ('bcn-ws-all', 'gn-ws-all', 'gn-all', 'bn')


@dataclass(frozen=True)
class Model:
    """One of the two networks of the demo."""

    title: str
    configs: str  # pattern of their names, with a place for the norm
    metrics: dict[str, str]  # name in the host's file to name for people


MODELS = (
    Model(
        'Mask R-CNN',
        'mask-rcnn_r18_fpn64_{}*_1xb1-400i_stardist.py',
        {'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'},
    ),
    Model(
        'DeepLabV3',
        'deeplabv3_r18-d16_{}*_1xb1-300i_stardist.py',
        {'mIoU': 'mIoU', 'mDice': 'mDice'},
    ),
)


def call(script: str, *arguments: object) -> int:
    """Print and run a script of this folder; return its exit status."""
    words = [ROOT / 'tools' / script, *arguments]
    command = [sys.executable, *map(str, words)]
    print(f'$ {shlex.join(command)}', flush=True)
    return subprocess.run(command).returncode


def call_well(script: str, *arguments: object) -> None:
    """Run a script; end the demo if it fails."""
    status = call(script, *arguments)
    if status:
        raise SetupError(
            f'{script} failed (exit status {status}); what it said is above. '
            'The same command tries again from here.'
        )


def prepare_data(offline: bool) -> tuple[Path, str]:
    """Write the tiles of the real image, or else of generated shapes.

    Returns:
        Folder of the data set, and a line on where the images come from.
    """
    data = Path('data/demo/stardist')
    status = NO_DOWNLOAD if offline else call(CONVERTER, '--out', data)
    if status == NO_DOWNLOAD:
        data = Path('data/demo/generated')
        call_well(CONVERTER, '--out', data, '--generated')
    elif status:
        raise SetupError(f'{CONVERTER} failed; what it said is above.')
    return data, json.loads((data / 'source.json').read_text())['origin']


def data_options(config: Config, data: Path) -> list[str]:
    """Return the options that lead a config to the data."""
    loaders = ('train', 'val', 'test')
    options = [f'{x}_dataloader.dataset.data_root={data}/' for x in loaders]
    if 'ann_file' in config.test_evaluator:
        file = data / 'annotations/instances_val.json'
        options += [f'{x}_evaluator.ann_file={file}' for x in loaders[1:]]
    return options


def run(model: Model, norm: str, folder: Path, data: Path) -> str:
    """Train, evaluate and draw with one network.

    Args:
        model: network.
        norm: its norm, as in the name of the config.
        folder: folder of all trainings on these data.
        data: root of the data set.

    Returns:
        A line with the results.
    """
    (path,) = CONFIGS.glob(model.configs.format(norm))
    config = Config.fromfile(path)
    steps, work_dir = config.train_cfg.max_iters, folder / path.stem
    options = ['--cfg-options', *data_options(config, data)]
    weights = work_dir / f'iter_{steps}.pth'
    if weights.exists():
        print(f'{weights} is there: delete it to train anew.')
    else:
        where = ('--work-dir', work_dir, '--resume')
        call_well('train.py', path, *where, *options)
    tested, pictures = work_dir / 'test', work_dir / 'pictures'
    shutil.rmtree(tested, ignore_errors=True)
    where = ('--work-dir', tested, '--show-dir', pictures)
    call_well('test.py', path, weights, *where, *options)
    (found,) = tested.glob('*/*.json')
    values = json.loads(found.read_text())
    # The host gives no AP where nothing at all was found.
    results = ', '.join(
        f'{name} {values.get(key, 0.0):.3g}'
        for key, name in model.metrics.items()
    )
    # Where the hosts draw, they add folders of their own.
    drawn = next(pictures.rglob('*.png'), pictures / '.').parent
    return f'{model.title}, {norm}, {steps} steps: {results}; see {drawn}'


def parse_args() -> argparse.Namespace:
    """Command line of the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--compare',
        action='store_true',
        help='also train with GN+WS, GN and BN: four times as long',
    )
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs/demo'),
        help='folder for trainings and pictures',
    )
    parser.add_argument(
        '--offline',
        action='store_true',
        help='use generated shapes; nothing is fetched',
    )
    return parser.parse_args()


def main() -> None:
    """Get the data, then train and evaluate."""
    args = parse_args()
    check_writable(str(args.work_dir), '--work-dir')
    # So that the child ends, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        data, origin = prepare_data(args.offline)
        lines = [
            run(model, norm, args.work_dir / data.name, data)
            for norm in NORMS[: None if args.compare else 1]
            for model in MODELS
        ]
    except KeyboardInterrupt:
        print('Interrupted. The same command continues from here.')
        sys.exit(130)
    print('', origin, *lines, sep='\n')
    if data.name == 'generated':
        print('*** The images are GENERATED SHAPES, not the real image.')
    print(NEXT.format(activate=Path(sys.prefix) / 'bin/activate'))


if __name__ == '__main__':
    launch.run(main)
