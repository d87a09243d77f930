"""Energy per frame: traces and blocks with known energy, intervals with known coverage, and logs of external meters."""

from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from time import sleep, time

import numpy as np
import pytest

from hkd_bench.bench import BenchOptions, bench
from hkd_bench.cli import main
from hkd_bench.energy import (
    Block,
    EnergyMeter,
    PowerSource,
    PowerTrace,
    Sampler,
    compute_energies,
    open_energy_meter,
    read_power_log,
)
from hkd_bench.result import read_result, write_result
from hkd_bench.table import format_markdown_table, format_text_table
from hkd_deploy.power_rails import SensorMissingError
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import UsageError


def make_blocks(start: float, num_blocks: int, frames: int) -> list[Block]:
    """Blocks of one second."""
    return [(start + index, start + index + 1, frames) for index in range(num_blocks)]


def test_trace_of_power_is_its_integral() -> None:
    """Power t from 0 to 10 s: the energy between a and b is (b^2 - a^2) / 2."""
    trace = PowerTrace(np.arange(101) / 10, np.arange(101) / 10, is_counter=False)
    assert trace.compute_energy(2, 6) == pytest.approx(16)
    assert trace.compute_total() == pytest.approx(50)
    assert PowerTrace([0, 2], [7.0, 7.0], is_counter=False).compute_energy(0.5, 1.5) == pytest.approx(7)


def test_trace_of_counter_is_its_difference() -> None:
    trace = PowerTrace([0, 1, 3], [100.0, 110.0, 150.0], is_counter=True)
    assert trace.compute_energy(0.5, 2) == pytest.approx(25)


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (-1, 2, r"do not cover the measurement: \+1\.0 to \+7\.0 s"),
        (2, 10, "do not cover"),
        (3, 8, r"no sample for 4\.0 s"),
    ],
)
def test_trace_that_does_not_cover_an_interval_has_reason(start: float, end: float, message: str) -> None:
    trace = PowerTrace([0, 1, 2, 3, 4, 8, 9], [1.0] * 7, is_counter=False)
    with pytest.raises(SensorMissingError, match=message):
        trace.compute_energy(start, end)
    assert trace.compute_energy(0, 4) == pytest.approx(4)


def make_meter(path: Path, samples: list[tuple[float, float]]) -> EnergyMeter:
    path.write_text("time,watts\n" + "".join(f"{when:.3f},{watts}\n" for when, watts in samples))
    return EnergyMeter(PowerSource({"meter": "external meter"}), path, {})


def test_energy_per_frame_and_above_idle(tmp_path: Path) -> None:
    """Idle 10 W, running 30 W at 20 frames per second: 1.5 J per frame, 1 J above idle."""
    steps = [(1000.0, 10), (1009.999, 10), (1010, 30), (1030, 30), (1030.001, 14), (1040, 14)]
    samples = [(when, np.interp(when, *zip(*steps, strict=True))) for when in np.arange(1000, 1040.2, 0.1)]
    meter = make_meter(tmp_path / "meter.csv", [*samples, *steps])
    meter.idle_before, meter.idle_after = make_blocks(1001, 5, 0), make_blocks(1034, 5, 0)
    power, energies = compute_energies(meter, {"model": make_blocks(1011, 18, 20)})
    energy = energies["model"]
    assert (power.idle_before_w, power.idle_after_w) == (pytest.approx(10), pytest.approx(14))
    assert energy.joules_per_frame == energy.ci_low == energy.ci_high == pytest.approx(1.5)
    assert energy.above_idle == pytest.approx(1.5 - 12 / 20)
    assert energy.above_idle_low is not None and energy.above_idle_high is not None
    assert 1.5 - 14 / 20 <= energy.above_idle_low < 0.9 < energy.above_idle_high <= 1.5 - 10 / 20
    assert (energy.frames, energy.seconds, energy.watts) == (360, pytest.approx(18), pytest.approx(30))
    assert energy.by_sensor == {"meter": pytest.approx(1.5)} and not energy.reason


def test_energy_interval_has_its_coverage(tmp_path: Path) -> None:
    """The 95 % interval of blocks with independent noise contains the true energy in about 95 % of the trials."""
    rng = np.random.default_rng(1)
    contained = []
    for _ in range(60):
        watts = np.repeat(rng.normal(20, 4, 40), 2)
        times = np.sort(np.concatenate([np.arange(40) + 1e-3, np.arange(40) + 1 - 1e-3])) + 1000
        meter = make_meter(tmp_path / "meter.csv", [(999, 20), *zip(times, watts, strict=True), (1041, 20)])
        meter.idle_before = make_blocks(1000, 1, 0)
        energy = compute_energies(meter, {"model": make_blocks(1000, 40, 10)})[1]["model"]
        assert energy.ci_low is not None and energy.ci_high is not None
        contained.append(energy.ci_low < 2 < energy.ci_high)
    assert 0.85 <= np.mean(contained) <= 1


def test_energy_without_sensor_is_null_with_reason() -> None:
    meter = EnergyMeter(PowerSource({}, {"RAPL": "no such counters"}), None, {})
    _, energies = compute_energies(meter, {"model": make_blocks(0, 3, 5)})
    assert energies["model"].joules_per_frame is None and energies["model"].reason == "RAPL: no such counters"
    assert meter.compute_total() == (None, "RAPL: no such counters")


def test_sampler_leaves_out_failed_reads() -> None:
    values = iter(range(1000))

    def read() -> int:
        value = next(values)
        if value % 2:
            raise OSError("resource temporarily unavailable")
        return value

    with Sampler(read, 0.01) as sampler:
        sleep(0.2)
    assert len(sampler.samples) > 3 and all(value % 2 == 0 for _, value in sampler.samples)
    assert sorted(sampler.samples) == sampler.samples


NOON = datetime(2026, 7, 29, 12, 0, 0, tzinfo=timezone.utc).timestamp()


@pytest.mark.parametrize(
    "text",
    [
        f"time,watts\n{NOON},4.5\n{NOON + 1},5.5\n",
        f"{NOON},4.5\n{NOON + 1},5.5\n{NOON + 2},7",  # the last line is not complete
        f"Power (W);Timestamp\n5,5;{1000 * (NOON + 1):.0f}\n4,5;{1000 * NOON:.0f}\n",  # milliseconds, not sorted
        f"time,volts,watts\n{1e9 * NOON:.0f},5,4.5\n\n{1e9 * (NOON + 1):.0f},5,5.5\n",  # nanoseconds
        "\ufefftimestamp,power\n2026-07-29T12:00:00Z,4.5\n2026-07-29T14:00:01+02:00,5.5\n",
        "time,watts\n2026-07-29 12:00:00.000+00:00,4.5\n2026-07-29 12:00:01.000+00:00,5.5\n",
    ],
)
def test_power_log_forms(text: str, tmp_path: Path) -> None:
    path = tmp_path / "meter.csv"
    path.write_text(text, encoding="utf-8")
    times, watts = read_power_log(path)
    assert times == pytest.approx([NOON, NOON + 1], abs=1e-3) and watts == [4.5, 5.5]


def test_power_log_of_tegrastats(tmp_path: Path) -> None:
    path = tmp_path / "tegrastats.log"
    line = "{} RAM 2272/7620MB (lfb 4x4MB) cpu@54.937C VDD_IN {}mW/4673mW VDD_SOC 1339mW/1339mW\n"
    path.write_text(line.format("07-29-2026 18:00:27", 4673) + line.format("07-29-2026 18:00:28", 5000))
    local = datetime(2026, 7, 29, 18, 0, 27).astimezone().timestamp()
    assert read_power_log(path) == ([local, local + 1], [4.673, 5.0])
    path.write_text("RAM 1/2MB POM_5V_IN 1997/2089\n")
    with pytest.raises(UsageError, match=r"tegrastats\.log:1: no date"):
        read_power_log(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,watts\nnow,4\n", ":2: expected a time and watts, got 'now,4'"),
        ("1,nan\n", ":1: expected a time and watts"),
        ("1,-3\n", ":1: expected a time and watts"),
        ("1,4\n2\n", ":2: expected a time and watts, got '2'"),
    ],
)
def test_invalid_power_log_names_the_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "meter.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_power_log(path)


@pytest.fixture(scope="module")
def model(write_tiny_onnx: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_onnx(tmp_path_factory.mktemp("model") / "tiny.onnx")


@pytest.mark.slow
def test_bench_with_meter_of_constant_power(model: Path, half_right: Path, tmp_path: Path) -> None:
    """12 W at all times: energy per frame is 12 W x duration per frame, and there is none above idle."""
    log = tmp_path / "meter.csv"
    log.write_text("time,watts\n" + "".join(f"{time() + second},12\n" for second in range(-2, 600, 2)))
    options = BenchOptions(
        runs=2, rounds=2, warmup=1, warmup_s=0, stage_runs=1, data=str(half_right), energy=True, power_csv=log,
        energy_s=0.5, idle_s=0.2,
    )  # fmt: skip
    result = bench([model], load_dataset(str(half_right), "val"), options)
    energy = result.models[0].energy
    assert energy.frames > 2 and energy.seconds > 1 and not energy.reason
    assert energy.joules_per_frame == pytest.approx(12 * energy.seconds / energy.frames)
    assert energy.above_idle == pytest.approx(0, abs=1e-6 * 12)
    assert (result.power.idle_before_w, result.power.idle_after_w) == (pytest.approx(12), pytest.approx(12))
    write_result(tmp_path / "r.json", result)
    assert read_result(tmp_path / "r.json") == result
    text = format_text_table(result)
    assert "energy per frame" in text.splitlines()[0] and f" {1e3 * energy.joules_per_frame:.1f} " in text
    assert f"Measured by meter: external meter ({log}). Idle power: 12.00 W before and 12.00 W after" in text
    assert "energy per frame (mJ)" in format_markdown_table(result).splitlines()[0]


@pytest.mark.slow
@pytest.mark.usefixtures("one_round")
def test_bench_energy_without_sensor_is_null_everywhere(
    model: Path, half_right: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hkd_bench.energy.open_power_sensors", lambda _: ([], {"RAPL": "no such counters"}))
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    assert main([str(model), "--data", str(half_right), "--runs", "3", "--energy", *files]) == 0
    assert "Energy not measured: RAPL: no such counters." in capsys.readouterr().out
    energy = read_result(tmp_path / "r.json").models[0].energy
    assert energy.joules_per_frame is None and energy.reason == "RAPL: no such counters"
    page = (tmp_path / "r.html").read_text()
    assert "RAPL is missing: no such counters." in page and "<h2>State of the device</h2>" in page


def test_meter_without_file_is_one_line(model: Path, half_right: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model), "--data", str(half_right), "--power-csv", "missing.csv"]) == 2
    assert "--power-csv missing.csv: no such file. Start the meter's program first." in capsys.readouterr().err


def test_meter_of_this_machine_has_energy_or_reason() -> None:
    with open_energy_meter("cpu", None) as meter:
        sleep(0.3)
    joules, reason = meter.compute_total()
    assert (joules is None) == bool(reason) and (joules is None or joules > 0)
