"""Check a COCO 2017 tree and say exactly what is missing and where it goes.

The tree, and what it comes from:

    data/coco/annotations/instances_{train,val}2017.json
        http://images.cocodataset.org/annotations/annotations_trainval2017.zip
    data/coco/train2017/*.jpg    118287 images
        http://images.cocodataset.org/zips/train2017.zip (18 GB)
    data/coco/val2017/*.jpg      5000 images
        http://images.cocodataset.org/zips/val2017.zip (0.8 GB)
"""

import argparse
import json
import os
import sys
from multiprocessing import Pool
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track

SITE = 'http://images.cocodataset.org'
IMAGES = {'train2017': 118287, 'val2017': 5000}
SHOWN = 10
NEEDED = {
    'images': ('id', 'file_name', 'width', 'height'),
    'annotations': ('image_id', 'category_id'),
}


def source(root: Path, archive: str) -> str:
    """Describe how to get an archive of the data set into the tree."""
    name = Path(archive).name
    if (root / name).is_file():
        return f'unpack it there: unzip -q {root / name} -d {root}'
    return f'from {SITE}/{archive}, unpacked in {root}'


def read_annotations(path: Path) -> tuple[dict | None, str]:
    """Content of an instance file, or None and what is wrong with it."""
    print(f'reading {path} ...', flush=True)
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        return None, f'{path} is not readable JSON ({error})'
    fault = fault_of(content)
    return (None, f'{path}{fault}') if fault else (content, '')


def fault_of(content: Any) -> str:
    """Say behind the name of an instance file what is wrong with it."""
    keys = ('images', 'annotations', 'categories')
    if not isinstance(content, dict) or any(k not in content for k in keys):
        return f' has no {", ".join(keys)}: not an instance file'
    for key in keys:
        if not isinstance(content[key], list):
            return f': {key} is no list'
    if not content['images']:
        return ' lists no images'
    for key, needed in NEEDED.items():
        for entry in content[key]:
            for name in needed:
                if name not in entry:
                    return f': one of {key} has no {name}: {entry}'
    ids = {image['id'] for image in content['images']}
    for entry in content['annotations']:
        if entry['image_id'] not in ids:
            return f': annotations of no image (id {entry["image_id"]!r})'
    return ''


def damaged(image: tuple[str, int, int]) -> str | None:
    """Path and fault of an image that does not decode to its size."""
    path, width, height = image
    try:
        with Image.open(path) as picture:
            picture.load()
            size = picture.size
    except Exception as error:
        return f'{path} does not decode ({error})'
    if size != (width, height):
        return f'{path} is {size[0]}x{size[1]}, annotated {width}x{height}'
    return None


def check_split(root: Path, split: str, nproc: int | None) -> list[str]:
    """Compare the listing of one split with its annotation file.

    Args:
        root: the COCO tree.
        split: such as ``'val2017'``.
        nproc: processes that decode every image, None to not decode.

    Returns:
        One line per problem.
    """
    problems = []
    ann_file = root / 'annotations' / f'instances_{split}.json'
    folder = root / split
    annotations = 'annotations/annotations_trainval2017.zip'
    content = None
    if ann_file.is_file():
        content, fault = read_annotations(ann_file)
        if fault:
            problems.append(f'{fault}; get it {source(root, annotations)}')
    else:
        problems.append(f'missing {ann_file}: {source(root, annotations)}')
    if not folder.is_dir():
        problems.append(
            f'missing {folder}/: {source(root, f"zips/{split}.zip")}'
        )
        return problems
    with os.scandir(folder) as entries:
        sizes = {e.name: e.stat().st_size for e in entries if e.is_file()}
    if content is None:
        return problems

    images = content['images']
    listed = {image['file_name'] for image in images}
    absent = sorted(name for name in listed if not sizes.get(name))
    print(
        f'{split}: {len(listed)} images listed, {len(listed) - len(absent)} '
        f'there, {len(content["annotations"])} objects'
    )
    if len(listed) != IMAGES[split]:
        print(f'  note: the official file lists {IMAGES[split]} images')
    for name in absent[:SHOWN]:
        state = 'empty file' if name in sizes else 'missing'
        problems.append(f'{state} {folder / name}')
    if len(absent) > SHOWN:
        problems.append(f'... {len(absent)} images of {folder} in all')
    if absent:
        problems.append(
            f'images of {split}: {source(root, f"zips/{split}.zip")}'
        )
    if nproc is not None:
        tasks = [
            (str(folder / i['file_name']), i['width'], i['height'])
            for i in images
            if sizes.get(i['file_name'])
        ]
        with Pool(nproc) as pool:
            faults = pool.imap_unordered(damaged, tasks, chunksize=32)
            problems += filter(
                None,
                track(faults, f'decoding {split}', total=len(tasks)),
            )
    return problems


def main() -> int:
    """Check the tree; 0 if it is complete."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'root', nargs='?', default='data/coco', type=Path, help='the tree'
    )
    parser.add_argument(
        '--splits', nargs='+', choices=list(IMAGES), default=list(IMAGES)
    )
    parser.add_argument(
        '--decode',
        action='store_true',
        help='decode every image, which finds damaged ones',
    )
    parser.add_argument(
        '--nproc', type=int, default=os.cpu_count(), help='for --decode'
    )
    args = parser.parse_args()
    if args.nproc < 1:
        parser.error(f'--nproc={args.nproc}: give 1 or more')
    nproc = args.nproc if args.decode else None
    problems = []
    for split in args.splits:
        problems += check_split(args.root, split, nproc)
    for line in problems:
        print(line)
    if not problems:
        print(f'{args.root} is complete')
    return int(bool(problems))


if __name__ == '__main__':
    sys.exit(main())
