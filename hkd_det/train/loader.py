"""Loading: pictures from disk to batches, the same whatever the number of workers or processes.

Chance depends only on (seed, epoch, position in the epoch): workers hold no random state, so a resumed
run draws the same views.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hkd_det.datasets import Sample, read_picture
from hkd_det.errors import HkdError
from hkd_det.imgsz import STRIDE
from hkd_det.models.assignment import TruthBatch
from hkd_det.train.augment import View, training_view, view_from_arrays

Batch = tuple[Tensor, TruthBatch]
LEAST_VISIBLE = 0.2  # less of a person can't be learnt from: ignored, as the protocols' widest setup does


@dataclass(frozen=True)
class Draw:
    """One view to make: which samples (one, or four for a mosaic), at what size, from what seed."""

    indices: tuple[int, ...]
    size_hw: tuple[int, int]
    seed: int


@dataclass(frozen=True)
class Epochs:
    """How the epochs' views are drawn: see TrainConfig for the meaning of each."""

    pictures: int
    batch: int
    size_hw: tuple[int, int]
    multi_scale: float
    mosaic: float
    seed: int

    @property
    def steps(self) -> int:
        """Batches an epoch: every picture once, the last batch filled up with the first ones."""
        return -(-self.pictures // self.batch)

    def batches(self, epoch: int, plain: bool) -> Iterator[list[Draw]]:
        """The global batches of an epoch. `plain`: without mosaic and multi-scale, as at the end of training."""
        chance = np.random.default_rng((self.seed, epoch))
        order = np.resize(chance.permutation(self.pictures), self.steps * self.batch)
        for step in range(self.steps):
            size_hw = self.size_hw if plain else self._scaled(chance)
            yield [
                Draw(self._sources(chance, int(index), plain), size_hw, int(chance.integers(2**62)))
                for index in order[step * self.batch : (step + 1) * self.batch]
            ]

    def _scaled(self, chance: np.random.Generator) -> tuple[int, int]:
        factor = chance.uniform(1 - self.multi_scale, 1 + self.multi_scale)
        height, width = (max(STRIDE, round(side * factor / STRIDE) * STRIDE) for side in self.size_hw)
        return height, width

    def _sources(self, chance: np.random.Generator, index: int, plain: bool) -> tuple[int, ...]:
        if plain or chance.random() >= self.mosaic:
            return (index,)
        return (index, *(int(other) for other in chance.integers(self.pictures, size=3)))


class RankSampler(Sampler[list[Draw]]):
    """This process's share of each global batch of one epoch after the other."""

    def __init__(self, epochs: Epochs, rank: int, count: int) -> None:
        self.epochs, self.rank, self.count = epochs, rank, count
        self.epoch, self.plain = 0, False

    def __len__(self) -> int:
        return self.epochs.steps

    def __iter__(self) -> Iterator[list[Draw]]:
        for batch in self.epochs.batches(self.epoch, self.plain):
            yield batch[self.rank :: self.count]


class TrainingViews(Dataset[View | HkdError]):
    """Augmented views of samples; decoded pictures are kept while they fit in `cache_mib`."""

    def __init__(self, samples: Sequence[Sample], size_hw: tuple[int, int], cache_mib: float) -> None:
        self.samples = samples
        self.largest_hw = (size_hw[0] * 2, size_hw[1] * 2)
        self.room_bytes = int(cache_mib * 2**20)
        self.cached: dict[int, tuple[NDArray[np.uint8], float]] = {}

    def __getitem__(self, draw: Draw) -> View | HkdError:
        """The view, or what is wrong with its pictures: raised here it would cross processes as a traceback."""
        try:
            sources = [self._source(index) for index in draw.indices]
        except HkdError as error:
            return error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw.seed)
            return training_view(sources, draw.size_hw)

    def _source(self, index: int) -> View:
        picture, scale = self._picture(index)
        truth = self.samples[index].truth
        ignore = truth.ignore | (truth.visibility < LEAST_VISIBLE)
        return view_from_arrays(picture, truth.boxes_xyxy * scale, ignore)

    def _picture(self, index: int) -> tuple[NDArray[np.uint8], float]:
        """The picture, shrunk where it is far larger than training needs, and by what factor."""
        if index in self.cached:
            return self.cached[index]
        picture = read_picture(self.samples[index].path)
        scale = min(1.0, max(self.largest_hw[0] / picture.shape[0], self.largest_hw[1] / picture.shape[1]))
        if scale < 1:
            picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA).astype(np.uint8)
        if picture.nbytes <= self.room_bytes:
            self.room_bytes -= picture.nbytes
            self.cached[index] = (picture, scale)
        return picture, scale


def collate(made: list[View | HkdError]) -> Batch | HkdError:
    """Views of one size to pictures [B, 3, H, W] uint8 and their padded truth; the first error in their place."""
    views = []
    for view in made:
        if isinstance(view, HkdError):
            return view
        views.append(view)
    most = max((len(view.ignore) for view in views), default=0)
    boxes = torch.zeros(len(views), most, 4)
    real = torch.zeros(len(views), most, dtype=torch.bool)
    ignore = torch.zeros(len(views), most, dtype=torch.bool)
    for row, view in enumerate(views):
        count = len(view.ignore)
        boxes[row, :count] = view.boxes_xyxy
        real[row, :count] = ~view.ignore
        ignore[row, :count] = view.ignore
    return torch.stack([view.picture for view in views]), TruthBatch(boxes, real, ignore)


def open_loader(
    samples: Sequence[Sample], epochs: Epochs, rank: int, count: int, workers: int, cache_mib: int
) -> tuple[DataLoader[Batch | HkdError], RankSampler]:
    """A loader of this process's batches, and the sampler on which the epoch is set."""
    sampler = RankSampler(epochs, rank, count)
    views = TrainingViews(samples, epochs.size_hw, cache_mib / max(1, workers))
    loader: DataLoader[Batch | HkdError] = DataLoader(
        views,  # type: ignore[arg-type]  # the stubs know no collate_fn that changes the type
        batch_sampler=sampler,
        num_workers=workers,
        # Not fork: a copy of a process whose OpenMP or OpenCV threads have run waits for them for ever.
        multiprocessing_context="spawn" if workers else None,
        collate_fn=collate,
        persistent_workers=workers > 0,
        worker_init_fn=_quiet_worker,
    )
    return loader, sampler


def batches(loader: DataLoader[Batch | HkdError]) -> Iterator[Batch]:
    """One epoch's batches; raises what a picture raised in a worker, as one line."""
    for batch in loader:
        if isinstance(batch, HkdError):
            raise batch
        yield batch


def _quiet_worker(_worker: int) -> None:
    """One thread a worker: the cores belong to the training step. Ctrl-C is the main process's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
