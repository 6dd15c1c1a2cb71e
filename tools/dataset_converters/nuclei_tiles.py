"""Cut one labelled image of nuclei into the data set of tools/demo.py.

COCO instances and index masks of the same tiles, in a folder like

    train/*.png  val/*.png  semantic/{train,val}/*.png
    annotations/instances_{train,val}.json  source.json
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset_converters.nuclei_scenes import (
    DownloadError,
    Scene,
    generated_scene,
    stardist_scene,
)
from support.bare_machine import cache_dir

LAYOUT = 1  # raise it when the files change
NO_DOWNLOAD = 3  # exit status that lets a caller fall back
TILE = 128
# Upper and left edges. The 32 rows between the parts are not used: no nucleus
# bridges them, so none is in both parts.
ROWS = {'train': (0, 112, 224), 'val': (384,)}
COLUMNS = (0, 128, 256, 384)
PALETTE = [0, 0, 0, 220, 20, 60]
SOURCE = ('name', 'origin', 'layout', 'sha256')  # keys of source.json


def write_dataset(scene: Scene, target: Path) -> bool:
    """Write the tiles of a scene, whole or not at all.

    Args:
        scene: Image to cut.
        target: folder of the data set; one of this tool is replaced where it
            differs.

    Returns:
        True; False if it was there already.

    Raises:
        FileExistsError: ``target`` is something else.
        ValueError: a nucleus would be in both parts.
    """
    source = describe(scene)
    if target.exists():
        if read_source(target) == source:
            return False
        if not read_source(target) and any(target.iterdir()):
            raise FileExistsError(
                f'{target} is no data set of this tool and is left alone; '
                'name another folder (--out)'
            )
    # Hidden beside the target, so that one rename makes it appear.
    part = target.parent / f'.{target.name}.part'
    old = target.parent / f'.{target.name}.old'
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        seen = {name: write_part(scene, name, part) for name in ROWS}
        both = seen['train'] & seen['val']
        if both:
            raise ValueError(
                f'nuclei {sorted(both)} are in the training and in the '
                'held-out tiles; widen the gap between ROWS'
            )
        _dump(source, part / 'source.json')
        if target.exists():
            target.rename(old)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return True


def describe(scene: Scene) -> dict:
    """Content of source.json; two data sets with equal ones are equal."""
    digest = hashlib.sha256(scene.image.tobytes() + scene.labels.tobytes())
    values = (scene.name, scene.origin, LAYOUT, digest.hexdigest())
    return dict(zip(SOURCE, values, strict=True))


def read_source(target: Path) -> dict:
    """source.json of a data set; empty where there is none of this tool."""
    try:
        found = json.loads((target / 'source.json').read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    ours = isinstance(found, dict) and found.keys() == set(SOURCE)
    return found if ours else {}


def write_part(scene: Scene, name: str, folder: Path) -> set[int]:
    """Write one part's images, masks and annotations.

    Args:
        scene: Image to cut.
        name: 'train' or 'val'.
        folder: root of the data set.

    Returns:
        Labels of the nuclei that the part shows.
    """
    for subfolder in (name, f'semantic/{name}', 'annotations'):
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for top in ROWS[name]:
        for left in COLUMNS:
            window = np.s_[top : top + TILE, left : left + TILE]
            file_name = f'y{top:03}_x{left:03}.png'
            image_id = len(images) + 1
            images.append(
                {
                    'id': image_id,
                    'file_name': file_name,
                    'width': TILE,
                    'height': TILE,
                }
            )
            labels = scene.labels[window]
            Image.fromarray(scene.image[window]).save(
                folder / name / file_name
            )
            _save_mask(labels > 0, folder / 'semantic' / name / file_name)
            for nucleus in np.unique(labels[labels > 0]).tolist():
                annotations.append(
                    {
                        'id': len(annotations) + 1,
                        'image_id': image_id,
                        'category_id': 1,
                        'iscrowd': 0,
                        'nucleus': nucleus,
                        **encode(labels == nucleus),
                    }
                )
    _dump(
        {
            'info': {'description': scene.origin},
            'categories': [{'id': 1, 'name': 'nucleus'}],
            'images': images,
            'annotations': annotations,
        },
        folder / 'annotations' / f'instances_{name}.json',
    )
    return {annotation['nucleus'] for annotation in annotations}


def encode(mask: np.ndarray) -> dict:
    """A boolean mask (h, w) as the COCO fields segmentation, area, bbox."""
    counts = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        'segmentation': {
            'size': counts['size'],
            'counts': counts['counts'].decode('ascii'),
        },
        'area': int(mask.sum()),
        'bbox': rle.toBbox(counts).tolist(),
    }


def _save_mask(mask: np.ndarray, path: Path) -> None:
    """As VOC does: pixels are class indices, a palette gives colours."""
    picture = Image.fromarray(mask.astype(np.uint8))
    picture.putpalette(PALETTE)
    picture.save(path)


def _dump(content: dict, path: Path) -> None:
    path.write_text(json.dumps(content, indent=1))


def parse_args() -> argparse.Namespace:
    """Command line of the converter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--out',
        type=Path,
        help='folder of the data set, by default data/demo/stardist or '
        'data/demo/generated',
    )
    parser.add_argument(
        '--generated',
        action='store_true',
        help='draw shapes instead of fetching the real image (3 MB)',
    )
    return parser.parse_args()


def main() -> None:
    """Get the image and write its tiles."""
    args = parse_args()
    try:
        if args.generated:
            scene = generated_scene()
        else:
            scene = stardist_scene(cache_dir())
        target = args.out or Path('data/demo') / scene.name
        written = write_dataset(scene, target)
    except DownloadError as error:
        print(f'{error}\n--generated draws shapes instead', file=sys.stderr)
        raise SystemExit(NO_DOWNLOAD) from error
    except (OSError, ValueError) as error:
        raise SystemExit(f'nuclei_tiles: {error}') from error
    print(f'{target}: {scene.origin}{"" if written else " (was there)"}')


if __name__ == '__main__':
    main()
