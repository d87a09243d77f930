"""COCO's average precision and recall of the person class, by pycocotools: the official program itself.

Ignore regions (`ignore`, which pycocotools itself does not read) are passed to it as crowds: what falls into them
counts neither way.
"""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hkd_det.metrics.coco_files import CocoGroundTruth
from hkd_det.metrics.tables import DetectionTable

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def evaluate(ground_truth: CocoGroundTruth, detections: DetectionTable) -> dict[str, float]:
    """The twelve figures, fractions; -1 where nobody of that size was to be found."""
    with contextlib.redirect_stdout(io.StringIO()):  # it talks to the terminal at every step
        people = _build_coco_index(ground_truth)
        if not len(detections):
            return {name: 0.0 if (~ground_truth.table.ignore).any() else -1.0 for name in METRIC_NAMES}
        columns = (detections.image_index + 1, *detections.boxes_xywh.T, detections.scores, np.ones(len(detections)))
        judged = COCOeval(people, people.loadRes(np.stack(columns, axis=1)), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return dict(zip(METRIC_NAMES, judged.stats.tolist(), strict=True))


def _build_coco_index(ground_truth: CocoGroundTruth) -> COCO:
    """Pictures and records counted from 1: a record of id 0 is never found by pycocotools."""
    table = ground_truth.table
    ignored = ground_truth.iscrowd | table.ignore
    people = COCO()
    people.dataset = {
        "images": [{"id": number + 1} for number in range(table.num_images)],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [
            {
                "id": number + 1,
                "image_id": picture + 1,
                "category_id": 1,
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for number, (picture, box, area, crowd) in enumerate(
                zip(
                    table.image_index.tolist(),
                    table.boxes_xywh.tolist(),
                    ground_truth.area.tolist(),
                    ignored,
                    strict=True,
                )
            )
        ],
    }
    people.createIndex()
    return people
