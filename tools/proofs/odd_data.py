"""Write a tiny data set with the oddities that real ones have.

    python tools/proofs/odd_data.py DIR

Three images, which a detector and a segmentor can be trained on:

    DIR/images/           gray, with spaces and letters that are not ASCII in
                          the name; RGBA; one without any object
    DIR/instances.json    COCO: ids neither sorted nor small nor dense,
                          polygons (one of two parts), run lengths as a string
                          and as numbers, a crowd
    DIR/masks/            semantic maps: 0 is background, 255 is ignored; one
                          is a palette image
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import launch
from support.checks import SetupError, check_writable

# Neither sorted nor dense. mmdet numbers classes in the order of the file,
# whatever the order of metainfo.classes is.
CATEGORY_IDS = {'bar': 90, 'disk': 3, 'square': 17}
THINGS = tuple(CATEGORY_IDS)
BACKGROUND = 'background'
PALETTE = ((0, 0, 0), (220, 20, 60), (0, 130, 180), (250, 170, 30))
IGNORED = 255
GRAY, ALPHA, EMPTY = 'größe 灰色.png', 'alpha.png', 'nothing here.png'
# Beyond 32 bits, and neither sorted nor dense.
IMAGE_IDS = {GRAY: 2**32 + 5, ALPHA: 7, EMPTY: 1_000_003}
SIZES = {GRAY: (97, 131), ALPHA: (120, 160), EMPTY: (131, 97)}
# Class, form of the mask, and its polygons, each a list of x, y. 'string' and
# 'numbers' are run lengths.
OBJECTS: dict[str, list[tuple[str, str, list[list[int]]]]] = {
    GRAY: [
        ('bar', 'polygon', [[8, 10, 60, 10, 60, 30, 8, 30]]),
        (
            'disk',
            'polygon',
            [
                [70, 40, 90, 36, 104, 50, 96, 70, 74, 66],
                [70, 78, 104, 78, 104, 92, 70, 92],
            ],
        ),
        ('square', 'string', [[12, 44, 52, 44, 52, 84, 12, 84]]),
    ],
    ALPHA: [
        ('square', 'numbers', [[10, 12, 60, 12, 60, 62, 10, 62]]),
        ('disk', 'string', [[80, 20, 110, 12, 130, 40, 112, 70, 84, 60]]),
        ('bar', 'crowd', [[20, 84, 150, 84, 150, 112, 20, 112]]),
    ],
    EMPTY: [],
}


def parse_args() -> argparse.Namespace:
    """Command line of the data."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('dir', help='new or empty folder')
    return parser.parse_args()


def mask_of(polygons: list[list[int]], size: tuple[int, int]) -> np.ndarray:
    """Fill polygons."""
    mask = np.zeros(size, np.uint8)
    for polygon in polygons:
        cv2.fillPoly(mask, [np.array(polygon).reshape(-1, 2)], 1)
    return mask


def segmentation(form: str, polygons: list, mask: np.ndarray) -> Any:
    """A mask in one of the forms that COCO knows."""
    from pycocotools import mask as coder

    if form == 'polygon':
        return polygons
    size = list(mask.shape)
    if form == 'string':
        encoded = coder.encode(np.asfortranarray(mask))
        return dict(size=size, counts=encoded['counts'].decode('ascii'))
    # Lengths of runs by column, the first of which are zeros.
    flat = mask.flatten(order='F')
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return dict(size=size, counts=[0, *runs] if flat[0] else runs)


def picture(name: str, semantic: np.ndarray) -> np.ndarray:
    """Noise with brighter objects, in the channels of the name's image."""
    rng = np.random.default_rng(IMAGE_IDS[name])
    channels = {GRAY: 1, ALPHA: 4, EMPTY: 3}[name]
    image = rng.integers(0, 60, (*semantic.shape, channels), np.uint8)
    objects = np.where(semantic == IGNORED, 0, semantic)
    return (image + 60 * objects[..., None]).astype(np.uint8)


def write_map(path: Path, values: np.ndarray, palette: bool) -> None:
    """Write a semantic map, gray or with a palette."""
    from PIL import Image

    image = Image.fromarray(values)
    if palette:
        # PIL keeps only the values that have a color.
        colors = np.zeros((256, 3), np.uint8)
        colors[: len(PALETTE)], colors[IGNORED] = PALETTE, 224
        image.putpalette(colors.tobytes())
    image.save(path)


def write(folder: Path) -> Path:
    """Write all of it.

    Args:
        folder: New folder.

    Returns:
        The folder.
    """
    for name in ('images', 'masks'):
        (folder / name).mkdir(parents=True, exist_ok=True)
    coco: dict[str, list] = dict(images=[], annotations=[])
    coco['categories'] = [
        dict(id=number, name=name) for name, number in CATEGORY_IDS.items()
    ]
    for name, objects in OBJECTS.items():
        height, width = SIZES[name]
        image_id = IMAGE_IDS[name]
        coco['images'].append(
            dict(id=image_id, file_name=name, height=height, width=width)
        )
        semantic = np.zeros((height, width), np.uint8)
        for index, (kind, form, polygons) in enumerate(objects, 1):
            mask = mask_of(polygons, (height, width))
            semantic[mask > 0] = 1 + THINGS.index(kind)
            coco['annotations'].append(
                dict(
                    id=10**10 * index - image_id,
                    image_id=image_id,
                    category_id=CATEGORY_IDS[kind],
                    bbox=list(cv2.boundingRect(mask)),
                    area=int(mask.sum()),
                    iscrowd=int(form == 'crowd'),
                    segmentation=segmentation(form, polygons, mask),
                )
            )
        semantic[:6] = IGNORED
        write_map(folder / 'masks' / name, semantic, name == ALPHA)
        cv2.imwrite(str(folder / 'images' / name), picture(name, semantic))
    (folder / 'instances.json').write_text(
        json.dumps(coco, ensure_ascii=False), encoding='utf-8'
    )
    return folder


def main() -> None:
    """Write the data set into a folder."""
    folder = Path(parse_args().dir)
    check_writable(str(folder), 'DIR')
    if any(folder.iterdir()):
        raise SetupError(f'DIR {folder} is not empty. Give a new folder.')
    print(write(folder))


if __name__ == '__main__':
    launch.run(main)
