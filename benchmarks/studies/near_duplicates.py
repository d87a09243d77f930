"""Similarity of changed copies and of unrelated images, for the thresholds of `hkd-train --check`.

    python benchmarks/studies/near_duplicates.py --data A.yaml --data B.yaml ...

The datasets must come from different sources: every pair of images of two datasets counts as unrelated. The copies are
changed in one way each. Tables: found copies by change, and the pairs of unrelated images by similarity.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets import duplicates
from hkd_det.datasets.catalog import list_splits, load_dataset
from hkd_det.datasets.duplicates import ORIENTATIONS, find_duplicates, make_thumbnail
from hkd_det.image import read_image

NUM_COPIED = 300  # images, at equal distances
LIMITS = (0.5, 0.6, 0.7, 0.75, 0.8)
Image = NDArray[np.uint8]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the results as Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, help="data YAML; give it at least twice")
    arguments = parser.parse_args(argv)
    paths = [
        [sample.path for split in list_splits(data) for sample in load_dataset(data, split)] for data in arguments.data
    ]
    thumbnails = [np.array([make_thumbnail(read_image(path)) for path in of_data]) for of_data in paths]
    flat = [path for of_data in paths for path in of_data]
    step = max(1, len(flat) // NUM_COPIED)
    images = [read_image(path) for path in flat[::step]]
    print(f"{len(flat)} images, {len(images)} copied\n\n| change | found |\n| --- | --- |")
    originals = np.array([make_thumbnail(image) for image in images])
    rng = np.random.default_rng(0)
    for name, change in CHANGES.items():
        copies = np.array([make_thumbnail(np.ascontiguousarray(change(image, rng))) for image in images])
        found = {pair.first for pair in find_duplicates(copies, originals) if pair.first == pair.second}
        print(f"| {name} | {len(found) / len(images):.1%} |")
    print_unrelated(thumbnails)


def print_unrelated(thumbnails: Sequence[Image]) -> None:
    """Print the number of unrelated pairs by similarity of frequencies and of details.

    Args:
        thumbnails (list of array[N, 32, 32]): Thumbnails of each source.
    """
    counts = {(limit, is_turned): 0 for limit in LIMITS for is_turned in (False, True)}
    highest = {False: 0.0, True: 0.0}
    num_pairs = 0
    for index, first in enumerate(thumbnails):
        for second in thumbnails[index + 1 :]:
            num_pairs += len(first) * len(second)
            spectra = duplicates._compute_spectra(first)
            turned = [duplicates._compute_spectra(duplicates.turn(second, name)) for name in ORIENTATIONS]
            best, orientation = duplicates._compare(spectra, turned)
            for limit in LIMITS:
                for is_turned in (False, True):
                    counts[limit, is_turned] += int(((best >= limit) & ((orientation > 0) == is_turned)).sum())
            rows, columns = np.nonzero(best >= LIMITS[0])
            for row, column in zip(rows, columns, strict=True):
                name = list(ORIENTATIONS)[orientation[row, column]]
                details = [
                    duplicates._normalize_contrast(image[None])[0]
                    for image in (first[row], duplicates.turn(second[[column]], name)[0])
                ]
                is_turned = bool(orientation[row, column])
                highest[is_turned] = max(highest[is_turned], float(details[0] @ details[1]))
    print(
        f"\n{num_pairs} unrelated pairs\n\n| frequencies from | unchanged | flipped or rotated |\n| --- | --- | --- |"
    )
    for limit in LIMITS:
        print(f"| {limit:g} | {counts[limit, False]} | {counts[limit, True]} |")
    print(f"| highest similarity of details among these | {highest[False]:.2f} | {highest[True]:.2f} |")


def crop(image: Image, rng: np.random.Generator, ratio: float) -> Image:
    """Remove a part of each side.

    Args:
        image (array[H, W, 3]): uint8.
        rng: Random generator.
        ratio: Removed part of height and width, divided at random between both ends.
    """
    height, width = image.shape[:2]
    top, left = (rng.uniform(0, ratio, 2) * (height, width)).astype(int)
    return image[top : top + round((1 - ratio) * height), left : left + round((1 - ratio) * width)]


def rotate(image: Image, degrees: float) -> Any:
    """Rotate an image around its center, with black corners.

    Args:
        image (array[H, W, 3]): uint8.
        degrees: Angle.
    """
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
    return cv2.warpAffine(image, matrix, (width, height))


def cover(image: Image) -> Image:
    """Cover the top left corner, a twentieth of the area, with white.

    Args:
        image (array[H, W, 3]): uint8.
    """
    covered = image.copy()
    covered[: image.shape[0] // 5, : image.shape[1] // 4] = 255
    return covered


CHANGES: dict[str, Callable[[Image, np.random.Generator], Any]] = {
    "JPEG, quality 30": lambda image, _: cv2.imdecode(
        cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 30])[1], 1
    ),
    "half size": lambda image, _: cv2.resize(image, None, fx=0.5, fy=0.5),
    "stretched to a square": lambda image, _: cv2.resize(image, (416, 416)),
    "gamma 0.5": lambda image, _: (255 * (image / 255) ** 0.5).astype(np.uint8),
    "30 % brighter, 30 added": lambda image, _: np.clip(image * 1.3 + 30, 0, 255).astype(np.uint8),
    "noise, standard deviation 15": lambda image, rng: np.clip(image + rng.normal(0, 15, image.shape), 0, 255).astype(
        np.uint8
    ),
    "blur, 3 px": lambda image, _: cv2.GaussianBlur(image, (0, 0), 3),
    "flip left-right": lambda image, _: np.fliplr(image),
    "rotate 90, JPEG, quality 30": lambda image, _: cv2.imdecode(
        cv2.imencode(".jpg", np.rot90(image), [cv2.IMWRITE_JPEG_QUALITY, 30])[1], 1
    ),
    "a corner covered": lambda image, _: cover(image),
    "rotated by 3 degrees": lambda image, _: rotate(image, 3),
    "2 % cropped": lambda image, rng: crop(image, rng, 0.02),
    "5 % cropped": lambda image, rng: crop(image, rng, 0.05),
    "10 % cropped": lambda image, rng: crop(image, rng, 0.1),
}

if __name__ == "__main__":
    main()
