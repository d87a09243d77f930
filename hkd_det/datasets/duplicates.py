"""Near-duplicate images within and between sets of images, under the eight orientations of an image.

A thumbnail of 32 x 32 pixels is compared twice. The low frequencies of its cosine transform, as in perceptual hashing,
but as weighted real numbers instead of bits, select candidates by one matrix product. The contrast-normalized thumbnail
confirms them. benchmarks/results/near_duplicates.md contains the distributions that the thresholds are from.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Thumbnails = NDArray[np.uint8]

THUMBNAIL_PX = 32
NUM_FREQUENCIES = 12  # per axis
MIN_SIMILARITY = 0.8  # of the frequencies; unrelated images reach 0.77
MIN_DETAIL_SIMILARITY = 0.6  # of the thumbnails; unrelated candidates reach 0.5
MIN_TURNED_SIMILARITY = 0.9  # in the seven other orientations: symmetric scenes of one kind reach 0.84
CONTRAST_SIGMA_PX, CONTRAST_FLOOR = 2.0, 8.0  # window and gray values; the floor suppresses noise in uniform areas
MAX_CANDIDATES = 5  # per image: an image of a fixed camera can have thousands
MAX_CHUNK_CELLS = 2**23

# Names of Pillow's transpose methods; the second image becomes the first by this operation. Each is a transposition,
# then a flip top-bottom, then a flip left-right.
ORIENTATIONS = {
    "unchanged": (False, False, False),
    "flip left-right": (False, False, True),
    "flip top-bottom": (False, True, False),
    "rotate 180": (False, True, True),
    "transpose": (True, False, False),
    "rotate 270": (True, False, True),
    "rotate 90": (True, True, False),
    "transverse": (True, True, True),
}
UNCHANGED = "unchanged"


@dataclass(frozen=True)
class DuplicatePair:
    """Two near-duplicate images.

    Attributes:
        first: Index of the first image in its set.
        second: Index of the second image in its set.
        similarity: Correlation of the contrast-normalized thumbnails, at most 1.
        orientation: Key of `ORIENTATIONS` that turns the second image into the first.
    """

    first: int
    second: int
    similarity: float
    orientation: str


def make_thumbnail(image_rgb: NDArray[np.uint8]) -> Thumbnails:
    """Return the gray thumbnail of an image. The aspect ratio is not kept.

    Args:
        image_rgb (array[H, W, 3]): RGB, uint8.

    Returns:
        array[32, 32]: uint8.
    """
    size = (THUMBNAIL_PX, THUMBNAIL_PX)
    small = cv2.resize(image_rgb, size, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), np.uint8)


def find_duplicates(thumbnails: Thumbnails, others: Thumbnails | None = None) -> list[DuplicatePair]:
    """Find near-duplicates within a set of images, or between two sets.

    Args:
        thumbnails (array[N, 32, 32]): uint8; the first images of the pairs.
        others (array[M, 32, 32]): uint8; the second images. By default the same set: each pair is reported once.

    Returns:
        At most `MAX_CANDIDATES` pairs per first image, the most similar first.
    """
    second = thumbnails if others is None else others
    if not len(thumbnails) or not len(second):
        return []
    spectra = _compute_spectra(thumbnails)
    turned_spectra = [_compute_spectra(turn(second, name)) for name in ORIENTATIONS]
    pairs: list[DuplicatePair] = []
    step = max(1, MAX_CHUNK_CELLS // len(second))
    for start in range(0, len(thumbnails), step):
        best, orientation = _compare(spectra[start : start + step], turned_spectra)
        if others is None:  # only pairs with first < second
            best[np.arange(start, start + len(best))[:, None] >= np.arange(len(second))[None]] = -1
        rows, columns = _select_candidates(best)
        pairs += _confirm(thumbnails, second, rows + start, columns, orientation[rows, columns])
    return sorted(pairs, key=lambda pair: -pair.similarity)


def group_duplicates(pairs: Iterable[DuplicatePair]) -> list[list[int]]:
    """Group the images of a set that are connected by pairs.

    Args:
        pairs: Pairs within the set.

    Returns:
        Indices of the images of each group, ascending; the largest group first.
    """
    parents: dict[int, int] = {}

    def find_root(index: int) -> int:
        while parents.setdefault(index, index) != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    for pair in pairs:
        parents[find_root(pair.first)] = find_root(pair.second)
    groups: dict[int, list[int]] = {}
    for index in sorted(parents):
        groups.setdefault(find_root(index), []).append(index)
    return sorted(groups.values(), key=len, reverse=True)


def turn(images: NDArray[np.generic], orientation: str) -> NDArray[np.generic]:
    """Flip or rotate square images.

    Args:
        images (array[N, S, S]): Images.
        orientation: Key of `ORIENTATIONS`.

    Returns:
        array[N, S, S]: A view.
    """
    is_transposed, is_flipped_y, is_flipped_x = ORIENTATIONS[orientation]
    turned = images.swapaxes(1, 2) if is_transposed else images
    return turned[:, :: -1 if is_flipped_y else 1, :: -1 if is_flipped_x else 1]


def _compute_spectra(thumbnails: NDArray[np.generic]) -> FloatArray:
    """Return the low frequencies of images as unit vectors [N, F]; zero for a uniform image.

    A frequency is weighted by its order, because the amplitudes of natural images fall with it.
    """
    count = NUM_FREQUENCIES
    weights = np.add.outer(np.arange(count), np.arange(count)).astype(np.float32)
    spectra = [cv2.dct(np.ascontiguousarray(image, np.float32))[:count, :count] * weights for image in thumbnails]
    return _normalize_rows(np.array(spectra, np.float32).reshape(len(spectra), -1))


def _normalize_contrast(thumbnails: NDArray[np.generic]) -> FloatArray:
    """Return images with local mean 0 and local standard deviation of about 1, as unit vectors [N, S * S]."""
    rows = []
    for image in thumbnails:
        gray = np.ascontiguousarray(image, np.float32)
        detail = gray - _blur(gray)
        detail = detail / (np.sqrt(_blur(detail * detail)) + CONTRAST_FLOOR)
        rows.append((detail - detail.mean()).ravel())
    return _normalize_rows(np.array(rows, np.float32))


def _blur(gray: FloatArray) -> FloatArray:
    blurred: FloatArray = cv2.GaussianBlur(gray, (0, 0), CONTRAST_SIGMA_PX, borderType=cv2.BORDER_REFLECT)
    return blurred


def _normalize_rows(rows: FloatArray) -> FloatArray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    normalized: FloatArray = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 1e-3)
    return normalized


def _compare(spectra: FloatArray, turned_spectra: Sequence[FloatArray]) -> tuple[FloatArray, NDArray[np.int8]]:
    """Return the similarity of all pairs in their best orientation, and the index of that orientation."""
    best = spectra @ turned_spectra[0].T  # [rows, M]
    orientation = np.zeros(best.shape, np.int8)
    for index, turned in enumerate(turned_spectra[1:], 1):
        similarity = spectra @ turned.T
        is_better = similarity > best
        best[is_better], orientation[is_better] = similarity[is_better], index
    return best, orientation


def _select_candidates(similarity: FloatArray) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return row and column of the `MAX_CANDIDATES` highest values of each row that are high enough."""
    count = min(MAX_CANDIDATES, similarity.shape[1])
    columns = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
    is_high = np.take_along_axis(similarity, columns, axis=1) >= MIN_SIMILARITY
    return np.nonzero(is_high)[0], columns[is_high]


def _confirm(
    first: Thumbnails,
    second: Thumbnails,
    rows: NDArray[np.intp],
    columns: NDArray[np.intp],
    orientations: NDArray[np.int8],
) -> Iterator[DuplicatePair]:
    """Yield the candidates whose details agree."""
    for index, name in enumerate(ORIENTATIONS):
        is_name = orientations == index
        if not is_name.any():
            continue
        details = _normalize_contrast(first[rows[is_name]]), _normalize_contrast(turn(second[columns[is_name]], name))
        limit = MIN_DETAIL_SIMILARITY if name == UNCHANGED else MIN_TURNED_SIMILARITY
        for row, column, similarity in zip(
            rows[is_name].tolist(), columns[is_name].tolist(), (details[0] * details[1]).sum(1).tolist(), strict=True
        ):
            if similarity >= limit:
                yield DuplicatePair(row, column, similarity, name)
