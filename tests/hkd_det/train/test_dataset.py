"""Data loader: deterministic batches, cleanup of the cache, and boxes that match the images."""

import gc
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from hkd_det.datasets import GroundTruth, Sample
from hkd_det.errors import DataError
from hkd_det.train.augment import AugmentedImage
from hkd_det.train.dataset import (
    Batch,
    EpochPlan,
    TrainDataset,
    _ignore_broken_pipe,
    build_dataloader,
    collate,
    iterate_batches,
)
from hkd_det.train.image_cache import DirectoryCache

SIZE_HW = (64, 96)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Write 12 PNG and JPEG images, small and large, with one white box each, whose upper half is visible."""
    folder = tmp_path_factory.mktemp("images")
    samples = []
    for number in range(12):
        height, width = (70, 110) if number % 3 else (1210, 1790)
        box = np.array([[width // 4, height // 8, width // 2, height - height // 8]], np.float32)
        visible = box * [1, 1, 1, 0.5]
        image = np.zeros((height, width, 3), np.uint8)
        x1, y1, x2, y2 = box[0].astype(int)
        image[y1:y2, x1:x2] = 255
        path = folder / f"{number}.{'png' if number % 2 else 'jpg'}"
        cv2.imwrite(str(path), image)
        ground_truth = GroundTruth(box, np.array([False]), visible.astype(np.float32), ("person",))
        samples.append(Sample(number, path, ground_truth))
    return samples


def make_plan(samples: list[Sample], mosaic: float = 0.5, multi_scale: float = 0.25) -> EpochPlan:
    return EpochPlan(len(samples), batch=4, size_hw=SIZE_HW, multi_scale=multi_scale, mosaic=mosaic, seed=3)


def load_epochs(samples: list[Sample], workers: int = 0, cache_mib: int = 64, num_epochs: int = 1) -> list[list[Batch]]:
    loader, _ = build_dataloader(samples, make_plan(samples), 0, 1, workers, cache_mib)
    return [list(iterate_batches(loader)) for _ in range(num_epochs)]


def are_equal(first: list[Batch], second: list[Batch]) -> bool:
    def tensors(batch: Batch) -> list[torch.Tensor]:
        return [batch[0], batch[1].boxes_xyxy, batch[1].valid, batch[1].ignore]

    return len(first) == len(second) and all(
        torch.equal(a, b)
        for x, y in zip(first, second, strict=True)
        for a, b in zip(tensors(x), tensors(y), strict=True)
    )


def test_batches_do_not_depend_on_epoch_or_cache(samples: list[Sample]) -> None:
    first, later = load_epochs(samples, num_epochs=2)
    assert are_equal(first, later)
    assert are_equal(first, load_epochs(samples, cache_mib=0)[0])


@pytest.mark.slow
def test_batches_do_not_depend_on_workers(samples: list[Sample]) -> None:
    (first,) = load_epochs(samples)
    with_workers = load_epochs(samples, workers=2, num_epochs=2)
    assert are_equal(first, with_workers[0]) and are_equal(first, with_workers[1])


def test_batch_has_the_detector_input_format(samples: list[Sample]) -> None:
    for images, targets in load_epochs(samples)[0]:
        assert images.dtype == torch.uint8 and images.shape[:2] == (4, 3)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert targets.boxes_xyxy.dtype == torch.float32 and targets.valid.dtype == targets.ignore.dtype == torch.bool
        assert not (targets.valid & targets.ignore).any()


def test_boxes_match_white_pixels_after_the_loader(samples: list[Sample]) -> None:
    """Re-encoding, reduced decoding, scale, crop and flip move box and pixels equally."""
    loader, sampler = build_dataloader(samples, make_plan(samples, mosaic=0, multi_scale=0), 0, 1, 0, 64)
    num_checked = 0
    for sampler.epoch in range(4):
        for images, targets in iterate_batches(loader):
            for image, box, is_box in zip(images, targets.boxes_xyxy, targets.valid | targets.ignore, strict=True):
                if not is_box[0] or (box[0, 2:] - box[0, :2]).min() < 4:
                    continue
                # Brighter than the padding (114) after any color jitter; the background is black.
                white = image.float().mean(0) > 160
                rows, columns = white.any(1).nonzero(), white.any(0).nonzero()
                extent = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                np.testing.assert_allclose(box[0], [float(side) for side in extent], atol=2)
                num_checked += 1
    assert num_checked > 24


def test_box_with_small_visible_part_is_ignored(samples: list[Sample]) -> None:
    """A box with a visible ratio of 0.1 is never valid; one with 0.5 is valid in some augmented images."""
    ground_truth = samples[1].ground_truth
    small = (ground_truth.boxes_xyxy * [1, 1, 1, 0.2]).astype(np.float32)
    occluded = GroundTruth(ground_truth.boxes_xyxy, ground_truth.ignore, small, ground_truth.labels)
    for annotation, expected in ((occluded, False), (ground_truth, True)):
        batches = load_epochs([Sample(0, samples[1].path, annotation)] * 8)[0]
        assert bool(torch.cat([batch[1].valid.any(1) for batch in batches]).any()) == expected


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_broken_image_raises_data_error(samples: list[Sample], tmp_path: Path, workers: int) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(samples[1].path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"broken\.png"):
        load_epochs([*samples, Sample("broken", path)], workers=workers)


@pytest.mark.slow
def test_cache_directory_is_removed_with_the_loader(samples: list[Sample]) -> None:
    loader, _ = build_dataloader(samples, make_plan(samples), 0, 1, 1, 64)
    dataset = loader.dataset
    assert isinstance(dataset, TrainDataset) and isinstance(dataset.images.cache, DirectoryCache)
    folder = dataset.images.cache.directory
    list(iterate_batches(loader))
    assert list(folder.iterdir())
    del loader, dataset
    gc.collect()
    assert not folder.exists()


@pytest.mark.slow
def test_cache_directory_is_removed_after_main_process_is_killed(samples: list[Sample]) -> None:
    program = f"""
import time
from pathlib import Path
from hkd_det.datasets import Sample
from hkd_det.train.dataset import EpochPlan, build_dataloader, iterate_batches
if __name__ == "__main__":
    samples = [Sample(0, Path({str(samples[1].path)!r}))]
    loader, _ = build_dataloader(samples, EpochPlan(1, 1, (64, 96), 0, 0, 0), 0, 1, workers=1, cache_mib=1)
    list(iterate_batches(loader))
    print(loader.dataset.images.cache.directory, flush=True)
    time.sleep(600)
"""
    script = samples[0].path.parent / "killed.py"
    script.write_text(program)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert list(folder.iterdir())
        process.kill()
    deadline = time.monotonic() + 60
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not folder.exists()


def test_collate_pads_boxes_to_the_largest_count() -> None:
    box = np.array([[1, 2, 30, 40]], np.float32)
    image = np.zeros((64, 96, 3), np.uint8)
    no_boxes = np.zeros((0, 4), np.float32)
    two_boxes = AugmentedImage(
        image, np.concatenate([box, box + 5]), np.concatenate([box, box]), np.array([False, True])
    )
    batch = collate([two_boxes, AugmentedImage(image, no_boxes, no_boxes, np.zeros(0, bool))])
    assert isinstance(batch, tuple)
    _, targets = batch
    assert targets.valid.tolist() == [[True, False], [False, False]]
    assert targets.ignore.tolist() == [[False, True], [False, False]]
    assert targets.boxes_xyxy[0].tolist() == [[1, 2, 30, 40], [6, 7, 35, 45]] and not targets.boxes_xyxy[1].any()


def test_epoch_contains_every_image_with_its_own_seed() -> None:
    plan = EpochPlan(num_images=10, batch=4, size_hw=SIZE_HW, multi_scale=0.25, mosaic=0.5, seed=0)
    specs = [spec for batch in plan.sample_batches(3, no_aug=False) for spec in batch]
    assert plan.steps_per_epoch == 3 and {spec.indices[0] for spec in specs} == set(range(10))
    assert {len(spec.indices) for spec in specs} == {1, 4} and len({spec.seed for spec in specs}) == 12
    unaugmented = [spec for batch in plan.sample_batches(3, no_aug=True) for spec in batch]
    assert all(len(spec.indices) == 1 and spec.size_hw == SIZE_HW for spec in unaugmented)


def test_worker_prints_errors_except_broken_pipes(capsys: pytest.CaptureFixture[str]) -> None:
    _ignore_broken_pipe(BrokenPipeError, BrokenPipeError("closed"), None)
    assert not capsys.readouterr().err
    _ignore_broken_pipe(ValueError, ValueError("wrong"), None)
    assert "wrong" in capsys.readouterr().err
