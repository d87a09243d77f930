"""Near-duplicates within and between the splits of a dataset, and of other datasets: figures, JSON and thumbnails."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from hkd_det.datasets.check_summary import escape_nonprintable
from hkd_det.datasets.duplicates import UNCHANGED, DuplicatePair, Thumbnails, find_duplicates, group_duplicates
from hkd_det.files import write_text
from hkd_det.image import read_image

PAIRS_PER_SHEET = 12
PAIRS_PER_ROW = 3
SHEET_TILE_PX, SHEET_GAP_PX, SHEET_CAPTION_PX = 180, 6, 22
SHEET_GRAY, SHEET_TEXT_GRAY = 24, 235


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
