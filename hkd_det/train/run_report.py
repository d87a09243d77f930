"""Figures of a run in its directory: curves, validation images with errors; and values for TensorBoard."""

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hkd_det.draw import MatchStatus
from hkd_det.errors import import_package
from hkd_det.files import atomic_write
from hkd_det.image import read_image
from hkd_det.metrics.citypersons import CityPersonsSetup, ImageMatches, match_image
from hkd_det.metrics.matching import FALSE_POSITIVE, TRUE_POSITIVE
from hkd_det.structures import Detections, Sample
from hkd_det.train.history import EpochRecord

EpochHook = Callable[[EpochRecord], object]

MAX_ERROR_IMAGES, TILE_WIDTH_PX, CAPTION_HEIGHT_PX, SHEET_COLUMNS = 12, 480, 24, 3
DETECTED_COLOR, MISSED_COLOR = MatchStatus.TRUE_POSITIVE.value, MatchStatus.FALSE_NEGATIVE.value
FALSE_POSITIVE_COLOR = MatchStatus.FALSE_POSITIVE.value
TENSORBOARD_HINT = "Run pip install 'hkd-det[tensorboard]'."


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
