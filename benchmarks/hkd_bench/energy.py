"""Energy of a stretch of work, from the processor's own counters (Linux powercap, RAPL)."""

from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Energy:
    """Joules of all processor packages, idle share included; None with the reason why it can't be read."""

    joules: float | None
    reason: str = ""


class RaplMeter:
    """Counts from its making on. The counters wrap around: ask at least once an hour."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        # Zones with one colon are packages; those with two are parts of one, counted in it.
        self.zones = sorted(zone for zone in powercap.glob("intel-rapl:*") if zone.name.count(":") == 1)
        self.reason = "" if self.zones else f"{powercap}/intel-rapl:*: no such counters on this machine"
        self.joules = 0.0
        self.last_uj = self._read_energy_uj()

    def total(self) -> Energy:
        """Since the making."""
        now = self._read_energy_uj()
        for zone, (before, after) in enumerate(zip(self.last_uj, now, strict=True)):
            wrapped = after < before
            self.joules += (after - before + (self._read_range_uj(zone) if wrapped else 0)) / 1e6
        self.last_uj = now
        return Energy(None, self.reason) if self.reason else Energy(self.joules)

    def _read_energy_uj(self) -> list[int]:
        try:
            return [int((zone / "energy_uj").read_text()) for zone in self.zones]
        except PermissionError as error:
            self.reason = f"{error.filename}: only root may read it (sudo chmod a+r does)"
        except (OSError, ValueError) as error:
            self.reason = f"{self.zones[0]}: {error}"
        self.zones = []
        return []

    def _read_range_uj(self, zone: int) -> int:
        return int((self.zones[zone] / "max_energy_range_uj").read_text())
