"""The user's own pictures without labels, for a teacher to speak of.

What such a picture's truth says is that nothing in it may be judged: one ignore region that covers whatever is cut
out of it, the grey beside it included. So no loss against the truth hears of it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hkd_det.datasets.sample import GroundTruth, Sample
from hkd_det.datasets.yolo import IMAGE_SUFFIXES
from hkd_det.errors import DataError

IGNORE_EXTENT_PX = 1e6  # beyond every picture's borders, at any scale


def read_unlabeled(folders: Sequence[Path]) -> list[Sample]:
    """Every picture in the folders and below them, sorted by path; DataError for a folder that holds none."""
    samples = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"--unlabelled {folder}: no such folder")
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        if not paths:
            raise DataError(f"--unlabelled {folder}: holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))})")
        samples += [Sample(str(path), path, unlabeled_ground_truth()) for path in paths]
    return samples


def unlabeled_ground_truth() -> GroundTruth:
    """The truth of a picture that nobody has looked at."""
    everywhere = np.array([[-IGNORE_EXTENT_PX, -IGNORE_EXTENT_PX, IGNORE_EXTENT_PX, IGNORE_EXTENT_PX]], np.float32)
    return GroundTruth(everywhere, np.array([True]), everywhere, ("unlabelled",))
