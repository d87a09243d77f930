"""COCO's average precision and recall of the person class, by pycocotools: the official program itself.

Ignore regions (`ignore`, which pycocotools itself does not read) are passed to it as crowds: what falls into them
counts neither way.
"""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hkd_det.metrics.coco_files import CocoTruth
from hkd_det.metrics.tables import DetectionTable

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def evaluate(truth: CocoTruth, detections: DetectionTable) -> dict[str, float]:
    """The twelve figures, fractions; -1 where nobody of that size was to be found."""
    with contextlib.redirect_stdout(io.StringIO()):  # it talks to the terminal at every step
        people = _index(truth)
        if not len(detections):
            return {name: 0.0 if (~truth.table.ignore).any() else -1.0 for name in NAMES}
        columns = (detections.picture + 1, *detections.boxes_xywh.T, detections.scores, np.ones(len(detections)))
        judged = COCOeval(people, people.loadRes(np.stack(columns, axis=1)), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return dict(zip(NAMES, judged.stats.tolist(), strict=True))


def _index(truth: CocoTruth) -> COCO:
    """Pictures and records counted from 1: a record of id 0 is never found by pycocotools."""
    table = truth.table
    ignored = truth.crowd | table.ignore
    people = COCO()
    people.dataset = {
        "images": [{"id": number + 1} for number in range(table.pictures)],
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
                zip(table.picture.tolist(), table.boxes_xywh.tolist(), truth.area_px.tolist(), ignored, strict=True)
            )
        ],
    }
    people.createIndex()
    return people
