"""Tests of `hkd-bench --cameras` with a detector of known time on a clock of its own, and with a real process."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jsonschema
import pytest

from hkd_bench.bench import BenchOptions, bench
from hkd_bench.cameras import measure_cameras, search_cameras
from hkd_bench.cli import main
from hkd_bench.report import write_bench_report
from hkd_bench.result import read_result, write_result
from hkd_bench.table import format_text_table
from hkd_det.datasets.catalog import load_dataset

SCHEMA = Path(__file__).parents[2] / "docs/reference/bench-result.schema.json"


class Device:
    """A clock, and a detector that takes `call_s` per call and `frame_s` per frame."""

    def __init__(self, frame_s: float, call_s: float = 0.0) -> None:
        self.now_s, self.frame_s, self.call_s = 0.0, frame_s, call_s

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + 1e-9

    def detect(self, frames: Sequence[int]) -> None:
        self.now_s += self.call_s + self.frame_s * len(frames)


@pytest.mark.parametrize(("frame_s", "fps"), [(0.0105, 10), (0.0103, 25), (0.0031, 30), (0.0999, 10), (0.0301, 5)])
def test_capacity_is_period_divided_by_time_per_frame(frame_s: float, fps: float) -> None:
    """Frames are evenly shifted: none waits while the time of a frame is below the period divided by the cameras."""
    device = Device(frame_s)
    result = search_cameras(device.detect, fps, 1, device.clock, device.sleep)
    assert result.cameras == int(1 / (fps * frame_s))
    for point in result.points:
        if point.cameras <= result.cameras:
            assert point.p50_ms == pytest.approx(1e3 * frame_s, abs=1e-3) == point.p99_ms
            assert point.dropped == 0


def test_no_camera_is_held_if_one_frame_takes_longer_than_the_period() -> None:
    device = Device(0.2)
    result = search_cameras(device.detect, 10, 1, device.clock, device.sleep)
    assert result.cameras == 0 and [point.cameras for point in result.points] == [1]


def test_dropped_share_of_an_overloaded_device() -> None:
    """20 cameras at 10 frames per second are 200 frames, of which a device of 10 ms per frame serves 100."""
    device = Device(0.01)
    point = measure_cameras(device.detect, 20, 10, 1, device.clock, device.sleep)
    assert point.dropped == pytest.approx(0.5, abs=0.03) and point.p99_ms is None and not point.is_held(10)


def test_batches_raise_the_capacity() -> None:
    """8 ms per call and 1 ms per frame: single frames take 9 ms, a batch of 4 takes 12 ms."""
    single, batched = Device(0.001, 0.008), Device(0.001, 0.008)
    assert search_cameras(single.detect, 10, 1, single.clock, single.sleep).cameras == 11
    assert 11 < search_cameras(batched.detect, 10, 4, batched.clock, batched.sleep).cameras <= 33


def test_result_has_the_curve(write_tiny_onnx: Callable[..., Path], half_right: Path, tmp_path: Path) -> None:
    model = write_tiny_onnx(tmp_path / "tiny.onnx")
    data = str(half_right)
    options = BenchOptions(
        runs=2, rounds=1, warmup=1, warmup_s=0, stage_runs=1, data=data, split="val", cameras_fps=1000
    )
    result = bench([model], load_dataset(data, "val"), options)
    cameras = result.models[0].cameras
    assert cameras is not None and (cameras.fps, cameras.batch) == (1000, 1) and cameras.points[0].cameras == 1
    write_result(tmp_path / "r.json", result)
    assert read_result(tmp_path / "r.json") == result
    jsonschema.validate(json.loads((tmp_path / "r.json").read_text()), json.loads(SCHEMA.read_text()))
    text = format_text_table(result)
    assert f"boxes below 1.0 ms: {cameras.cameras} (tiny)" in text and "dropped, %" in text
    write_bench_report(tmp_path / "r.html", result, title="Cameras")
    assert "<h2>Cameras</h2>" in (tmp_path / "r.html").read_text()


def test_wrong_rate_gives_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["x.onnx", "--data", "missing.yaml", "--cameras", "0"]) == 2
    assert "--cameras" in capsys.readouterr().err
