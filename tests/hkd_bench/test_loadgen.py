"""Tests of LoadGen runs with a detector of fixed time: logs, percentiles, and the early-stopping rule."""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from hkd_bench.latency import confidence_bound_ms, is_percentile_met
from hkd_bench.loadgen import run_loadgen
from hkd_bench.loadgen_log import read_detail_log
from hkd_bench.scenarios import LOADGEN_SCENARIOS, ScenarioResult, ScenarioSettings
from hkd_det.errors import DataError

pytest.importorskip("mlperf_loadgen")
NS = 1e-6  # milliseconds


class SleepingDetector:
    """A detector that sleeps 0.2 ms per image, and 5 ms more in every 20th call."""

    def __init__(self) -> None:
        self.calls: list[Sequence[int]] = []

    def __call__(self, images: Sequence[int]) -> None:
        self.calls.append(list(images))
        time.sleep(2e-4 * len(images) + 5e-3 * (len(self.calls) % 20 == 0))


def read_log(path: Path) -> list[dict[str, object]]:
    """Read a detail log with the checks of MLPerf's log parser: marker in the first line, JSON in each."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(":::MLLOG")
    return [json.loads(line[len(":::MLLOG") :]) for line in lines if line.startswith(":::MLLOG")]


def read_trace_latencies_ms(folder: Path) -> list[float]:
    """Return the latency of each query from the trace, in ascending order."""
    text = (folder / "mlperf_log_trace.json").read_text()
    return sorted(NS * int(value) for value in re.findall(r'"name":"Sample".*?"complete_ns":(\d+)', text))


def run(scenario: str, folder: Path, detector: SleepingDetector | None = None, **settings: float) -> ScenarioResult:
    values = ScenarioSettings(**{"min_duration_s": 0.2, **settings})  # type: ignore[arg-type]
    return run_loadgen(scenario, detector or SleepingDetector(), 8, 4, values, folder, enable_trace=True)


@pytest.mark.parametrize("scenario", LOADGEN_SCENARIOS)
def test_logs_have_the_format_of_mlperf(scenario: str, tmp_path: Path) -> None:
    settings = ScenarioSettings(200, 1e4, min_duration_s=0.2, min_queries=30)
    result = run_loadgen(scenario, SleepingDetector(), 8, 4, settings, tmp_path / "new")
    messages = read_log(tmp_path / "new" / "mlperf_log_detail.txt")
    values = {str(message["key"]): message["value"] for message in messages}
    summary = (tmp_path / "new" / "mlperf_log_summary.txt").read_text()
    assert not any(message["metadata"]["is_error"] for message in messages)  # type: ignore[index]
    assert values["effective_min_duration_ms"] == 200 and str(values["requested_scenario"]).replace(" ", "") == scenario
    assert values["result_validity"] == ("VALID" if result.is_valid else "INVALID")
    assert f"Result is : {values['result_validity']}" in summary
    assert bool(result.reasons) != result.is_valid
    assert result.images == result.queries * (8 if scenario == "MultiStream" else 1) or scenario == "Offline"


def test_single_stream_percentiles_and_estimate_equal_our_own(tmp_path: Path) -> None:
    result = run("SingleStream", tmp_path, min_queries=700)
    latencies_ms = read_trace_latencies_ms(tmp_path)
    assert len(latencies_ms) == result.queries >= 700 and result.is_valid
    for percentile in (50, 90, 99):
        own = latencies_ms[int(len(latencies_ms) * percentile / 100)]
        assert getattr(result, f"p{percentile}_ms") == pytest.approx(own, abs=1e-6)
    assert result.bound_ms == pytest.approx(confidence_bound_ms(latencies_ms, 90), abs=1e-6)
    values = read_detail_log(tmp_path / "mlperf_log_detail.txt")
    bound_p99 = confidence_bound_ms(latencies_ms, 99)
    assert bound_p99 is not None and NS * values["early_stopping_latency_ms"] == pytest.approx(bound_p99, abs=1e-6)


def test_server_is_valid_by_our_own_early_stopping_rule(tmp_path: Path) -> None:
    for limit_ms, queries in ((1e4, 459), (1e4, 458), (0.1, 459)):
        settings = {"target_qps": 2000.0, "target_latency_ms": limit_ms, "min_queries": queries, "min_duration_s": 0.1}
        result = run("Server", tmp_path, **settings)
        latencies_ms = read_trace_latencies_ms(tmp_path)
        late = sum(one > limit_ms for one in latencies_ms)
        assert result.late == late and result.queries == len(latencies_ms) == queries
        assert result.is_valid == is_percentile_met(late, queries, 99) == (limit_ms > 1 and queries == 459)
    assert result.reasons[0] == "p99 exceeds the limit of 0.1 ms"


def test_offline_and_server_use_batches_and_multi_stream_eight_images(tmp_path: Path) -> None:
    for scenario, largest in (("Offline", 4), ("MultiStream", 8), ("SingleStream", 1)):
        detector = SleepingDetector()
        run(scenario, tmp_path, detector, min_queries=20)
        assert max(map(len, detector.calls)) == largest and all(0 <= i < 8 for call in detector.calls for i in call)
    detector = SleepingDetector()
    run("Server", tmp_path, detector, target_qps=5000.0, min_queries=200)
    assert max(map(len, detector.calls)) <= 4


def test_too_few_queries_are_stated(tmp_path: Path) -> None:
    result = run("SingleStream", tmp_path, min_queries=1, min_duration_s=0.01)
    assert result.queries < 64 and not result.is_valid and result.bound_ms is None  # 0.2 ms or more per query
    assert "Need to process at least 64 queries" in result.reasons[0]


def test_error_of_the_detector_is_raised(tmp_path: Path) -> None:
    calls = []

    def detect(images: Sequence[int]) -> None:
        calls.append(images)
        if len(calls) == 20:
            raise DataError("image 3: damaged.")
        time.sleep(1e-3)

    with pytest.raises(DataError, match="image 3"):
        run_loadgen("SingleStream", detect, 8, 1, ScenarioSettings(min_duration_s=0.05), tmp_path)
    assert len(calls) == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "contains no result"),
        (":::MLLOG {\n", "line 1 is not a message"),
        (':::MLLOG {"key": "a"}\n', "line 1 is not a message"),
    ],
)
def test_damaged_detail_log_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mlperf_log_detail.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_detail_log(path)
    with pytest.raises(DataError, match="No such file"):
        read_detail_log(tmp_path / "none.txt")
