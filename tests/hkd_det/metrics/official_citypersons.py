"""Second implementation of the official CityPersons evaluation (eval_MR_multisetup.py): slow, with plain loops.

It shares no code with hkd_det.
"""

import math
from typing import Any

POINTS = [0.0100, 0.0178, 0.0316, 0.0562, 0.1000, 0.1778, 0.3162, 0.5623, 1.0000]


def miss_rate(
    images: list[tuple[list[dict[str, Any]], list[tuple[list[float], float]]]],
    heights: tuple[float, float],
    visibilities: tuple[float, float],
    zero_recall_before_curve: bool = False,
) -> float:
    """Compute MR^-2 of one setup.

    Args:
        images: Annotations (bbox xywh, height, vis_ratio, ignore) and detections (bbox xywh, score) of each image.
        zero_recall_before_curve: Not in the official program: recall 0 at points before the curve.
    """
    results: list[tuple[float, int]] = []
    num_gt = 0
    for annotations, detections in images:
        gt = []
        for annotation in annotations:
            ignored = bool(annotation["ignore"])
            if annotation["height"] < heights[0] or annotation["height"] > heights[1]:
                ignored = True
            if annotation["vis_ratio"] < visibilities[0] or annotation["vis_ratio"] > visibilities[1]:
                ignored = True
            gt.append((annotation["bbox"], ignored))
        gt = [g for g in gt if not g[1]] + [g for g in gt if g[1]]
        num_gt += sum(not g[1] for g in gt)
        dt = sorted(detections, key=lambda d: -d[1])[:1000]
        dt = [d for d in dt if heights[0] / 1.25 <= d[0][3] < heights[1] * 1.25]
        matched = [False] * len(gt)
        for box, score in dt:
            best_overlap, best, best_is_person = min(0.5, 1 - 1e-10), -1, False
            for index, (gt_box, ignored) in enumerate(gt):
                if matched[index] and not ignored:
                    continue
                if best > -1 and best_is_person and ignored:
                    break
                overlap = _overlap(box, gt_box, ignored)
                if overlap < best_overlap:
                    continue
                best_overlap, best, best_is_person = overlap, index, not ignored
            if best == -1:
                results.append((score, 0))
            elif best_is_person:
                matched[best] = True
                results.append((score, 1))
    if num_gt == 0:
        return -1.0
    results.sort(key=lambda j: -j[0])
    hits = misses = 0
    recalls, fppis = [], []
    for _, hit in results:
        hits, misses = hits + hit, misses + (1 - hit)
        recalls.append(hits / num_gt)
        fppis.append(misses / len(images))
    if not results:
        return 1.0
    logs = []
    for point in POINTS:
        index = -1
        while index + 1 < len(fppis) and fppis[index + 1] <= point:
            index += 1
        missed = 1.0 if zero_recall_before_curve and index == -1 else 1 - recalls[index]
        if missed <= 0:
            return 0.0
        logs.append(math.log(missed))
    return math.exp(sum(logs) / len(logs))


def _overlap(detection: list[float], gt: list[float], ignored: bool) -> float:
    width = min(detection[0] + detection[2], gt[0] + gt[2]) - max(detection[0], gt[0])
    height = min(detection[1] + detection[3], gt[1] + gt[3]) - max(detection[1], gt[1])
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    area = detection[2] * detection[3]
    union = area if ignored else area + gt[2] * gt[3] - intersection
    return intersection / union
