"""Solids as a data set that needs no files."""

from collections.abc import Sequence

import numpy as np
from mmengine.registry import DATASETS

from point_clouds.clouds import Clouds, sample_surface

ROUND = 32  # sides of what is round
LOW = 0.7  # half the height of a cube whose corners are 1 from its axis


def arc(start: float, stop: float) -> np.ndarray:
    """Points (cos, sin) of a circle, between two angles in degrees."""
    angles = np.radians(np.linspace(start, stop, 17))
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def triangles(*grid: np.ndarray) -> np.ndarray:
    """Cut the cells of a surface (x, y, z) of (U, V) points in halves."""
    p = np.stack(grid, 2)
    a, b, c, d = p[:-1, :-1], p[:-1, 1:], p[1:, :-1], p[1:, 1:]
    halves = np.stack([np.stack([a, b, c], 2), np.stack([b, c, d], 2)])
    return halves.reshape(-1, 3, 3)


def turned(line: Sequence, sides: int = ROUND) -> np.ndarray:
    """Turn a line of (radius, height) about the z axis, in a few steps."""
    angles = np.linspace(0, 2 * np.pi, sides + 1)
    radius, height = np.array(line).T[:, :, None]
    x, y = radius * np.cos(angles), radius * np.sin(angles)
    return triangles(x, y, np.broadcast_to(height, x.shape))


def spring(turns: float = 2.5, wire: float = 0.2) -> np.ndarray:
    """A wire wound about the z axis."""
    t = np.linspace(0, 2 * np.pi * turns, 80)[:, None]
    inner, up = wire * arc(0, 360).T
    radius = 1 + inner
    return triangles(radius * np.cos(t), radius * np.sin(t), t / 8 + up)


UP = np.array([0, 1])
BALL = arc(-90, 90)
WALL = [(1, -LOW), (1, LOW), (0.7, LOW), (0.7, -LOW), (1, -LOW)]
BLOCK = [(0, -LOW), (1, -LOW), (1, LOW), (0, LOW)]
SPIRE = [(0, -1), (1, -1), (0, 1)]
SOLIDS = {
    'sphere': turned(BALL),
    'hemisphere': turned([(0, 0), *arc(0, 90)]),
    'ellipsoid': turned(BALL) * [1, 0.7, 0.5],
    'capsule': turned([*(arc(-90, 0) - UP), *(UP + arc(0, 90))]),
    'cylinder': turned(BLOCK),
    'tube': turned(WALL),
    'cone': turned(SPIRE),
    'hourglass': turned([(0, -1), (1, -1), (0, 0), (1, 1), (0, 1)]),
    'torus': turned(0.35 * arc(0, 360) + [1, 0]),
    'spring': spring(),
    'cube': turned(BLOCK, 4),
    'hollow box': turned(WALL, 4),
    'pyramid': turned(SPIRE, 4),
    'prism': turned(BLOCK, 3),
}


@DATASETS.register_module()
class Solids(Clouds):
    """Noisy points on solids of random proportions, turned about z and tilted.

    A cloud depends on seed and index alone.

    Args:
        length: clouds, equally many of each class.
        seed: give training and validation different ones.
        num_points: Points of each cloud.
        noise: standard deviation of each coordinate; solids have radius 1.
        tilt: angle in radians, at most, about x and about y; pi for any.
        stretch: the axes are scaled by factors within 1 - and 1 + this.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        num_points: int = 256,
        noise: float = 0.03,
        tilt: float = 0.3,
        stretch: float = 0.2,
    ) -> None:
        super().__init__(list(SOLIDS), num_points)
        self.length, self.seed = length, seed
        self.noise, self.tilt, self.stretch = noise, tilt, stretch

    def __len__(self) -> int:
        return self.length

    def cloud(self, index: int, _: object) -> tuple[np.ndarray, int]:
        """Points (num_points, 3) of the solid of an index, and its class."""
        rng = np.random.default_rng((self.seed, index))
        label = index % len(SOLIDS)
        corners = list(SOLIDS.values())[label]
        corners = corners * rng.uniform(1 - self.stretch, 1 + self.stretch, 3)
        points = sample_surface(corners, self.num_points, rng)
        tilt, around = self.tilt, np.pi
        for axis, most in enumerate((around, tilt, tilt)):  # z, x, y
            angle = rng.uniform(-most, most)
            c, s = np.cos(angle), np.sin(angle)
            turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
            points = points @ np.roll(turn, axis, (0, 1))
        return points + self.noise * rng.normal(size=points.shape), label
