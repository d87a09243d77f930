"""State of the device on recorded trees of sysfs and procfs, marks, and `--require-quiet` with a known load.

The trees follow the kernel's documentation (cpufreq, thermal sysfs, cgroup v1 and v2) and public listings of Jetson
boards (soctherm_oc, throttle alerts, nvpmodel).
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import pytest

from hkd_bench.cli import check_marks, main
from hkd_bench.device_state import (
    DeviceState,
    DeviceStateReader,
    OtherLoadMeter,
    RunConditions,
    find_load,
    find_marks,
    format_other_load,
    read_throttle_counts,
    summarize_conditions,
)
from hkd_bench.host import HostFieldError, parse_power_mode, read_cpu_quota, read_power_mode
from hkd_det.errors import UnavailableError

WriteTree = Callable[[dict[str, object]], Path]


def cpu_files(clock_khz: int, governor: str = "schedutil") -> dict[str, object]:
    """Files of each usable CPU; the first one is busy."""
    files: dict[str, object] = {}
    for index, cpu in enumerate(sorted(os.sched_getaffinity(0))):
        folder = f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
        files[f"{folder}/scaling_cur_freq"] = clock_khz if index == 0 else 729_600
        files[f"{folder}/scaling_max_freq"] = 1_728_000
        files[f"{folder}/scaling_governor"] = governor
    return files


ORIN: dict[str, object] = {
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0",
    "var/lib/nvpmodel/status": "pmode:0002",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >",
    "sys/class/devfreq/17000000.gpu/cur_freq": 1_020_000_000,
    "sys/class/devfreq/15340000.vic/cur_freq": 115_200_000,
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": 54_937,
    "sys/class/thermal/thermal_zone1/type": "tj-thermal",
    "sys/class/thermal/thermal_zone1/temp": 56_656,
    "sys/class/thermal/thermal_zone2/type": "cv0-thermal",
    "sys/class/thermal/thermal_zone2/temp": -256_000,
    "sys/class/thermal/cooling_device0/type": "pwm-fan",
    "sys/class/thermal/cooling_device0/cur_state": 3,
    "sys/class/thermal/cooling_device1/type": "cpu-throttle-alert",
    "sys/class/thermal/cooling_device1/cur_state": 0,
    "sys/class/thermal/cooling_device2/type": "gpu-throttle-alert",
    "sys/class/thermal/cooling_device2/cur_state": 1,
    "sys/class/hwmon/hwmon3/name": "soctherm_oc",
    "sys/class/hwmon/hwmon3/oc1_event_cnt": 1,
    "sys/class/hwmon/hwmon3/oc3_event_cnt": 37,
}


def test_state_of_jetson(write_tree: WriteTree) -> None:
    state = DeviceStateReader("cuda", write_tree(ORIN | cpu_files(1_497_600))).read()
    assert (state.cpu_mhz, state.cpu_limit_mhz, state.governor) == (1497.6, 1728, "schedutil")
    assert (state.gpu_mhz, state.power_mode, state.is_memory_unified) == (1020, "2 (MAXN_SUPER)", True)
    assert state.temperatures_c == {"cpu-thermal": 54.937, "tj-thermal": 56.656}
    assert state.throttle_counts == {"over-current oc1": 1, "over-current oc3": 37}
    assert state.throttle_flags == ("gpu throttle alert",)
    assert state.gpu_memory_used_mib is None and "unified memory" in state.missing["gpu_memory_used_mib"]


def test_gpu_clock_of_thor_and_nano(write_tree: WriteTree, tmp_path: Path) -> None:
    thor = {
        "thor/proc/device-tree/compatible": "nvidia,tegra264",
        "thor/sys/class/devfreq/gpu-gpc-0/cur_freq": 1575000000,
    }
    nano = {
        "nano/proc/device-tree/compatible": "nvidia,tegra210",
        "nano/sys/class/devfreq/57000000.gpu/cur_freq": 76800000,
    }
    write_tree(thor | nano)
    assert DeviceStateReader("cuda", tmp_path / "thor").read().gpu_mhz == 1575
    assert DeviceStateReader("cuda", tmp_path / "nano").read().gpu_mhz == 76.8


def test_state_of_machine_without_files_has_reasons(tmp_path: Path) -> None:
    state = DeviceStateReader("cpu", tmp_path).read()
    assert (state.cpu_mhz, state.governor, state.power_mode, state.cpu_quota) == (None, None, None, None)
    assert state.missing.keys() >= {"cpu_mhz", "cpu_limit_mhz", "governor", "gpu_mhz", "power_mode"}
    assert state.memory_used_mib > 0 and state.usable_cpus == len(os.sched_getaffinity(0))


def test_throttle_counts_of_x86_count_a_package_once(write_tree: WriteTree) -> None:
    files: dict[str, object] = {}
    for cpu in range(4):
        folder = f"sys/devices/system/cpu/cpu{cpu}"
        files[f"{folder}/thermal_throttle/core_throttle_count"] = 2
        files[f"{folder}/thermal_throttle/package_throttle_count"] = 78 + cpu // 2
        files[f"{folder}/topology/physical_package_id"] = cpu // 2
    assert read_throttle_counts(write_tree(files)) == {"CPU core thermal": 8, "CPU package thermal": 78 + 79}


@pytest.mark.parametrize(
    ("files", "quota", "throttled"),
    [
        # Version 2 in the host's namespace: the group of the service and that of its slice have limits.
        ({"proc/self/cgroup": "0::/system.slice/x.service",
          "sys/fs/cgroup/system.slice/x.service/cpu.max": "max 100000",
          "sys/fs/cgroup/system.slice/cpu.max": "150000 100000",
          "sys/fs/cgroup/system.slice/x.service/cpu.stat": "usage_usec 5\nnr_periods 9\nnr_throttled 4"}, 1.5, 4),
        # Version 2 in a container: the mount is its own group.
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000",
          "sys/fs/cgroup/cpu.stat": "nr_periods 9\nnr_throttled 7"}, 0.5, 7),
        # Version 1: Docker names the group of the host, which is not visible in the container.
        ({"proc/self/cgroup": "4:cpu,cpuacct:/docker/1f\n3:memory:/docker/1f",
          "sys/fs/cgroup/cpu/cpu.cfs_quota_us": 200000, "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
          "sys/fs/cgroup/cpu/cpu.stat": "nr_periods 2\nnr_throttled 1\nthrottled_time 8"}, 2, 1),
        ({"proc/self/cgroup": "1:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1,
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000}, None, None),
        ({}, None, None),
    ],
)  # fmt: skip
def test_cpu_quota(files: dict[str, object], quota: float | None, throttled: int | None, write_tree: WriteTree) -> None:
    root = write_tree({"unrelated": 1, **files})
    assert read_cpu_quota(root) == quota
    assert read_throttle_counts(root).get("CPU quota") == throttled


def test_power_mode_without_configuration_is_its_number(write_tree: WriteTree) -> None:
    assert read_power_mode(write_tree({"var/lib/nvpmodel/status": "pmode:0010"})) == "10"


def test_power_mode_of_the_program() -> None:
    """Lines of JetPack 6, joined."""
    assert parse_power_mode("NV Power Mode: MAXN_SUPER; 2") == "2 (MAXN_SUPER)"
    assert parse_power_mode("NVPM WARN: fan mode is not set!; NV Power Mode: 15W; 0") == "0 (15W)"
    with pytest.raises(HostFieldError, match="no mode"):
        parse_power_mode("NVPM ERROR: Error opening /etc/nvpmodel.conf")


def test_flags_of_raspberry_pi(write_tree: WriteTree) -> None:
    root = write_tree({"sys/devices/platform/soc/soc:firmware/get_throttled": "50005"})
    assert DeviceStateReader("cpu", root).read().throttle_flags == ("under-voltage", "throttled")


BASE = DeviceState(cpu_mhz=1500.0, governor="schedutil", power_mode="0 (15W)", usable_cpus=6, memory_used_mib=900.0)


def test_conditions_are_those_of_the_timed_windows() -> None:
    """One sample per second; the first and the last are outside the window."""
    states = [
        replace(BASE, cpu_mhz=mhz, throttle_counts={"CPU quota": count}, temperatures_c={"cpu": temperature})
        for mhz, count, temperature in (
            (300.0, 5, 90),
            (1500.0, 6, 50),
            (1480.0, 6, 60),
            (1500.0, 8, 55),
            (300.0, 9, 50),
        )
    ]
    conditions = summarize_conditions(list(enumerate(states)), [(0.5, 3.5)], 0.1, "cpu")
    assert conditions.num_samples == 3 and conditions.cpu_mhz == pytest.approx((1484, 1500, 1500))
    assert conditions.max_temperatures_c == {"cpu": 60}
    assert conditions.throttle_events == {"CPU quota": 9 - 5}  # from the last sample before to the first after
    assert conditions.marks == ("throttled: CPU quota, 4 events",)


@pytest.mark.parametrize(
    ("conditions", "last", "device", "marks"),
    [
        ({"cpu_mhz": (1460.0, 1500.0, 1500.0), "other_cpus": 0.5}, {}, "cpu", []),
        ({"cpu_mhz": (1200.0, 1500.0, 1500.0)}, {}, "cpu", ["changed clock: CPU 1200 to 1500 MHz"]),
        ({"cpu_mhz": (300.0, 400.0, 900.0), "gpu_mhz": (1000.0, 1000.0, 1000.0)}, {}, "cuda", []),
        ({"gpu_mhz": (600.0, 900.0, 1000.0)}, {}, "cuda:0", ["changed clock: GPU 600 to 1000 MHz"]),
        ({"other_cpus": 0.9}, {}, "cpu", ["other processes use 0.9 CPUs (limit 0.5 of 6)"]),
        ({"throttle_flags": ("GPU hardware slowdown",)}, {}, "cuda", ["throttled: GPU hardware slowdown"]),
        ({}, {"governor": "performance"}, "cpu", ["changed governor: schedutil to performance"]),
        ({}, {"power_mode": "1 (7W)"}, "cpu", ["changed power mode: 0 (15W) to 1 (7W)"]),
    ],
)
def test_marks(conditions: dict[str, object], last: dict[str, object], device: str, marks: list[str]) -> None:
    run = RunConditions(**conditions)  # type: ignore[arg-type]
    assert find_marks(run, BASE, replace(BASE, **last), device) == marks  # type: ignore[arg-type]


@pytest.fixture
def busy() -> Iterator[None]:
    """Run a process that needs one CPU."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    sleep(0.3)
    yield
    process.kill()
    process.wait()


@pytest.mark.usefixtures("busy")
def test_other_load_contains_other_processes_and_not_this_one() -> None:
    meter = OtherLoadMeter()
    before = os.times()
    for _ in range(3_000_000):
        pass
    sleep(1)
    own = sum(os.times()[:2]) - sum(before[:2])
    load = meter.read()
    assert own > 0 and load is not None
    num_cpus = os.cpu_count() or 1
    assert 0.2 < load < num_cpus + 0.2  # at least a part of the busy process, which shares the CPU with others


def test_cpu_time_of_a_child_that_has_ended_is_own() -> None:
    meter = OtherLoadMeter()
    code = "import time\nwhile time.process_time() < 1: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    _, busy, own = (now - then for now, then in zip(meter._read(), meter._start, strict=True))
    assert 1 <= own < busy + 0.2


@pytest.mark.usefixtures("busy")
def test_require_quiet_refuses_with_one_line(
    half_right: Path,
    write_tiny_onnx: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = write_tiny_onnx(tmp_path / "tiny.onnx")
    assert main([str(model), "--data", str(half_right), "--require-quiet", "--json", str(tmp_path / "r.json")]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hkd-bench: ")]
    assert line.startswith("hkd-bench: --require-quiet: other processes use ") and "Stop the other load" in line
    assert not (tmp_path / "r.json").exists()


def test_require_quiet_names_throttling_and_gpu_processes(
    write_tree: WriteTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = DeviceStateReader("cuda", write_tree(ORIN))
    monkeypatch.setattr(reader, "list_other_gpu_processes", lambda: [7, 9])
    causes = find_load(reader, 0.01)
    assert causes[-2:] == ["2 other processes use the GPU", "throttled: gpu throttle alert"]


def test_limit_of_other_load_depends_on_the_cpus() -> None:
    assert format_other_load(0.15, 2) == "" and "limit 0.2 of 2" in format_other_load(0.25, 2)
    assert format_other_load(0.45, 64) == "" and "limit 0.5 of 64" in format_other_load(0.55, 64)
    assert format_other_load(None, 4) == ""


def test_check_marks_names_model_and_cause() -> None:
    """A throttled sustained run is a result, not an error."""

    def make_model(
        run: tuple[str, ...] = (), scenario: tuple[str, ...] = (), sustained: tuple[str, ...] = ()
    ) -> SimpleNamespace:
        return SimpleNamespace(
            name="student",
            conditions=RunConditions(marks=run),
            scenarios=[SimpleNamespace(scenario="Server", marks=scenario)],
            sustained=SimpleNamespace(marks=sustained),
        )

    throttled, loaded = ("throttled: CPU quota, 4 events",), ("other processes use 1.0 CPUs (limit 0.5 of 8)",)
    for model, message in (
        (make_model(run=throttled), r"--require-quiet: student: throttled: CPU quota, 4 events\. The results"),
        (make_model(scenario=throttled), "--require-quiet: student Server: throttled: CPU quota, 4 events"),
        (make_model(sustained=throttled + loaded), "--require-quiet: student sustained: other processes use 1.0 CPUs"),
    ):
        with pytest.raises(UnavailableError, match=message):
            check_marks([model])  # type: ignore[list-item]
    check_marks([make_model(sustained=throttled)])  # type: ignore[list-item]
