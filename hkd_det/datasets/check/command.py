"""The check itself: read, decode, count, draw, tell."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.catalogue import SPLITS, open_data, splits_of
from hkd_det.datasets.check.drawings import contact_sheet, figure_of
from hkd_det.datasets.check.page import Part, write_page
from hkd_det.datasets.check.pictures import decode_all
from hkd_det.datasets.check.summary import Summary, summarise
from hkd_det.datasets.check.words import printable, text
from hkd_det.datasets.sample import Sample
from hkd_det.errors import DataError, UsageError
from hkd_det.files import replacing, write_text

MOST_TOLD = 50  # faults on the terminal


def check(data: str, folder: Path) -> int:
    """Check every split of a data set; prints the result and writes it into the folder.

    There: `index.html` with everything, `faults.txt`, and of every split its contact sheet and histograms as PNG.
    Returns 0, or 1 if anything is wrong. Raises UsageError for a data set or key that there is not.
    """
    faults: dict[str, None] = {}  # in the order they were found, each once
    splits = splits_of(data)
    if not splits:
        raise UsageError(f"--data {data}: has none of {', '.join(SPLITS)}; there is nothing to check")
    parts = [_part(data, split, folder, faults) for split in splits]
    told = list(faults)
    write_text(folder / "faults.txt", "".join(f"{fault}\n" for fault in told))
    write_page(folder / "index.html", printable(data), parts, told)
    _print_faults(told, folder)
    return 1 if told else 0


def _part(data: str, split: str, folder: Path, faults: dict[str, None]) -> Part:
    def note(fault: DataError) -> None:
        faults[printable(f"{split}: {fault}")] = None

    samples: list[Sample] = []
    try:
        samples = open_data(data, split, note)
    except DataError as fault:  # not a record but a file, or nothing is left
        note(fault)
    except OSError as error:  # a folder that may not be read, a name too long
        note(DataError(f"{error.filename}: {error.strerror}"))
    sizes = decode_all(samples, note)
    summary = summarise(split, samples, sizes)
    print(text(summary))
    readable = [(sample, size) for sample, size in zip(samples, sizes, strict=True) if size]
    return Part(summary, _draw(summary, readable, folder))


def _draw(summary: Summary, readable: Sequence[tuple[Sample, tuple[int, int]]], folder: Path) -> bytes:
    """Write the pictures there is something to show in; the contact sheet as a JPEG file's bytes."""
    plot, pictures = (folder / f"{summary.split}_{name}.png" for name in ("histograms", "pictures"))
    for earlier in (plot, pictures):
        earlier.unlink(missing_ok=True)
    if summary.people:
        with replacing(plot) as aside:
            figure_of(summary).savefig(aside, dpi=110)
    if not readable:
        return b""
    sheet = contact_sheet(readable)
    with replacing(pictures) as aside:
        aside.write_bytes(_packed(sheet, ".png"))
    return _packed(sheet, ".jpg")


def _packed(picture_rgb: NDArray[np.uint8], suffix: str) -> bytes:
    return cv2.imencode(suffix, cv2.cvtColor(picture_rgb, cv2.COLOR_RGB2BGR))[1].tobytes()


def _print_faults(faults: Sequence[str], folder: Path) -> None:
    print(f"\n{len(faults):,} fault{'' if len(faults) == 1 else 's'}" if faults else "\nno faults")
    for fault in faults[:MOST_TOLD]:
        print(f"  {fault}")
    if len(faults) > MOST_TOLD:
        print(f"  ... and {len(faults) - MOST_TOLD:,} more: {folder / 'faults.txt'}")
    print(f"saved {folder / 'index.html'}")
