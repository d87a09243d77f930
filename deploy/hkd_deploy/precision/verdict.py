"""The verdict: was it worth it?"""

from dataclasses import asdict, dataclass
from typing import Any

from hkd_deploy.precision.judge import Judgement, Race

FASTER = 1.1  # below it nobody will notice
MOST_RECALL_FALL = 1.0  # percentage points


@dataclass(frozen=True)
class Verdict:
    """What a smaller file costs and brings on the device it was made on.

    before, after: of the FP32 file and of this one, on the runtime `judged_on`. races: one a runtime.
    conf: the threshold of recall. max_mr_rise: percentage points.
    """

    precision: str
    before: Judgement
    after: Judgement
    judged_on: str
    races: tuple[Race, ...]
    conf: float
    max_mr_rise: float

    @property
    def speed(self) -> float:
        """The FP32 file's time on its fastest runtime over this file's on its own fastest."""
        return min(race.fp32_ms for race in self.races) / self.fastest.ms

    @property
    def fastest(self) -> Race:
        """The runtime to run this file on."""
        return min(self.races, key=lambda race: race.ms)

    @property
    def miss_rate_rise(self) -> float:
        """Percentage points."""
        return 100 * (self.after.miss_rate - self.before.miss_rate)

    @property
    def recall_rise(self) -> float:
        """Percentage points."""
        return 100 * (self.after.recall - self.before.recall)

    @property
    def reasons(self) -> list[str]:
        """Why it is not worth it; none if it is."""
        found = []
        if self.miss_rate_rise > self.max_mr_rise:
            found.append(f"the miss rate rises by more than {self.max_mr_rise:g} points")
        if self.recall_rise < -MOST_RECALL_FALL:
            found.append(f"recall falls by more than {MOST_RECALL_FALL:g} points")
        if self.speed * FASTER < 1:
            found.append("it is slower")
        elif self.speed < FASTER:
            found.append("it is hardly faster")
        return found

    def line(self) -> str:
        """One line for the user."""
        ratios = ", ".join(f"{race.backend} {race.fp32_ms / race.ms:.2f}x" for race in self.races)
        end = f"not worth it: {' and '.join(self.reasons)}" if self.reasons else "worth it"
        return (
            f"{self.precision} against fp32 on this device: {self.speed:.2f}x as fast end to end ({ratios}); "
            f"on {self.judged_on} miss rate {self.miss_rate_rise:+.2f} points "
            f"({100 * self.after.miss_rate:.2f} %), recall at {self.conf:g} {self.recall_rise:+.2f} points "
            f"({100 * self.after.recall:.2f} %): {end}"
        )

    def facts(self) -> dict[str, Any]:
        """For the file's metadata."""
        return {
            **asdict(self),
            "speed": self.speed,
            "fastest": self.fastest.backend,
            "miss_rate_rise": self.miss_rate_rise,
            "recall_rise": self.recall_rise,
            "worth_it": not self.reasons,
            "reasons": self.reasons,
        }


def unmeasured(precision: str, why: str) -> tuple[str, dict[str, Any]]:
    """The line and the facts where this device cannot run the file."""
    return f"{precision}: not measured, neither worth it nor not: {why}", {"precision": precision, "unmeasured": why}
