"""The loader: the same batches whoever makes them, nothing left behind, and the truth where the pictures have it."""

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
    """Twelve pictures, PNG and JPEG, small and far too large, each with one white person whose lower half is hidden."""
    folder = tmp_path_factory.mktemp("pictures")
    made = []
    for number in range(12):
        height, width = (70, 110) if number % 3 else (1210, 1790)
        box = np.array([[width // 4, height // 8, width // 2, height - height // 8]], np.float32)
        visible = box * [1, 1, 1, 0.5]
        picture = np.zeros((height, width, 3), np.uint8)
        x1, y1, x2, y2 = box[0].astype(int)
        picture[y1:y2, x1:x2] = 255
        path = folder / f"{number}.{'png' if number % 2 else 'jpg'}"
        cv2.imwrite(str(path), picture)
        made.append(Sample(number, path, GroundTruth(box, np.array([False]), visible.astype(np.float32), ("person",))))
    return made


def epochs_of(samples: list[Sample], **changes: float) -> EpochPlan:
    return EpochPlan(**{"pictures": len(samples), "batch": 4, "size_hw": SIZE_HW, "multi_scale": 0.25, "mosaic": 0.5,
                     "seed": 3, **changes})  # type: ignore[arg-type]  # fmt: skip


def batches_of(samples: list[Sample], workers: int = 0, cache_mib: int = 64, rounds: int = 1) -> list[list[Batch]]:
    loader, _ = build_dataloader(samples, epochs_of(samples), 0, 1, workers, cache_mib)
    return [list(iterate_batches(loader)) for _ in range(rounds)]


def same(one: list[Batch], other: list[Batch]) -> bool:
    def tensors(batch: Batch) -> list[torch.Tensor]:
        return [batch[0], batch[1].boxes_xyxy, batch[1].valid, batch[1].ignore]

    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(tensors(x), tensors(y), strict=True)
    )


def test_the_same_batches_whoever_makes_them_and_whatever_is_kept(samples: list[Sample]) -> None:
    first, later = batches_of(samples, rounds=2)
    assert same(first, later)
    assert same(first, batches_of(samples, cache_mib=0)[0])
    both_workers = batches_of(samples, workers=2, rounds=2)
    assert same(first, both_workers[0]) and same(first, both_workers[1])


def test_batches_are_what_the_detector_takes(samples: list[Sample]) -> None:
    for pictures, truth in batches_of(samples)[0]:
        assert pictures.dtype == torch.uint8 and pictures.shape[:2] == (4, 3)
        assert pictures.is_contiguous(memory_format=torch.channels_last)
        assert truth.boxes_xyxy.dtype == torch.float32 and truth.valid.dtype == truth.ignore.dtype == torch.bool
        assert not (truth.valid & truth.ignore).any()


def test_people_lie_where_they_are_painted_through_the_whole_loader(samples: list[Sample]) -> None:
    """Packed, decoded at a fraction, scaled, cropped, mirrored: the white that is found is the box."""
    loader, sampler = build_dataloader(samples, epochs_of(samples, mosaic=0, multi_scale=0), 0, 1, 0, 64)
    seen = 0
    for sampler.epoch in range(4):
        for pictures, truth in iterate_batches(loader):
            for picture, box, there in zip(pictures, truth.boxes_xyxy, truth.valid | truth.ignore, strict=True):
                if not there[0] or (box[0, 2:] - box[0, :2]).min() < 4:
                    continue
                # Against the padding's 114 in any light; the ground is black.
                white = picture.float().mean(0) > 160
                rows, columns = white.any(1).nonzero(), white.any(0).nonzero()
                found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                np.testing.assert_allclose(box[0], [float(side) for side in found], atol=2)
                seen += 1
    assert seen > 24


def test_whose_visible_part_is_too_small_is_ignored(samples: list[Sample]) -> None:
    """Visible by a tenth: never somebody to find. By half: often."""
    truth = samples[1].ground_truth
    least = (truth.boxes_xyxy * [1, 1, 1, 0.2]).astype(np.float32)
    hidden = GroundTruth(truth.boxes_xyxy, truth.ignore, least, truth.labels)
    for known, expected in ((hidden, False), (truth, True)):
        made = batches_of([Sample(0, samples[1].path, known)] * 8)[0]
        assert bool(torch.cat([batch[1].valid.any(1) for batch in made]).any()) == expected


def test_a_broken_picture_is_one_line_from_a_worker_too(samples: list[Sample], tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(samples[1].path.read_bytes()[:200])
    broken = [*samples, Sample("broken", path)]
    with pytest.raises(DataError, match=r"broken\.png"):
        batches_of(broken)
    with pytest.raises(DataError, match=r"broken\.png"):
        batches_of(broken, workers=1)


def test_the_folder_goes_with_the_loader(samples: list[Sample]) -> None:
    loader, _ = build_dataloader(samples, epochs_of(samples), 0, 1, 1, 64)
    views = loader.dataset
    assert isinstance(views, TrainDataset) and isinstance(views.images.cache, DirectoryCache)
    folder = views.images.cache.directory
    list(iterate_batches(loader))
    assert list(folder.iterdir())
    del loader, views
    gc.collect()
    assert not folder.exists()


@pytest.mark.slow
def test_the_folder_goes_with_the_workers_of_a_killed_process(samples: list[Sample]) -> None:
    program = f"""
import time
from pathlib import Path
from hkd_det.datasets import Sample
from hkd_det.train.dataset import Epochs, batches, open_loader
if __name__ == "__main__":
    samples = [Sample(0, Path({str(samples[1].path)!r}))]
    loader, _ = open_loader(samples, Epochs(1, 1, (64, 96), 0, 0, 0), 0, 1, workers=1, cache_mib=1)
    list(batches(loader))
    print(loader.dataset.pictures.kept.folder, flush=True)
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


def test_views_of_unequal_counts_are_padded() -> None:
    one = np.array([[1, 2, 30, 40]], np.float32)
    picture = np.zeros((64, 96, 3), np.uint8)
    nobody = np.zeros((0, 4), np.float32)
    views = [
        AugmentedImage(picture, np.concatenate([one, one + 5]), np.concatenate([one, one]), np.array([False, True])),
        AugmentedImage(picture, nobody, nobody, np.zeros(0, bool)),
    ]
    batch = collate(list(views))
    assert isinstance(batch, tuple)
    _, truth = batch
    assert truth.valid.tolist() == [[True, False], [False, False]]
    assert truth.ignore.tolist() == [[False, True], [False, False]]
    assert truth.boxes_xyxy[0].tolist() == [[1, 2, 30, 40], [6, 7, 35, 45]] and not truth.boxes_xyxy[1].any()


def test_an_epoch_shows_every_picture_and_ranks_share_it() -> None:
    epochs = EpochPlan(num_images=10, batch=4, size_hw=SIZE_HW, multi_scale=0.25, mosaic=0.5, seed=0)
    drawn = [draw for batch in epochs.sample_batches(3, no_aug=False) for draw in batch]
    assert epochs.steps_per_epoch == 3 and {draw.indices[0] for draw in drawn} == set(range(10))
    assert {len(draw.indices) for draw in drawn} == {1, 4} and len({draw.seed for draw in drawn}) == 12
    plain = [draw for batch in epochs.sample_batches(3, no_aug=True) for draw in batch]
    assert all(len(draw.indices) == 1 and draw.size_hw == SIZE_HW for draw in plain)


def test_a_worker_whose_main_process_stops_says_nothing_but_other_errors_are_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _ignore_broken_pipe(BrokenPipeError, BrokenPipeError("gone"), None)
    assert not capsys.readouterr().err
    _ignore_broken_pipe(ValueError, ValueError("wrong"), None)
    assert "wrong" in capsys.readouterr().err
