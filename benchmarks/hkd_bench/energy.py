"""Energy per frame: samples of the power sensors, blocks of timed frames, and bootstrap intervals over the blocks.

The sensors are sampled in the parent process while a worker runs the model. The energy of a block is that between its
first and last moment; a model's energy per frame is the sum over its blocks divided by their frames. Energy above idle
subtracts the idle power, measured before the first and after the last model.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from time import sleep, time
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from hkd_bench.cameras import CameraResult
from hkd_bench.device_state import OtherLoadMeter
from hkd_bench.host import HostFieldError
from hkd_bench.power import (
    PowerSensor,
    open_power_sensors,
    parse_tegrastats_rails,
)
from hkd_bench.worker import BLOCK_S, Block
from hkd_deploy.power_rails import SensorMissingError, select_input_rails
from hkd_det.errors import UsageError
from hkd_det.metrics.bootstrap import CONFIDENCE, NUM_RESAMPLES

T = TypeVar("T")
POWER_INTERVAL_S = 0.1
MAX_GAP_S = 3.0  # between two samples; above it the energy is not known
TEGRASTATS_TIME = re.compile(r"(\d\d-\d\d-\d{4} \d\d:\d\d:\d\d) ")
TIME_NAMES = ("time", "timestamp", "time_s", "date", "datetime", "unix_time", "epoch")
WATT_NAMES = ("watts", "watt", "w", "power", "power_w", "power (w)", "p")


@dataclass(frozen=True)
class EnergyResult:
    """Energy of one model.

    Attributes:
        joules_per_frame: Energy per frame in joules, including idle power; None if it was not measured.
        ci_low, ci_high: Its 95 % interval.
        above_idle: Energy per frame above idle in joules.
        above_idle_low, above_idle_high: Its 95 % interval, with that of the idle power.
        watts: Mean power while the model ran without pauses.
        frames: Number of frames.
        seconds: Duration of all blocks.
        by_sensor: Energy per frame of each sensor in joules, including idle power.
        reason: Reason why `joules_per_frame` is None; empty otherwise.
    """

    joules_per_frame: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    above_idle: float | None = None
    above_idle_low: float | None = None
    above_idle_high: float | None = None
    watts: float | None = None
    frames: int = 0
    seconds: float = 0.0
    by_sensor: dict[str, float] = field(default_factory=dict)
    reason: str = "not requested: give --energy"


@dataclass(frozen=True)
class PowerSource:
    """Sensors of a measurement, and the idle power of the machine.

    Attributes:
        sensors: What each sensor measures, by name; their sum is the energy.
        missing: Reason of each sensor that is missing, by name: its part is not in the energy.
        idle_before_w: Mean power before the first model, without a worker process; None if it was not measured.
        idle_after_w: Mean power after the last model.
        idle_other_cpus: Mean number of CPUs that other processes used meanwhile; None if it was not measured.
    """

    sensors: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    idle_before_w: float | None = None
    idle_after_w: float | None = None
    idle_other_cpus: float | None = None


class Sampler(Generic[T]):
    """Thread that calls a function at an interval and keeps the results with their times.

    Args:
        read: Function; a result of an `OSError` or `HostFieldError` is left out.
        interval_s: Interval in seconds.
    """

    def __init__(self, read: Callable[[], T], interval_s: float) -> None:
        self.samples: list[tuple[float, T]] = []
        self._read, self._interval_s = read, interval_s
        self._stop = Event()
        self._thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Sampler[T]":
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        with suppress(OSError, ValueError, HostFieldError):
            value = self._read()
            self.samples.append((time(), value))


class PowerTrace:
    """Energy over time.

    Args:
        times: Unix times in seconds, ascending.
        values: Joules since some start, or watts.
        is_counter: Whether the values are joules.
    """

    def __init__(self, times: Sequence[float], values: Sequence[float], is_counter: bool) -> None:
        self._times = np.asarray(times, np.float64)
        power = np.asarray(values, np.float64)
        steps = np.diff(self._times) * (power[1:] + power[:-1]) / 2  # trapezoids
        self._joules = power if is_counter else np.concatenate([[0.0], np.cumsum(steps)])

    def compute_total(self) -> float:
        """Return the energy between the first and the last sample in joules."""
        return float(self._joules[-1] - self._joules[0])

    def compute_energy(self, start: float, end: float) -> float:
        """Return the energy between two times in joules, with linear interpolation between samples.

        Args:
            start: Unix time in seconds.
            end: Unix time in seconds.

        Raises:
            SensorMissingError: The samples do not cover the interval.
        """
        times = self._times
        if len(times) < 2 or times[0] > start or times[-1] < end:
            covered = f"{times[0] - start:+.1f} to {times[-1] - end:+.1f} s around it" if len(times) else "none"
            raise SensorMissingError(f"the samples do not cover the measurement: {covered}. Compare both clocks")
        first, last = np.searchsorted(times, start, "right") - 1, np.searchsorted(times, end, "left")
        gap = float(np.diff(times[first : last + 1]).max(initial=0.0))
        if gap > MAX_GAP_S:
            raise SensorMissingError(f"no sample for {gap:.1f} s; at most {MAX_GAP_S:g} s are allowed")
        low, high = np.interp([start, end], times, self._joules)
        return float(high - low)


class EnergyMeter:
    """Sensors of one measurement with their samples.

    Args:
        source: Sensors without idle power.
        power_csv: Log of an external meter, read at the end; None for the sensors of the machine.
        samplers: Sampler of each sensor, and whether it is a counter, by name.

    Attributes:
        idle_before: Blocks of `measure_idle` before the first model.
        idle_after: Blocks after the last model.
    """

    def __init__(
        self, source: PowerSource, power_csv: Path | None, samplers: Mapping[str, tuple[Sampler[float], bool]]
    ) -> None:
        self.source = source
        self._power_csv = power_csv
        self._samplers = samplers
        self.idle_before: list[Block] = []
        self.idle_after: list[Block] = []
        self._idle_loads: list[float] = []

    def measure_idle(self, seconds: float) -> list[Block]:
        """Wait without work and measure the CPU time of other processes.

        Args:
            seconds: Duration.

        Returns:
            Blocks of the duration, without frames.
        """
        load = OtherLoadMeter()
        blocks = []
        for _ in range(max(1, round(seconds / BLOCK_S))):
            start = time()
            sleep(min(seconds, BLOCK_S))
            blocks.append((start, time(), 0))
        self._idle_loads += [value for value in [load.read()] if value is not None]
        return blocks

    def get_idle_load(self) -> float | None:
        """Return the highest mean number of CPUs of other processes; None if it was not measured."""
        return max(self._idle_loads, default=None)

    def make_traces(self, end: float = 0.0) -> dict[str, PowerTrace]:
        """Return the trace of each sensor; wait up to `MAX_GAP_S` for the next line of an external meter.

        Args:
            end: Last time that is needed, Unix time in seconds; the end of the idle measurement if that is later.

        Raises:
            UsageError: The log of the external meter is invalid.
        """
        if self._power_csv:
            end = max([end, *(block[1] for block in self.idle_after)])
            deadline = time() + MAX_GAP_S
            times, watts = read_power_log(self._power_csv)
            while (not times or times[-1] < end) and time() < deadline:
                sleep(POWER_INTERVAL_S)
                times, watts = read_power_log(self._power_csv)
            return {"meter": PowerTrace(times, watts, is_counter=False)}
        return {
            name: PowerTrace([when for when, _ in sampler.samples], [value for _, value in sampler.samples], is_counter)
            for name, (sampler, is_counter) in self._samplers.items()
        }

    def compute_total(self) -> tuple[float | None, str]:
        """Return the joules of all samples, or None and the reason."""
        if not self.source.sensors:
            return None, "; ".join(f"{name}: {reason}" for name, reason in self.source.missing.items())
        totals = [trace.compute_total() for trace in self.make_traces().values()]
        return sum(totals), ""


@contextmanager
def open_energy_meter(device: str, power_csv: Path | None) -> Iterator[EnergyMeter]:
    """Open the sensors and sample them until the context ends.

    Args:
        device: cpu, cuda or cuda:N.
        power_csv: Log of an external meter that replaces the sensors of the machine.

    Yields:
        The meter. Its source has no sensors if none can be read.
    """
    sensors: list[PowerSensor]
    sensors, missing = ([], {}) if power_csv else open_power_sensors(device)
    scopes = {"meter": f"external meter ({power_csv})"} if power_csv else {one.name: one.scope for one in sensors}
    with ExitStack() as stack:
        samplers = {}
        for sensor in sensors:
            stack.callback(sensor.close)
            samplers[sensor.name] = (stack.enter_context(Sampler(sensor.read, POWER_INTERVAL_S)), sensor.is_counter)
        yield EnergyMeter(PowerSource(scopes, missing), power_csv, samplers)


def compute_energies(
    meter: EnergyMeter, blocks: Mapping[str, Sequence[Block]]
) -> tuple[PowerSource, dict[str, EnergyResult]]:
    """Compute the idle power, and the energy of each model.

    Args:
        meter: Meter whose sampling has ended.
        blocks: Blocks of each model, by name.

    Returns:
        The sensors with the idle power, and the energy of each model; without energy and with the reason if a sensor
        does not cover the measurement.
    """
    source = meter.source
    if not source.sensors:
        reason = "; ".join(f"{name}: {text}" for name, text in source.missing.items())
        return source, {name: EnergyResult(reason=reason) for name in blocks}
    try:
        traces = meter.make_traces()
        before, after = (_measure_blocks(traces, part) for part in (meter.idle_before, meter.idle_after))
        measured = {name: _measure_blocks(traces, part) for name, part in blocks.items()}
    except (SensorMissingError, UsageError) as error:
        reason = f"{', '.join(source.sensors)}: {str(error).removesuffix('.')}"
        return source, {name: EnergyResult(reason=reason) for name in blocks}
    idle = np.concatenate([before, after])
    results = {
        name: _summarize_blocks(list(traces), joules, blocks[name], idle, [*meter.idle_before, *meter.idle_after])
        for name, joules in measured.items()
    }
    return (
        PowerSource(
            source.sensors,
            source.missing,
            idle_before_w=_get_mean_power(before, meter.idle_before),
            idle_after_w=_get_mean_power(after, meter.idle_after),
            idle_other_cpus=meter.get_idle_load(),
        ),
        results,
    )


def compute_camera_energies(meter: EnergyMeter, source: PowerSource, cameras: CameraResult) -> CameraResult:
    """Compute the energy per camera and second of each number of cameras.

    Args:
        meter: Meter whose sampling has ended.
        source: Sensors with the idle power.
        cameras: Result of the search.

    Returns:
        The result with the energy, or with the reason if it is not known.
    """
    if not source.sensors:
        return replace(cameras, energy_reason="; ".join(f"{name}: {text}" for name, text in source.missing.items()))
    idle = [watts for watts in (source.idle_before_w, source.idle_after_w) if watts is not None]
    try:
        traces = meter.make_traces(max(point.window[1] for point in cameras.points))
        watts = [
            sum(trace.compute_energy(*point.window) for trace in traces.values()) / (point.window[1] - point.window[0])
            for point in cameras.points
        ]
    except (SensorMissingError, UsageError) as error:
        return replace(cameras, energy_reason=f"{', '.join(source.sensors)}: {str(error).removesuffix('.')}")
    points = [
        replace(
            point,
            joules_per_camera_s=power / point.cameras,
            above_idle_per_camera_s=(power - sum(idle) / len(idle)) / point.cameras if idle else None,
        )
        for point, power in zip(cameras.points, watts, strict=True)
    ]
    return replace(cameras, points=tuple(points), energy_reason="")


def _get_mean_power(joules: NDArray[np.float64], blocks: Sequence[Block]) -> float | None:
    return float(joules.sum() / _get_seconds(blocks).sum()) if blocks else None


def _get_seconds(blocks: Sequence[Block]) -> NDArray[np.float64]:
    return np.array([end - start for start, end, _ in blocks])


def _measure_blocks(traces: Mapping[str, PowerTrace], blocks: Sequence[Block]) -> NDArray[np.float64]:
    """Return the joules of each block (rows) and sensor (columns)."""
    rows = [[trace.compute_energy(start, end) for trace in traces.values()] for start, end, _ in blocks]
    return np.array(rows, np.float64).reshape(len(blocks), len(traces))


def _summarize_blocks(
    sensors: Sequence[str],
    joules: NDArray[np.float64],
    blocks: Sequence[Block],
    idle_joules: NDArray[np.float64],
    idle_blocks: Sequence[Block],
) -> EnergyResult:
    """Compute energy per frame and its intervals; resamples draw blocks, and idle blocks, with replacement."""
    total, seconds = joules.sum(axis=1), _get_seconds(blocks)
    frames = np.array([block[2] for block in blocks])
    idle_total, idle_seconds = idle_joules.sum(axis=1), _get_seconds(idle_blocks)
    rng = np.random.default_rng(0)
    draws = rng.integers(len(blocks), size=(NUM_RESAMPLES, len(blocks)))
    idle_draws = rng.integers(len(idle_blocks), size=(NUM_RESAMPLES, len(idle_blocks)))
    per_frame = total[draws].sum(axis=1) / frames[draws].sum(axis=1)
    idle_w = idle_total[idle_draws].sum(axis=1) / idle_seconds[idle_draws].sum(axis=1)
    above = per_frame - idle_w * seconds[draws].sum(axis=1) / frames[draws].sum(axis=1)
    ends = 100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2
    (low, high), (above_low, above_high) = (np.percentile(values, ends).tolist() for values in (per_frame, above))
    idle_energy = idle_total.sum() / idle_seconds.sum() * seconds.sum()
    return EnergyResult(
        joules_per_frame=float(total.sum() / frames.sum()),
        ci_low=low,
        ci_high=high,
        above_idle=float((total.sum() - idle_energy) / frames.sum()),
        above_idle_low=above_low,
        above_idle_high=above_high,
        watts=float(total.sum() / seconds.sum()),
        frames=int(frames.sum()),
        seconds=float(seconds.sum()),
        by_sensor=dict(zip(sensors, (joules.sum(axis=0) / frames.sum()).tolist(), strict=True)),
        reason="",
    )


def read_power_log(path: Path) -> tuple[list[float], list[float]]:
    """Read the log of an external meter: a CSV file with time and watts, or the output of tegrastats with its date.

    The columns have a header (`time`, `watts`), or they are the first two. The time is Unix time in s, ms, us or ns, or
    ISO 8601; without a time zone it is local time. A last line without line feed is not complete and left out.

    Args:
        path: The file.

    Returns:
        Unix times in seconds, ascending, and the power at each of them in watts.

    Raises:
        UsageError: The file is missing or invalid; the message names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--power-csv {path}: {error}. Expected a CSV file with time and watts.") from None
    lines = text.splitlines()
    if not text.endswith("\n"):  # the program of the meter has not written the last line completely
        lines = lines[:-1]
    read = _read_tegrastats_samples if any(map(parse_tegrastats_rails, lines[:5])) else _read_csv_samples
    samples = sorted(read(path, lines))
    return [time for time, _ in samples], [watts for _, watts in samples]


def _read_tegrastats_samples(path: Path, lines: Sequence[str]) -> Iterator[tuple[float, float]]:
    for number, line in enumerate(lines, 1):
        rails, time = parse_tegrastats_rails(line), TEGRASTATS_TIME.match(line)
        if not rails:
            continue
        if not time:
            raise UsageError(f"--power-csv {path}:{number}: no date. Use tegrastats of JetPack 5 or newer.")
        try:
            watts = sum(rails[name] for name in select_input_rails(list(rails)))
        except SensorMissingError as error:
            raise UsageError(f"--power-csv {path}:{number}: {error}. Use a meter.") from None
        yield datetime.strptime(time[1], "%m-%d-%Y %H:%M:%S").astimezone().timestamp(), watts


def _read_csv_samples(path: Path, lines: Sequence[str]) -> Iterator[tuple[float, float]]:
    rows = list(csv.reader(lines, delimiter=";" if lines and ";" in lines[0] else ","))
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    time_column = next((header.index(name) for name in TIME_NAMES if name in header), None)
    watt_column = next((header.index(name) for name in WATT_NAMES if name in header), None)
    has_header = time_column is not None and watt_column is not None
    if not has_header:
        time_column, watt_column = 0, 1
    for number, row in enumerate(rows[has_header:], 1 + has_header):
        if not any(cell.strip() for cell in row):
            continue
        try:
            watts = float(row[watt_column or 0].replace(",", "."))  # a decimal comma, if the delimiter is ";"
            if not 0 <= watts < 1e6:
                raise ValueError(f"{watts} W")
            yield _parse_time(row[time_column or 0].strip()), watts
        except (ValueError, IndexError, OverflowError):
            text = ",".join(row)
            raise UsageError(f"--power-csv {path}:{number}: expected a time and watts, got {text!r}.") from None


def _parse_time(text: str) -> float:
    """Return Unix time in seconds; the unit of a number follows from its size."""
    try:
        value = float(text)
    except ValueError:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    if not 0 <= value < 1e21:
        raise ValueError(text)
    while value > 1e11:  # seconds reach 1e11 in the year 5138
        value /= 1e3
    return value
