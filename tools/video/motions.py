"""Clips of a moving view of photographs, as a data set."""

from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.registry import DATASETS
from support.checks import require
from torch import Tensor
from torch.utils.data import Dataset

from video.something import read_image, resize

# Pairs of a motion and its time reversal, in the order of the pose.
CLASSES = (
    *('pan right', 'pan left', 'pan down', 'pan up'),
    *('zoom out', 'zoom in', 'turn right', 'turn left'),
)
# Of the pose to both sides: x and y in sizes, log scale, radians.
REACH = np.array([0.3, 0.3, 0.375, 0.6])
DETAIL = 1.5  # pixels; what is coarser hardly moves between two frames


def poses(label: int, frames: int, rng: np.random.Generator) -> np.ndarray:
    """Centre x and y, log scale and angle of the view in each frame.

    One of them takes each of ``frames`` values in turn, in the one order or
    the other. Each of the rest takes one of these values in all frames. So a
    single frame has the same distribution in every class.

    Shape:
        result: (frames, 4), from -1 to 1 in units of REACH.
    """
    steps = np.linspace(-1, 1, frames)
    found = np.tile(rng.choice(steps, 4), (frames, 1))
    found[:, label // 2] = steps[:: 1 - 2 * (label % 2)]
    return found


@DATASETS.register_module()
class MovingPhotographs(Dataset):
    """Clips of pan, zoom or rotation, each with its time reversal.

    A clip depends on seed and index alone. It shows details, without what a
    Gaussian blur leaves, and is standardized: from photographs as they
    are, a small network learned nothing within 2000 clips.

    Args:
        data_root: parent of the folder of photographs.
        data_prefix: ``dict(img=FOLDER)``, with .jpg files.
        length: clips, equally many of each class.
        seed: of place, angle and motion.
        frames: of each clip.
        size: height and width in pixels.
    """

    def __init__(
        self,
        data_root: str,
        data_prefix: dict[str, str],
        length: int,
        seed: int = 0,
        frames: int = 8,
        size: int = 24,
    ) -> None:
        folder = Path(data_root) / data_prefix['img']
        require([folder / '*.jpg'], 'Photographs')
        self.photographs = sorted(folder.glob('*.jpg'))
        self.length, self.seed = length, seed
        self.frames, self.size = frames, size
        self.metainfo = {'classes': CLASSES}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rng = np.random.default_rng((self.seed, index))
        label, size = index % len(CLASSES), self.size
        path = self.photographs[rng.integers(len(self.photographs))]
        photograph = resize(read_image(path), 2 * size)
        place = rng.random(2) * photograph.shape[1::-1]
        start = rng.uniform(0, 2 * np.pi)
        frames = []
        for x, y, zoom, angle in poses(label, self.frames, rng) * REACH:
            cos, sin = np.cos(start + angle), np.sin(start + angle)
            turn = np.exp(zoom) * np.array([[cos, -sin], [sin, cos]])
            # Motions go along the sides of the view, whatever its start.
            corner = place + turn @ (np.array([x, y]) - 0.5) * size
            view = cv2.warpAffine(
                photograph,
                np.column_stack([turn, corner]),
                (size, size),
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                borderMode=cv2.BORDER_REFLECT_101,
            )
            view = view.astype('float32')
            frames.append(view - cv2.GaussianBlur(view, (0, 0), DETAIL))
        clip = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
        return (clip - clip.mean()) / (clip.std() + 1e-3), label
