"""The official CityPersons evaluation, written a second time: slow, literal, a loop a line of its description.

After ../shared/evaluation.md, which tells how eval_MR_multisetup.py behaves. It shares no code with hkd_det.
"""

import math
from typing import Any

POINTS = [0.0100, 0.0178, 0.0316, 0.0562, 0.1000, 0.1778, 0.3162, 0.5623, 1.0000]


def miss_rate(
    pictures: list[tuple[list[dict[str, Any]], list[tuple[list[float], float]]]],
    heights: tuple[float, float],
    visibilities: tuple[float, float],
    strict: bool = False,
) -> float:
    """pictures: (truths with bbox xywh, height, vis_ratio, ignore; detections as (bbox xywh, score)).

    strict is not the official program's: recall 0 at points before the curve.
    """
    judged: list[tuple[float, int]] = []
    people = 0
    for truths, detections in pictures:
        gt = []
        for truth in truths:
            ignored = bool(truth["ignore"])
            if truth["height"] < heights[0] or truth["height"] > heights[1]:
                ignored = True
            if truth["vis_ratio"] < visibilities[0] or truth["vis_ratio"] > visibilities[1]:
                ignored = True
            gt.append((truth["bbox"], ignored))
        gt = [g for g in gt if not g[1]] + [g for g in gt if g[1]]
        people += sum(not g[1] for g in gt)
        dt = sorted(detections, key=lambda d: -d[1])[:1000]
        dt = [d for d in dt if heights[0] / 1.25 <= d[0][3] < heights[1] * 1.25]
        matched = [False] * len(gt)
        for box, score in dt:
            best_overlap, best, best_is_real = min(0.5, 1 - 1e-10), -1, False
            for index, (truth_box, ignored) in enumerate(gt):
                if matched[index] and not ignored:
                    continue
                if best > -1 and best_is_real and ignored:
                    break
                overlap = _overlap(box, truth_box, ignored)
                if overlap < best_overlap:
                    continue
                best_overlap, best, best_is_real = overlap, index, not ignored
            if best == -1:
                judged.append((score, 0))
            elif best_is_real:
                matched[best] = True
                judged.append((score, 1))
    if people == 0:
        return -1.0
    judged.sort(key=lambda j: -j[0])
    hits = misses = 0
    recalls, fppis = [], []
    for _, hit in judged:
        hits, misses = hits + hit, misses + (1 - hit)
        recalls.append(hits / people)
        fppis.append(misses / len(pictures))
    if not judged:
        return 1.0
    logs = []
    for point in POINTS:
        index = -1
        while index + 1 < len(fppis) and fppis[index + 1] <= point:
            index += 1
        missed = 1.0 if strict and index == -1 else 1 - recalls[index]
        if missed <= 0:
            return 0.0
        logs.append(math.log(missed))
    return math.exp(sum(logs) / len(logs))


def _overlap(detection: list[float], truth: list[float], ignored: bool) -> float:
    width = min(detection[0] + detection[2], truth[0] + truth[2]) - max(detection[0], truth[0])
    height = min(detection[1] + detection[3], truth[1] + truth[3]) - max(detection[1], truth[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    own = detection[2] * detection[3]
    union = own if ignored else own + truth[2] * truth[3] - shared
    return shared / union
