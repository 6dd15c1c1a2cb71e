"""Add the SBD annotations to VOC 2012, as training on its 10582 images needs.

From these two:

    data/VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets}
        VOCtrainval_11-May-2012.tar (2 GB), unpacked in data
    data/VOCdevkit/VOCaug/dataset/{cls/*.mat,train.txt,val.txt}
        benchmark.tgz (1.4 GB), its benchmark_RELEASE renamed to VOCaug

it writes, into VOC2012:

    SegmentationClassAug/*.png    labels of all training images; VOC's own
                                  where VOC has them, else those of SBD
    ImageSets/Segmentation/aug.txt         images that only SBD labels
    ImageSets/Segmentation/trainaug.txt    those and VOC's train

An interrupted run continues where it was when it is started again.
"""

import argparse
import os
import signal
import sys
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.files import replacing, write_text

try:
    from scipy.io import loadmat
except ImportError:
    sys.exit('The SBD files need scipy. Install it with: pip install scipy')

VOC_SOURCE = (
    'from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/'
    'VOCtrainval_11-May-2012.tar'
)
SBD_SOURCE = (
    'from http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/'
    'semantic_contours/benchmark.tgz'
)
LABELS = {*range(21), 255}
OFFICIAL = {'train': 1464, 'val': 1449, 'aug': 9118, 'trainaug': 10582}
SHOWN = 10


def missing_parts(voc: Path, sbd: Path) -> list[str]:
    """One line per file or folder that the conversion needs and lacks."""
    sets = voc / 'ImageSets' / 'Segmentation'
    needed = {
        voc / 'JPEGImages': VOC_SOURCE,
        voc / 'SegmentationClass': VOC_SOURCE,
        sets / 'train.txt': VOC_SOURCE,
        sets / 'val.txt': VOC_SOURCE,
        sbd / 'dataset' / 'cls': SBD_SOURCE,
        sbd / 'dataset' / 'train.txt': SBD_SOURCE,
        sbd / 'dataset' / 'val.txt': SBD_SOURCE,
    }
    return [
        f'missing {path}: {origin}'
        for path, origin in needed.items()
        if not path.exists()
    ]


def read_names(path: Path) -> list[str]:
    """Image names of a list file."""
    return path.read_text().split()


def is_whole(path: Path, size: tuple[int, int]) -> bool:
    """Return whether a label image is readable and as large as its photo."""
    try:
        with Image.open(path) as labels:
            labels.load()
            return labels.size == size
    except (OSError, SyntaxError):
        return False


def convert(
    name: str, voc: Path, sbd: Path, own: frozenset[str]
) -> str | None:
    """Write the label image of one photo.

    Args:
        name: Name of the image, without folder and suffix.
        voc: the VOC2012 folder.
        sbd: the folder that holds ``dataset``.
        own: names that VOC itself labels.

    Returns:
        What is wrong, or None.
    """
    photo = voc / 'JPEGImages' / f'{name}.jpg'
    target = voc / 'SegmentationClassAug' / f'{name}.png'
    if name in own:
        labelled = voc / 'SegmentationClass' / f'{name}.png'
    else:
        labelled = sbd / 'dataset' / 'cls' / f'{name}.mat'
    for path in (photo, labelled):
        if not path.is_file():
            origin = SBD_SOURCE if path.suffix == '.mat' else VOC_SOURCE
            return f'missing {path}: {origin}'
    try:
        with Image.open(photo) as picture:
            size = picture.size
        if is_whole(target, size):
            return None
        if name in own:
            with Image.open(labelled) as image:
                mode, labels = image.mode, np.array(image)
            if mode not in ('P', 'L'):
                return (
                    f'{labelled} is of mode {mode}: labels are one channel of '
                    "class indices, as VOC's own PNGs with a palette are (P) "
                    f'or gray ones (L). Unpack it anew {VOC_SOURCE}'
                )
        else:
            truth = loadmat(labelled)['GTcls'][0, 0]
            labels = truth['Segmentation']
    except Exception as error:
        return f'unreadable {photo} or {labelled} ({error})'
    if labels.shape != size[::-1]:
        return (
            f'{labelled} is {labels.shape[1]}x{labels.shape[0]}, but {photo} '
            f'is {size[0]}x{size[1]}'
        )
    wrong = set(np.unique(labels).tolist()) - LABELS
    if wrong:
        return (
            f'{labelled} holds the label {min(wrong)}: those of VOC are 0 to '
            '20, and 255 where nothing counts'
        )
    # A process may be killed at any point: only whole files get their name.
    with replacing(target) as part:
        Image.fromarray(labels.astype(np.uint8)).save(part)
    return None


def ignore_interrupt() -> None:
    """Leave Ctrl-C to the parent, which ends the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def prepare(voc: Path, sbd: Path, nproc: int) -> list[str]:
    """Convert what is not converted yet, then write the lists.

    Args:
        voc: the VOC2012 folder.
        sbd: the folder that holds ``dataset``.
        nproc: number of processes.

    Returns:
        One line per problem; the lists are written only when there is none.
    """
    problems = missing_parts(voc, sbd)
    if problems:
        return problems
    sets = voc / 'ImageSets' / 'Segmentation'
    train = read_names(sets / 'train.txt')
    val = set(read_names(sets / 'val.txt'))
    in_sbd = set()
    for split in ('train', 'val'):
        in_sbd.update(read_names(sbd / 'dataset' / f'{split}.txt'))
    aug = sorted(in_sbd - set(train) - val)
    names = {'aug': aug, 'trainaug': sorted({*aug, *train})}

    folder = voc / 'SegmentationClassAug'
    if folder.exists() and not folder.is_dir():
        return [f'{folder} is a file; the label images need a folder there']
    folder.mkdir(exist_ok=True)
    task = partial(convert, voc=voc, sbd=sbd, own=frozenset(train))
    with Pool(nproc, ignore_interrupt) as pool:
        done = pool.imap_unordered(task, names['trainaug'], chunksize=16)
        total = len(names['trainaug'])
        problems = [
            problem
            for problem in track(done, 'converting', total=total)
            if problem
        ]
    for name in val:
        for path in (
            voc / 'JPEGImages' / f'{name}.jpg',
            voc / 'SegmentationClass' / f'{name}.png',
        ):
            if not path.is_file():
                problems.append(f'missing {path}: {VOC_SOURCE}')
    if problems:
        return sorted(problems)
    for split, split_names in names.items():
        write_text(sets / f'{split}.txt', '\n'.join(split_names) + '\n')
    counts = {k: len(v) for k, v in names.items()}
    counts |= {'train': len(train), 'val': len(val)}
    for split, count in counts.items():
        print(f'{split}: {count} images')
        if count != OFFICIAL[split]:
            print(f'  note: the official list has {OFFICIAL[split]}')
    return []


def main() -> int:
    """Prepare the tree; 0 if it is complete."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'devkit_path', nargs='?', default='data/VOCdevkit', type=Path
    )
    parser.add_argument(
        'aug_path', nargs='?', default='data/VOCdevkit/VOCaug', type=Path
    )
    parser.add_argument(
        '--nproc', type=int, default=os.cpu_count(), help='processes'
    )
    args = parser.parse_args()
    if args.nproc < 1:
        parser.error(f'--nproc={args.nproc}: give 1 or more')
    voc = args.devkit_path / 'VOC2012'
    try:
        problems = prepare(voc, args.aug_path, args.nproc)
    except KeyboardInterrupt:
        print('interrupted; start it again to continue')
        return 130
    for line in problems[:SHOWN]:
        print(line)
    if len(problems) > SHOWN:
        print(f'... {len(problems)} problems in all')
    if not problems:
        print(f'{voc} is complete')
    return int(bool(problems))


if __name__ == '__main__':
    sys.exit(main())
