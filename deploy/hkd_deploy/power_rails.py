"""Power of Jetson boards: the rails of their power monitors INA3221 and INA238 in sysfs.

Rails that contain each other are never added: a board has one input rail, or rails that NVIDIA documents as parallel.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

INA_NAMES = ("ina3221", "ina238")
RAIL_FOLDERS = ("hwmon*", "hwmon/hwmon*", "iio*device*")
# Complete input of a board or module, most complete first: VIN of Thor includes the carrier board.
INPUT_RAILS = ("VIN", "VDD_IN", "POM_5V_IN", "5V_IN")
# Boards without an input rail: parallel rails (AGX Xavier; AGX Orin; AGX Thor without the INA238 of its carrier board).
# VDDQ_VDD2_1V8AO of AGX Orin is a part of VIN_SYS_5V0 and not added.
PARALLEL_RAILS = (
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),
)


class SensorMissingError(Exception):
    """A power sensor cannot be read; the message gives the reason."""


@dataclass(frozen=True)
class PowerRail:
    """One channel of a power monitor.

    Attributes:
        label: Name of the rail.
        factors: Files whose product is the power.
        scale: Watts per unit of the product.
    """

    label: str
    factors: tuple[Path, ...]
    scale: float

    def read_w(self) -> float:
        """Return the power in watts."""
        product = 1.0
        for path in self.factors:
            product *= int(path.read_text())
        return product * self.scale


def list_power_rails(root: Path = Path("/")) -> list[PowerRail]:
    """List the rails of INA3221 and INA238 monitors: hwmon (JetPack 5 and newer) and iio (JetPack 4).

    Args:
        root: Root directory of the system.

    Returns:
        One rail per label. Channels without a connection (NC), sums and shunt voltages are left out.
    """
    patterns = [
        *(f"bus/i2c/{kind}/{name}" for kind in ("devices/*", "drivers/ina*/*") for name in RAIL_FOLDERS),
        "class/hwmon/hwmon*",
        "bus/iio/devices/iio*device*",
    ]
    rails: dict[str, PowerRail] = {}
    for folder in (folder for pattern in patterns for folder in sorted((root / "sys").glob(pattern))):
        with suppress(OSError):
            for rail in [*_list_hwmon_rails(folder), *_list_iio_rails(folder)]:
                if rail.label and not re.fullmatch(r"NC\d*", rail.label):
                    rails.setdefault(rail.label, rail)
    return list(rails.values())


def _list_hwmon_rails(folder: Path) -> Iterator[PowerRail]:
    name = (folder / "name").read_text().strip() if (folder / "name").exists() else ""
    if not name.startswith(INA_NAMES):
        return
    if name.startswith("ina238"):  # one channel: in0 is the shunt, in1 the bus
        labels = [path.read_text().strip() for path in (folder / "in1_label", folder / "label") if path.exists()]
        yield _make_hwmon_rail(folder, 1, labels[0] if labels else "VIN")
        return
    for channel in (1, 2, 3):  # 4 to 6 are shunt voltages, 7 is their sum
        label, enable = folder / f"in{channel}_label", folder / f"in{channel}_enable"
        if label.exists() and not (enable.exists() and enable.read_text().strip() == "0"):
            yield _make_hwmon_rail(folder, channel, label.read_text().strip())


def _make_hwmon_rail(folder: Path, channel: int, label: str) -> PowerRail:
    power = folder / f"power{channel}_input"  # microwatts
    if power.exists():
        return PowerRail(label, (power,), 1e-6)
    return PowerRail(label, (folder / f"in{channel}_input", folder / f"curr{channel}_input"), 1e-6)  # mV, mA


def _list_iio_rails(folder: Path) -> Iterator[PowerRail]:
    for path in sorted(folder.glob("rail_name_*")):
        channel = path.name.removeprefix("rail_name_")
        power = folder / f"in_power{channel}_input"  # milliwatts
        pair = folder / f"in_voltage{channel}_input", folder / f"in_current{channel}_input"  # mV, mA
        yield PowerRail(path.read_text().strip(), *(((power,), 1e-3) if power.exists() else (pair, 1e-6)))


def select_input_rails(labels: Sequence[str]) -> tuple[str, ...]:
    """Select the rails whose sum is the power of the board or module, each part once.

    Args:
        labels: Names of all rails.

    Returns:
        Names of the selected rails.

    Raises:
        SensorMissingError: There are no rails, or the board is unknown.
    """
    for name in INPUT_RAILS:
        if name in labels:
            return (name,)
    for names in PARALLEL_RAILS:
        if set(names) <= set(labels):
            return names
    if not labels:
        raise SensorMissingError("no INA3221 or INA238 power monitor")
    raise SensorMissingError(f"rails {', '.join(labels)}: which of them contain others is not known for this board")


class RailSensor:
    """Power of a Jetson board by its power monitors in sysfs.

    Args:
        root: Root directory of the system.

    Raises:
        SensorMissingError: There are no rails, they cannot be read, or the board is unknown.
    """

    name, is_counter = "INA3221", False

    def __init__(self, root: Path = Path("/")) -> None:
        rails = {rail.label: rail for rail in list_power_rails(root)}
        names = select_input_rails(list(rails))
        self.scope = " + ".join(names)
        self._rails = [rails[name] for name in names]
        try:
            self.read()
        except (OSError, ValueError) as error:
            raise SensorMissingError(f"{self.scope}: {error}") from None

    def read(self) -> float:
        """Return the power in watts."""
        return sum(rail.read_w() for rail in self._rails)

    def close(self) -> None:
        """Release nothing."""
