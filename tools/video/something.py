"""Something-Something V2: JSON files, and frames in folders or videos."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.registry import DATASETS
from support.checks import SetupError, require
from torch import Tensor
from torch.utils.data import Dataset

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def resize(image: np.ndarray, short_side: int) -> np.ndarray:
    """Scale an image (H, W, 3) to so many pixels at its short side."""
    scale = short_side / min(image.shape[:2])
    height, width = (round(scale * side) for side in image.shape[:2])
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=way)


def read_image(path: Path) -> np.ndarray:
    """Read an RGB image (H, W, 3)."""
    image = cv2.imread(str(path))
    if image is None:
        raise SetupError(f'{path} is not an image that can be read.')
    return image[..., ::-1]


def to_clip(frames: list[np.ndarray]) -> Tensor:
    """Normalize RGB frames and make a tensor (T, 3, H, W) of them."""
    clip = (np.stack(frames) - np.array(MEAN)) / STD
    return torch.from_numpy(clip.astype('float32')).permute(0, 3, 1, 2)


@DATASETS.register_module()
class SomethingSomething(Dataset):
    """Clips of one frame from each of equal parts of a video.

    Args:
        data_root: parent of what follows.
        ann_file: JSON list of clips with ``id`` and ``template``.
        labels: JSON of the number of each template.
        data_prefix: ``dict(img=FOLDER)`` with the frames of each clip in
            ``ID/*.jpg``, or ``dict(video=FOLDER)`` with ``ID.webm``, which
            needs PyAV.
        frames: of each clip.
        size: height and width in pixels, out of a short side of 8/7 of it.
        augment: any frame of each part and any place, else the middle.

    Raises:
        SetupError: files are missing, or templates are unknown.
    """

    def __init__(
        self,
        data_root: str,
        ann_file: str,
        labels: str,
        data_prefix: dict[str, str],
        frames: int = 8,
        size: int = 224,
        augment: bool = False,
    ) -> None:
        root = Path(data_root)
        require([root / ann_file, root / labels], 'Something-Something')
        numbers = json.loads((root / labels).read_text())
        clips = json.loads((root / ann_file).read_text())
        # "Holding [something]" is "Holding something" in the other file.
        names = [
            str(clip.get('template')).replace('[', '').replace(']', '')
            for clip in clips
        ]
        if unknown := sorted(set(names) - set(numbers)):
            raise SetupError(
                f'{root / ann_file}: {len(unknown)} templates are not in '
                f'{labels}: {", ".join(map(repr, unknown[:20]))}.'
            )
        ((kind, prefix),) = data_prefix.items()
        ending = '.webm' if kind == 'video' else '/*.jpg'
        paths = [root / prefix / f'{clip["id"]}{ending}' for clip in clips]
        require(paths, f'Something-Something, {root / ann_file}')
        self.paths, self.labels = paths, [int(numbers[name]) for name in names]
        self.metainfo = {'classes': tuple(sorted(numbers, key=numbers.get))}
        self.frames, self.size, self.augment = frames, size, augment

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.paths[index]
        if path.suffix == '.webm':
            files = decoded(path)
        else:
            files = sorted(path.parent.glob(path.name), key=numbered)
        where = np.full(self.frames + 2, 0.5)
        if self.augment:
            where = torch.rand(self.frames + 2, dtype=torch.double).numpy()
        parts = (np.arange(self.frames) + where[2:]) / self.frames
        images = [files[int(part * len(files))] for part in parts]
        if path.suffix != '.webm':
            images = [read_image(file) for file in images]
        images = [resize(image, round(self.size * 8 / 7)) for image in images]
        room = np.array(images[0].shape[:2]) - self.size + 1
        y, x = (where[:2] * room).astype(int)
        cuts = [i[y : y + self.size, x : x + self.size] for i in images]
        return to_clip(cuts), self.labels[index]


def numbered(path: Path) -> list[int]:
    """Numbers in a name, by which frames follow each other."""
    return [int(digits) for digits in re.findall(r'\d+', path.stem)]


def decoded(path: Path) -> list[np.ndarray]:
    """All frames of a video, RGB."""
    try:
        import av
    except ImportError:
        raise SetupError(
            'Videos need PyAV: pip install av. Or give folders of frames: '
            "data_prefix=dict(img='...')."
        ) from None
    with av.open(str(path)) as file:
        return [f.to_ndarray(format='rgb24') for f in file.decode(video=0)]
