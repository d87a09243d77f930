"""Near-duplicate images within and between sets of images, under the eight orientations of an image.

A thumbnail of 32 x 32 pixels is compared twice. The low frequencies of its cosine transform, as in perceptual hashing,
but as weighted real numbers instead of bits, select candidates by one matrix product. The contrast-normalized thumbnail
confirms them. benchmarks/results/near_duplicates.md contains the distributions that the thresholds are from.

`search_duplicates` searches the splits of a dataset. The results are written as JSON and as images of the pairs.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.check_summary import escape_nonprintable
from hkd_det.files import write_text
from hkd_det.image import read_image

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

PAIRS_PER_SHEET = 12
PAIRS_PER_ROW = 3
SHEET_TILE_PX, SHEET_GAP_PX, SHEET_CAPTION_PX = 180, 6, 22
SHEET_GRAY, SHEET_TEXT_GRAY = 24, 235


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


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The readable images of a split.

    Attributes:
        name: Name of the split, with the dataset if it is another one.
        paths: Image files.
        thumbnails (array[N, 32, 32], uint8): Thumbnail of each image.
    """

    name: str
    paths: tuple[Path, ...]
    thumbnails: Thumbnails


@dataclass(frozen=True, eq=False)
class DuplicateSearch:
    """Near-duplicates within one set of images, or of one set in another.

    Attributes:
        first: Set whose images are counted.
        second: Set in which they are searched; the same object for a search within the set.
        pairs: The near-duplicates, the most similar first.
    """

    first: ImageSet
    second: ImageSet
    pairs: tuple[DuplicatePair, ...]

    @property
    def title(self) -> str:
        """Names of the sets."""
        return f"within {self.first.name}" if self.first is self.second else f"{self.first.name} in {self.second.name}"

    @cached_property
    def groups(self) -> list[list[int]]:
        """Groups of near-duplicates within a set; empty for two sets."""
        return group_duplicates(self.pairs) if self.first is self.second else []

    @property
    def summary(self) -> str:
        """Number of images with a near-duplicate."""
        if not self.pairs:
            return "none"
        num_turned = sum(pair.orientation != UNCHANGED for pair in self.pairs)
        num_images = sum(map(len, self.groups)) or len({pair.first for pair in self.pairs})
        parts = [f"{num_images:,} of {len(self.first.paths):,} images"]
        parts += [f"groups: {len(self.groups):,}"] if self.groups else []
        parts += [f"flipped or rotated pairs: {num_turned:,}"] if num_turned else []
        return "; ".join(parts)


def search_duplicates(splits: Sequence[ImageSet], references: Sequence[ImageSet] = ()) -> list[DuplicateSearch]:
    """Search near-duplicates within each split, of each later split in the earlier ones, and of all in references.

    Args:
        splits: Splits of the dataset in the order train, val, test.
        references: Splits of other datasets.

    Returns:
        One search for each set and each pair of sets.
    """
    sets = [(one, one) for one in splits]
    sets += [(later, earlier) for earlier, later in combinations(splits, 2)]
    sets += [(one, reference) for one in splits for reference in references]
    return [
        DuplicateSearch(
            first,
            second,
            tuple(find_duplicates(first.thumbnails, None if first is second else second.thumbnails)),
        )
        for first, second in sets
    ]


def write_duplicates_json(path: Path, searches: Sequence[DuplicateSearch]) -> None:
    """Write all pairs as JSON.

    Args:
        path: Output file.
        searches: The searches.
    """
    write_text(path, json.dumps([_make_record(search) for search in searches], indent=1) + "\n")


def draw_duplicates(search: DuplicateSearch) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Draw pairs side by side with similarity and orientation, those that are flipped or rotated first.

    Args:
        search: A search with at least one pair. Of each first image, the most similar pair is drawn.

    Returns:
        array[H, W, 3]: RGB, uint8.
    """
    best = {pair.first: pair for pair in reversed(search.pairs)}  # the pairs are sorted by descending similarity
    pairs = sorted(best.values(), key=lambda pair: (pair.orientation == UNCHANGED, pair.similarity))
    turned = [pair for pair in pairs if pair.orientation != UNCHANGED][: PAIRS_PER_SHEET // 2]
    unchanged = [pair for pair in pairs if pair.orientation == UNCHANGED]
    count = min(PAIRS_PER_SHEET - len(turned), len(unchanged))
    spread: list[int] = np.linspace(0, len(unchanged) - 1, count).astype(int).tolist() if count else []
    tiles = [_draw_pair(search, pair) for pair in [*turned, *(unchanged[index] for index in spread)]]
    while len(tiles) % PAIRS_PER_ROW:
        tiles.append(np.full_like(tiles[0], SHEET_GRAY))
    rows = [np.concatenate(tiles[i : i + PAIRS_PER_ROW], axis=1) for i in range(0, len(tiles), PAIRS_PER_ROW)]
    return np.concatenate(rows)


def _draw_pair(search: DuplicateSearch, pair: DuplicatePair) -> np.ndarray[Any, np.dtype[np.uint8]]:
    width = 2 * (SHEET_TILE_PX + SHEET_GAP_PX) + SHEET_GAP_PX
    tile = np.full((SHEET_TILE_PX + SHEET_CAPTION_PX, width, 3), SHEET_GRAY, np.uint8)
    paths = search.first.paths[pair.first], search.second.paths[pair.second]
    for number, path in enumerate(paths):
        image = read_image(path)
        scale = SHEET_TILE_PX / max(image.shape[:2])
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        left = number * (SHEET_TILE_PX + SHEET_GAP_PX)
        tile[: small.shape[0], left : left + small.shape[1]] = small
    caption = f"{pair.similarity:.2f} {pair.orientation}: {paths[0].stem[:12]}, {paths[1].stem[:12]}"
    caption = caption.encode("ascii", "replace").decode("ascii")
    origin = (4, SHEET_TILE_PX + SHEET_CAPTION_PX - 7)
    cv2.putText(tile, caption, origin, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (SHEET_TEXT_GRAY,) * 3, 1, cv2.LINE_AA)
    return tile


def _make_record(search: DuplicateSearch) -> dict[str, Any]:
    return {
        "search": escape_nonprintable(search.title),
        "num_images": len(search.first.paths),
        "groups": [[str(search.first.paths[index]) for index in group] for group in search.groups],
        "pairs": [
            {
                "first": str(search.first.paths[pair.first]),
                "second": str(search.second.paths[pair.second]),
                "similarity": round(pair.similarity, 4),
                "orientation": pair.orientation,
            }
            for pair in search.pairs
        ],
    }
