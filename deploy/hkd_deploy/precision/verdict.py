"""The verdict: was it worth it?"""

from dataclasses import asdict, dataclass
from typing import Any

from hkd_deploy.precision.judge import Accuracy, LatencyComparison

MIN_SPEEDUP = 1.1  # below it nobody will notice
MAX_RECALL_DROP = 1.0  # percentage points


@dataclass(frozen=True)
class PrecisionReport:
    """What a smaller file costs and brings on the device it was made on.

    before, after: of the FP32 file and of this one, on the runtime `judged_on`. races: one a runtime.
    conf: the threshold of recall. max_mr_rise: percentage points.
    """

    precision: str
    before: Accuracy
    after: Accuracy
    eval_backend: str
    latencies: tuple[LatencyComparison, ...]
    conf: float
    max_mr_increase: float

    @property
    def speedup(self) -> float:
        """The FP32 file's time on its fastest runtime over this file's on its own fastest."""
        return min(race.fp32_ms for race in self.latencies) / self.fastest.ms

    @property
    def fastest(self) -> LatencyComparison:
        """The runtime to run this file on."""
        return min(self.latencies, key=lambda race: race.ms)

    @property
    def mr_increase(self) -> float:
        """Percentage points."""
        return 100 * (self.after.miss_rate - self.before.miss_rate)

    @property
    def recall_increase(self) -> float:
        """Percentage points."""
        return 100 * (self.after.recall - self.before.recall)

    @property
    def reasons(self) -> list[str]:
        """Why it is not worth it; none if it is."""
        found = []
        if self.mr_increase > self.max_mr_increase:
            found.append(f"the miss rate rises by more than {self.max_mr_increase:g} points")
        if self.recall_increase < -MAX_RECALL_DROP:
            found.append(f"recall falls by more than {MAX_RECALL_DROP:g} points")
        if self.speedup * MIN_SPEEDUP < 1:
            found.append("it is slower")
        elif self.speedup < MIN_SPEEDUP:
            found.append("it is hardly faster")
        return found

    def log_line(self) -> str:
        """One line for the user."""
        ratios = ", ".join(f"{race.backend} {race.fp32_ms / race.ms:.2f}x" for race in self.latencies)
        end = f"not worth it: {' and '.join(self.reasons)}" if self.reasons else "worth it"
        return (
            f"{self.precision} against fp32 on this device: {self.speedup:.2f}x as fast end to end ({ratios}); "
            f"on {self.eval_backend} miss rate {self.mr_increase:+.2f} points "
            f"({100 * self.after.miss_rate:.2f} %), recall at {self.conf:g} {self.recall_increase:+.2f} points "
            f"({100 * self.after.recall:.2f} %): {end}"
        )

    def to_metadata(self) -> dict[str, Any]:
        """For the file's metadata."""
        return {
            **asdict(self),
            "speed": self.speedup,
            "fastest": self.fastest.backend,
            "miss_rate_rise": self.mr_increase,
            "recall_rise": self.recall_increase,
            "worth_it": not self.reasons,
            "reasons": self.reasons,
        }


def not_measured(precision: str, reason: str) -> tuple[str, dict[str, Any]]:
    """The line and the facts where this device cannot run the file."""
    return f"{precision}: not measured, neither worth it nor not: {reason}", {
        "precision": precision,
        "unmeasured": reason,
    }
