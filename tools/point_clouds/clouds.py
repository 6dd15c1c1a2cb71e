"""Point clouds in the unit sphere, and points on a surface."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


def sample_surface(
    corners: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw points on triangles, uniformly by area.

    Shape:
        corners: (triangles, 3, 3), the last axis x, y, z; result: (count, 3).

    Raises:
        ZeroDivisionError: the triangles have no area.
    """
    a, b, c = corners.swapaxes(0, 1)
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    if not areas.sum() > 0:
        raise ZeroDivisionError('the area of the triangles is 0')
    drawn = rng.choice(len(areas), count, p=areas / areas.sum())
    u, v = rng.random((2, count, 1))
    beyond = u + v > 1  # in the other half of the parallelogram
    u, v = np.where(beyond, 1 - u, u), np.where(beyond, 1 - v, v)
    return a[drawn] + u * (b - a)[drawn] + v * (c - a)[drawn]


class Clouds(Dataset):
    """Clouds with their classes; what inherits has ``cloud(index, rng)``.

    Args:
        classes: Names of the classes.
        num_points: Points of each cloud.
        augment: turn about the y axis, scale by 0.8 to 1.25, shift by up to
            0.1, move each point by about 0.01, anew in each epoch.
    """

    def __init__(
        self, classes: Sequence[str], num_points: int, augment: bool = False
    ) -> None:
        self.metainfo = {'classes': tuple(classes)}
        self.num_points, self.augment = num_points, augment

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        seed = int(torch.randint(2**31, ())) if self.augment else index
        rng = np.random.default_rng(seed)
        points, label = self.cloud(index, rng)
        points = points - points.mean(0)
        points = points / max(np.linalg.norm(points, axis=1).max(), 1e-9)
        if self.augment:
            angle = rng.uniform(0, 2 * np.pi)
            c, s = np.cos(angle), np.sin(angle)
            points = points @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
            points = points * rng.uniform(0.8, 1.25)
            points = points + rng.uniform(-0.1, 0.1, 3)
            points = points + 0.01 * rng.normal(size=points.shape)
        return torch.from_numpy(points.astype('float32')), label
