"""Every picture opened and decoded: what can't be read is told now, not in the night of a training.

The check itself: read, decode, count, draw, tell.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hkd_det.datasets.base import ErrorHandler
from hkd_det.datasets.catalog import SPLITS, list_splits, load_dataset
from hkd_det.datasets.check_report import SplitReport, make_contact_sheet, plot_histograms, write_dataset_report
from hkd_det.datasets.check_summary import SplitSummary, escape_nonprintable, format_summary, summarize
from hkd_det.errors import DataError, UsageError
from hkd_det.files import atomic_write, write_text
from hkd_det.image import read_image
from hkd_det.structures import Sample

NUM_THREADS = 4  # decoding leaves Python's lock


def validate_images(samples: Sequence[Sample], on_error: ErrorHandler) -> list[tuple[int, int] | None]:
    """(height, width) of every picture, in order, None for one that can't be read.

    A size that the annotations state wrongly is a fault too.
    """
    sizes: list[tuple[int, int] | None] = []
    pool = ThreadPoolExecutor(NUM_THREADS)
    try:
        found = pool.map(_read_size_or_error, samples)
        progress = tqdm(found, desc="decode", total=len(samples), unit="picture", leave=False, delay=2)
        for sample, size in zip(samples, progress, strict=True):
            if isinstance(size, DataError):
                on_error(size)
                sizes.append(None)
                continue
            if sample.size_hw is not None and sample.size_hw != size:
                stated = f"{sample.size_hw[1]} x {sample.size_hw[0]}"
                on_error(DataError(f"{sample.path}: is {size[1]} x {size[0]} pixels, its annotation says {stated}"))
            sizes.append(size)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the thousands in the queue
    return sizes


def _read_size_or_error(sample: Sample) -> tuple[int, int] | DataError:
    try:
        height, width = read_image(sample.path).shape[:2]
    except DataError as fault:
        return fault
    except OSError as error:
        return DataError(f"{sample.path}: {error.strerror or error}")
    return height, width


MAX_PRINTED = 50  # faults on the terminal


def check_dataset(data: str, folder: Path) -> int:
    """Check every split of a data set; prints the result and writes it into the folder.

    There: `index.html` with everything, `faults.txt`, and of every split its contact sheet and histograms as PNG.
    Returns 0, or 1 if anything is wrong. Raises UsageError for a data set or key that there is not.
    """
    faults: dict[str, None] = {}  # in the order they were found, each once
    splits = list_splits(data)
    if not splits:
        raise UsageError(f"--data {data}: has none of {', '.join(SPLITS)}; there is nothing to check")
    parts = [_check_split(data, split, folder, faults) for split in splits]
    told = list(faults)
    write_text(folder / "faults.txt", "".join(f"{fault}\n" for fault in told))
    write_dataset_report(folder / "index.html", escape_nonprintable(data), parts, told)
    _print_errors(told, folder)
    return 1 if told else 0


def _check_split(data: str, split: str, folder: Path, errors: dict[str, None]) -> SplitReport:
    def note(fault: DataError) -> None:
        errors[escape_nonprintable(f"{split}: {fault}")] = None

    samples: list[Sample] = []
    try:
        samples = load_dataset(data, split, note)
    except DataError as fault:  # not a record but a file, or nothing is left
        note(fault)
    except OSError as error:  # a folder that may not be read, a name too long
        note(DataError(f"{error.filename}: {error.strerror}"))
    sizes = validate_images(samples, note)
    summary = summarize(split, samples, sizes)
    print(format_summary(summary))
    readable = [(sample, size) for sample, size in zip(samples, sizes, strict=True) if size]
    return SplitReport(summary, _save_images(summary, readable, folder))


def _save_images(
    summary: SplitSummary, readable_samples: Sequence[tuple[Sample, tuple[int, int]]], folder: Path
) -> bytes:
    """Write the pictures there is something to show in; the contact sheet as a JPEG file's bytes."""
    plot, pictures = (folder / f"{summary.split}_{name}.png" for name in ("histograms", "pictures"))
    for earlier in (plot, pictures):
        earlier.unlink(missing_ok=True)
    if summary.num_gt:
        with atomic_write(plot) as aside:
            plot_histograms(summary).savefig(aside, dpi=110)
    if not readable_samples:
        return b""
    sheet = make_contact_sheet(readable_samples)
    with atomic_write(pictures) as aside:
        aside.write_bytes(_encode_sheet(sheet, ".png"))
    return _encode_sheet(sheet, ".jpg")


def _encode_sheet(image_rgb: NDArray[np.uint8], suffix: str) -> bytes:
    return cv2.imencode(suffix, cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR))[1].tobytes()


def _print_errors(errors: Sequence[str], folder: Path) -> None:
    print(f"\n{len(errors):,} fault{'' if len(errors) == 1 else 's'}" if errors else "\nno faults")
    for fault in errors[:MAX_PRINTED]:
        print(f"  {fault}")
    if len(errors) > MAX_PRINTED:
        print(f"  ... and {len(errors) - MAX_PRINTED:,} more: {folder / 'faults.txt'}")
    print(f"saved {folder / 'index.html'}")
