"""Data loading for training: deterministic epochs of augmented, padded batches.

All random numbers depend only on (seed, epoch, position in the epoch). Workers hold no random state. The batches are
therefore the same for any number of workers or processes, and for a resumed run.
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
    """The inputs of one augmented image.

    Attributes:
        indices: Indices of the samples: one, or four for a mosaic.
        size_hw: Output height and width, pixels.
        seed: Seed of the augmentation.
    """

    indices: tuple[int, ...]
    size_hw: tuple[int, int]
    seed: int


@dataclass(frozen=True)
class EpochPlan:
    """How the batches of an epoch are sampled.

    Unlabeled images follow the labeled ones in the index. They never enter a mosaic, and do not change how labeled
    images are sampled.

    Attributes:
        num_images: Number of labeled images.
        batch: Labeled images per global batch.
        size_hw: Output height and width, pixels.
        multi_scale: Random change of the size per batch, ratio: 0.25 gives 0.75 to 1.25.
        mosaic: Probability of a mosaic.
        seed: Seed of the run.
        num_unlabeled: Number of unlabeled images.
        unlabeled_batch: Unlabeled images added to each global batch.
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
        """Batches per epoch. Every labeled image occurs once; the last batch is filled with the first images."""
        return -(-self.num_images // self.batch)

    def sample_batches(self, epoch: int, no_aug: bool, no_unlabeled: bool = False) -> Iterator[list[SampleSpec]]:
        """Sample the global batches of one epoch.

        Args:
            epoch: Index of the epoch, from 0.
            no_aug: Disable mosaic and multi-scale, as at the end of training.
            no_unlabeled: Leave out the unlabeled images, as in epochs without distillation.

        Yields:
            The specs of one global batch: labeled images first, then unlabeled ones.
        """
        rng = np.random.default_rng((self.seed, epoch))
        order = np.resize(rng.permutation(self.num_images), self.steps_per_epoch * self.batch)
        unlabeled_batches = self._sample_unlabeled(epoch)
        for step in range(self.steps_per_epoch):
            size_hw = self.size_hw if no_aug else self._sample_size(rng)
            labeled = [
                SampleSpec(self._sample_indices(rng, int(index), no_aug), size_hw, int(rng.integers(2**62)))
                for index in order[step * self.batch : (step + 1) * self.batch]
            ]
            if no_unlabeled:
                yield labeled
            else:
                yield labeled + [SampleSpec((index,), size_hw, seed) for index, seed in next(unlabeled_batches)]

    def _sample_unlabeled(self, epoch: int) -> Iterator[list[tuple[int, int]]]:
        """Sample the unlabeled images of each step, as (index, seed), from a random stream of their own."""
        rng = np.random.default_rng((self.seed, epoch, 1))
        order = np.resize(rng.permutation(self.num_unlabeled), (self.steps_per_epoch, self.unlabeled_batch))
        for indices in (self.num_images + order).tolist():
            yield [(index, int(rng.integers(2**62))) for index in indices]

    def _sample_size(self, rng: np.random.Generator) -> tuple[int, int]:
        factor = rng.uniform(1 - self.multi_scale, 1 + self.multi_scale)
        height, width = (max(STRIDE, round(side * factor / STRIDE) * STRIDE) for side in self.size_hw)
        return height, width

    def _sample_indices(self, rng: np.random.Generator, index: int, no_aug: bool) -> tuple[int, ...]:
        if no_aug or rng.random() >= self.mosaic:
            return (index,)
        return (index, *(int(partner) for partner in rng.integers(self.num_images, size=3)))


class DistributedBatchSampler(Sampler[list[SampleSpec]]):
    """Yields the part of each global batch that one process trains on.

    Args:
        plan: How the global batches are sampled.
        rank: Index of this process.
        world_size: Number of processes.

    Attributes:
        epoch: Epoch that the next iteration samples. Set it before each epoch.
        no_aug: Whether the next iteration disables mosaic and multi-scale.
        no_unlabeled: Whether the next iteration leaves out the unlabeled images.
    """

    def __init__(self, plan: EpochPlan, rank: int, world_size: int) -> None:
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.epoch, self.no_aug, self.no_unlabeled = 0, False, False

    def __len__(self) -> int:
        return self.plan.steps_per_epoch

    def __iter__(self) -> Iterator[list[SampleSpec]]:
        for batch in self.plan.sample_batches(self.epoch, self.no_aug, self.no_unlabeled):
            yield batch[self.rank :: self.world_size]


class TrainDataset(Dataset[AugmentedImage | HkdError]):
    """Augmented images of samples, indexed by `SampleSpec`.

    Args:
        samples: Samples with the ground truth.
        images: The images of these samples.
    """

    def __init__(self, samples: Sequence[Sample], images: CachedImages) -> None:
        self.ground_truths = [sample.ground_truth for sample in samples]
        self.images = images

    def __getitem__(self, spec: SampleSpec) -> AugmentedImage | HkdError:
        """Load and augment one image.

        Args:
            spec: What to load.

        Returns:
            The augmented image, or the error of an unreadable file. A worker that raised the error would print a
            traceback.
        """
        image_loaders = [partial(self._load_image, index) for index in spec.indices]
        try:
            return augment(image_loaders, spec.size_hw, np.random.default_rng(spec.seed))
        except HkdError as error:
            return error

    def _load_image(self, index: int, frame_hw: tuple[float, float]) -> AugmentedImage:
        decoded, ground_truth = self.images.read(index, frame_hw), self.ground_truths[index]
        scale_xyxy = np.array(decoded.scale_xy * 2)
        boxes, visible = (
            (boxes_xyxy * scale_xyxy).astype(np.float32)
            for boxes_xyxy in (ground_truth.boxes_xyxy, ground_truth.visible_xyxy)
        )
        return AugmentedImage(decoded.image, boxes, visible, ground_truth.ignore)


def collate(items: list[AugmentedImage | HkdError]) -> Batch | HkdError:
    """Stack augmented images of one size and pad their boxes.

    Args:
        items: Augmented images; an error in place of an image that cannot be loaded.

    Returns:
        images (uint8 Tensor[B, 3, H, W], channels last) and their targets; or the first error.
    """
    augmented_images = []
    for item in items:
        if isinstance(item, HkdError):
            return item
        augmented_images.append(item)
    max_boxes = max((len(augmented.ignore) for augmented in augmented_images), default=0)
    boxes = np.zeros((len(augmented_images), max_boxes, 4), np.float32)
    valid, ignore = np.zeros((2, len(augmented_images), max_boxes), bool)
    for row, augmented in enumerate(augmented_images):
        num_boxes = len(augmented.ignore)
        boxes[row, :num_boxes] = augmented.boxes_xyxy
        valid[row, :num_boxes] = ~augmented.ignore
        ignore[row, :num_boxes] = augmented.ignore
    images = torch.from_numpy(np.stack([augmented.image for augmented in augmented_images])).permute(0, 3, 1, 2)
    return images, Targets(torch.from_numpy(boxes), torch.from_numpy(valid), torch.from_numpy(ignore))


class ImageLoader(DataLoader[Batch | HkdError]):
    """A data loader that does not warn about more processes than CPUs: the default of two runs on one CPU as well."""

    def check_worker_number_rationality(self) -> None:
        """Accept any number of processes."""


def build_dataloader(
    samples: Sequence[Sample], plan: EpochPlan, rank: int, world_size: int, workers: int, cache_mib: int
) -> tuple[DataLoader[Batch | HkdError], DistributedBatchSampler]:
    """Build the data loader of one process.

    Re-encoded images are cached in memory, or, with workers, in a temporary directory. The directory is removed with
    the loader, or by the workers if this process is killed.

    Args:
        samples: The labeled samples, then the unlabeled ones, in the numbers that `plan` states.
        plan: How the batches are sampled.
        rank: Index of this process.
        world_size: Number of processes.
        workers: Number of loader processes; 0 loads in this process.
        cache_mib: Limit of the cache, MiB.

    Returns:
        The loader, and its sampler, on which the epoch is set.
    """
    sampler = DistributedBatchSampler(plan, rank, world_size)
    max_scale = (1 + plan.multi_scale) * MAX_FRAME_SCALE
    max_hw = (plan.size_hw[0] * max_scale, plan.size_hw[1] * max_scale)
    cache_dir = Path(tempfile.mkdtemp(prefix="hkd-images-")) if workers else None
    cache: ByteCache = DirectoryCache(cache_dir) if cache_dir else {}
    capacity_bytes = int(cache_mib * 2**20 / max(1, workers))
    images = CachedImages([sample.path for sample in samples], max_hw, cache, capacity_bytes)
    dataset = TrainDataset(samples, images)
    loader = ImageLoader(
        dataset,  # type: ignore[arg-type]  # the stubs do not allow a collate_fn that changes the type
        batch_sampler=sampler,
        num_workers=workers,
        # Not "fork": a child of a process with running OpenMP or OpenCV threads can wait for them forever.
        multiprocessing_context="spawn" if workers else None,
        collate_fn=collate,
        persistent_workers=workers > 0,
        worker_init_fn=partial(_init_worker, cache_dir) if cache_dir else None,
    )
    if cache_dir:
        weakref.finalize(loader, shutil.rmtree, cache_dir, ignore_errors=True)
    return loader, sampler


def iterate_batches(loader: DataLoader[Batch | HkdError]) -> Iterator[Batch]:
    """Iterate over one epoch and raise the errors that workers returned.

    Args:
        loader: A loader of `build_dataloader`.

    Yields:
        images (uint8 Tensor[B, 3, H, W]) and their targets.

    Raises:
        HkdError: A worker could not read an image.
    """
    for batch in loader:
        if isinstance(batch, HkdError):
            raise batch
        yield batch


def _init_worker(cache_dir: Path, _worker_id: int) -> None:
    """Limit a worker to one thread, and leave Ctrl-C to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    sys.excepthook = _ignore_broken_pipe
    # Workers do not run atexit functions.
    Finalize(None, shutil.rmtree, (cache_dir,), {"ignore_errors": True}, exitpriority=0)


def _ignore_broken_pipe(cls: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print uncaught errors, except those of a worker that sends a batch while the main process exits."""
    if not issubclass(cls, BrokenPipeError | ConnectionResetError):
        sys.__excepthook__(cls, error, traceback)
