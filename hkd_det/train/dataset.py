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
from hkd_det.letterbox import STRIDE
from hkd_det.models.base import Targets
from hkd_det.train.augment import MAX_FRAME_SCALE, AugmentedImage, augment
from hkd_det.train.image_cache import ByteCache, CachedImages, DirectoryCache

Batch = tuple[Tensor, Targets]


@dataclass(frozen=True)
class SampleSpec:
    """One view to make: which samples (one, or four for a mosaic), at what size, from what seed."""

    indices: tuple[int, ...]
    size_hw: tuple[int, int]
    seed: int


@dataclass(frozen=True)
class EpochPlan:
    """How the epochs' views are drawn: see TrainConfig for the meaning of each.

    unlabelled: how many pictures without labels follow the `pictures` labelled ones. unlabelled_a_step: how many of
    them go into each batch, on top. They are shown singly, never in a mosaic with others, and change nothing of how
    the labelled ones are drawn.
    """

    num_images: int
    batch: int
    size_hw: tuple[int, int]
    multi_scale: float
    mosaic: float
    seed: int
    num_unlabeled: int = 0
    unlabeled_batch: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch: every labelled picture once, the last batch filled up with the first ones."""
        return -(-self.num_images // self.batch)

    def sample_batches(self, epoch: int, no_aug: bool) -> Iterator[list[SampleSpec]]:
        """The global batches of an epoch. `plain`: without mosaic and multi-scale, as at the end of training.

        Nobody teaches then, so unlabelled pictures are left out, too.
        """
        chance = np.random.default_rng((self.seed, epoch))
        order = np.resize(chance.permutation(self.num_images), self.steps_per_epoch * self.batch)
        others = self._sample_unlabeled(epoch)
        for step in range(self.steps_per_epoch):
            size_hw = self.size_hw if no_aug else self._sample_size(chance)
            labelled = [
                SampleSpec(self._sample_indices(chance, int(index), no_aug), size_hw, int(chance.integers(2**62)))
                for index in order[step * self.batch : (step + 1) * self.batch]
            ]
            yield (
                labelled if no_aug else labelled + [SampleSpec((index,), size_hw, seed) for index, seed in next(others)]
            )

    def _sample_unlabeled(self, epoch: int) -> Iterator[list[tuple[int, int]]]:
        """For each step of an epoch its unlabelled pictures and their seeds, from chance of their own."""
        chance = np.random.default_rng((self.seed, epoch, 1))
        order = np.resize(chance.permutation(self.num_unlabeled), (self.steps_per_epoch, self.unlabeled_batch))
        for indices in (self.num_images + order).tolist():
            yield [(index, int(chance.integers(2**62))) for index in indices]

    def _sample_size(self, rng: np.random.Generator) -> tuple[int, int]:
        factor = rng.uniform(1 - self.multi_scale, 1 + self.multi_scale)
        height, width = (max(STRIDE, round(side * factor / STRIDE) * STRIDE) for side in self.size_hw)
        return height, width

    def _sample_indices(self, rng: np.random.Generator, index: int, no_aug: bool) -> tuple[int, ...]:
        if no_aug or rng.random() >= self.mosaic:
            return (index,)
        return (index, *(int(other) for other in rng.integers(self.num_images, size=3)))


class DistributedBatchSampler(Sampler[list[SampleSpec]]):
    """This process's share of each global batch of one epoch after the other."""

    def __init__(self, plan: EpochPlan, rank: int, world_size: int) -> None:
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.epoch, self.no_aug = 0, False

    def __len__(self) -> int:
        return self.plan.steps_per_epoch

    def __iter__(self) -> Iterator[list[SampleSpec]]:
        for batch in self.plan.sample_batches(self.epoch, self.no_aug):
            yield batch[self.rank :: self.world_size]


class TrainDataset(Dataset[AugmentedImage | HkdError]):
    """Augmented views of samples."""

    def __init__(self, samples: Sequence[Sample], images: CachedImages) -> None:
        self.ground_truths = [sample.ground_truth for sample in samples]
        self.images = images

    def __getitem__(self, spec: SampleSpec) -> AugmentedImage | HkdError:
        """The view, or what is wrong with its pictures: raised here it would cross processes as a traceback."""
        sources = [partial(self._load_image, index) for index in spec.indices]
        try:
            return augment(sources, spec.size_hw, np.random.default_rng(spec.seed))
        except HkdError as error:
            return error

    def _load_image(self, index: int, frame_hw: tuple[float, float]) -> AugmentedImage:
        decoded, truth = self.images.read(index, frame_hw), self.ground_truths[index]
        scale_xyxy = np.array(decoded.scale_xy * 2)
        boxes, visible = ((part * scale_xyxy).astype(np.float32) for part in (truth.boxes_xyxy, truth.visible_xyxy))
        return AugmentedImage(decoded.image, boxes, visible, truth.ignore)


def collate(items: list[AugmentedImage | HkdError]) -> Batch | HkdError:
    """Views of one size to pictures [B, 3, H, W] uint8 and their padded truth; the first error in their place."""
    views = []
    for view in items:
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
    pictures = torch.from_numpy(np.stack([view.image for view in views])).permute(0, 3, 1, 2)
    return pictures, Targets(torch.from_numpy(boxes), torch.from_numpy(real), torch.from_numpy(ignore))


def build_dataloader(
    samples: Sequence[Sample], plan: EpochPlan, rank: int, world_size: int, workers: int, cache_mib: int
) -> tuple[DataLoader[Batch | HkdError], DistributedBatchSampler]:
    """A loader of this process's batches, and the sampler on which the epoch is set.

    samples: the labelled ones, then those without labels, as many as `epochs` counts of each.
    What has to be packed anew of the pictures is kept, `cache_mib` MiB at most: in memory, or for workers in a
    temporary folder that goes with the loader, or with the workers if this process is killed.
    """
    sampler = DistributedBatchSampler(plan, rank, world_size)
    largest = (1 + plan.multi_scale) * MAX_FRAME_SCALE
    largest_hw = (plan.size_hw[0] * largest, plan.size_hw[1] * largest)
    folder = Path(tempfile.mkdtemp(prefix="hkd-pictures-")) if workers else None
    kept: ByteCache = DirectoryCache(folder) if folder else {}
    room_bytes = int(cache_mib * 2**20 / max(1, workers))
    unlabelled = range(plan.num_images, plan.num_images + plan.num_unlabeled)
    pictures = CachedImages([sample.path for sample in samples], largest_hw, kept, room_bytes, unlabelled)
    views = TrainDataset(samples, pictures)
    loader: DataLoader[Batch | HkdError] = DataLoader(
        views,  # type: ignore[arg-type]  # the stubs know no collate_fn that changes the type
        batch_sampler=sampler,
        num_workers=workers,
        # Not fork: a copy of a process whose OpenMP or OpenCV threads have run waits for them for ever.
        multiprocessing_context="spawn" if workers else None,
        collate_fn=collate,
        persistent_workers=workers > 0,
        worker_init_fn=partial(_init_worker, folder) if folder else None,
    )
    if folder:
        weakref.finalize(loader, shutil.rmtree, folder, ignore_errors=True)
    return loader, sampler


def iterate_batches(loader: DataLoader[Batch | HkdError]) -> Iterator[Batch]:
    """One epoch's batches; raises what a picture raised in a worker, as one line."""
    for batch in loader:
        if isinstance(batch, HkdError):
            raise batch
        yield batch


def _init_worker(cache_dir: Path, _worker_id: int) -> None:
    """One thread a worker: the cores belong to the training step. Ctrl-C is the main process's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    sys.excepthook = _ignore_broken_pipe
    Finalize(None, shutil.rmtree, (cache_dir,), {"ignore_errors": True}, exitpriority=0)  # atexit is not run in workers


def _ignore_broken_pipe(cls: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """A worker that hands over a batch while the main process stops has nothing to report."""
    if not issubclass(cls, BrokenPipeError | ConnectionResetError):
        sys.__excepthook__(cls, error, traceback)
