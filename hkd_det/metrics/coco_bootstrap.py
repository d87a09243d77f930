"""Bootstrap over images: confidence intervals of COCO's average precision.

A resample contains each image as often as it was drawn. pycocotools matches the detections of each image once, because
the match does not depend on other images; `resample_average_precision` then accumulates the matches with the number of
copies of each image as weights. The result equals an evaluation of a dataset with these copies, unless detections of
one image have equal scores, which the copies would mix.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval
from scipy.sparse import csr_array

from hkd_det.metrics.bootstrap import NUM_RESAMPLES, compute_ends
from hkd_det.metrics.tables import Floats

NUM_ROWS_PER_CHUNK = 250  # resamples at once; limits memory to about 100 MB per 50,000 true positives


def compute_ap_intervals(
    coco_eval: COCOeval, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Compute the 95 % intervals of AP and AP50 over boxes of all sizes.

    Args:
        coco_eval: An evaluation after `evaluate`.
        num_resamples: Number of resamples of the images.
        seed: Seed of the resamples.

    Returns:
        Ends of the interval of "AP" and "AP50", 0 to 1; empty without ground truth.
    """
    values = resample_average_precision(coco_eval, num_resamples, seed)
    values = values[:, ~np.isnan(values[0])]
    if not values.shape[1]:
        return {}
    return {"AP": compute_ends(values.mean(axis=0)), "AP50": compute_ends(values[0])}


def resample_average_precision(coco_eval: COCOeval, num_resamples: int, seed: int) -> Floats:
    """Compute the average precision of resamples at each IoU threshold.

    Args:
        coco_eval: An evaluation after `evaluate`.
        num_resamples: Number of resamples.
        seed: Seed of the resamples; `bootstrap.resample_miss_rates` draws the same images with it.

    Returns:
        array[T, num_resamples]: AP at each of T IoU thresholds, 0 to 1; NaN for a resample without ground truth.
    """
    num_images, thresholds = len(coco_eval.params.imgIds), coco_eval.params.iouThrs
    # The first area range contains all sizes: the first entry of each image.
    images = [entry or None for entry in coco_eval.evalImgs[:num_images]]
    matches = _Matches(images, len(thresholds))
    rng, values = np.random.default_rng(seed), np.empty((len(thresholds), num_resamples))
    for start in range(0, num_resamples, NUM_ROWS_PER_CHUNK):
        size = min(NUM_ROWS_PER_CHUNK, num_resamples - start)
        weights = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size)
        for index in range(len(thresholds)):
            values[index, start : start + size] = matches.compute_weighted_ap(
                index, weights, np.asarray(coco_eval.params.recThrs)
            )
    return values


class _Matches:
    """Matches of all images by descending score.

    Args:
        images: Entry of `evalImgs` of each image; None for an image without boxes.
        num_thresholds: Number of IoU thresholds.
    """

    def __init__(self, images: list[dict[str, Any] | None], num_thresholds: int) -> None:
        used = [image for image in images if image is not None]
        counts = [0 if image is None else len(image["dtScores"]) for image in images]
        empty = np.zeros((num_thresholds, 0))
        scores = np.concatenate([np.asarray(image["dtScores"], np.float64) for image in used] or [np.zeros(0)])
        order = np.argsort(-scores, kind="mergesort")  # the order of pycocotools
        is_matched = np.concatenate([image["dtMatches"] for image in used] or [empty], axis=1)[:, order] > 0
        is_ignored = np.concatenate([image["dtIgnore"] for image in used] or [empty], axis=1)[:, order] > 0
        self.image_index = np.repeat(np.arange(len(images)), counts)[order]
        self.is_true, self.is_false = is_matched & ~is_ignored, ~is_matched & ~is_ignored
        self.gt_per_image = np.array(
            [0 if image is None else int((np.asarray(image["gtIgnore"]) == 0).sum()) for image in images]
        )

    def compute_weighted_ap(self, threshold: int, weights: NDArray[np.int_], recall_points: Floats) -> Floats:
        """Compute AP with image i counted `weights[r, i]` times, for each row r.

        Only true positives change the recall, and the interpolated precision at a recall is that of a true positive,
        so that false positives are summed up between true positives.

        Args:
            threshold: Index of the IoU threshold.
            weights (int array[R, num_images]): Number of copies of each image.
            recall_points (float64 array[101]): Recall at which the precision is interpolated.

        Returns:
            array[R]: AP, 0 to 1; NaN without ground truth.
        """
        num_gt = weights @ self.gt_per_image
        true_rows, false_rows = np.flatnonzero(self.is_true[threshold]), np.flatnonzero(self.is_false[threshold])
        if not len(true_rows):
            return np.where(num_gt > 0, 0.0, np.nan)
        num_true = np.cumsum(weights[:, self.image_index[true_rows]], axis=1)  # [R, S]
        segment = np.searchsorted(true_rows, false_rows)  # of the next true positive
        is_used = segment < len(true_rows)
        shape = (weights.shape[1], len(true_rows))
        index = (self.image_index[false_rows[is_used]], segment[is_used])
        per_segment = csr_array((np.ones(int(is_used.sum())), index), shape=shape)
        num_false = np.cumsum(weights @ per_segment, axis=1)  # [R, S]
        precision = num_true / np.maximum(num_true + num_false, np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = num_true / np.maximum(num_gt, 1)[:, None]
        values = np.empty(len(weights))
        for row in range(len(weights)):
            position = np.searchsorted(recall[row], recall_points, side="left")
            reached = position < len(true_rows)
            values[row] = precision[row, position[reached]].sum() / len(recall_points)
        return np.where(num_gt > 0, values, np.nan)
