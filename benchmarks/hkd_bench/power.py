"""Power sensors: RAPL, NVML, the power rails of Jetson boards, jtop and tegrastats.

A sensor that cannot be read is missing with a reason. No power is estimated. Domains that contain each other are never
added: `hkd_deploy.power_rails` selects rails, RAPL has packages and DRAM.
"""

import re
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from time import sleep
from typing import Protocol

from hkd_bench.host import HostFieldError, NvmlGpu
from hkd_deploy.power_rails import RailSensor, SensorMissingError, select_input_rails

ZONE_PATTERNS = ("intel-rapl/intel-rapl:*/intel-rapl:*", "intel-rapl/intel-rapl:*", "intel-rapl:*")
TEGRASTATS_RAIL = re.compile(r"(?<!\S)([A-Z0-9][A-Z0-9_]*) (\d+)(?:mW)?(?:/\d+(?:mW)?)+(?!\S)")


class PowerSensor(Protocol):
    """A sensor of energy or power.

    Attributes:
        name: Name of the sensor.
        scope: What it measures.
        is_counter: True if `read` returns joules since some start, false if it returns watts now.
    """

    name: str
    scope: str
    is_counter: bool

    def read(self) -> float:
        """Return joules or watts."""

    def close(self) -> None:
        """Release the sensor."""


class RaplSensor:
    """Energy of the processor packages and of the DRAM (Linux powercap, RAPL).

    Zones "core" and "uncore" are parts of a package, "psys" contains the packages: they are not added.
    `intel-rapl-mmio` repeats a package. Read at least once per minute, because the counters wrap around.

    Args:
        root: Root directory of the system.

    Raises:
        SensorMissingError: The machine has no such counters, or they cannot be read.
    """

    name, is_counter = "RAPL", True

    def __init__(self, root: Path = Path("/")) -> None:
        folder = root / "sys/class/powercap"
        # Links to all zones, or the tree of the control type where a copy of sysfs has no links.
        found = {zone.name: zone for pattern in ZONE_PATTERNS for zone in sorted(folder.glob(pattern))}
        zones = {zone: self._read_name(zone) for zone in found.values()}
        self._zones = [zone for zone, name in zones.items() if name.startswith("package") or name == "dram"]
        if not any(zones[zone].startswith("package") for zone in self._zones):
            raise SensorMissingError(f"{folder}/intel-rapl:*: this machine has no such counters")
        self.scope = " + ".join(sorted({zones[zone] for zone in self._zones}, reverse=True))
        try:
            self._last_uj = [self._read_uj(zone) for zone in self._zones]
            self._range_uj = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
        except PermissionError as error:
            hint = f"Run sudo chmod a+r {folder}/intel-rapl*/energy_uj"
            raise SensorMissingError(f"{error.filename}: permission denied. {hint}") from None
        except (OSError, ValueError) as error:
            raise SensorMissingError(f"{folder}: {error}") from None
        self._joules = 0.0

    @staticmethod
    def _read_name(zone: Path) -> str:
        try:
            return (zone / "name").read_text().strip()
        except OSError:
            return ""

    @staticmethod
    def _read_uj(zone: Path) -> int:
        return int((zone / "energy_uj").read_text())

    def read(self) -> float:
        """Return the joules since the sensor was opened."""
        now_uj = [self._read_uj(zone) for zone in self._zones]
        for before, now, range_uj in zip(self._last_uj, now_uj, self._range_uj, strict=True):
            self._joules += (now - before + (range_uj if now < before else 0)) / 1e6
        self._last_uj = now_uj
        return self._joules

    def close(self) -> None:
        """Release nothing."""


class NvmlSensor:
    """Energy counter of an NVIDIA GPU, or its power where the GPU has no counter (before Volta).

    Args:
        gpu: The GPU.

    Raises:
        SensorMissingError: The GPU reports neither, such as on Jetson boards.
    """

    name = "NVML"

    def __init__(self, gpu: NvmlGpu) -> None:
        self.scope = gpu.name
        for self.is_counter, read in ((True, gpu.read_energy_j), (False, gpu.read_power_w)):
            self._read = read
            with suppress(HostFieldError):
                read()
                return
        raise SensorMissingError(f"{gpu.name}: NVML supports neither its energy nor its power")

    def read(self) -> float:
        """Return joules, or watts for a GPU without counter."""
        return self._read()

    def close(self) -> None:
        """Release nothing."""


class JtopSensor:
    """Power of a Jetson board by the service of jetson-stats, where it is installed (jtop, AGPL-3.0).

    Its own total is not used: on boards without an input rail it adds rails that contain others.

    Raises:
        SensorMissingError: jtop is not installed, its service does not run, or the board is unknown.
    """

    name, is_counter = "jtop", False

    def __init__(self) -> None:
        try:
            import jtop  # noqa: PLC0415  # optional package
        except ImportError:
            raise SensorMissingError("jtop is not installed") from None
        self._jtop = jtop.jtop(interval=0.5)
        try:
            self._jtop.start()
        except (jtop.JtopException, OSError) as error:
            raise SensorMissingError(f"jtop: {error}") from None
        self._names = select_input_rails(list(self._read_rails()))
        self.scope = " + ".join(self._names)

    def _read_rails(self) -> dict[str, float]:
        power = self._jtop.power
        rails = {**power["rail"], power["tot"].get("name", ""): power["tot"]}
        return {label: values["power"] / 1e3 for label, values in rails.items() if label}

    def read(self) -> float:
        """Return the power in watts."""
        rails = self._read_rails()
        return sum(rails[name] for name in self._names)

    def close(self) -> None:
        """Disconnect from the service."""
        self._jtop.close()


def parse_tegrastats_rails(line: str) -> dict[str, float]:
    """Read the power of each rail from a line of tegrastats.

    Args:
        line: For example "RAM 1/2MB ... VDD_IN 4563mW/4563mW VDD_SOC 1373mW/1373mW"; JetPack 4 omits the unit.

    Returns:
        Present power of each rail in watts (the first of its values; the others are mean and maximum).
    """
    return {name: int(value) / 1e3 for name, value in TEGRASTATS_RAIL.findall(line)}


class TegrastatsSensor:
    """Power of a Jetson board by NVIDIA's program tegrastats, which runs until `close`.

    Args:
        command: Program with its flags.

    Raises:
        SensorMissingError: The program is not installed, prints nothing, or the board is unknown.
    """

    name, is_counter = "tegrastats", False

    def __init__(self, command: Sequence[str] = ("tegrastats", "--interval", "100")) -> None:
        try:
            self._process = subprocess.Popen(
                list(command), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError as error:
            raise SensorMissingError(f"{command[0]}: {error.strerror}") from None
        self._rails: dict[str, float] = {}
        self._thread = Thread(target=self._follow, daemon=True)
        self._thread.start()
        for _ in range(30):
            if self._rails:
                break
            sleep(0.1)
        try:
            self._names = select_input_rails(list(self._rails))
        except SensorMissingError as error:
            self.close()
            raise SensorMissingError(f"{command[0]}: {error}") from None
        self.scope = " + ".join(self._names)

    def _follow(self) -> None:
        for line in self._process.stdout or ():
            self._rails = parse_tegrastats_rails(line) or self._rails

    def read(self) -> float:
        """Return the power of the newest line in watts."""
        if self._process.poll() is not None:
            raise OSError("tegrastats ended")
        rails = self._rails
        return sum(rails[name] for name in self._names)

    def close(self) -> None:
        """End the program."""
        self._process.terminate()
        self._process.wait()
        self._thread.join(1)
        if self._process.stdout and not self._thread.is_alive():
            self._process.stdout.close()


def open_power_sensors(device: str, root: Path = Path("/")) -> tuple[list[PowerSensor], dict[str, str]]:
    """Open the sensors whose sum is the energy of the device.

    A Jetson board has one sensor for all of it. Otherwise it is the processor, and the GPU if it runs the models.

    Args:
        device: cpu, cuda or cuda:N.
        root: Root directory of the system.

    Returns:
        The sensors, and the reason of each one that is missing, by name.
    """
    missing: dict[str, str] = {}
    jetson: tuple[tuple[str, Callable[[], PowerSensor]], ...] = (
        ("INA3221", lambda: RailSensor(root)),
        ("jtop", JtopSensor),
        ("tegrastats", TegrastatsSensor),
    )
    for name, open_sensor in jetson:
        try:
            return [open_sensor()], {}
        except SensorMissingError as error:
            missing[name] = str(error)
    if not has_unified_memory(root):
        missing = {}
    parts: list[tuple[str, Callable[[], PowerSensor]]] = [("RAPL", lambda: RaplSensor(root))]
    if device.startswith("cuda"):
        parts.insert(0, ("NVML", lambda: NvmlSensor(NvmlGpu(device))))
    sensors: list[PowerSensor] = []
    for name, open_sensor in parts:
        try:
            sensors.append(open_sensor())
        except (SensorMissingError, HostFieldError) as error:
            missing[name] = str(error)
    return sensors, missing


def has_unified_memory(root: Path = Path("/")) -> bool:
    """Return whether this is a board with a Tegra processor, whose memory the CPU and the GPU share.

    Args:
        root: Root directory of the system.
    """
    compatible = root / "proc/device-tree/compatible"
    with suppress(OSError):
        return b"nvidia,tegra" in compatible.read_bytes()
    return (root / "etc/nv_tegra_release").exists()
