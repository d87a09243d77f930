"""Files of `hkd-train --check`: the directory of the report, the inspection of all images, and their thumbnails."""

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.console import Progress, log_stage
from hkd_det.datasets.base import ErrorHandler, set_image
from hkd_det.datasets.check_summary import escape_nonprintable
from hkd_det.datasets.duplicates import THUMBNAIL_PX, ImageSet, Thumbnails, make_thumbnail
from hkd_det.datasets.image_files import make_stated_size_error
from hkd_det.errors import DataError
from hkd_det.files import atomic_write_dir
from hkd_det.image import decode_image, read_image, read_image_bytes
from hkd_det.image_header import UPRIGHT, parse_image_header
from hkd_det.structures import Sample

NUM_THREADS = 4  # OpenCV releases the GIL while it decodes
SOURCE_NAME = "source.txt"  # in the directory of the report: path or name of the dataset
GENERIC_NAMES = ("data.yaml", "dataset.yaml", "_annotations.coco.json", "result.json")
SPLIT_DIRECTORIES = ("train", "valid", "val", "test")
PAGE_NAME, PREVIEW_DIR = "images.html", "thumbnails"
PREVIEW_WH, PREVIEW_QUALITY = (320, 240), 75  # approximate size; about 10 kB per image


@dataclass(frozen=True, eq=False)
class InspectedImage:
    """Properties of a decoded image.

    Attributes:
        size_hw: Height and width in pixels.
        thumbnail (array[32, 32], uint8): Gray thumbnail.
        is_exif_rotated: True if the EXIF orientation rotates or flips the stored pixels.
    """

    size_hw: tuple[int, int]
    thumbnail: Thumbnails
    is_exif_rotated: bool


def choose_report_dir(parent: Path, data: str) -> Path:
    """Return the directory of the report of a dataset, which no other dataset has.

    The name is that of the file or directory. Files with the same name in each dataset have that of their directory.

    Args:
        parent: Directory of all reports.
        data: Dataset, as for `check_dataset`.

    Returns:
        `parent`/NAME. If another dataset has this directory, `parent`/NAME-2 and so on.
    """
    path, source = _find_named_path(data), describe_source(data)
    name = path.name if path.is_dir() else path.stem
    if name in SPLIT_DIRECTORIES and path.parent.name:
        name = f"{path.parent.name}-{name}"
    for number in count(1):
        candidate = parent / (name if number == 1 else f"{name}-{number}")
        marker = candidate / SOURCE_NAME
        if not marker.exists() or marker.read_text(encoding="utf-8", errors="replace").rstrip("\n") == source:
            return candidate
    raise AssertionError  # the loop is endless


def describe_source(data: str) -> str:
    """Return the absolute path of a dataset, or its name in datasets.yaml.

    Args:
        data: Dataset, as for `check_dataset`.
    """
    return escape_nonprintable(str(_find_named_path(data)))


def _find_named_path(data: str) -> Path:
    path = Path(data)
    if not path.exists():
        return path
    return path.resolve().parent if path.name in GENERIC_NAMES else path.resolve()


def inspect_images(
    samples: Sequence[Sample], on_error: ErrorHandler, previews: Sequence[Path] | None = None
) -> list[InspectedImage | None]:
    """Decode every image and compare its size with the annotation.

    Args:
        samples: Samples to check.
        on_error: Function that receives each error.
        previews: Output file of the thumbnail of each image; None writes no thumbnails.

    Returns:
        Properties of each image; None if it cannot be decoded.
    """
    images: list[InspectedImage | None] = []
    pool = ThreadPoolExecutor(NUM_THREADS)
    try:
        results = pool.map(_inspect_or_error, samples, previews or [None] * len(samples))
        with Progress(len(samples), "decode", "image", delay_s=2) as progress:
            for sample, result in zip(samples, results, strict=True):
                progress.update()
                if isinstance(result, DataError):
                    on_error(set_image(result, sample.path))
                    images.append(None)
                    continue
                if sample.size_hw is not None and sample.size_hw != result.size_hw:
                    error = make_stated_size_error(sample.path, sample.size_hw, result.size_hw)
                    on_error(set_image(error, sample.path))
                images.append(result)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the queue
    return images


def _inspect_or_error(sample: Sample, preview: Path | None) -> InspectedImage | DataError:
    try:
        encoded = read_image_bytes(sample.path)
        image = decode_image(encoded, sample.path)
    except DataError as error:
        return error
    except OSError as error:
        return DataError(f"{sample.path}: {error.strerror or error}. Check the permissions.")
    if preview:
        _write_preview(image, preview)
    header = parse_image_header(encoded)
    is_rotated = header is not None and header.orientation != UPRIGHT
    return InspectedImage((image.shape[0], image.shape[1]), make_thumbnail(image), is_rotated)


def _write_preview(image: NDArray[np.uint8], path: Path) -> None:
    # OpenCV averages whole blocks of pixels four times as fast as fractions of pixels.
    factor = max(1, round(max(image.shape[1] / PREVIEW_WH[0], image.shape[0] / PREVIEW_WH[1])))
    height, width = (max(1, side // factor) for side in image.shape[:2])
    blocks = image[: height * factor, : width * factor]
    small = cv2.resize(blocks, (width, height), interpolation=cv2.INTER_AREA)
    options = [cv2.IMWRITE_JPEG_QUALITY, PREVIEW_QUALITY]
    path.write_bytes(cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), options)[1].tobytes())


def write_previews(files: Sequence[tuple[Path, Path]]) -> None:
    """Decode images to write their thumbnails.

    Args:
        files: Image file and thumbnail of each image.
    """
    if files:
        log_stage(f"write {len(files):,} thumbnails")
    with ThreadPoolExecutor(NUM_THREADS) as pool, Progress(len(files), "thumbnails", "image", delay_s=2) as progress:
        for _ in pool.map(lambda pair: _write_preview(read_image(pair[0]), pair[1]), files):
            progress.update()


@contextmanager
def open_preview_dir(output_dir: Path, splits: Sequence[str], max_images: int) -> Iterator[Path | None]:
    """Replace the directory of thumbnails; without images, remove it and the page.

    Args:
        output_dir: Directory of the report. It does not exist after a failure, unless it contains files.
        splits: Names of the splits.
        max_images: Maximum number of images of the page.

    Yields:
        The new directory, with one directory for each split; None without images.
    """
    if max_images:
        with atomic_write_dir(output_dir / PREVIEW_DIR) as preview_dir:
            for split in splits:
                (preview_dir / split).mkdir()
            yield preview_dir
    else:
        (output_dir / PAGE_NAME).unlink(missing_ok=True)
        if (output_dir / PREVIEW_DIR).exists():
            shutil.rmtree(output_dir / PREVIEW_DIR)
        yield None


def make_image_set(name: str, samples: Sequence[Sample], images: Sequence[InspectedImage | None]) -> ImageSet:
    """Return the readable images for the search of near-duplicates.

    Args:
        name: Name of the split.
        samples: Samples of the split.
        images: Properties of each image; None if it cannot be decoded.
    """
    pairs = [(sample.path, image.thumbnail) for sample, image in zip(samples, images, strict=True) if image]
    thumbnails = np.array([thumbnail for _, thumbnail in pairs], np.uint8).reshape(-1, THUMBNAIL_PX, THUMBNAIL_PX)
    return ImageSet(name, tuple(path for path, _ in pairs), thumbnails)


def make_preview_paths(split: str, num_images: int) -> list[Path]:
    """Return the paths of the thumbnails of a split. They do not depend on the names of the images.

    Args:
        split: Name of the split.
        num_images: Number of images.
    """
    return [Path(split) / f"{number:06}.jpg" for number in range(num_images)]
