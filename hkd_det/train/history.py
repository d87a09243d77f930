"""Results of each epoch, as a log line and as a row of `results.csv`."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hkd_det.files import write_text


@dataclass(frozen=True)
class EpochRecord:
    """Results of one epoch.

    Attributes:
        epoch: Number of the epoch, from 1.
        losses: Mean of each loss.
        miss_rate: Validation MR^-2 of the setup of the run, fraction.
        images_per_s: Training speed, images per second.
        metrics: Means of other logged values, such as the weights of a gradient balancer.
        meets_target: Whether the epoch may become `best.pt`. A student that is pruned must have its final size.
    """

    epoch: int
    losses: dict[str, float]
    miss_rate: float
    images_per_s: float
    metrics: dict[str, float] = field(default_factory=dict)
    meets_target: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for checkpoints."""
        return asdict(self)

    def log_line(self, epochs: int, setup: str) -> str:
        """Format the record for the terminal.

        Args:
            epochs: Number of epochs of the run.
            setup: Name of the setup of `miss_rate`.

        Returns:
            One line.
        """
        return (
            f"epoch {self.epoch}/{epochs}  loss {sum(self.losses.values()):.3f}  "
            f"MR^-2 {setup} {100 * self.miss_rate:.2f} %  {self.images_per_s:.1f} images/s"
        )


def write_history(path: Path, history: Sequence[EpochRecord]) -> None:
    """Write one row per epoch to a CSV file. A value that an epoch does not have stays empty.

    Args:
        path: File to write.
        history: Records in the order of epochs.
    """
    names = list(dict.fromkeys(name for record in history for name in record.losses | record.metrics))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["epoch", *names, "miss_rate", "images_per_s"], lineterminator="\n")
    writer.writeheader()
    for record in history:
        fixed = {"epoch": record.epoch, "miss_rate": record.miss_rate, "images_per_s": record.images_per_s}
        writer.writerow({**fixed, **record.losses, **record.metrics})
    write_text(path, text.getvalue())
