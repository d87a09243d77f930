"""Loading: pictures from disk to batches, the same whatever the number of workers or processes.

Chance depends only on (seed, epoch, position in the epoch): workers hold no random state, so a resumed
run draws the same views.
"""

import shutil
import signal
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hkd_det.datasets import Sample
from hkd_det.errors import HkdError
from hkd_det.imgsz import STRIDE
from hkd_det.models.assignment import TruthBatch
from hkd_det.train.augment import LARGEST_FRAME, View, training_view
from hkd_det.train.pictures import Kept, SharedFolder, TrainingPictures

Batch = tuple[Tensor, TruthBatch]


@dataclass(frozen=True)
class Draw:
    """One view to make: which samples (one, or four for a mosaic), at what size, from what seed."""

    indices: tuple[int, ...]
    size_hw: tuple[int, int]
    seed: int


@dataclass(frozen=True)
class Epochs:
    """How the epochs' views are drawn: see TrainConfig for the meaning of each.

    unlabelled: how many pictures without labels follow the `pictures` labelled ones. unlabelled_a_step: how many of
    them go into each batch, on top. They are shown singly, never in a mosaic with others, and change nothing of how
    the labelled ones are drawn.
    """

    pictures: int
    batch: int
    size_hw: tuple[int, int]
    multi_scale: float
    mosaic: float
    seed: int
    unlabelled: int = 0
    unlabelled_a_step: int = 0

    @property
    def steps(self) -> int:
        """Batches an epoch: every labelled picture once, the last batch filled up with the first ones."""
        return -(-self.pictures // self.batch)

    def batches(self, epoch: int, plain: bool) -> Iterator[list[Draw]]:
        """The global batches of an epoch. `plain`: without mosaic and multi-scale, as at the end of training.

        Nobody teaches then, so unlabelled pictures are left out, too.
        """
        chance = np.random.default_rng((self.seed, epoch))
        order = np.resize(chance.permutation(self.pictures), self.steps * self.batch)
        others = self._unlabelled(epoch)
        for step in range(self.steps):
            size_hw = self.size_hw if plain else self._scaled(chance)
            labelled = [
                Draw(self._sources(chance, int(index), plain), size_hw, int(chance.integers(2**62)))
                for index in order[step * self.batch : (step + 1) * self.batch]
            ]
            yield labelled if plain else labelled + [Draw((index,), size_hw, seed) for index, seed in next(others)]

    def _unlabelled(self, epoch: int) -> Iterator[list[tuple[int, int]]]:
        """For each step of an epoch its unlabelled pictures and their seeds, from chance of their own."""
        chance = np.random.default_rng((self.seed, epoch, 1))
        order = np.resize(chance.permutation(self.unlabelled), (self.steps, self.unlabelled_a_step))
        for indices in (self.pictures + order).tolist():
            yield [(index, int(chance.integers(2**62))) for index in indices]

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
    """Augmented views of samples."""

    def __init__(self, samples: Sequence[Sample], pictures: TrainingPictures) -> None:
        self.truths = [sample.truth for sample in samples]
        self.pictures = pictures

    def __getitem__(self, draw: Draw) -> View | HkdError:
        """The view, or what is wrong with its pictures: raised here it would cross processes as a traceback."""
        sources = [partial(self._source, index) for index in draw.indices]
        try:
            return training_view(sources, draw.size_hw, np.random.default_rng(draw.seed))
        except HkdError as error:
            return error

    def _source(self, index: int, frame_hw: tuple[float, float]) -> View:
        decoded, truth = self.pictures.read(index, frame_hw), self.truths[index]
        scale_xyxy = np.array(decoded.scale_xy * 2)
        boxes, visible = ((part * scale_xyxy).astype(np.float32) for part in (truth.boxes_xyxy, truth.visible_xyxy))
        return View(decoded.picture, boxes, visible, truth.ignore)


def collate(made: list[View | HkdError]) -> Batch | HkdError:
    """Views of one size to pictures [B, 3, H, W] uint8 and their padded truth; the first error in their place."""
    views = []
    for view in made:
        if isinstance(view, HkdError):
            return view
        views.append(view)
    most = max((len(view.ignore) for view in views), default=0)
    boxes = np.zeros((len(views), most, 4), np.float32)
    real, ignore = np.zeros((2, len(views), most), bool)
    for row, view in enumerate(views):
        count = len(view.ignore)
        boxes[row, :count] = view.boxes_xyxy
        real[row, :count] = ~view.ignore
        ignore[row, :count] = view.ignore
    pictures = torch.from_numpy(np.stack([view.picture for view in views])).permute(0, 3, 1, 2)
    return pictures, TruthBatch(torch.from_numpy(boxes), torch.from_numpy(real), torch.from_numpy(ignore))


def open_loader(
    samples: Sequence[Sample], epochs: Epochs, rank: int, count: int, workers: int, cache_mib: int
) -> tuple[DataLoader[Batch | HkdError], RankSampler]:
    """A loader of this process's batches, and the sampler on which the epoch is set.

    samples: the labelled ones, then those without labels, as many as `epochs` counts of each.
    What has to be packed anew of the pictures is kept, `cache_mib` MiB at most: in memory, or for workers in a
    temporary folder that goes with the loader, or with the workers if this process is killed.
    """
    sampler = RankSampler(epochs, rank, count)
    largest = (1 + epochs.multi_scale) * LARGEST_FRAME
    largest_hw = (epochs.size_hw[0] * largest, epochs.size_hw[1] * largest)
    folder = Path(tempfile.mkdtemp(prefix="hkd-pictures-")) if workers else None
    kept: Kept = SharedFolder(folder) if folder else {}
    room_bytes = int(cache_mib * 2**20 / max(1, workers))
    unlabelled = range(epochs.pictures, epochs.pictures + epochs.unlabelled)
    pictures = TrainingPictures([sample.path for sample in samples], largest_hw, kept, room_bytes, unlabelled)
    views = TrainingViews(samples, pictures)
    loader: DataLoader[Batch | HkdError] = DataLoader(
        views,  # type: ignore[arg-type]  # the stubs know no collate_fn that changes the type
        batch_sampler=sampler,
        num_workers=workers,
        # Not fork: a copy of a process whose OpenMP or OpenCV threads have run waits for them for ever.
        multiprocessing_context="spawn" if workers else None,
        collate_fn=collate,
        persistent_workers=workers > 0,
        worker_init_fn=partial(_quiet_worker, folder) if folder else None,
    )
    if folder:
        weakref.finalize(loader, shutil.rmtree, folder, ignore_errors=True)
    return loader, sampler


def batches(loader: DataLoader[Batch | HkdError]) -> Iterator[Batch]:
    """One epoch's batches; raises what a picture raised in a worker, as one line."""
    for batch in loader:
        if isinstance(batch, HkdError):
            raise batch
        yield batch


def _quiet_worker(folder: Path, _worker: int) -> None:
    """One thread a worker: the cores belong to the training step. Ctrl-C is the main process's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    sys.excepthook = _left_alone
    Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=0)  # atexit is not run in workers


def _left_alone(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A worker that hands over a batch while the main process stops has nothing to report."""
    if not issubclass(kind, BrokenPipeError | ConnectionResetError):
        sys.__excepthook__(kind, error, trace)
