"""`--collect`: which frames are saved, how many, and that the reader of `hkd-train --unlabeled` reads them."""

import errno
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from hkd_deploy.backends.base import StageTimes
from hkd_deploy.demo import collect
from hkd_deploy.demo.base import FrameResult
from hkd_deploy.demo.cli import main
from hkd_deploy.demo.collect import CollectConfig, Collector, FrameSelector, append_line
from hkd_det.datasets.image_files import read_unlabeled
from hkd_det.draw import Redaction
from hkd_det.image import read_image
from hkd_det.structures import Detections

BOX = np.array([[40.0, 20, 80, 100]])


def make_result(
    time_s: float, image: np.ndarray, scores: list[float], camera: str = "door", privacy: Redaction | None = None
) -> FrameResult:
    found = Detections(np.repeat(BOX, len(scores), 0), np.array(scores))
    times = StageTimes(0.0, 0.0, 0.0)
    return FrameResult(camera, 0, image, found.filter(0.4), found, 0.4, time_s, None, times, privacy=privacy)


def make_image(rng: np.random.Generator, level: float = 100) -> np.ndarray:
    """Return an image whose coarse structure is random."""
    cells = np.clip(rng.normal(level, 40, (9, 16, 3)), 0, 255).astype(np.uint8)
    return cv2.resize(cells, (160, 120), interpolation=cv2.INTER_NEAREST)


def write_hour(collector: Collector, rng: np.random.Generator, seconds: int = 7200, camera: str = "door") -> None:
    for index in range(seconds):
        scores = [float(rng.uniform(0.3, 0.5))]
        collector.write(make_result(float(index), make_image(rng), scores, camera))


def read_index(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "frames.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("per_hour", [1, 7, 60])
def test_no_hour_has_more_images_than_the_limit(per_hour: int) -> None:
    rng, selector = np.random.default_rng(0), FrameSelector(per_hour)
    times = [
        selected.result.timestamp_s
        for time_s in np.cumsum(rng.exponential(2.0, 5000))  # irregular, 2.8 hours
        if (selected := selector.add(make_result(float(time_s), make_image(rng), [0.4])))
    ]
    assert all(sum(start <= one < start + 3600 for one in times) <= per_hour for start in times)
    assert len(times) >= 0.8 * per_hour * 2.7 - 1


def test_most_uncertain_frame_of_an_interval_is_selected() -> None:
    rng, selector = np.random.default_rng(0), FrameSelector(60)
    frames = [make_result(float(index), make_image(rng), [0.9]) for index in range(0, 60, 2)]
    frames[20] = make_result(40.0, make_image(rng), [0.9, 0.42, 0.35])
    frames[24] = make_result(48.0, make_image(rng), [0.9, 0.42])
    assert [selector.add(frame) for frame in frames] == [None] * 30
    selected = selector.add(make_result(60.0, make_image(rng), [0.9]))
    assert selected is not None and selected.result is frames[20]
    assert selected.reasons == ["uncertain", "diverse"]  # the first image has nothing to be compared with
    assert selected.uncertainty == pytest.approx((1 - 0.02 / 0.15) + (1 - 0.05 / 0.15), abs=1e-5)


@pytest.mark.slow
def test_repeated_and_certain_images_are_not_selected() -> None:
    rng, selector = np.random.default_rng(0), FrameSelector(60)
    image, num_selected = make_image(rng), 0
    for index in range(600):
        noisy = np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
        num_selected += selector.add(make_result(float(index), noisy, [0.4])) is not None
    assert num_selected == 1  # uncertain, but the same image
    selected = [
        candidate
        for index in range(600, 900)
        if (candidate := selector.add(make_result(float(index), make_image(rng), [0.95])))
    ]
    assert [candidate.reasons for candidate in selected] == [["diverse"]] * len(selected) and len(selected) >= 4


def test_reader_of_unlabeled_directories_reads_the_result(tmp_path: Path) -> None:
    collector = Collector(CollectConfig(tmp_path, per_hour=30), ["door"], print)  # a reload adds the other
    rng = np.random.default_rng(0)
    for camera in ("door", "a/b"):
        write_hour(collector, rng, 1200, camera)
    collector.close()
    samples, index = read_unlabeled([tmp_path]), read_index(tmp_path)
    assert len(samples) == len(index) == collector.num_saved >= 18
    assert sorted(str(sample.path) for sample in samples) == sorted(str(tmp_path / entry["file"]) for entry in index)
    assert {sample.path.parent.name for sample in samples} == {"door", "a_b"}
    assert all(read_image(sample.path).shape == (120, 160, 3) for sample in samples)
    assert all(sample.ground_truth.ignore.all() for sample in samples)
    entry = index[0]
    assert entry["image_wh"] == [160, 120] and entry["conf"] == 0.4 and entry["privacy"] is None
    assert entry["detections"][0]["box_xyxy"] == BOX[0].tolist()
    assert not list(tmp_path.rglob(".*"))


def test_privacy_redacts_the_images(tmp_path: Path) -> None:
    collector = Collector(CollectConfig(tmp_path), ["door"], print)
    image = np.full((120, 160, 3), 255, np.uint8)
    collector.write(make_result(0.0, image, [0.4], privacy="fill"))
    collector.close()
    (sample,) = read_unlabeled([tmp_path])
    saved = read_image(sample.path)
    assert abs(int(saved[60, 60, 0]) - 128) < 6 and saved[60, 140, 0] > 250
    assert read_index(tmp_path)[0]["privacy"] == "fill"


def test_total_limit_counts_earlier_runs_and_is_reported_once(tmp_path: Path) -> None:
    for seed, expected in ((0, 3), (1, 5), (2, 5)):
        lines: list[str] = []
        limit = 3 if seed == 0 else 5
        collector = Collector(
            CollectConfig(tmp_path, 60, limit), ["door"], lambda text, *_, lines=lines, **__: lines.append(text)
        )
        write_hour(collector, np.random.default_rng(seed), 600)
        collector.close()
        assert len(read_unlabeled([tmp_path])) == expected
        (line,) = lines
        assert line.startswith(f"--collect {tmp_path}: {limit} images are reached. Nothing more is saved;")


@pytest.mark.slow
@pytest.mark.parametrize("step", ["atomic_write", "append_line"])
def test_full_disk_is_one_line_and_collection_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    is_full = True

    def fail_if_full(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments)

        return call

    monkeypatch.setattr(collect, step, fail_if_full(getattr(collect, step)))
    lines: list[str] = []
    collector = Collector(CollectConfig(tmp_path), ["door"], lambda text, *_, **__: lines.append(text))
    rng = np.random.default_rng(0)
    for index in range(300):
        collector.write(make_result(float(index), make_image(rng), [0.4]))
    end_s = time.monotonic() + 10
    while collector._queue.qsize() and time.monotonic() < end_s:
        time.sleep(0.01)
    time.sleep(0.1)
    assert lines == [f"--collect {tmp_path}: No space left on device. Images are left out until the disk accepts data."]
    assert not list(tmp_path.rglob("*.jpg"))
    is_full = False
    with monkeypatch.context() as patch:  # little space is free: a small image would fit, the next one not
        patch.setattr(collect.shutil, "disk_usage", lambda _path: SimpleNamespace(free=2**20))
        for index in range(300, 450):
            collector.write(make_result(float(index), make_image(rng), [0.4]))
        while collector._queue.qsize() and time.monotonic() < end_s:
            time.sleep(0.01)
        time.sleep(0.1)
    assert len(lines) == 1
    for index in range(450, 700):
        collector.write(make_result(float(index), make_image(rng), [0.4]))
    collector.close()
    assert lines[1:] == [f"--collect {tmp_path}: images are saved again."]
    assert len(read_unlabeled([tmp_path])) == len(read_index(tmp_path)) == collector.num_saved > 0


def test_failed_line_leaves_the_index_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "frames.jsonl"
    append_line(path, "first")

    def fail(_file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(collect.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        append_line(path, "second")
    assert path.read_text() == "first\n"


def test_command_collects_from_a_video(tiny_onnx: Callable[..., Path], tmp_path: Path) -> None:
    rng, frames = np.random.default_rng(0), tmp_path / "frames"
    frames.mkdir()
    for index in range(30):
        cv2.imwrite(str(frames / f"{index:02d}.png"), make_image(rng, 200))
    out = tmp_path / "collected"
    flags = ["--source", str(frames), "--collect", str(out), "--collect-per-hour", "3600", "--headless"]
    assert main([str(tiny_onnx()), *flags]) == 0
    entries = read_index(out)
    assert len(read_unlabeled([out])) == len(entries) > 3
    assert all(entry["position_s"] >= 0 and entry["reasons"] for entry in entries)
