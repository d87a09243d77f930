"""Power sensors on recorded trees of sysfs and on lines of tegrastats.

The RAPL trees follow the kernel's Documentation/power/powercap/powercap.rst. The trees of Jetson boards follow
Documentation/hwmon/ina3221.rst and the rail tables of NVIDIA's Jetson Linux Developer Guide. The lines of tegrastats
are from public logs of these boards.
"""

import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, sleep
from typing import ClassVar

import pytest

from hkd_bench.host import HostFieldError, NvmlGpu
from hkd_bench.power import (
    JtopSensor,
    NvmlSensor,
    RaplSensor,
    TegrastatsSensor,
    has_unified_memory,
    open_power_sensors,
    parse_tegrastats_rails,
)
from hkd_bench.worker import _read_gpu_memory
from hkd_deploy.power_rails import RailSensor, SensorMissingError, select_input_rails

WriteTree = Callable[[dict[str, object]], Path]
RANGE_UJ = 262_143_328_850


def rapl_zone(name: str, domain: str, energy_uj: int, range_uj: int = RANGE_UJ) -> dict[str, object]:
    folder = f"sys/class/powercap/{name}"
    return {
        f"{folder}/name": domain,
        f"{folder}/energy_uj": energy_uj,
        f"{folder}/max_energy_range_uj": range_uj,
    }


def write_server(write_tree: WriteTree, package_uj: int, dram_uj: int, other_uj: int) -> Path:
    """Two packages with DRAM, as on a server, and the zones that contain or repeat them."""
    return write_tree(
        rapl_zone("intel-rapl:0", "package-0", package_uj)
        | rapl_zone("intel-rapl:0:0", "core", other_uj)
        | rapl_zone("intel-rapl:0:1", "uncore", other_uj)
        | rapl_zone("intel-rapl:0:2", "dram", dram_uj, 65_532_610_987)
        | rapl_zone("intel-rapl:1", "package-1", package_uj)
        | rapl_zone("intel-rapl:1:2", "dram", dram_uj, 65_532_610_987)
        | rapl_zone("intel-rapl:2", "psys", other_uj)
        | rapl_zone("intel-rapl-mmio:0", "package-0", package_uj)
    )


def test_rapl_adds_packages_and_dram_once(write_tree: WriteTree) -> None:
    sensor = RaplSensor(write_server(write_tree, 5_000_000, 1_000_000, 0))
    write_server(write_tree, 7_500_000, 1_250_000, 90_000_000)
    assert sensor.is_counter and sensor.scope == "package-1 + package-0 + dram"
    assert sensor.read() == pytest.approx(2 * 2.5 + 2 * 0.25)


def test_rapl_counter_wraps_at_the_range_of_its_zone(write_tree: WriteTree) -> None:
    sensor = RaplSensor(write_server(write_tree, RANGE_UJ - 1_000_000, 65_532_610_987 - 500_000, 0))
    write_server(write_tree, 250_000, 250_000, 0)
    assert sensor.read() == pytest.approx(2 * 1.25 + 2 * 0.75)
    write_server(write_tree, 1_250_000, 250_000, 0)
    assert sensor.read() == pytest.approx(2 * 2.25 + 2 * 0.75)


def test_rapl_zones_in_the_tree_of_the_control_type(write_tree: WriteTree) -> None:
    """/sys/devices/virtual/powercap, to which the class directory links; a copy of sysfs may have no links."""
    package, dram = rapl_zone("intel-rapl:0", "package-0", 0), rapl_zone("intel-rapl:0:1", "dram", 0)
    tree = {name.replace("powercap/", "powercap/intel-rapl/"): value for name, value in package.items()}
    tree |= {name.replace("powercap/", "powercap/intel-rapl/intel-rapl:0/"): value for name, value in dram.items()}
    sensor = RaplSensor(write_tree(tree))
    write_tree({name: 2_000_000 for name in tree if name.endswith("energy_uj")})
    assert (sensor.scope, sensor.read()) == ("package-0 + dram", pytest.approx(4))


def test_rapl_without_package_has_reason(write_tree: WriteTree) -> None:
    with pytest.raises(SensorMissingError, match="this machine has no such counters"):
        RaplSensor(write_tree({"sys/class/powercap/other": 1}))
    with pytest.raises(SensorMissingError, match="no such counters"):
        RaplSensor(write_tree(rapl_zone("intel-rapl:0", "psys", 1)))
    broken = write_tree(rapl_zone("intel-rapl:0", "package-0", 1) | {"sys/class/powercap/intel-rapl:0/energy_uj": "x"})
    with pytest.raises(SensorMissingError, match="invalid literal"):
        RaplSensor(broken)


def test_rapl_that_root_only_may_read_has_a_remedy(write_tree: WriteTree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tree(rapl_zone("intel-rapl:0", "package-0", 1))
    read_text = Path.read_text

    def refuse(path: Path, *args: str) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(SensorMissingError, match=r"permission denied\. Run sudo chmod a\+r"):
        RaplSensor(root)


def test_rapl_of_this_machine_measures_more_under_load() -> None:
    try:
        sensor = RaplSensor()
    except SensorMissingError as error:
        pytest.skip(str(error))
    start = sensor.read()
    sleep(2)
    idle = sensor.read()
    end = perf_counter() + 2
    while perf_counter() < end:
        pass
    assert 0 < idle - start < sensor.read() - idle < 2000


def hwmon(folder: str, name: str, rails: dict[int, tuple[str, int, int]]) -> dict[str, object]:
    """Files of an INA3221: label, millivolts and milliamperes of channels, and the channel "sum of shunt voltages"."""
    files: dict[str, object] = {f"{folder}/name": name, f"{folder}/in7_label": "sum of shunt voltages"}
    files |= {f"{folder}/in7_input": 0, f"{folder}/curr4_input": 9999}
    for channel, (label, millivolts, milliamperes) in rails.items():
        files[f"{folder}/in{channel}_label"] = label
        files[f"{folder}/in{channel}_input"] = millivolts
        files[f"{folder}/curr{channel}_input"] = milliamperes
        files[f"{folder}/in{channel + 3}_input"] = 50  # shunt voltage
    return files


def iio(folder: str, rails: dict[str, tuple[int, int, int]]) -> dict[str, object]:
    """Files of NVIDIA's driver ina3221x of JetPack 4: millivolts, milliamperes and milliwatts of each rail."""
    files: dict[str, object] = {f"{folder}/name": "ina3221x"}
    for channel, (label, values) in enumerate(rails.items()):
        files[f"{folder}/rail_name_{channel}"] = label
        for quantity, value in zip(("voltage", "current", "power"), values, strict=True):
            files[f"{folder}/in_{quantity}{channel}_input"] = value
    return files


I2C = "sys/bus/i2c/devices"
BOARDS: dict[str, tuple[dict[str, object], str, float]] = {
    "Nano, JetPack 4": (
        iio(f"{I2C}/6-0040/iio:device0", {
            "POM_5V_IN": (5088, 392, 1997), "POM_5V_GPU": (5080, 8, 40), "POM_5V_CPU": (5072, 40, 203),
        }), "POM_5V_IN", 1.997),
    "TX2, JetPack 4": (
        iio(f"{I2C}/0-0041/iio:device1", {
            "VDD_IN": (19168, 160, 3056), "VDD_SYS_CPU": (19168, 8, 152), "VDD_SYS_DDR": (4792, 184, 883)})
        | iio(f"{I2C}/0-0040/iio:device0", {
            "VDD_SYS_GPU": (19168, 8, 152), "VDD_SYS_SOC": (19160, 36, 687), "VDD_4V0_WIFI": (4792, 0, 0)}),
        "VDD_IN", 3.056),
    "AGX Xavier, JetPack 4": (
        iio("sys/bus/i2c/drivers/ina3221x/1-0040/iio:device0", {
            "GPU": (19152, 0, 0), "CPU": (19152, 16, 311), "SOC": (19152, 48, 932)})
        | iio("sys/bus/i2c/drivers/ina3221x/1-0041/iio:device1", {
            "CV": (19152, 0, 0), "VDDRQ": (19152, 32, 621), "SYS5V": (4944, 300, 1482)}),
        "GPU + CPU + SOC + CV + VDDRQ + SYS5V", 3.346),
    "Xavier NX, JetPack 5": (
        hwmon("sys/bus/i2c/drivers/ina3221/7-0040/hwmon/hwmon6", "ina3221", {
            1: ("VDD_IN", 4960, 820), 2: ("VDD_CPU_GPU_CV", 4960, 140), 3: ("VDD_SOC", 4960, 204)}),
        "VDD_IN", 4.0672),
    "Orin Nano, JetPack 6": (
        hwmon(f"{I2C}/1-0040/hwmon/hwmon1", "ina3221", {
            1: ("VDD_IN", 4984, 1856), 2: ("VDD_CPU_GPU_CV", 4984, 105), 3: ("VDD_SOC", 4984, 275)})
        | hwmon("sys/class/hwmon/hwmon1", "ina3221", {
            1: ("VDD_IN", 4984, 1856), 2: ("VDD_CPU_GPU_CV", 4984, 105), 3: ("VDD_SOC", 4984, 275)}),
        "VDD_IN", 4.984 * 1.856),
    "AGX Orin, JetPack 6": (
        hwmon(f"{I2C}/1-0040/hwmon/hwmon3", "ina3221", {
            1: ("VDD_GPU_SOC", 19840, 160), 2: ("VDD_CPU_CV", 19840, 700), 3: ("VIN_SYS_5V0", 4968, 953)})
        | hwmon(f"{I2C}/1-0041/hwmon/hwmon4", "ina3221", {
            1: ("NC", 0, 0), 2: ("VDDQ_VDD2_1V8AO", 4968, 341), 3: ("NC", 0, 0)}),
        "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0", 19.84 * 0.86 + 4.968 * 0.953),
    "AGX Thor, JetPack 7": (
        hwmon("sys/class/hwmon/hwmon3", "ina3221", {
            1: ("VDD_GPU", 19600, 100), 2: ("VDD_CPU_SOC_MSS", 19600, 300), 3: ("VIN_SYS_5V0", 4900, 1150)})
        | {"sys/class/hwmon/hwmon5/name": "ina238", "sys/class/hwmon/hwmon5/in0_input": 2,
           "sys/class/hwmon/hwmon5/in1_input": 19650, "sys/class/hwmon/hwmon5/curr1_input": 1006,
           "sys/class/hwmon/hwmon5/power1_input": 19_780_000},
        "VIN", 19.78),
    "AGX Thor module on another carrier board": (
        hwmon("sys/class/hwmon/hwmon3", "ina3221", {
            1: ("VDD_GPU", 19600, 100), 2: ("VDD_CPU_SOC_MSS", 19600, 300), 3: ("VIN_SYS_5V0", 4900, 1150)}),
        "VDD_GPU + VDD_CPU_SOC_MSS + VIN_SYS_5V0", 19.6 * 0.4 + 4.9 * 1.15),
}  # fmt: skip


@pytest.mark.parametrize("board", BOARDS)
def test_rails_of_board_are_counted_once(board: str, write_tree: WriteTree) -> None:
    files, scope, watts = BOARDS[board]
    sensor = RailSensor(write_tree(files))
    assert sensor.scope == scope and not sensor.is_counter
    assert sensor.read() == pytest.approx(watts)


def test_disabled_channel_is_no_rail(write_tree: WriteTree) -> None:
    rails = {1: ("VDD_IN", 4984, 1856), 2: ("VDD_SOC", 4984, 105), 3: ("", 0, 0)}
    folder = f"{I2C}/1-0040/hwmon/hwmon1"
    root = write_tree(hwmon(folder, "ina3221", rails) | {f"{folder}/in1_enable": 0})
    with pytest.raises(SensorMissingError, match="rails VDD_SOC: which of them contain others is not known"):
        RailSensor(root)


def test_board_without_monitor_has_reason(write_tree: WriteTree) -> None:
    with pytest.raises(SensorMissingError, match="no INA3221"):
        RailSensor(write_tree({"sys/class/hwmon/hwmon0/name": "nct6775"}))


TEGRASTATS = {
    "Nano, JetPack 4.6": (
        "RAM 1738/3956MB (lfb 172x4MB) SWAP 0/1978MB (cached 0MB) IRAM 0/252kB(lfb 252kB) "
        "CPU [7%@1224,0%@1224,3%@1224,7%@1224] EMC_FREQ 0%@1600 GR3D_FREQ 0%@76 APE 25 PLL@29C CPU@31C PMIC@100C "
        "GPU@31.5C AO@37C thermal@31.25C POM_5V_IN 1997/2089 POM_5V_GPU 40/57 POM_5V_CPU 203/289", 1.997),
    "TX2, JetPack 4": (
        "CPU [1%@345,0%@345,2%@345] EMC_FREQ 4%@1600 GR3D_FREQ 0%@624 APE 150 PLL@37.5C MCPU@37.5C PMIC@100C "
        "Tboard@32C GPU@35C BCPU@37.5C thermal@36.5C Tdiode@34.25C VDD_SYS_GPU 152/152 VDD_SYS_SOC 687/687 "
        "VDD_4V0_WIFI 0/0 VDD_IN 3056/3056 VDD_SYS_CPU 152/152 VDD_SYS_DDR 883/883", 3.056),
    "AGX Xavier, JetPack 4": (
        "RAM 721/31927MB (lfb 7291x4MB) SWAP 0/15963MB (cached 0MB) CPU [2%@1190,0%@1190,off,off] EMC_FREQ 0%@665 "
        "GR3D_FREQ 0%@318 APE 150 MTS fg 0% bg 0% AO@37.5C GPU@37.5C Tdiode@40C PMIC@100C AUX@36C CPU@37.5C "
        "thermal@36.9C Tboard@37C GPU 0/0 CPU 311/311 SOC 932/932 CV 0/0 VDDRQ 621/621 SYS5V 1482/1482", 3.346),
    "AGX Orin, JetPack 5": (
        "EMC_FREQ 0% GR3D_FREQ 14%@407 NVDLA0_FREQ @1600 APE 174 CV0@73.625C CPU@77.281C Tboard@62C SOC2@70C "
        "tj@77.281C CV2@67.25C VDD_GPU_SOC 3150mW/2971mW VDD_CPU_CV 14312mW/12415mW VIN_SYS_5V0 4968mW/5048mW "
        "VDDQ_VDD2_1V8AO 1091mW/1091mW", 22.430),
    "Orin Nano, JetPack 6": (
        "07-29-2026 18:00:27 RAM 2272/7620MB (lfb 4x4MB) SWAP 221/3810MB (cached 0MB) CPU [0%@729,0%@1036,0%@1036] "
        "GR3D_FREQ 0% cpu@54.937C soc2@55.562C tj@56.656C VDD_IN 4673mW/4673mW VDD_CPU_GPU_CV 527mW/527mW "
        "VDD_SOC 1339mW/1339mW", 4.673),
    "AGX Thor, JetPack 7": (
        "04-21-2026 15:50:52 RAM 105265/125772MB (lfb 34x4MB) CPU [0%@972,8%@972] EMC_FREQ 0%@2750 "
        "GR3D_FREQ @[314,314,314] VIC off OFA_FREQ @315 PVA0_FREQ off APE 300 cpu@37.343C tj@38.875C "
        "VDD_GPU 1962mW/1962mW VDD_CPU_SOC_MSS 5887mW/5887mW VIN_SYS_5V0 5635mW/5635mW VIN 19780mW/19780mW", 19.780),
    "Thor with mean and maximum, JetPack 7": (
        "07-02-2026 20:41:39 RAM 37755/125749MB (lfb 529x4MB) CPU [2%@972,0%@972] cpu@40.281C/40.281C "
        "VDD_GPU 1975mW/1975mW/1975mW VDD_CPU_SOC_MSS 5530mW/5530mW/5530mW VIN_SYS_5V0 5635mW/5635mW/5700mW", 13.140),
}  # fmt: skip


@pytest.mark.parametrize("board", TEGRASTATS)
def test_tegrastats_line_of_board(board: str) -> None:
    line, watts = TEGRASTATS[board]
    rails = parse_tegrastats_rails(line)
    assert sum(rails[name] for name in select_input_rails(list(rails))) == pytest.approx(watts)
    assert not {"RAM", "SWAP", "IRAM", "APE"} & rails.keys()


def test_tegrastats_program_is_read_until_it_is_closed(tmp_path: Path) -> None:
    line = TEGRASTATS["Orin Nano, JetPack 6"][0]
    sensor = TegrastatsSensor(("sh", "-c", f"while echo '{line}'; do sleep 0.05; done"))
    assert (sensor.scope, sensor.read()) == ("VDD_IN", pytest.approx(4.673))
    sensor.close()
    with pytest.raises(OSError, match="ended"):
        sensor.read()
    with pytest.raises(SensorMissingError, match="No such file"):
        TegrastatsSensor((str(tmp_path / "tegrastats"),))


class Jtop:
    """The part of jtop 4.3 that is read: `power` has the rails, and as total the input rail or the sum of all rails."""

    rails: ClassVar[dict[str, int]] = {}

    def __init__(self, interval: float) -> None:
        self.calls = [interval]

    def start(self) -> None:
        if not self.rails:
            raise JtopError("The jtop.service is not active")

    def close(self) -> None:
        self.calls.append(0)

    @property
    def power(self) -> dict[str, object]:
        rails = {name: {"volt": 5000, "curr": 1, "power": watts, "avg": 1} for name, watts in self.rails.items()}
        if "VDD_IN" in rails:
            return {"tot": {"name": "VDD_IN", **rails.pop("VDD_IN")}, "rail": rails}
        return {"tot": {"power": sum(self.rails.values()), "avg": 1}, "rail": rails}


class JtopError(Exception):
    """As jtop.JtopException."""


@pytest.mark.parametrize(
    ("rails", "scope", "watts"),
    [
        ({"VDD_IN": 4673, "VDD_CPU_GPU_CV": 527, "VDD_SOC": 1339}, "VDD_IN", 4.673),
        (
            {"VDD_GPU_SOC": 3150, "VDD_CPU_CV": 14312, "VIN_SYS_5V0": 4968, "VDDQ_VDD2_1V8AO": 1091},
            "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0",
            22.430,
        ),
    ],
)
def test_jtop_rails_are_counted_once(
    rails: dict[str, int], scope: str, watts: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("jtop")
    module.jtop, module.JtopException = Jtop, JtopError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jtop", module)
    with pytest.raises(SensorMissingError, match="service is not active"):
        JtopSensor()
    monkeypatch.setattr(Jtop, "rails", rails)
    sensor = JtopSensor()
    assert (sensor.scope, sensor.read()) == (scope, pytest.approx(watts))
    sensor.close()


def make_nvml(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, object], visible: str = ""
) -> tuple[types.ModuleType, list[object]]:
    """Replace pynvml: functions of `values` return them, others raise NVML's error Not Supported."""
    module, opened = types.ModuleType("pynvml"), []
    module.NVMLError = type("NVMLError", (Exception,), {})  # type: ignore[attr-defined]
    module.NVML_CLOCK_SM, module.NVML_TEMPERATURE_GPU = 1, 0  # type: ignore[attr-defined]

    def get(name: str) -> Callable[..., object]:
        def call(*args: object) -> object:
            if name.startswith("nvmlDeviceGetHandle"):
                opened.append(args[0])
            if name in values or name.startswith(("nvmlInit", "nvmlDeviceGetHandle", "nvmlDeviceGetName")):
                return values.get(name, "NVIDIA H200")
            raise module.NVMLError("Not Supported")

        return call

    module.__getattr__ = get  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    return module, opened


def test_nvml_prefers_the_energy_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    make_nvml(monkeypatch, {"nvmlDeviceGetTotalEnergyConsumption": 12_500, "nvmlDeviceGetPowerUsage": 70_000})
    sensor = NvmlSensor(NvmlGpu("cuda"))
    assert (sensor.is_counter, sensor.read(), sensor.scope) == (True, 12.5, "NVIDIA H200")
    make_nvml(monkeypatch, {"nvmlDeviceGetPowerUsage": 70_000})
    sensor = NvmlSensor(NvmlGpu("cuda"))
    assert (sensor.is_counter, sensor.read()) == (False, 70.0)


def test_nvml_of_jetson_supports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    make_nvml(monkeypatch, {})
    with pytest.raises(SensorMissingError, match="neither its energy nor its power"):
        NvmlSensor(NvmlGpu("cuda:0"))


@pytest.mark.parametrize(
    ("device", "visible", "opened"),
    [("cuda", "", 0), ("cuda:1", "", 1), ("cuda:1", "3,2", 2), ("cuda", "GPU-8f2", "GPU-8f2")],
)
def test_nvml_opens_the_gpu_of_cuda(device: str, visible: str, opened: object, monkeypatch: pytest.MonkeyPatch) -> None:
    _, handles = make_nvml(monkeypatch, {}, visible)
    NvmlGpu(device)
    assert handles == [opened]


def test_nvml_process_memory_and_throttle_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = [
        types.SimpleNamespace(pid=7, usedGpuMemory=512 * 2**20),
        types.SimpleNamespace(pid=8, usedGpuMemory=None),
    ]
    make_nvml(
        monkeypatch,
        {
            "nvmlDeviceGetComputeRunningProcesses": processes,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x1 | 0x4 | 0x40,
        },
    )
    gpu = NvmlGpu("cuda")
    assert gpu.read_process_memory_mib(7) == 512
    for pid in (8, 9):
        with pytest.raises(HostFieldError, match=f"no memory of process {pid}"):
            gpu.read_process_memory_mib(pid)
    assert gpu.list_throttle_reasons() == ["GPU software power cap", "GPU hardware thermal slowdown"]


def test_worker_reads_the_gpu_memory_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    own = types.SimpleNamespace(pid=os.getpid(), usedGpuMemory=300 * 2**20)
    make_nvml(monkeypatch, {"nvmlDeviceGetComputeRunningProcesses": [own]})
    assert _read_gpu_memory("cuda:0") == (300, "")
    assert _read_gpu_memory("cpu") == (None, "device cpu")
    make_nvml(monkeypatch, {"nvmlDeviceGetComputeRunningProcesses": []})
    memory, reason = _read_gpu_memory("cuda")
    assert memory is None and "share the host's process ids" in reason


def test_open_sensors_of_desktop_adds_gpu_and_processor(write_tree: WriteTree, monkeypatch: pytest.MonkeyPatch) -> None:
    make_nvml(monkeypatch, {"nvmlDeviceGetTotalEnergyConsumption": 1})
    root = write_server(write_tree, 1, 1, 1)
    assert [sensor.name for sensor in open_power_sensors("cpu", root)[0]] == ["RAPL"]
    sensors, missing = open_power_sensors("cuda", root)
    assert [sensor.name for sensor in sensors] == ["NVML", "RAPL"] and not missing
    sensors, missing = open_power_sensors("cuda", root / "empty")
    assert [sensor.name for sensor in sensors] == ["NVML"] and "no such counters" in missing["RAPL"]


def test_open_sensors_of_jetson_uses_the_board_only(write_tree: WriteTree, monkeypatch: pytest.MonkeyPatch) -> None:
    make_nvml(monkeypatch, {"nvmlDeviceGetTotalEnergyConsumption": 1})
    root = write_tree(
        BOARDS["AGX Orin, JetPack 6"][0] | {"proc/device-tree/compatible": "nvidia,p3737-0000\0nvidia,tegra234\0"}
    )
    sensors, missing = open_power_sensors("cuda", root)
    assert [sensor.name for sensor in sensors] == ["INA3221"] and not missing and has_unified_memory(root)
    _, missing = open_power_sensors(
        "cpu", write_tree({"empty/proc/device-tree/compatible": "nvidia,tegra234\0"}) / "empty"
    )
    assert list(missing) == ["INA3221", "jtop", "tegrastats", "RAPL"] and not has_unified_memory(root / "other")
