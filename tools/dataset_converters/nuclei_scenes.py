"""The labelled microscopy image of the demo, and what stands in for it."""

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

STARDIST = 'stardist==0.9.2'
# One platform for everybody: the same file, whatever machine asks for it.
WHEEL_TAGS = (
    '--platform=manylinux_2_28_x86_64',
    '--python-version=3.11',
    '--implementation=cp',
    '--abi=cp311',
)
MEMBERS = {
    'stardist/data/images/img2d.tif': (
        'f9ccc1571b92c861ff87e28463068b43f61bd47357ed0503f711e5cd1eb97750'
    ),
    'stardist/data/images/mask2d.tif': (
        '59ad5e820b7982ca9d13e946fa6e7f64e2714899e00a2ae6c69aa79aad53d46f'
    ),
}


class DownloadError(RuntimeError):
    """pip could not get the wheel; the message is pip's."""


class Scene(NamedTuple):
    """A grey image, its nuclei, and where they come from."""

    image: np.ndarray  # (512, 512) uint8
    labels: np.ndarray  # (512, 512) uint16, 0 is background
    name: str  # of the folder that its tiles go to
    origin: str  # one line for people


def stardist_scene(cache: Path) -> Scene:
    """Read the image that the stardist wheel ships; fetch the wheel once.

    Args:
        cache: folder that keeps the wheel (3 MB).

    Raises:
        DownloadError: pip cannot get the wheel.
        ValueError: the wheel is broken or holds another image.
    """
    wheels = sorted(cache.glob(STARDIST.replace('==', '-') + '-*.whl'))
    if not wheels:
        wheels = [_download(cache)]
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            data = [wheel.read(member) for member in MEMBERS]
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(
            f'{wheels[0]} cannot be read ({error}); delete it and run again'
        ) from error
    for content, (member, expected) in zip(data, MEMBERS.items(), strict=True):
        found = hashlib.sha256(content).hexdigest()
        if found != expected:
            raise ValueError(
                f'{wheels[0]}: {member} has sha256 {found}, not {expected}; '
                'delete the wheel and run again'
            )
    image, labels = (np.array(Image.open(io.BytesIO(d))) for d in data)
    # 16 bits that use only the lower 8: nothing is lost.
    return Scene(
        image.astype(np.uint8),
        labels.astype(np.uint16),
        'stardist',
        f'real microscopy image of the {STARDIST} wheel (BSD-3-Clause)',
    )


def _download(cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [
            *(sys.executable, '-m', 'pip', 'download', STARDIST),
            *('--no-deps', '--only-binary=:all:', *WHEEL_TAGS),
            *('--quiet', '--disable-pip-version-check'),
            *('--retries=1', '--timeout=20', '--dest', folder),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob('*.whl'))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ['no message']
            errors = [line for line in lines if line.startswith('ERROR')]
            raise DownloadError(
                f'pip download {STARDIST} failed: {(errors or lines)[-1]}'
            )
        kept = cache / wheels[0].name
        os.replace(wheels[0], kept)
    return kept


def generated_scene(seed: int = 0) -> Scene:
    """Draw shapes as dim, as dense and as noisy as the real nuclei.

    Args:
        seed: Seed of positions, outlines and noise.
    """
    random = np.random.default_rng(seed)
    side = 512
    labels = np.zeros((side, side), np.uint16)
    glow = np.full((side, side), 20, np.float32)
    while labels.max() < 125:
        center = random.uniform(0, side, 2)
        outline = _outline(random, center)
        shape = np.zeros((side, side), np.uint8)
        cv2.fillPoly(shape, [outline], 1)
        inside = shape.astype(bool)
        near = cv2.dilate(shape, np.ones((3, 3), np.uint8)).astype(bool)
        # A corner of the picture may cut most of a shape away.
        if inside.sum() < 25 or labels[near].any():
            continue
        labels[inside] = labels.max() + 1
        glow[inside] += random.lognormal(mean=3.5, sigma=0.5)
    glow = cv2.GaussianBlur(glow, (0, 0), 1.0)
    noisy = glow + random.normal(scale=4.0, size=glow.shape)
    return Scene(
        np.clip(np.rint(noisy), 0, 235).astype(np.uint8),
        labels,
        'generated',
        f'GENERATED shapes (seed {seed}), no real image',
    )


def _outline(random: np.random.Generator, center: np.ndarray) -> np.ndarray:
    """Corners (n, 2) of an ellipse or of a polygon inside one."""
    corners = 32 if random.random() < 0.5 else random.integers(4, 8)
    angles = 2 * np.pi * np.arange(corners) / corners
    radii = random.uniform(8, 15, 2)
    points = radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    turn = random.uniform(0, np.pi)
    rotation = np.array(
        [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    )
    return np.rint(points @ rotation.T + center).astype(np.int32)
