"""What each epoch of a run gave: for the log line, `results.csv` and the report's curves."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hkd_det.files import write_text


@dataclass(frozen=True)
class EpochRecord:
    """Epoch (from 1), mean loss terms, validation miss rate MR^-2 of the run's setup (fraction), training speed.

    figures: what else the steps told, as means: an arbiter's angle and weights. eligible: whether it may become
    best.pt: a student that shrinks must have done so.
    """

    epoch: int
    losses: dict[str, float]
    miss_rate: float
    images_per_s: float
    metrics: dict[str, float] = field(default_factory=dict)
    meets_target: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints."""
        return asdict(self)

    def log_line(self, epochs: int, setup: str) -> str:
        """The epoch in one line for the user."""
        loss = sum(self.losses.values())
        return (
            f"epoch {self.epoch}/{epochs}  loss {loss:.3f}  MR^-2 {setup} {100 * self.miss_rate:.2f} %  "
            f"{self.images_per_s:.1f} pictures/s"
        )


def write_history(path: Path, history: Sequence[EpochRecord]) -> None:
    """`results.csv`: a row an epoch; a loss term or figure that an epoch did not have is left empty."""
    names = list(dict.fromkeys(name for record in history for name in record.losses | record.metrics))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["epoch", *names, "miss_rate", "pictures_per_s"], lineterminator="\n")
    writer.writeheader()
    for record in history:
        writer.writerow(
            {
                "epoch": record.epoch,
                **record.losses,
                **record.metrics,
                "miss_rate": record.miss_rate,
                "pictures_per_s": record.images_per_s,
            }
        )
    write_text(path, text.getvalue())
