"""Exact resume: a resumed training equals an uninterrupted one."""

import random
from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.utils.data import IterableDataset


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Seed every iteration and every sample by its place in the training.

    mmengine saves no random state: a resumed run starts with the state of a
    new one. Its model and its augmentations draw other numbers than the
    uninterrupted run would, and dataloader workers repeat those of the
    start. With this hook there is no state to save.

    Formula, for the generators of Python, NumPy and torch:
        before iteration i: state = f(seed, i)
        before sample k of epoch e on rank r: state = f(seed, r, e, k)
    with k the place in the order of the sampler. Which worker loads the
    sample, and how many there are, makes no difference (but see below).

    Convention: runs with this hook draw other numbers than runs without, so
        use it from the start. mmengine restores the order of the samples
        for the same seed. The hook does not restore values that a
        transform, a preprocessor or a model carries from one sample to the
        next outside of its state_dict (CachedMosaic's images, the last size
        of BatchSyncRandomResize), what mmdet's GroupMultiSourceSampler draws,
        and the samples of an IterableDataset. Releases of mmengine start
        the workers of a loop of iterations before any hook runs. Their
        samples keep the workers' own random numbers: resume with the same
        ``num_workers``.
    """

    # Before any other hook draws a number for the iteration.
    priority = 'VERY_HIGH'

    def before_train(self, runner: Any) -> None:
        """Number the samples and seed before each."""
        runner.logger.info(
            'ExactResumeHook seeds every iteration and sample, so that a '
            'resumed run equals an unbroken one. The random numbers are '
            'others than without it (tools/train.py --no-exact-resume).'
        )
        loader = runner.train_loop.dataloader
        if isinstance(loader.dataset, IterableDataset):
            runner.logger.info(
                'ExactResumeHook: the data set is a stream, whose samples '
                'have no places. After a resume they have other random '
                'numbers.'
            )
        batches = getattr(runner.train_loop, 'dataloader_iterator', None)
        started = getattr(batches, '_iterator', None)
        if loader.num_workers and started is not None:
            runner.logger.info(
                'ExactResumeHook: this mmengine has started the workers '
                'already, so that their samples have random numbers of the '
                'workers. Resume with the same train_dataloader.num_workers='
                f'{loader.num_workers}.'
            )
        self._samples: NumberedSampler | None = None
        sampler = getattr(loader.batch_sampler, 'sampler', None)
        if sampler is None:
            return
        self._samples = NumberedSampler(sampler)
        loader.batch_sampler.sampler = self._samples
        dataset = loader.dataset
        # The fetcher of a DataLoader prefers this to dataset[index].
        dataset.__getitems__ = SeededSamples(dataset, runner.seed, get_rank())

    def before_train_epoch(self, runner: Any) -> None:
        """Count the samples of this epoch from 0."""
        if self._samples is not None:
            self._samples.epoch, self._samples.number = runner.epoch, 0

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Seed the random numbers of the model and the other hooks."""
        seed_generators(runner.seed, runner.iter)


class Numbered(int):
    """An index that knows its place in the order of the samples."""

    place: tuple[int, int]


class NumberedSampler:
    """A sampler whose indices carry the epoch and their number in it."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.epoch = self.number = 0
        if hasattr(sampler, 'skip'):
            skip = sampler.skip

            def skip_and_count(samples: int) -> None:
                skip(samples)
                self.number = samples

            sampler.skip = skip_and_count

    def __iter__(self) -> Iterator[Any]:
        """Number integer indices; pass others unchanged."""
        for index in self.sampler:
            number, self.number = self.number, self.number + 1
            # Those of NumPy and of torch are no int.
            if isinstance(index, SupportsIndex) and not getattr(
                index, 'ndim', 0
            ):
                index = Numbered(index)
                index.place = (self.epoch, number)
            yield index

    def __len__(self) -> int:
        """Length of the sampler."""
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        """Forward the rest, such as set_epoch and dataset, to the sampler."""
        if name == 'sampler':
            raise AttributeError(name)
        return getattr(self.sampler, name)


class SeededSamples:
    """Load samples of a data set, each with random numbers of its own.

    Args:
        dataset: map-style data set.
        seed: seed of the run.
        rank: rank of the process.
    """

    def __init__(self, dataset: Any, seed: int, rank: int) -> None:
        self.dataset, self.seed, self.rank = dataset, seed, rank

    def __call__(self, indices: Sequence[Any]) -> list[Any]:
        """Load the samples of a batch."""
        samples = []
        for index in indices:
            if isinstance(index, Numbered):
                seed_generators(self.seed, self.rank, *index.place)
                index = int(index)
            samples.append(self.dataset[index])
        return samples


def seed_generators(*place: int) -> None:
    """Seed Python, NumPy and torch of this process from several numbers."""
    words = np.random.SeedSequence(place).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)
    # torch.manual_seed would format a stack where CUDA was not initialised.
    seed = int.from_bytes(words[:2].tobytes(), 'little')
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
