"""Tests of `hkd-bench --cameras` with a detector of known time on a clock of its own, and with a real process."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from hkd_bench.bench import BenchOptions, bench
from hkd_bench.cameras import CameraPoint, CameraResult, measure_cameras, search_batches, search_cameras
from hkd_bench.cli import main
from hkd_bench.energy import EnergyMeter, PowerSource, Sampler, compute_camera_energies
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


@pytest.mark.parametrize(("call_s", "frame_s", "fps"), [(0.004, 0.0021, 10), (0.0, 0.011, 25), (0.02, 0.0007, 20)])
def test_largest_batch_fills_the_period(call_s: float, frame_s: float, fps: float) -> None:
    device = Device(frame_s, call_s)
    largest, points = search_batches(device.detect, fps, None, clock=device.clock)
    assert largest == int((1 / fps - call_s) / frame_s)
    assert [point.batch for point in points] == sorted(point.batch for point in points)
    for point in points:
        call_ms = 1e3 * (call_s + point.batch * frame_s)
        assert (point.p50_ms, point.p99_ms) == (pytest.approx(call_ms), pytest.approx(call_ms))
        assert point.images_per_s == pytest.approx(1e3 * point.batch / call_ms)
        assert point.is_held(fps) == (point.batch <= largest)


def test_batches_above_the_limit_of_the_file_are_not_tried() -> None:
    device = Device(0.001)
    largest, points = search_batches(device.detect, 10, None, 6, device.clock)
    assert largest == 6 == points[-1].batch
    largest, points = search_batches(device.detect, 10, 4, clock=device.clock)
    assert (largest, [point.batch for point in points]) == (4, [4])
    slow = Device(0.2)
    assert search_batches(slow.detect, 10, 4, clock=slow.clock)[0] == 0
    assert slow.now_s < 15  # it ends after the first late calls, not after 200


@pytest.mark.parametrize(("late", "held"), [({50}, 1), ({50, 60, 70, 80}, 0)])
def test_one_late_call_of_200_is_allowed(late: set[int], held: int) -> None:
    """p99 of 200 calls is the second largest."""
    device, calls = Device(0.0), []

    def detect(frames: Sequence[int]) -> None:
        calls.append(frames)
        device.now_s += 0.15 if len(calls) in late else 0.02

    assert search_batches(detect, 10, 1, clock=device.clock)[0] == held and len(calls) == 201


def test_energy_per_camera_is_power_divided_by_cameras() -> None:
    """12 W during the run of 4 cameras and 6 W before it, of which 5 W are idle power."""
    samples = [(float(t), 6.0 if t < 10 else 12.0) for t in range(30)]
    sampler: Sampler[float] = Sampler(lambda: 0.0, 1)
    sampler.samples = samples
    meter = EnergyMeter(PowerSource({"VDD_IN": "board"}), None, {"VDD_IN": (sampler, False)})
    points = (CameraPoint(2, 5, 6, 0, (2.0, 8.0)), CameraPoint(4, 5, 6, 0, (11.0, 19.0)))
    cameras = CameraResult(10, 1, 4, points)
    source = replace(meter.source, idle_before_w=4.0, idle_after_w=6.0)
    result = compute_camera_energies(meter, source, cameras)
    assert [point.joules_per_camera_s for point in result.points] == [pytest.approx(3), pytest.approx(3)]
    assert [point.above_idle_per_camera_s for point in result.points] == [pytest.approx(0.5), pytest.approx(1.75)]
    assert not result.energy_reason
    late = replace(cameras, points=(CameraPoint(2, 5, 6, 0, (25.0, 35.0)),))
    result = compute_camera_energies(meter, source, late)
    assert result.points[0].joules_per_camera_s is None and "VDD_IN: the samples do not cover" in result.energy_reason
    result = compute_camera_energies(meter, PowerSource(missing={"RAPL": "not readable"}), cameras)
    assert result.points == points and result.energy_reason == "RAPL: not readable"


@pytest.mark.slow
def test_result_has_the_curve(write_tiny_onnx: Callable[..., Path], half_right: Path, tmp_path: Path) -> None:
    model = write_tiny_onnx(tmp_path / "tiny.onnx")
    data = str(half_right)
    options = BenchOptions(
        runs=2, rounds=1, warmup=1, warmup_s=0, stage_runs=1, data=data, split="val", cameras_fps=1000
    )
    result = bench([model], load_dataset(data, "val"), options)
    cameras = result.models[0].cameras
    assert cameras is not None and (cameras.fps, cameras.batch) == (1000, 1) and cameras.points[0].cameras == 1
    held = [point.batch for point in cameras.batches if point.is_held(1000)]
    assert cameras.batches[0].batch == 1 and cameras.largest_batch == max(held, default=0)
    assert cameras.points[0].joules_per_camera_s is None and cameras.energy_reason == "not requested: give --energy"
    write_result(tmp_path / "r.json", result)
    assert read_result(tmp_path / "r.json") == result
    jsonschema.validate(json.loads((tmp_path / "r.json").read_text()), json.loads(SCHEMA.read_text()))
    text = format_text_table(result)
    assert "energy per camera" not in text
    measured = replace(cameras, points=(replace(cameras.points[0], joules_per_camera_s=2.346),), energy_reason="")
    powered = replace(result, models=(replace(result.models[0], cameras=measured),), power=PowerSource({"INA": "rail"}))
    assert "energy per camera, J/s" in format_text_table(powered) and " 2.35" in format_text_table(powered)
    assert f"boxes below 1.0 ms: {cameras.cameras} (tiny)" in text and "dropped, %" in text
    write_bench_report(tmp_path / "r.html", result, title="Cameras")
    page = (tmp_path / "r.html").read_text()
    assert (
        "Time to boxes against the number of cameras: tiny holds" in page
        and "<h2>Cameras</h2>" in page
        and "<h3>Batch size</h3>" in page
    )
    assert f"Largest batch of frames that arrive together, with p99 below the period: {cameras.largest_batch}" in text


def test_wrong_rate_gives_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["x.onnx", "--data", "missing.yaml", "--cameras", "0"]) == 2
    assert "--cameras" in capsys.readouterr().err
