"""Second implementation of the official Caltech evaluation: slow, with the same loops as the MATLAB programs.

It follows dbEval.m 3.2.1, bbGt.m (evalRes, compOas, compRoc, bbLoad) and bbApply.m (resize). It shares no code with
hkd_det.
"""

import math
from typing import Any

INF = math.inf


def miss_rate(
    images: list[tuple[list[dict[str, Any]], list[list[float]]]],
    version: str,
    heights: tuple[float, float],
    visibilities: tuple[float, float],
    aspect: float,
    threshold: float,
    margin: float,
) -> float:
    """Compute MR^-2 of one setup.

    Args:
        images: Objects (lbl, bb, bbv, occ, ign) and detections [x, y, w, h, score] of each image.
    """
    load = _load_old if version == "caltech" else _load_new
    gt = [load(objects, heights, visibilities, aspect) for objects, _ in images]
    dt = []
    for _, detections in images:
        rows = [_resize(row) if version == "caltech" else list(row) for row in detections]
        dt.append([row for row in rows if row[3] >= heights[0] * (1 / margin) and row[3] < heights[1] * margin])
    num_gt, results = 0, []
    for gt_image, dt_image in zip(gt, dt, strict=True):
        num_gt_image, results_image = _eval_res(gt_image, dt_image, threshold)
        num_gt += num_gt_image
        results += results_image
    return _log_average(results, num_gt, len(images))


def _load_old(
    objects: list[dict[str, Any]], hr: tuple[float, float], vr: tuple[float, float], ar: float
) -> list[list[float]]:
    rows = []
    for o in objects:
        if o["lbl"] not in ("person", "person?", "people", "ignore"):
            continue
        x, y, w, h = o["bb"]
        p = o["lbl"] == "person"
        p = p and hr[0] <= h < hr[1]
        vf = INF if all(v == 0 for v in o["bbv"]) else o["bbv"][2] * o["bbv"][3] / (w * h)
        p = p and vr[0] <= vf <= vr[1]
        if ar != 0:
            p = p and math.copysign(1, ar) * abs(w / h - 0.41) < ar
        p = p and x >= 5 and x + w <= 635
        p = p and y >= 5 and y + h <= 475
        rows.append([*_resize([x, y, w, h]), 0] if p else [x, y, w, h, 1])
    return rows


def _load_new(
    objects: list[dict[str, Any]], hr: tuple[float, float], vr: tuple[float, float], ar: float
) -> list[list[float]]:
    vr = (1, 1) if vr == (INF, INF) else vr
    rows = []
    for o in objects:
        if o["lbl"] not in ("person", "person?", "people", "ignore"):
            continue
        x, y, w, h = o["bb"]
        ign = bool(o["ign"]) or o["lbl"] == "ignore"
        for v in (x, x + w):
            ign = ign or v < 5 or v > 635
        for v in (y, y + h):
            ign = ign or v < 5 or v > 475
        ign = ign or h < hr[0] or h > hr[1]
        if not o["occ"] or all(v == 0 for v in o["bbv"]):
            v = 1.0
        elif list(o["bbv"]) == list(o["bb"]):
            v = 0.0
        else:
            v = o["bbv"][2] * o["bbv"][3] / (w * h)
        ign = ign or v < vr[0] or v > vr[1]
        if ar != 0:
            ign = ign or not math.copysign(1, ar) * abs(w / h - 0.41) < ar
        rows.append([x, y, w, h, 1] if ign else [*_resize([x, y, w, h]), 0])
    return rows


def _resize(bb: list[float]) -> list[float]:
    d = bb[3] * 0.41 - bb[2]
    return [bb[0] - d / 2, bb[1], bb[2] + d, *bb[3:]]


def _eval_res(gt0: list[list[float]], dt0: list[list[float]], thr: float) -> tuple[int, list[tuple[float, int]]]:
    dt0 = sorted(dt0, key=lambda row: -row[4])
    gt = [[*row[:4], -row[4]] for row in sorted(gt0, key=lambda row: row[4])]
    results = []
    for d in dt0:
        best_oa, best_g, best_m = thr, -1, 0
        for g, box in enumerate(gt):
            m = box[4]
            if m == 1:
                continue
            if best_m != 0 and m == -1:
                break
            oa = _overlap(d, box, m == -1)
            if oa < best_oa:
                continue
            best_oa, best_g, best_m = oa, g, (1 if m == 0 else -1)
        if best_m == 1:
            gt[best_g][4] = 1
        if best_m != -1:
            results.append((d[4], best_m))
    return sum(row[4] != -1 for row in gt), results


def _overlap(dt: list[float], gt: list[float], ignored: bool) -> float:
    w = min(dt[0] + dt[2], gt[0] + gt[2]) - max(dt[0], gt[0])
    if w <= 0:
        return 0.0
    h = min(dt[1] + dt[3], gt[1] + gt[3]) - max(dt[1], gt[1])
    if h <= 0:
        return 0.0
    t = w * h
    return t / (dt[2] * dt[3] if ignored else dt[2] * dt[3] + gt[2] * gt[3] - t)


def _log_average(results: list[tuple[float, int]], num_gt: int, num_images: int) -> float:
    if num_gt == 0:
        return -1.0  # NaN in MATLAB
    ordered = sorted(results, key=lambda row: -row[0])
    xs, ys = [-INF], [0.0]
    fp = tp = 0
    for _, hit in ordered:
        fp, tp = fp + (hit != 1), tp + (hit == 1)
        xs.append(fp / num_images)
        ys.append(tp / num_gt)
    logs = []
    for exponent in (-2, -1.75, -1.5, -1.25, -1, -0.75, -0.5, -0.25, 0):
        last = max(j for j, x in enumerate(xs) if x <= 10.0**exponent)
        if ys[last] == 1:
            return 0.0
        logs.append(math.log(1 - ys[last]))
    return math.exp(sum(logs) / 9)
