"""COCO's average precision and recall of the person class.

The metrics are computed by pycocotools, the official program. It does not read `ignore`, so ignore regions are passed
to it as crowds: detections in them count neither as true nor as false positives.
"""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hkd_det.metrics.coco_files import PEDESTRIAN_CATEGORY_ID, CocoGroundTruth
from hkd_det.metrics.tables import DetectionTable, GroundTruthTable
from hkd_det.structures import Detections, Sample

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def evaluate(ground_truth: CocoGroundTruth, detections: DetectionTable) -> dict[str, float]:
    """Compute the twelve metrics of COCO.

    Args:
        ground_truth: Ground truth.
        detections: Detections in the same images.

    Returns:
        The metrics of `METRIC_NAMES` as fractions; -1 for a size class without ground truth.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every step
        if not len(detections):
            return {name: 0.0 if (~ground_truth.table.ignore).any() else -1.0 for name in METRIC_NAMES}
        return summarize_matches(match_boxes(ground_truth, detections))


def summarize_matches(coco_eval: COCOeval) -> dict[str, float]:
    """Compute the twelve metrics of COCO from matched boxes.

    Args:
        coco_eval: Result of `match_boxes`.

    Returns:
        The metrics of `METRIC_NAMES` as fractions; -1 for a size class without ground truth.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every step
        coco_eval.accumulate()
        coco_eval.summarize()
    return dict(zip(METRIC_NAMES, coco_eval.stats.tolist(), strict=True))


def match_boxes(ground_truth: CocoGroundTruth, detections: DetectionTable) -> COCOeval:
    """Match detections to the ground truth at all IoU thresholds of COCO.

    Args:
        ground_truth: Ground truth.
        detections: Detections in the same images, at least one.

    Returns:
        The evaluation after `evaluate`.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every step
        coco = _build_coco_index(ground_truth)
        columns = (detections.image_index + 1, *detections.boxes_xywh.T, detections.scores, np.ones(len(detections)))
        coco_eval = COCOeval(coco, coco.loadRes(np.stack(columns, axis=1)), "bbox")
        coco_eval.evaluate()
    return coco_eval


def make_ground_truth(samples: Sequence[Sample]) -> CocoGroundTruth:
    """Return the ground truth of samples in the form of a COCO file.

    Args:
        samples: Annotated images.
    """
    table = GroundTruthTable.from_samples([sample.ground_truth for sample in samples])
    area = table.boxes_xywh[:, 2] * table.boxes_xywh[:, 3]
    return CocoGroundTruth(
        Path(), tuple(range(len(samples))), {PEDESTRIAN_CATEGORY_ID: "person"}, table, area, np.zeros(len(area), bool)
    )


def evaluate_average_precision(samples: Sequence[Sample], detections: Sequence[Detections]) -> dict[str, float]:
    """Compute the twelve metrics of COCO for detections in memory.

    Args:
        samples: Annotated images.
        detections: Detections of each sample, in the same order.

    Returns:
        The metrics of `METRIC_NAMES` as fractions; -1 for a size class without ground truth.
    """
    return evaluate(make_ground_truth(samples), DetectionTable.from_detections(detections))


def _build_coco_index(ground_truth: CocoGroundTruth) -> COCO:
    """Build pycocotools' index; ids start at 1 because pycocotools never matches an annotation with id 0."""
    table = ground_truth.table
    columns = zip(
        table.image_index.tolist(),
        table.boxes_xywh.tolist(),
        ground_truth.area.tolist(),
        (ground_truth.iscrowd | table.ignore).tolist(),
        strict=True,
    )
    coco = COCO()
    coco.dataset = {
        "images": [{"id": index + 1} for index in range(table.num_images)],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [
            {
                "id": row + 1,
                "image_id": image_index + 1,
                "category_id": 1,
                "bbox": box,
                "area": area,
                "iscrowd": int(is_ignored),
            }
            for row, (image_index, box, area, is_ignored) in enumerate(columns)
        ],
    }
    coco.createIndex()
    return coco
