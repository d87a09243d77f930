"""History of a run: results of the epochs, `results.csv`, early stopping, warnings, figures, TensorBoard."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hkd_det.console import format_duration
from hkd_det.draw import MatchStatus
from hkd_det.errors import import_package
from hkd_det.files import atomic_write, write_text
from hkd_det.image import read_image
from hkd_det.metrics.bootstrap import (
    MIN_IMAGES,
    MIN_PERSONS,
    compare_miss_rates,
    compute_interval,
    has_reliable_interval,
)
from hkd_det.metrics.citypersons import CityPersonsSetup, ImageMatches, match_image
from hkd_det.metrics.matching import FALSE_POSITIVE, TRUE_POSITIVE, CountedDetections, MissRateResult
from hkd_det.structures import Detections, Sample

VALUE_COLUMNS = ("miss_rate", "ap", "ap50", "recall", "threshold", "lr", "images_per_s", "time_s")
MAX_ERROR_IMAGES, TILE_WIDTH_PX, CAPTION_HEIGHT_PX, SHEET_COLUMNS = 12, 480, 24, 3
DETECTED_COLOR, MISSED_COLOR = MatchStatus.TRUE_POSITIVE.value, MatchStatus.FALSE_NEGATIVE.value
FALSE_POSITIVE_COLOR = MatchStatus.FALSE_POSITIVE.value
TENSORBOARD_HINT = "Run pip install 'hkd-det[tensorboard]'."


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
            f"epoch {self.epoch}/{epochs}  loss {sum(self.losses.values()):.3f}  {self.format_accuracy(setup)}  "
            f"{self.images_per_s:.1f} images/s  {format_duration(seconds_left)} left"
        )

    def format_accuracy(self, setup: str) -> str:
        """Return miss rate, AP50, AP, and recall at the suggested threshold.

        Args:
            setup: Name of the setup of `miss_rate`.
        """
        return (
            f"MR^-2 {setup} {100 * self.miss_rate:.2f} %  AP50 {100 * self.ap50:.1f} %  AP {100 * self.ap:.1f} %  "
            f"recall {100 * self.recall:.1f} % at {self.threshold:.2f}"
        )


EpochHook = Callable[[EpochRecord], object]


@dataclass
class RunResults:
    """Miss rates of one run on the same validation images, for intervals and paired differences.

    Attributes:
        initial: Of the initial weights, if they are those of a finished detector.
        first: Of the first epoch.
        best: Of the epoch of `best.pt`.
        last: Of the last epoch.
    """

    initial: MissRateResult | None = None
    first: MissRateResult | None = None
    best: MissRateResult | None = None
    last: MissRateResult | None = None

    def add(self, result: MissRateResult, is_best: bool) -> None:
        """Add the result of an epoch.

        Args:
            result: Miss rate in the setup of the run.
            is_best: Whether the epoch is the best so far.
        """
        self.first, self.last = self.first or result, result
        self.best = result if is_best else self.best

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for checkpoints."""
        return {name: _pack(value) for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunResults":
        """Restore the results from the values of `as_dict`.

        Args:
            values: Values of a checkpoint.
        """
        return cls(**{name: _unpack(value) for name, value in values.items()})


def _pack(result: MissRateResult) -> dict[str, Any]:
    """Return what a comparison needs, as plain values. The curve is left out."""
    counted = asdict(result.counted)
    arrays = {name: value.tolist() for name, value in counted.items() if isinstance(value, np.ndarray)}
    return {"value": result.value, "num_gt": result.num_gt, "counted": {**counted, **arrays}}


def _unpack(values: dict[str, Any]) -> MissRateResult:
    counted = values["counted"]
    restored = CountedDetections(
        np.array(counted["image_index"], np.int32),
        np.array(counted["is_true_positive"], bool),
        np.array(counted["gt_per_image"], np.intp),
        tuple(counted["fppi_points"]),
        counted["zero_recall_before_curve"],
    )
    no_curve, num_images = np.zeros(0), len(restored.gt_per_image)
    return MissRateResult(values["value"], no_curve, no_curve, no_curve, values["num_gt"], num_images, restored)


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


def find_warning(history: Sequence[EpochRecord], results: RunResults) -> str:
    """Return why the result of a run is probably not useful, as two sentences; empty if it is not worse.

    Args:
        history: Records of all epochs.
        results: Miss rates of the initial weights and of some epochs.
    """
    best, first, last = find_best_record(history), history[0], history[-1]
    if best.miss_rate >= 1 or best.recall == 0:
        return (
            "the detector finds no person in the validation images. "
            "Check the labels with --check, train longer, or start from --weights."
        )
    if results.initial and best.miss_rate > results.initial.value:
        return (
            f"worse than before training (MR^-2 {100 * results.initial.value:.2f} % before, "
            f"{100 * best.miss_rate:.2f} % after; {_compare(results.best, results.initial)}). "
            "Keep the initial weights, or reduce the learning rate (--set lr=)."
        )
    if last.miss_rate > first.miss_rate and last.meets_target and first.meets_target:
        return (
            f"the last epoch is worse than the first (MR^-2 {100 * first.miss_rate:.2f} % first, "
            f"{100 * last.miss_rate:.2f} % last; {_compare(results.last, results.first)}; best.pt is epoch "
            f"{best.epoch}). Reduce the learning rate (--set lr=), or add training images."
        )
    return ""


def format_interval_and_gain(results: RunResults) -> str:
    """Return the interval of the best miss rate and its difference to the initial weights, for the last lines of a run.

    Args:
        results: Miss rates of the initial weights and of some epochs.
    """
    interval = compute_interval(results.best) if results.best else None
    if interval is None:
        return ""
    gain = f"; compared with the initial weights: {_compare(results.best, results.initial)}" if results.initial else ""
    text = f"95 % interval {100 * interval.ci_low:.2f} to {100 * interval.ci_high:.2f} %{gain}"
    if results.best and not has_reliable_interval(results.best):
        return f"{text}. Not reliable: fewer than {MIN_IMAGES} images or {MIN_PERSONS} persons in val"
    return text


def _compare(result: MissRateResult | None, reference: MissRateResult | None) -> str:
    difference = compare_miss_rates(result, reference) if result and reference else None
    return difference.summary() if difference else "no interval: a session of an older version did not save its results"


def plot_history(path: Path, history: Sequence[EpochRecord], setup: str) -> None:
    """Plot losses, miss rate, AP, recall and learning rate over the epochs.

    Args:
        path: PNG file to write.
        history: Records of all epochs, at least one.
        setup: Name of the setup of the miss rate.
    """
    epochs = [record.epoch for record in history]
    losses = list(dict.fromkeys(name for record in history for name in record.losses))
    panels: dict[str, dict[str, list[float]]] = {
        "losses": {name: [record.losses.get(name, np.nan) for record in history] for name in losses},
        f"MR^-2 {setup}, %": {"": [100 * record.miss_rate for record in history]},
        "AP and recall, %": {
            "AP50": [100 * record.ap50 for record in history],
            "AP": [100 * record.ap for record in history],
            "recall": [100 * record.recall for record in history],
        },
        "learning rate": {"": [record.lr for record in history]},
    }
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for position, (title, curves) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(2, 2, position)
        for name, values in curves.items():
            axes.plot(epochs, values, marker="." if len(epochs) < 50 else "", label=name)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axes.legend(fontsize=8)
    with atomic_write(path) as temp_path:
        figure.savefig(temp_path, dpi=110)


def draw_val_errors(
    path: Path, samples: Sequence[Sample], detections: Sequence[Detections], threshold: float, setup: CityPersonsSetup
) -> None:
    """Draw the validation images with the most errors: missed persons red, false positives yellow, others green.

    Args:
        path: JPEG file to write. It is removed if there is no error.
        samples: Annotated images.
        detections: Detections of each sample, source pixels.
        threshold: Lowest score of a detection.
        setup: Setup that selects the evaluated persons.
    """
    found = []
    for sample, item in zip(samples, detections, strict=True):
        kept = item.filter(threshold)
        matches = match_image(sample.ground_truth, kept, setup)
        num_errors = len(matches.missed_gt) + int((matches.match_status == FALSE_POSITIVE).sum())
        if num_errors:
            found.append((num_errors, sample, kept, matches))
    found.sort(key=lambda row: -row[0])
    tiles = [_render_tile(sample, kept, matches) for _, sample, kept, matches in found[:MAX_ERROR_IMAGES]]
    if not tiles:
        path.unlink(missing_ok=True)
        return
    rows = [tiles[start : start + SHEET_COLUMNS] for start in range(0, len(tiles), SHEET_COLUMNS)]
    sheet = np.concatenate([_join_row(row) for row in rows])
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
    with atomic_write(path) as temp_path:
        temp_path.write_bytes(jpeg.tobytes())


def open_tensorboard(directory: Path, num_epochs: int) -> EpochHook:
    """Return a function that writes the values of an epoch for TensorBoard.

    Args:
        directory: Directory of the event files.
        num_epochs: Epochs that an earlier session has finished; later values in the directory are discarded.

    Returns:
        Function of the record.

    Raises:
        UnavailableError: The package tensorboard is not installed.
    """
    import_package("tensorboard", hint=TENSORBOARD_HINT)
    module = import_package("torch.utils.tensorboard", "tensorboard", TENSORBOARD_HINT)
    writer = module.SummaryWriter(str(directory), purge_step=num_epochs + 1 if num_epochs else None)

    def write_record(record: EpochRecord) -> None:
        for name, value in record.as_scalars().items():
            group = "loss" if name in record.losses else "metrics" if name in record.metrics else "run"
            writer.add_scalar(f"{group}/{name}", value, record.epoch)
        writer.flush()

    return write_record


def _render_tile(sample: Sample, detections: Detections, matches: ImageMatches) -> NDArray[np.uint8]:
    image = read_image(sample.path)
    scale = TILE_WIDTH_PX / image.shape[1]
    size_wh = TILE_WIDTH_PX, max(1, round(image.shape[0] * scale))
    tile = np.ascontiguousarray(cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA))
    for index, status in zip(matches.eval_indices, matches.match_status, strict=True):
        if status in (TRUE_POSITIVE, FALSE_POSITIVE):
            color = DETECTED_COLOR if status == TRUE_POSITIVE else FALSE_POSITIVE_COLOR
            _draw_rectangle(tile, detections.boxes_xyxy[index] * scale, color, 2)
    for index in matches.missed_gt:
        _draw_rectangle(tile, sample.ground_truth.boxes_xyxy[index] * scale, MISSED_COLOR, 3)
    num_missed, num_false = len(matches.missed_gt), int((matches.match_status == FALSE_POSITIVE).sum())
    caption = np.full((CAPTION_HEIGHT_PX, TILE_WIDTH_PX, 3), 255, np.uint8)
    name = sample.path.name.encode("ascii", "replace").decode()[-36:]
    text = f"{name}: {num_missed} missed, {num_false} false"
    cv2.putText(caption, text, (4, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (20, 20, 20), 1, cv2.LINE_AA)
    return np.concatenate([caption, tile])


def _draw_rectangle(
    image: NDArray[np.uint8], box_xyxy: NDArray[np.floating], color: tuple[int, int, int], thickness: int
) -> None:
    left, top, right, bottom = np.clip(box_xyxy, -1e4, 1e4).round().astype(int).tolist()
    cv2.rectangle(image, (left, top), (right, bottom), color, thickness)


def _join_row(tiles: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Join tiles of different heights to a row of `SHEET_COLUMNS` tiles."""
    row = np.full((max(len(tile) for tile in tiles), SHEET_COLUMNS * TILE_WIDTH_PX, 3), 255, np.uint8)
    for column, tile in enumerate(tiles):
        row[: len(tile), column * TILE_WIDTH_PX : (column + 1) * TILE_WIDTH_PX] = tile
    return row
