"""Tests of `hkd-bench --sustained`: drift against Welch's formula and planted changes, parts, and Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import t as student_t

from hkd_bench.bench import BenchOptions, bench
from hkd_bench.cli import main
from hkd_bench.device_state import DeviceState
from hkd_bench.energy import PowerTrace
from hkd_bench.report import write_bench_report
from hkd_bench.result import read_result
from hkd_bench.separate_runs import SustainedSamples
from hkd_bench.sustained import SustainedRun, compute_drift, summarize_sustained
from hkd_bench.table import format_text_table
from hkd_det.datasets.catalog import load_dataset

SCHEMA = Path(__file__).parents[2] / "docs/reference/bench-result.schema.json"
T0 = 1.8e9
# Each update of the progress is a line: the first one of a sustained run follows its warm-up.
ALL_LINES = """
import sys
from hkd_det import console
from hkd_bench.cli import main
console.LINE_INTERVAL_S = 0.0
sys.exit(main(sys.argv[1:]))
"""


def make_run(seconds: float, make_ms: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> SustainedRun:
    """A frame every 20 ms whose latency is a function of the time; clock and temperature every half second, 5 W."""
    offsets = np.arange(0, seconds, 0.02)
    times = np.arange(-1, seconds + 2, 0.5)
    states = [
        (T0 + t, DeviceState(cpu_mhz=2000 - 5 * t, temperatures_c={"a": 40.0, "soc": 50 + t / 10})) for t in times
    ]
    trace = PowerTrace((T0 + times).tolist(), [5.0] * len(times), is_counter=False)
    return SustainedRun(T0 + offsets, make_ms(offsets), states, {"VDD_IN": trace})


def make_noise(rng: np.random.Generator, level: float = 10.0) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    return lambda offsets: level * np.exp(0.1 * rng.standard_normal(len(offsets)))


def test_last_tenth_and_first_minute_of_a_planted_step() -> None:
    """1,200 s: 10 ms up to 1,000 s and 13 ms after that; the clock falls by 5 MHz each second."""
    rng = np.random.default_rng(0)
    noise = make_noise(rng)
    run = make_run(1200, lambda offsets: noise(offsets) * np.where(offsets < 1000, 1, 1.3))
    result = summarize_sustained(run, 1200, is_interrupted=False)
    assert (result.first.start_s, result.first.seconds) == (0, pytest.approx(60))
    assert (result.last.start_s, result.last.seconds) == (pytest.approx(1080, abs=0.1), pytest.approx(120, abs=0.1))
    assert result.first.p50_ms == pytest.approx(10, rel=0.01) and result.last.p50_ms == pytest.approx(13, rel=0.01)
    assert result.first.p99_ms == pytest.approx(10 * np.exp(0.1 * 2.326), rel=0.02)
    assert result.conclusion == "slower" and result.drift == pytest.approx(0.3, abs=0.01)
    assert result.drift_low is not None and result.drift_high is not None
    assert 0.28 < result.drift_low < result.drift < result.drift_high < 0.32
    assert result.first.cpu_mhz == pytest.approx(2000 - 5 * 30, abs=3)
    assert result.first.temperature_c == pytest.approx(56, abs=0.1) and result.first.gpu_mhz is None
    assert result.first.watts == pytest.approx(5) == result.last.watts and not result.power_reason
    assert len(result.points) == 120 and sum(point.frames for point in result.points) == pytest.approx(60000, abs=2)
    assert result.points[-1].p50_ms == pytest.approx(13, rel=0.03)


def test_drift_interval_equals_the_formula_of_welch() -> None:
    rng = np.random.default_rng(3)
    first, last = rng.uniform(9, 11, 12), rng.uniform(10, 14, 7)
    drift, low, high = compute_drift(first.tolist(), last.tolist())
    a, b = np.log(first), np.log(last)
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = student_t.ppf(0.975, freedom) * np.sqrt(va + vb)
    difference = b.mean() - a.mean()
    assert drift == pytest.approx(np.exp(difference) - 1)
    assert (low, high) == (pytest.approx(np.exp(difference - half) - 1), pytest.approx(np.exp(difference + half) - 1))


@pytest.mark.slow
def test_steady_run_shows_no_change_in_most_trials() -> None:
    conclusions = []
    for seed in range(100):
        run = make_run(100, make_noise(np.random.default_rng(seed)))
        conclusions.append(summarize_sustained(run, 100, is_interrupted=False).conclusion)
    assert conclusions.count("no change shown") >= 88  # 95 are expected; P(fewer than 88) is 0.2 %


def test_faster_run_and_short_run() -> None:
    noise = make_noise(np.random.default_rng(1))
    run = make_run(120, lambda offsets: noise(offsets) * np.where(offsets < 60, 1, 0.9))
    assert summarize_sustained(run, 120, is_interrupted=False).conclusion == "faster"
    short = summarize_sustained(make_run(20, noise), 1800, is_interrupted=True)
    assert short.conclusion == "too short for a conclusion" and short.drift_low is None and short.is_interrupted
    constant = make_run(100, lambda offsets: np.full(len(offsets), 10.0))
    assert summarize_sustained(constant, 100, is_interrupted=False).conclusion == "no change shown"


def test_power_that_does_not_cover_the_run_is_missing_with_reason() -> None:
    run = make_run(60, make_noise(np.random.default_rng(1)))
    run._traces = {"VDD_IN": PowerTrace([T0 + t for t in range(10)], [5.0] * 10, is_counter=False)}
    result = summarize_sustained(run, 60, is_interrupted=False)
    assert result.first.watts is not None and result.last.watts is None and "do not cover" in result.power_reason


def test_one_frame_is_enough() -> None:
    run = SustainedRun(np.array([T0]), np.array([30.0]), [], {})
    result = summarize_sustained(run, 90, is_interrupted=True)
    assert result.first.p50_ms == result.last.p50_ms == 30 and result.seconds == pytest.approx(0.03)
    assert result.drift_low is None and result.power_reason == "no power sensor"


@pytest.mark.slow
def test_table_and_page_show_the_course(write_tiny_onnx: Callable[..., Path], half_right: Path, tmp_path: Path) -> None:
    model = write_tiny_onnx(tmp_path / "tiny.onnx")
    options = BenchOptions(
        runs=2, rounds=1, warmup=1, warmup_s=0, stage_runs=1, data=str(half_right), split="val", sustained_s=1.5
    )
    result = bench([model], load_dataset(str(half_right), "val"), options)
    run = result.models[0].sustained
    assert run is not None and not run.is_interrupted and run.seconds == pytest.approx(1.5, abs=0.5)
    assert run.last.frames > 0 and bool(run.power_reason) == (run.last.watts is None)
    text = format_text_table(result)
    assert "Sustained for 1.5 s without pauses; quote the last tenth." in text and not result.has_energy
    noise = make_noise(np.random.default_rng(1))
    planted = make_run(600, noise)
    samples = SustainedSamples(1800, planted._starts, planted._latencies_ms, is_interrupted=True, other_cpus=None)
    course = samples.summarize(planted._states, planted._traces, "", "cpu")
    first = replace(result.models[0], sustained=course)
    shown = replace(result, models=(first, replace(result.models[0], name="later", sustained=None)))
    text = format_text_table(shown)
    assert "tiny: interrupted after 600 of 1800 s." in text and "Not sustained after the interruption: later." in text
    assert "changed clock: CPU" in text and "last 60 s" in text and "first 60 s" in text
    write_bench_report(tmp_path / "r.html", shown, title="sustained")
    page = (tmp_path / "r.html").read_text()
    for title in ("Latency", "CPU clock", "Highest temperature", "Power"):
        assert f"<h3>{title} over time</h3>" in page
    assert "<h3>GPU clock over time</h3>" not in page


@pytest.mark.slow
@pytest.mark.parametrize("to_group", [True, False], ids=["terminal", "kill"])
def test_ctrl_c_keeps_what_was_measured(
    to_group: bool, write_tiny_onnx: Callable[..., Path], half_right: Path, tmp_path: Path
) -> None:
    """A terminal sends the signal to the command and its worker, `kill` to the command only."""
    model = write_tiny_onnx(tmp_path / "tiny.onnx")
    command = [sys.executable, "-c", ALL_LINES]
    command += [str(model), str(model), "--names", "a,b", "--data", str(half_right), "--runs", "3"]
    command += ["--sustained", "1h", "--json", str(tmp_path / "r.json")]
    log_path = tmp_path / "log.txt"
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            while not re.search(r"sustained a: \d+/", log_path.read_text()) and process.poll() is None:
                time.sleep(0.1)
            time.sleep(1)
            (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)
            process.wait(60)
        finally:
            process.kill()
    assert process.returncode == 130, log_path.read_text()
    assert "hkd-bench: interrupted" in log_path.read_text()
    first, second = read_result(tmp_path / "r.json").models
    assert len(first.e2e_ms) == 3 == len(second.e2e_ms) and second.sustained is None
    assert first.sustained is not None and first.sustained.is_interrupted and first.sustained.last.frames > 0
    jsonschema.validate(json.loads((tmp_path / "r.json").read_text()), json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize("text", ["30", "m", "0s", "-5m"])
def test_invalid_duration_is_an_error(text: str, half_right: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["m.onnx", "--data", str(half_right), f"--sustained={text}"]) == 2
    assert f"--sustained {text}: expected a number above 0 and s, m, h or d" in capsys.readouterr().err
