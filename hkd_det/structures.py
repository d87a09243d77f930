"""Boxes as NumPy arrays, and the data structures that the packages exchange: detections, ground truth and samples.

Boxes are xyxy in pixels: x to the right, y down, the right and bottom edges exclusive. A box
(x1, y1, x2, y2) covers x1 <= x < x2, so its width is x2 - x1. The readers convert other formats,
such as COCO's xywh and the 1-based inclusive boxes of MATLAB tools.
"""

import json
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, overload

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.draw import draw_detections
from hkd_det.errors import UsageError, import_package
from hkd_det.image import ImageInput, ImageReference, load_image

Boxes = NDArray[np.floating]
PERSON_CLASS_ID, PERSON_CLASS_NAME = 0, "person"
IGNORE_EXTENT_PX = 1e6  # larger than any image, at any scale
FUSION_IOU = 0.55
MAX_FUSED_DETECTIONS = 300  # boxes per model and image that are fused


def xyxy_from_xywh(boxes_xywh: Boxes) -> Boxes:
    """Convert boxes from (x, y, width, height) to (x1, y1, x2, y2).

    Args:
        boxes_xywh (array[N, 4] or array[4]): xywh.

    Returns:
        array[N, 4]: xyxy.
    """
    boxes = np.asarray(boxes_xywh).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def xywh_from_xyxy(boxes_xyxy: Boxes) -> Boxes:
    """Convert boxes from (x1, y1, x2, y2) to (x, y, width, height).

    Args:
        boxes_xyxy (array[N, 4] or array[4]): xyxy.

    Returns:
        array[N, 4]: xywh.
    """
    boxes = np.asarray(boxes_xyxy).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def box_area(boxes_xyxy: Boxes) -> NDArray[np.floating]:
    """Compute box areas.

    Args:
        boxes_xyxy (array[N, 4]): xyxy, pixels.

    Returns:
        array[N]: Areas in square pixels; 0 for an inverted box.
    """
    sides = np.clip(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], 0, None)
    return sides[:, 0] * sides[:, 1]


def box_intersection(boxes1_xyxy: Boxes, boxes2_xyxy: Boxes) -> NDArray[np.floating]:
    """Compute the intersection area of each pair of boxes.

    Args:
        boxes1_xyxy (array[N, 4]): xyxy, pixels.
        boxes2_xyxy (array[M, 4]): xyxy, pixels.

    Returns:
        array[N, M]: Areas in square pixels.
    """
    low = np.maximum(boxes1_xyxy[:, None, :2], boxes2_xyxy[None, :, :2])  # [N, M, 2]
    high = np.minimum(boxes1_xyxy[:, None, 2:], boxes2_xyxy[None, :, 2:])  # [N, M, 2]
    sides = np.clip(high - low, 0, None)
    return sides[..., 0] * sides[..., 1]


def box_iou(boxes1_xyxy: Boxes, boxes2_xyxy: Boxes) -> NDArray[np.floating]:
    """Compute the intersection over union (Jaccard index) of each pair of boxes.

    Args:
        boxes1_xyxy (array[N, 4]): xyxy, pixels.
        boxes2_xyxy (array[M, 4]): xyxy, pixels.

    Returns:
        array[N, M]: IoU, 0 to 1; 0 if both boxes are empty.
    """
    intersection = box_intersection(boxes1_xyxy, boxes2_xyxy)
    union = box_area(boxes1_xyxy)[:, None] + box_area(boxes2_xyxy)[None, :] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def clip_boxes(boxes_xyxy: Boxes, size_hw: tuple[int, int]) -> Boxes:
    """Clip boxes to the image.

    Args:
        boxes_xyxy (array[N, 4]): xyxy, pixels.
        size_hw: Image height and width in pixels.

    Returns:
        array[N, 4]: Clipped boxes, xyxy.
    """
    height, width = size_hw
    return np.clip(boxes_xyxy, 0, [width, height, width, height])


def rotate_boxes(boxes_xyxy: Boxes, num_turns: int, size_hw: tuple[int, int]) -> Boxes:
    """Rotate boxes with their image by multiples of 90 degrees, counterclockwise, as `np.rot90`.

    Args:
        boxes_xyxy (array[N, 4]): xyxy, pixels.
        num_turns: Number of turns by 90 degrees, at least 0.
        size_hw: Height and width of the image before the rotation, in pixels.

    Returns:
        array[N, 4]: xyxy, pixels of the rotated image.
    """
    height, width = size_hw
    for _ in range(num_turns % 4):
        x1, y1, x2, y2 = boxes_xyxy.T
        boxes_xyxy = np.stack([y1, width - x2, y2, width - x1], axis=1)
        height, width = width, height
    return boxes_xyxy


def nms(boxes_xyxy: Boxes, iou_threshold: float) -> NDArray[np.intp]:
    """Perform greedy non-maximum suppression.

    Args:
        boxes_xyxy (array[N, 4]): xyxy, in descending order of score.
        iou_threshold: A box is removed if its IoU with a kept box of higher score is above this value.

    Returns:
        array[K]: Ascending indices of the kept boxes.
    """
    if not len(boxes_xyxy):
        return np.zeros(0, np.intp)
    boxes_xywh = np.clip(xywh_from_xyxy(boxes_xyxy), (-np.inf, -np.inf, 0, 0), None)
    scores = np.arange(len(boxes_xyxy), 0, -1, dtype=np.float32)  # keeps the order of the boxes
    return np.asarray(cv2.dnn.NMSBoxes(boxes_xywh.tolist(), scores.tolist(), 0.0, iou_threshold), np.intp)


class Detection(NamedTuple):
    """One detected person.

    Attributes:
        box_xyxy (array[4]): xyxy, pixels of the source image.
        score: 0 to 1.
    """

    box_xyxy: NDArray[np.float32]
    score: float


@dataclass(frozen=True, eq=False)
class Detections:
    """Detected persons of one image, sorted by descending score.

    The constructor converts both arrays to float32 and sorts them. Iteration and an integer index give `Detection`;
    a slice or a mask gives `Detections`.

    Attributes:
        boxes_xyxy (array[N, 4]): xyxy, pixels of the source image.
        scores (array[N]): 0 to 1.
        source: Reference to the image, for `plot`. Set by a detector; None otherwise, and after pickling.

    Examples:
        >>> detections = detector("street.jpg").filter(0.3)
        >>> for box_xyxy, score in detections:
        ...     print(box_xyxy, score)
        >>> tall = detections[detections.boxes_xyxy[:, 3] - detections.boxes_xyxy[:, 1] > 100]
    """

    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    source: ImageReference | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        boxes = np.asarray(self.boxes_xyxy, dtype=np.float32).reshape(-1, 4)
        scores = np.asarray(self.scores, dtype=np.float32).reshape(-1)
        if len(boxes) != len(scores):
            raise ValueError(f"expected one score per box, got {len(boxes)} boxes but {len(scores)} scores")
        order = np.argsort(-scores, kind="stable")
        object.__setattr__(self, "boxes_xyxy", boxes[order])
        object.__setattr__(self, "scores", scores[order])

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        return (Detection(box, float(score)) for box, score in zip(self.boxes_xyxy, self.scores, strict=True))

    @overload
    def __getitem__(self, index: slice | list[Any] | NDArray[Any]) -> "Detections": ...

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> Detection: ...

    def __getitem__(self, index: slice | list[Any] | NDArray[Any] | int | np.integer[Any]) -> "Detections | Detection":
        if isinstance(index, (slice, list, np.ndarray)):
            rows = _to_index_array(index) if isinstance(index, list) else index
            return Detections(self.boxes_xyxy[rows], self.scores[rows], self.source)
        row = operator.index(index)
        return Detection(self.boxes_xyxy[row], float(self.scores[row]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "source": None}  # another process does not have the image

    @classmethod
    def empty(cls) -> "Detections":
        """Return an empty set of detections."""
        return cls(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))

    def filter(self, min_score: float) -> "Detections":
        """Return the detections with a minimum score.

        Args:
            min_score: Minimum score, 0 to 1, inclusive.
        """
        return self[self.scores >= min_score]

    def to_dict(self) -> dict[str, Any]:
        """Return lists of Python numbers.

        Returns:
            `boxes_xyxy` and `scores`. `Detections(**values)` restores the detections.
        """
        return {"boxes_xyxy": self.boxes_xyxy.tolist(), "scores": self.scores.tolist()}

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict())

    def to_supervision(self) -> Any:
        """Convert to `supervision.Detections`, for its annotators, trackers and metrics.

        Returns:
            The detections, with class id 0 and class name person.

        Raises:
            UnavailableError: supervision is not installed.
        """
        supervision = import_package("supervision", hint="Run pip install supervision.")
        return supervision.Detections(
            xyxy=self.boxes_xyxy.copy(),
            confidence=self.scores.copy(),
            class_id=np.full(len(self), PERSON_CLASS_ID),
            data={"class_name": np.full(len(self), PERSON_CLASS_NAME)},
        )

    def plot(self, image: ImageInput | None = None, bgr: bool = False, show_scores: bool = True) -> NDArray[np.uint8]:
        """Draw the boxes on a copy of an image.

        Args:
            image: The image: array, file or PIL image. By default the image that the detector received, if it was
                a file, or an array or PIL image that the program still holds.
            bgr: True if `image` is a BGR array. By default as passed to the detector.
            show_scores: True to label each box with its score.

        Returns:
            array[H, W, 3]: uint8, RGB. BGR if the image is a BGR array.

        Raises:
            UsageError: No image is given, and the image of the detector is not available.
            ValueError: The argument is not an image.
            DataError: The file is missing or is not a readable image.
        """
        if image is None and self.source is not None:
            image, bgr = self.source.resolve(), self.source.bgr
        if image is None:
            raise UsageError("plot: the image of the detections is not in memory. Pass it: detections.plot(image).")
        canvas = draw_detections(load_image(image, bgr), self, show_scores=show_scores)
        is_bgr_array = bgr and isinstance(image, np.ndarray)
        return np.ascontiguousarray(canvas[..., ::-1]) if is_bgr_array else canvas


def _to_index_array(index: list[Any]) -> NDArray[Any]:
    """Convert a list of booleans or integers; an empty list selects nothing."""
    return np.array(index) if index else np.zeros(0, np.intp)


def fuse_detections(detections: Sequence[Detections], iou: float = FUSION_IOU) -> tuple[Detections, NDArray[np.int64]]:
    """Fuse the detections of several models in one image, as in weighted boxes fusion (Solovyev et al. 2021).

    A box joins the cluster whose fused box it overlaps most, if the IoU is larger than `iou`. Only the best box of each
    model counts, so that duplicates do not change the result. The fused box is the mean of the boxes, weighted by the
    scores. Its score is the sum of the scores, divided by the number of models.

    Args:
        detections: Detections of each model.
        iou: IoU above which a box joins a cluster.

    Returns:
        detections: Fused detections in descending order of score.
        num_models: For each of them, the number of models that found it.
    """
    boxes = np.concatenate([item.boxes_xyxy[:MAX_FUSED_DETECTIONS] for item in detections])
    scores = np.concatenate([item.scores[:MAX_FUSED_DETECTIONS] for item in detections]).astype(np.float64)
    models = np.repeat(np.arange(len(detections)), [len(item.scores[:MAX_FUSED_DETECTIONS]) for item in detections])
    fused, sums = np.zeros((len(boxes), 4)), np.zeros(len(boxes))  # sums of the scores
    found_by = np.zeros((len(boxes), len(detections)), bool)
    num_clusters = 0
    for row in np.argsort(-scores, kind="stable"):
        overlaps = box_iou(boxes[row, None], fused[:num_clusters])[0]
        cluster = int(overlaps.argmax()) if num_clusters and overlaps.max() > iou else num_clusters
        num_clusters = max(num_clusters, cluster + 1)
        if found_by[cluster, models[row]]:
            continue
        found_by[cluster, models[row]] = True
        sums[cluster] += scores[row]
        fused[cluster] += (boxes[row] - fused[cluster]) * (scores[row] / sums[cluster])
    order = np.argsort(-sums[:num_clusters], kind="stable")
    mean_scores = (sums[order] / max(1, len(detections))).astype(np.float32)
    return Detections(fused[order].astype(np.float32), mean_scores), found_by.sum(1)[order]


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Annotated persons and ignore regions of one image.

    Attributes:
        boxes_xyxy (array[N, 4]): Full-body boxes including hidden parts, xyxy, pixels of the source image.
        ignore (array[N], bool): True for a region that is neither a person to detect nor background, such as
            a rider, a group or a poster.
        visible_xyxy (array[N, 4]): Boxes of the visible parts, xyxy, pixels. Equal to `boxes_xyxy` if the
            dataset does not annotate visibility.
        labels: N class names of the dataset, such as "pedestrian" or "rider".
    """

    boxes_xyxy: NDArray[np.float32]
    ignore: NDArray[np.bool_]
    visible_xyxy: NDArray[np.float32]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        count = len(self.labels)
        if not (self.boxes_xyxy.shape == self.visible_xyxy.shape == (count, 4) and self.ignore.shape == (count,)):
            raise ValueError(
                f"expected arrays of the same length, got boxes {self.boxes_xyxy.shape}, "
                f"visible {self.visible_xyxy.shape}, ignore {self.ignore.shape} and {count} labels"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def empty(cls) -> "GroundTruth":
        """Return the ground truth of an image without annotations."""
        no_boxes = np.zeros((0, 4), np.float32)
        return cls(no_boxes, np.zeros(0, bool), no_boxes, ())

    @property
    def heights_px(self) -> NDArray[np.float64]:
        """Heights of the full-body boxes in pixels, array[N]."""
        boxes = self.boxes_xyxy.astype(np.float64)
        return boxes[:, 3] - boxes[:, 1]

    @property
    def visible_ratio(self) -> NDArray[np.float64]:
        """Visible area divided by full-body area, array[N].

        0 to 1 if the visible box is inside the full-body box; 0 for an empty box. The computation uses double
        precision because the evaluation compares the ratio with exact limits such as 0.65.
        """
        visible = box_area(self.visible_xyxy.astype(np.float64))
        full = box_area(self.boxes_xyxy.astype(np.float64))
        return np.divide(visible, full, out=np.zeros_like(full), where=full > 0)


@dataclass(frozen=True, eq=False)
class Sample:
    """One annotated image.

    Attributes:
        image_id: Identifier, unique in its dataset split.
        path: Image file.
        ground_truth: Annotations.
        size_hw: Image height and width in pixels, or None if the annotations do not contain the size.
    """

    image_id: int | str
    path: Path
    ground_truth: GroundTruth = field(default_factory=GroundTruth.empty)
    size_hw: tuple[int, int] | None = None


def unlabeled_ground_truth() -> GroundTruth:
    """Return the ground truth of an unlabeled image: one ignore region that covers every pixel.

    The region extends beyond the image, so it also covers the padding of crops. The detection loss therefore
    excludes all anchor points of the image.
    """
    extent = np.array([[-IGNORE_EXTENT_PX, -IGNORE_EXTENT_PX, IGNORE_EXTENT_PX, IGNORE_EXTENT_PX]], np.float32)
    return GroundTruth(extent, np.array([True]), extent, ("unlabeled",))
