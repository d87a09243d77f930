"""State of the device before, during and after a measurement: clocks, power mode, temperatures, throttling, other load.

`find_marks` names what makes a run incomparable. Each value is read from the system or missing with a reason.
"""

import os
import re
import resource
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep, time
from typing import TypeVar

import numpy as np
import psutil

from hkd_bench.host import HostFieldError, NvmlGpu, list_cgroup_folders, read_cpu_quota, read_power_mode
from hkd_bench.power import has_unified_memory

T = TypeVar("T")
STATE_INTERVAL_S = 0.5
QUIET_SAMPLE_S = 1.0
MAX_CLOCK_RATIO = 1.1  # 90th to 10th percentile of the clock during the timed runs
MAX_OTHER_CPUS = 0.5  # a browser without visible page needs less, any program that computes needs 1
MAX_OTHER_CPU_RATIO = 0.1  # of the usable CPUs, on machines with less than five
GPU_NAME = re.compile(r"\bgpu\b|gpu-gpc|ga10b|gv11b|gp10b|gb10b")
THROTTLE_ALERT = re.compile(r"(.+)-throttle-alert$")
# Bits of get_throttled of a Raspberry Pi that are set now.
RASPBERRY_PI_FLAGS = {0x1: "under-voltage", 0x2: "CPU clock capped", 0x4: "throttled", 0x8: "soft temperature limit"}


@dataclass(frozen=True)
class DeviceState:
    """State of the device at one time.

    Attributes:
        cpu_mhz: Highest clock of the usable CPUs in MHz: that of the busy ones.
        cpu_limit_mhz: Highest clock that the governor may select, in MHz.
        governor: Governors of the usable CPUs.
        gpu_mhz: Clock of the GPU in MHz.
        power_mode: Power mode of a Jetson board (nvpmodel).
        temperatures_c: Temperature of each sensor in degrees Celsius.
        throttle_counts: Number of throttle and over-current events of each counter since the system start.
        throttle_flags: What reduces a clock now.
        cpu_quota: CPUs that the container may use; None without limit.
        usable_cpus: Number of CPUs of the affinity mask.
        load_average: Mean number of runnable processes over the last minute.
        memory_used_mib: Memory in use on the machine in MiB, without caches.
        gpu_memory_used_mib: Memory in use on the GPU in MiB, of all processes.
        is_memory_unified: Whether the CPU and the GPU share the memory, as on Jetson boards.
        missing: Reason of each value that cannot be read, by attribute.
    """

    cpu_mhz: float | None = None
    cpu_limit_mhz: float | None = None
    governor: str | None = None
    gpu_mhz: float | None = None
    power_mode: str | None = None
    temperatures_c: dict[str, float] = field(default_factory=dict)
    throttle_counts: dict[str, int] = field(default_factory=dict)
    throttle_flags: tuple[str, ...] = ()
    cpu_quota: float | None = None
    usable_cpus: int = 0
    load_average: float | None = None
    memory_used_mib: float = 0.0
    gpu_memory_used_mib: float | None = None
    is_memory_unified: bool = False
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunConditions:
    """State of the device during the runs of one model.

    Attributes:
        cpu_mhz: 10th, 50th and 90th percentile of the CPU clock in MHz; empty if it was not measured.
        gpu_mhz: The same of the GPU clock.
        max_temperatures_c: Highest temperature of each sensor in degrees Celsius.
        throttle_events: Number of new events of each counter.
        throttle_flags: What reduced a clock at any time.
        other_cpus: Mean number of CPUs that other processes used; None if it cannot be measured.
        memory_used_mib: Highest memory in use on the machine in MiB.
        gpu_memory_used_mib: Highest memory in use on the GPU in MiB, of all processes.
        num_samples: Number of samples during the runs.
        marks: What makes the run incomparable; empty for a quiet run.
        missing: Reason of each value that is missing, by attribute.
    """

    cpu_mhz: tuple[float, ...] = ()
    gpu_mhz: tuple[float, ...] = ()
    max_temperatures_c: dict[str, float] = field(default_factory=dict)
    throttle_events: dict[str, int] = field(default_factory=dict)
    throttle_flags: tuple[str, ...] = ()
    other_cpus: float | None = None
    memory_used_mib: float | None = None
    gpu_memory_used_mib: float | None = None
    num_samples: int = 0
    marks: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)


class DeviceStateReader:
    """Reader of the state of this device.

    Args:
        device: cpu, cuda or cuda:N; for cpu no GPU is read.
        root: Root directory of the system.
    """

    def __init__(self, device: str, root: Path = Path("/")) -> None:
        self._root = root
        self._cpus = _list_usable_cpus()
        self._has_gpu = device.startswith("cuda")
        self._is_jetson = has_unified_memory(root)
        self._gpu: NvmlGpu | None = None
        self._gpu_reason = "device cpu"
        if self._has_gpu and not self._is_jetson:
            try:
                self._gpu = NvmlGpu(device)
            except HostFieldError as error:
                self._gpu_reason = str(error)

    def read(self) -> DeviceState:
        """Return the state now."""
        missing: dict[str, str] = {}

        def get(name: str, read: Callable[[], T]) -> T | None:
            try:
                return read()
            except (HostFieldError, OSError, ValueError) as error:
                missing[name] = str(error)
                return None

        temperatures = self._read_temperatures()
        if not temperatures:
            missing["temperatures_c"] = "no sensor in /sys/class/thermal and /sys/class/hwmon"
        counts = read_throttle_counts(self._root)
        if not counts:
            missing["throttle_counts"] = "no counter"
        return DeviceState(
            cpu_mhz=get("cpu_mhz", lambda: max(self._read_cpus("scaling_cur_freq")) / 1e3),
            cpu_limit_mhz=get("cpu_limit_mhz", lambda: max(self._read_cpus("scaling_max_freq")) / 1e3),
            governor=get("governor", self._read_governor),
            gpu_mhz=get("gpu_mhz", self._read_gpu_mhz),
            power_mode=get("power_mode", lambda: read_power_mode(self._root)),
            temperatures_c=temperatures,
            throttle_counts=counts,
            throttle_flags=tuple(self._list_throttle_flags()),
            cpu_quota=read_cpu_quota(self._root),
            usable_cpus=len(self._cpus),
            load_average=get("load_average", lambda: os.getloadavg()[0]),
            memory_used_mib=_read_used_memory_mib(),
            gpu_memory_used_mib=get("gpu_memory_used_mib", self._read_gpu_memory_mib),
            is_memory_unified=self._is_jetson,
            missing=missing,
        )

    def _read_cpus(self, name: str) -> list[int]:
        folder = self._root / "sys/devices/system/cpu"
        values = []
        for cpu in self._cpus:
            with suppress(OSError):  # a CPU that is offline
                values.append(int((folder / f"cpu{cpu}/cpufreq/{name}").read_text()))
        if not values:
            raise HostFieldError(f"{folder}/cpu*/cpufreq/{name}: no such file")
        return values

    def _read_governor(self) -> str:
        folder = self._root / "sys/devices/system/cpu"
        paths = [folder / f"cpu{cpu}/cpufreq/scaling_governor" for cpu in self._cpus]
        names = {path.read_text().strip() for path in paths if path.exists()}
        if not names:
            raise HostFieldError(f"{folder}/cpu*/cpufreq/scaling_governor: no such file")
        return ", ".join(sorted(names))

    def _read_gpu_mhz(self) -> float:
        if not self._is_jetson:
            return self._get_gpu().read_clock_mhz()
        for folder in sorted((self._root / "sys/class/devfreq").glob("*")):
            of_name = folder / "device/of_node/name"
            name = of_name.read_text().strip("\0\n") if of_name.exists() else ""
            if GPU_NAME.search(folder.name) or GPU_NAME.search(name):
                return int((folder / "cur_freq").read_text()) / 1e6
        raise HostFieldError(f"{self._root}/sys/class/devfreq: no GPU")

    def _read_gpu_memory_mib(self) -> float:
        if self._is_jetson:
            raise HostFieldError("unified memory: the GPU uses that of the machine")
        return self._get_gpu().read_used_memory_mib()

    def _get_gpu(self) -> NvmlGpu:
        if self._gpu is None:
            raise HostFieldError(self._gpu_reason)
        return self._gpu

    def _read_temperatures(self) -> dict[str, float]:
        values = {}
        for zone in sorted((self._root / "sys/class/thermal").glob("thermal_zone*")):
            with suppress(OSError, ValueError):  # EAGAIN: zones of Tegra while their part has no power
                values[(zone / "type").read_text().strip()] = int((zone / "temp").read_text()) / 1e3
        for folder in sorted((self._root / "sys/class/hwmon").glob("hwmon*")):
            with suppress(OSError, ValueError):
                name = (folder / "name").read_text().strip()
                if name in ("coretemp", "k10temp", "zenpower"):
                    values[name] = max(int(path.read_text()) for path in folder.glob("temp*_input")) / 1e3
        if self._gpu:
            with suppress(HostFieldError):
                values["GPU"] = self._gpu.read_temperature_c()
        return {name: value for name, value in values.items() if -50 < value < 150}  # unused sensors: -256

    def _list_throttle_flags(self) -> list[str]:
        flags = []
        for folder in sorted((self._root / "sys/class/thermal").glob("cooling_device*")):
            with suppress(OSError, ValueError):
                match = THROTTLE_ALERT.match((folder / "type").read_text().strip())
                if match and int((folder / "cur_state").read_text()) > 0:
                    flags.append(f"{match[1]} throttle alert")
        with suppress(OSError, ValueError):
            path = self._root / "sys/devices/platform/soc/soc:firmware/get_throttled"
            bits = int(path.read_text(), 16)
            flags += [text for bit, text in RASPBERRY_PI_FLAGS.items() if bits & bit]
        if self._gpu:
            with suppress(HostFieldError):
                flags += self._gpu.list_throttle_reasons()
        return flags

    def list_other_gpu_processes(self) -> list[int]:
        """Return the ids of the compute processes on the GPU, before this measurement starts one."""
        with suppress(HostFieldError):
            return sorted(self._get_gpu().list_process_memory_mib())
        return []


def _list_usable_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _read_used_memory_mib() -> float:
    memory = psutil.virtual_memory()
    return float(memory.total - memory.available) / 2**20


def read_throttle_counts(root: Path = Path("/")) -> dict[str, int]:
    """Read the counters of throttle and over-current events.

    They are: thermal throttling of x86 (thermal_throttle; all CPUs of a package have its value), over-current events of
    Jetson boards (soctherm_oc), and throttled periods of the container's CPU quota (cpu.stat).

    Args:
        root: Root directory of the system.

    Returns:
        Number of events since the system start, by counter.
    """
    counts: dict[str, int] = {}
    packages: dict[str, int] = {}
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*"):
        with suppress(OSError, ValueError):
            cores = int((folder / "thermal_throttle/core_throttle_count").read_text())
            counts["CPU core thermal"] = counts.get("CPU core thermal", 0) + cores
            package = folder / "topology/physical_package_id"
            name = package.read_text().strip() if package.exists() else "0"
            packages[name] = int((folder / "thermal_throttle/package_throttle_count").read_text())
    if packages:
        counts["CPU package thermal"] = sum(packages.values())
    for path in sorted((root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt")):
        with suppress(OSError, ValueError):
            counts[f"over-current {path.name.split('_')[0]}"] = int(path.read_text())
    for folder in list_cgroup_folders(root):
        with suppress(OSError):
            match = re.search(r"^nr_throttled (\d+)", (folder / "cpu.stat").read_text(), re.MULTILINE)
            if match:
                counts["CPU quota"] = counts.get("CPU quota", 0) + int(match[1])
    return counts


class OtherLoadMeter:
    """CPU time of other processes since the creation: that of the machine without this process and its children.

    Time that a hypervisor took (steal) counts as other load. Children count after they have ended.
    """

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        kinds = ("user", "nice", "system", "irq", "softirq", "steal")  # user includes guests
        own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        busy = sum(getattr(times, kind, 0.0) for kind in kinds)
        return time(), busy, sum(usage.ru_utime + usage.ru_stime for usage in own)

    def read(self) -> float | None:
        """Return the mean number of CPUs; None if the machine reports less CPU time than this process needed."""
        seconds, busy, own = (now - before for now, before in zip(self._read(), self._start, strict=True))
        if seconds <= 0 or busy < 0.5 * own:
            return None
        return max(0.0, (busy - own) / seconds)


def format_other_load(other_cpus: float | None, usable_cpus: int) -> str:
    """Return a clause if other processes use more than the limit, otherwise an empty string.

    Args:
        other_cpus: Mean number of CPUs of other processes.
        usable_cpus: Number of CPUs that the measurement may use.
    """
    limit = min(MAX_OTHER_CPUS, MAX_OTHER_CPU_RATIO * usable_cpus)
    if other_cpus is None or other_cpus <= limit:
        return ""
    return f"other processes use {other_cpus:.1f} CPUs (limit {limit:.1f} of {usable_cpus})"


def find_load(reader: DeviceStateReader, seconds: float = QUIET_SAMPLE_S) -> list[str]:
    """Return what is not quiet before a measurement.

    Args:
        reader: Reader of the state.
        seconds: Duration over which the load of other processes is measured.
    """
    meter = OtherLoadMeter()
    sleep(seconds)
    state = reader.read()
    load = format_other_load(meter.read(), state.usable_cpus)
    processes = reader.list_other_gpu_processes()
    return [
        *([load] if load else []),
        *([f"{len(processes)} other processes use the GPU"] if processes else []),
        *(f"throttled: {flag}" for flag in state.throttle_flags if "power cap" not in flag),
    ]


def summarize_conditions(
    samples: Sequence[tuple[float, DeviceState]],
    windows: Sequence[tuple[float, float]],
    other_cpus: float | None,
    device: str,
) -> RunConditions:
    """Summarize the state of the device during the runs of one model.

    Args:
        samples: Unix time in seconds and state, ascending, of the whole measurement.
        windows: Start and end of each timed part.
        other_cpus: Mean number of CPUs of other processes.
        device: cpu, cuda or cuda:N; selects the clock that must not change.

    Returns:
        The conditions with their marks.
    """
    inside = [state for when, state in samples if any(start <= when <= end for start, end in windows)]
    # Counters: from the last sample before each window to the first one after it.
    events: dict[str, int] = {}
    for start, end in windows:
        before = next((state for when, state in reversed(samples) if when <= start), samples[0][1])
        after = next((state for when, state in samples if when >= end), samples[-1][1])
        for name, count in after.throttle_counts.items():
            if count > before.throttle_counts.get(name, count):
                events[name] = events.get(name, 0) + count - before.throttle_counts[name]
    states = inside or [samples[-1][1]]
    temperatures: dict[str, float] = {}
    for state in states:
        for name, value in state.temperatures_c.items():
            temperatures[name] = max(value, temperatures.get(name, value))
    missing = dict(states[-1].missing)
    if other_cpus is None:
        missing["other_cpus"] = "the machine reports less CPU time than this process needed"
    if not inside:
        missing["cpu_mhz"] = missing["gpu_mhz"] = f"the timed runs are shorter than {STATE_INTERVAL_S:g} s"
    gpu_memory = [state.gpu_memory_used_mib for state in states if state.gpu_memory_used_mib is not None]
    conditions = RunConditions(
        cpu_mhz=_get_percentiles([state.cpu_mhz for state in inside]),
        gpu_mhz=_get_percentiles([state.gpu_mhz for state in inside]),
        max_temperatures_c=temperatures,
        throttle_events=events,
        throttle_flags=tuple(dict.fromkeys(flag for state in inside for flag in state.throttle_flags)),
        other_cpus=other_cpus,
        memory_used_mib=max(state.memory_used_mib for state in states),
        gpu_memory_used_mib=max(gpu_memory, default=None),
        num_samples=len(inside),
        missing=missing,
    )
    marks = find_marks(conditions, states[0], states[-1], device)
    return RunConditions(**{**vars(conditions), "marks": tuple(marks)})


def _get_percentiles(values: Sequence[float | None]) -> tuple[float, ...]:
    known = [value for value in values if value is not None]
    return tuple(np.percentile(known, (10, 50, 90)).tolist()) if known else ()


def find_marks(conditions: RunConditions, first: DeviceState, last: DeviceState, device: str) -> list[str]:
    """Return what makes a run incomparable.

    Args:
        conditions: State during the runs.
        first: State at the start of the runs.
        last: State at their end.
        device: cpu, cuda or cuda:N; selects the clock that must not change.
    """
    marks = [f"throttled: {name}, {count} events" for name, count in conditions.throttle_events.items()]
    marks += [f"throttled: {flag}" for flag in conditions.throttle_flags]
    name, clock = ("GPU", conditions.gpu_mhz) if device.startswith("cuda") else ("CPU", conditions.cpu_mhz)
    if clock and clock[2] > MAX_CLOCK_RATIO * clock[0]:
        marks.append(f"changed clock: {name} {clock[0]:.0f} to {clock[2]:.0f} MHz")
    for text, before, after in (
        ("governor", first.governor, last.governor),
        ("power mode", first.power_mode, last.power_mode),
        ("CPU clock limit", first.cpu_limit_mhz, last.cpu_limit_mhz),
    ):
        if before != after:
            marks.append(f"changed {text}: {before} to {after}")
    load = format_other_load(conditions.other_cpus, last.usable_cpus)
    return marks + ([load] if load else [])
