"""Results of the epochs: the log line, `results.csv`, early stopping, and the warning at the end of a run."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hkd_det.console import format_duration
from hkd_det.files import write_text

VALUE_COLUMNS = ("miss_rate", "ap", "ap50", "recall", "threshold", "lr", "images_per_s", "time_s")


@dataclass(frozen=True)
class EpochRecord:
    """Results of one epoch. Values are NaN if they were not measured.

    Attributes:
        epoch: Number of the epoch, from 1.
        losses: Mean of each loss.
        miss_rate: Validation MR^-2 of the setup of the run, fraction.
        images_per_s: Training speed, images per second.
        metrics: Means of other logged values, such as the weights of a gradient balancer.
        meets_target: Whether the epoch may become `best.pt`. A student that is pruned must have its final size.
        ap: Validation AP of COCO, fraction.
        ap50: Validation AP at IoU 0.5, fraction.
        recall: Validation recall at `threshold` in the setup of the run, fraction.
        threshold: Suggested score threshold: the one with the highest F1 score.
        lr: Learning rate of the last step.
        time_s: Time since the start of the run, seconds, summed over its sessions.
    """

    epoch: int
    losses: dict[str, float]
    miss_rate: float
    images_per_s: float
    metrics: dict[str, float] = field(default_factory=dict)
    meets_target: bool = True
    ap: float = math.nan
    ap50: float = math.nan
    recall: float = math.nan
    threshold: float = math.nan
    lr: float = math.nan
    time_s: float = math.nan

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for checkpoints."""
        return asdict(self)

    def as_scalars(self) -> dict[str, float]:
        """Return the named values of the epoch, for `results.csv` and experiment trackers. NaN values are left out."""
        values = {**self.losses, **self.metrics, **{name: getattr(self, name) for name in VALUE_COLUMNS}}
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def log_line(self, epochs: int, setup: str, seconds_left: float) -> str:
        """Format the record for the terminal.

        Args:
            epochs: Number of epochs of the run.
            setup: Name of the setup of `miss_rate`.
            seconds_left: Expected time until the end of the run.

        Returns:
            One line.
        """
        return (
            f"epoch {self.epoch}/{epochs}  loss {sum(self.losses.values()):.3f}  "
            f"MR^-2 {setup} {100 * self.miss_rate:.2f} %  AP50 {100 * self.ap50:.1f} %  AP {100 * self.ap:.1f} %  "
            f"recall {100 * self.recall:.1f} % at {self.threshold:.2f}  {self.images_per_s:.1f} images/s  "
            f"{format_duration(seconds_left)} left"
        )


def write_history(path: Path, history: Sequence[EpochRecord]) -> None:
    """Write one row per epoch to a CSV file. A value that an epoch does not have stays empty.

    Args:
        path: File to write.
        history: Records in the order of epochs.
    """
    names = list(dict.fromkeys(name for record in history for name in record.losses | record.metrics))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["epoch", *names, *VALUE_COLUMNS], lineterminator="\n")
    writer.writeheader()
    for record in history:
        writer.writerow({"epoch": record.epoch, **record.as_scalars()})
    write_text(path, text.getvalue())


def find_best_record(history: Sequence[EpochRecord]) -> EpochRecord:
    """Return the record of `best.pt`: the latest of the epochs with the lowest miss rate.

    Args:
        history: At least one record that meets the target.
    """
    return min((record for record in reversed(history) if record.meets_target), key=lambda record: record.miss_rate)


def is_patience_exhausted(history: Sequence[EpochRecord], patience: int) -> bool:
    """Return whether early stopping ends the run, as in Ultralytics.

    Epochs before the first detected person, and epochs that cannot become `best.pt`, do not count.

    Args:
        history: Records of all epochs so far.
        patience: Number of epochs without a lower miss rate; 0 never stops.
    """
    best_epoch, lowest = 0, 1.0
    for record in history:
        if lowest >= 1 or (record.meets_target and record.miss_rate < lowest):
            best_epoch = record.epoch
            lowest = record.miss_rate if record.meets_target else 1.0
    return 0 < patience <= len(history) - best_epoch


def find_warning(history: Sequence[EpochRecord], initial_miss_rate: float | None) -> str:
    """Return why the result of a run is probably not useful, as two sentences; empty if it is not worse.

    Args:
        history: Records of all epochs.
        initial_miss_rate: Miss rate before the first epoch, fraction, or None if it was not measured.
    """
    best, first, last = find_best_record(history), history[0], history[-1]
    if best.miss_rate >= 1 or best.recall == 0:
        return (
            "the detector finds no person in the validation images. "
            "Check the labels with --check, train longer, or start from --weights."
        )
    if initial_miss_rate is not None and best.miss_rate > initial_miss_rate:
        return (
            f"worse than before training (MR^-2 {100 * initial_miss_rate:.2f} % before, {100 * best.miss_rate:.2f} % "
            "after). Keep the initial weights, or reduce the learning rate (--set lr=)."
        )
    if last.miss_rate > first.miss_rate and last.meets_target and first.meets_target:
        return (
            f"the last epoch is worse than the first (MR^-2 {100 * first.miss_rate:.2f} % first, "
            f"{100 * last.miss_rate:.2f} % last; best.pt is epoch {best.epoch}). "
            "Reduce the learning rate (--set lr=), or add training images."
        )
    return ""
