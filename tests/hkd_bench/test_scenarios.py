"""Tests of `hkd-bench --scenario`: paced frames on a clock of its own, settings, and the command with a real model."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from hkd_bench import scenarios
from hkd_bench.bench import BenchOptions, bench
from hkd_bench.cli import main
from hkd_bench.latency import is_percentile_met
from hkd_bench.report import write_bench_report
from hkd_bench.result import read_result
from hkd_bench.scenarios import ScenarioSettings, measure_paced, parse_scenarios
from hkd_bench.table import format_text_table
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import UsageError

SCHEMA = Path(__file__).parents[2] / "docs/reference/bench-result.schema.json"


class Device:
    """A clock, and a detector that takes `frame_s` per frame, and `slow_s` for each of `slow`."""

    def __init__(self, frame_s: float, slow: Sequence[int] = (), slow_s: float = 0.0) -> None:
        self.now_s, self.frame_s, self.slow, self.slow_s = 0.0, frame_s, set(slow), slow_s

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + 1e-9

    def detect(self, frames: Sequence[int]) -> None:
        (frame,) = frames
        self.now_s += self.slow_s if frame in self.slow else self.frame_s


def test_paced_run_of_a_fast_device_is_valid() -> None:
    device = Device(0.004)
    result = measure_paced(device.detect, ScenarioSettings(25, min_duration_s=40), device.clock, device.sleep)
    assert result.is_valid and not result.reasons
    assert (result.queries, result.late, result.dropped) == (1000, 0, 0)
    assert result.seconds == pytest.approx(40, abs=0.05) and result.images_per_s == pytest.approx(25, rel=0.01)
    assert result.p50_ms == pytest.approx(4, abs=1e-3) == result.p99_ms == result.bound_ms
    assert result.target_latency_ms == 40 and not result.log_dir


def test_paced_run_counts_late_and_dropped_frames() -> None:
    """A frame of 65 ms at 25 frames per second: the next frame waits 25 ms and is in time with 10 ms of its own."""
    device = Device(0.010, slow=range(100, 700, 100), slow_s=0.065)
    settings = ScenarioSettings(25, min_duration_s=0, min_queries=700)
    result = measure_paced(device.detect, settings, device.clock, device.sleep)
    assert (result.late, result.dropped, result.queries) == (6, 0, 700) and not result.is_valid
    device = Device(0.010, slow=(100,), slow_s=0.130)  # three frames arrive meanwhile, the newest of them is used
    result = measure_paced(device.detect, settings, device.clock, device.sleep)
    assert (result.late, result.dropped) == (3, 2)


def test_paced_run_with_too_few_frames_is_invalid() -> None:
    """Without late frames, 459 frames show p99 with 99 % confidence, as LoadGen states for Server."""
    for frames, is_valid in ((458, False), (459, True)):
        device = Device(0.001)
        settings = ScenarioSettings(100, min_duration_s=0, min_queries=frames)
        result = measure_paced(device.detect, settings, device.clock, device.sleep)
        assert result.is_valid == is_valid == is_percentile_met(0, frames, 99)
        assert bool(result.reasons) != is_valid


def test_percentile_is_met_by_the_binomial_distribution() -> None:
    """LoadGen's table of the minimum number of samples: 459 without late ones, 662 with one, 838 with two."""
    for late, count in enumerate((459, 662, 838)):
        assert is_percentile_met(late, count, 99) and not is_percentile_met(late, count - 1, 99)


def test_overloaded_paced_run_has_no_p99() -> None:
    device = Device(0.1)
    settings = ScenarioSettings(20, min_duration_s=0, min_queries=100)
    result = measure_paced(device.detect, settings, device.clock, device.sleep)
    assert result.p99_ms is None and result.bound_ms is None and result.late == 100 and not result.is_valid
    assert result.dropped == pytest.approx(50, abs=2)


@pytest.mark.parametrize("text", ["single-stream,MultiStream", "SingleStream,multistream,singlestream"])
def test_scenario_names_are_those_of_loadgen(text: str) -> None:
    assert parse_scenarios(text) == ("SingleStream", "MultiStream")


def test_unknown_scenario_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"--scenario burst: expected single-stream, .* or paced"):
        parse_scenarios("server,burst")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scenario", "server"], "--target-qps: required by --scenario server"),
        (["--scenario", "paced", "--target-qps", "0"], "--target-qps: expected"),
        (["--scenario", "paced", "--target-qps", "5", "--min-queries", "0"], "--min-queries: expected at least 1"),
        (["--scenario", "paced", "--target-qps", "5", "--min-duration", "5"], "--min-duration 5: expected a number"),
        (["--scenario", "paced", "--target-qps", "5", "--scenario-batch", "0"], "--scenario-batch: expected"),
        (["--scenario", "single-stream"], "--scenario-logs: expected a directory"),
    ],
)
def test_invalid_scenario_flags(
    flags: list[str], message: str, half_right: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlperf_loadgen")
    assert main([str(tmp_path / "m.onnx"), "--data", str(half_right), *flags]) == 2
    assert message in capsys.readouterr().err


def test_missing_loadgen_is_one_line_with_the_extra(
    half_right: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scenarios, "find_spec", lambda _: None)
    assert main(["m.onnx", "--data", str(half_right), "--scenario", "offline"]) == 1
    error = capsys.readouterr().err
    assert "pip install 'hkd-det[loadgen]'" in error and error.count("\n") == 1


@pytest.mark.slow
def test_fixed_batch_of_the_file_is_used(
    write_tiny_onnx: Callable[..., Path], half_right: Path, tmp_path: Path
) -> None:
    """A fixed batch of the file has priority over --scenario-batch."""
    pytest.importorskip("mlperf_loadgen")
    model = write_tiny_onnx(tmp_path / "tiny.onnx", batch=2)
    options = BenchOptions(
        runs=2, rounds=1, warmup=1, warmup_s=0, stage_runs=1, data=str(half_right), split="val",
        scenarios=("Offline",), scenario_settings=ScenarioSettings(min_duration_s=0.1, batch=64),
        scenario_logs=tmp_path,
    )  # fmt: skip
    result = bench([model], load_dataset(str(half_right), "val"), options)
    assert result.models[0].scenarios[0].batch == 2


@pytest.mark.slow
def test_scenarios_are_in_table_json_and_page(
    write_tiny_onnx: Callable[..., Path], half_right: Path, tmp_path: Path
) -> None:
    model = write_tiny_onnx(tmp_path / "tiny.onnx")
    options = BenchOptions(
        runs=2, rounds=1, warmup=1, warmup_s=0, stage_runs=1, data=str(half_right), split="val",
        scenarios=("Paced",), scenario_settings=ScenarioSettings(50, min_duration_s=0.2, min_queries=5),
    )  # fmt: skip
    result = bench([model], load_dataset(str(half_right), "val"), options)
    (one,) = result.models[0].scenarios
    assert (one.scenario, one.queries, one.is_valid) == ("Paced", 10, False) and one.seconds > 0.1
    text = format_text_table(replace(result, models=(replace(result.models[0], scenarios=(one, one)),)))
    assert text.count("INVALID Paced (tiny): ") == 2 and "Paced at 50 frames/s of one camera with p99 below" in text
    write_bench_report(tmp_path / "r.html", result, title="scenarios")
    page = (tmp_path / "r.html").read_text()
    assert "<h2>Load scenarios</h2>" in page and "<td>INVALID</td>" in page


@pytest.mark.slow
@pytest.mark.usefixtures("one_round")
def test_command_runs_all_scenarios_and_fails_if_one_is_invalid(
    write_tiny_onnx: Callable[..., Path], half_right: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit of 10 s is met by any machine; without early stopping, 5 queries of server are too few."""
    pytest.importorskip("mlperf_loadgen")
    model = write_tiny_onnx(tmp_path / "tiny.onnx")
    args = [str(model), "--data", str(half_right), "--runs", "3", "--json", str(tmp_path / "r.json")]
    args += ["--min-duration", "0.2s", "--target-latency", "10000", "--target-qps", "100"]
    assert main([*args, "--scenario", "single-stream,offline,server", "--scenario-batch", "4"]) == 0
    output = capsys.readouterr().out
    model_result = read_result(tmp_path / "r.json").models[0]
    assert [one.scenario for one in model_result.scenarios] == ["SingleStream", "Offline", "Server"]
    assert [one.batch for one in model_result.scenarios] == [1, 4, 4]
    for one in model_result.scenarios:
        folder = tmp_path / "r-loadgen" / "tiny" / one.scenario
        assert one.is_valid and one.log_dir == str(folder) and one.loadgen
        assert {"mlperf_log_summary.txt", "mlperf_log_detail.txt"} <= {path.name for path in folder.iterdir()}
        assert "Result is : VALID" in (folder / "mlperf_log_summary.txt").read_text()
    assert "its logs are in" in output and output.count(" VALID ") == 3
    jsonschema.validate(json.loads((tmp_path / "r.json").read_text()), json.loads(SCHEMA.read_text()))
    assert main([*args, "--scenario", "server", "--min-queries", "5"]) == 1
    error = capsys.readouterr().err
    assert "--scenario: invalid: tiny Server: early-stopping rule:" in error and error.count("\n") == 1
    assert not read_result(tmp_path / "r.json").models[0].scenarios[0].is_valid
