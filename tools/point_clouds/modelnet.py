"""ModelNet40 as HDF5 files of sampled points, or as OFF meshes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmengine.registry import DATASETS
from support.checks import SetupError, require

from point_clouds.clouds import Clouds, sample_surface

CLASSES = (
    'airplane bathtub bed bench bookshelf bottle bowl car chair cone cup '
    'curtain desk door dresser flower_pot glass_box guitar keyboard lamp '
    'laptop mantel monitor night_stand person piano plant radio range_hood '
    'sink sofa stairs stool table tent toilet tv_stand vase wardrobe xbox'
).split()


@DATASETS.register_module()
class ModelNetH5(Clouds):
    """The files of ``modelnet40_ply_hdf5_2048``.

    Args:
        data_root: folder with ``train_files.txt``, ``test_files.txt``, and
            the files whose names they list.
        split: 'train' or 'test'.
        num_points: Points of each cloud: the first ones, or, augmented, any.
        augment: see :class:`Clouds`.

    Raises:
        SetupError: h5py or files are missing, or are of another shape.
    """

    def __init__(
        self,
        data_root: str,
        split: str,
        num_points: int = 1024,
        augment: bool = False,
    ) -> None:
        try:
            import h5py
        except ImportError:
            raise SetupError('HDF5 needs h5py: pip install h5py') from None
        super().__init__(CLASSES, num_points, augment)
        listed = Path(data_root) / f'{split}_files.txt'
        require([listed], 'ModelNet40')
        # The paths in it are those of the computer that wrote it.
        names = [Path(line).name for line in listed.read_text().split()]
        require([listed.with_name(name) for name in names], str(listed))
        self.points, self.labels = [], []
        for path in map(listed.with_name, names):
            with h5py.File(path) as file:
                data = np.array(file.get('data', ()))
                label = np.array(file.get('label', ())).reshape(-1)
            if (
                data.ndim != 3
                or len(data) != len(label)
                or data.shape[1] < num_points
                or data.shape[2] != 3
            ):
                raise SetupError(
                    f'{path} has data of {data.shape} and {len(label)} labels;'
                    f' wanted (clouds, {num_points} or more, 3), a label each.'
                )
            self.points += list(data)
            self.labels += label.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def cloud(
        self, index: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, int]:
        """Points (num_points, 3) of a cloud, and its class."""
        points = self.points[index]
        if self.augment:
            points = rng.permutation(points)
        return points[: self.num_points], self.labels[index]


def read_off(path: Path) -> np.ndarray:
    """Triangles of an OFF file, of shape (count, 3, 3).

    Convention: some files of ModelNet lack the line break after ``OFF``.

    Raises:
        SetupError: it is none, or not whole.
    """
    text = '\n'.join(line.split('#')[0] for line in path.open()).strip()
    if not text.startswith('OFF'):
        raise SetupError(f'{path} is no OFF file: it must begin with OFF.')
    try:
        head, *lines = filter(str.strip, text[3:].split('\n'))
        points, faces = map(int, head.split()[:2])
        if len(lines) < points + faces:
            raise ValueError(f'{len(lines)} lines, not {points + faces}')
        corners = []
        for line in lines[points : points + faces]:
            size, *face = line.split()
            # Behind the corners may be a colour.
            face = [int(corner) for corner in face[: int(size)]]
            if len(face) != int(size) or not all(
                0 <= corner < points for corner in face
            ):
                raise ValueError(f'face {line!r} of {points} points')
            # A polygon is a fan of triangles.
            corners += [
                (face[0], *face[i : i + 2]) for i in range(1, len(face) - 1)
            ]
        xyz = np.array([line.split()[:3] for line in lines[:points]], float)
        return xyz[np.array(corners)]
    except (ValueError, IndexError) as error:
        raise SetupError(f'{path} is not whole: {error}') from error


@DATASETS.register_module()
class ModelNetOFF(Clouds):
    """ModelNet as it is published: ``CLASS/{train,test}/*.off``.

    Every access reads a mesh and draws points, always the same, or others in
    each epoch if augmented.

    Args:
        data_root: parent of the classes.
        split: 'train' or 'test'.
        classes: folders to use, in the order of their numbers.
        num_points: Points of each cloud.
        augment: see :class:`Clouds`.

    Raises:
        SetupError: classes have no meshes.
    """

    def __init__(
        self,
        data_root: str,
        split: str,
        classes: Sequence[str] = tuple(CLASSES),
        num_points: int = 1024,
        augment: bool = False,
    ) -> None:
        super().__init__(classes, num_points, augment)
        folders = [Path(data_root) / name / split for name in classes]
        require([folder / '*.off' for folder in folders], 'ModelNet')
        self.files = [
            (path, label)
            for label, folder in enumerate(folders)
            for path in sorted(folder.glob('*.off'))
        ]

    def __len__(self) -> int:
        return len(self.files)

    def cloud(
        self, index: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, int]:
        """Points (num_points, 3) on a mesh, and its class."""
        path, label = self.files[index]
        try:
            points = sample_surface(read_off(path), self.num_points, rng)
        except ZeroDivisionError as error:
            raise SetupError(
                f'{path} has no surface: its area is 0'
            ) from error
        return points, label
