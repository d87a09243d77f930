"""Label audit: compare the labels of images with the fused detections of one or several models.

The fusion is weighted boxes fusion (Solovyev et al., Image and Vision Computing 2021). The findings are those of
ObjectLab (Tkachenko et al., 2023) for one class: overlooked, badly located and spurious labels.
benchmarks/results/label_audit.md contains the precision and recall at these thresholds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from hkd_det.onnxrt.detector import OnnxDetector
from hkd_det.structures import (
    Boxes,
    Detections,
    GroundTruth,
    Sample,
    box_area,
    box_intersection,
    box_iou,
    fuse_detections,
)

FindingKind = Literal["missing", "location", "improbable", "rotated"]
FINDING_KINDS: tuple[FindingKind, ...] = ("missing", "location", "improbable", "rotated")

FUSION_MIN_SCORE = 0.05  # weaker boxes change no cluster that can become a finding
PROPOSAL_SCORE = 0.3  # default of --audit-score; about two of three missing labels of INRIA test are people
CERTAIN_SCORE = 0.5  # about five of six
# Missing: the proposal is no label (IoU), and neither a part of a label nor of an ignore region.
MAX_MISSING_IOU = 0.4
MAX_INSIDE_RATIO = 0.6
# Location: below 0.3 the proposal shows something else; from 0.6 it is as close as these models get.
MIN_LOCATION_IOU, MAX_LOCATION_IOU = 0.3, 0.6
FOUND_IOU = 0.5  # as in the miss rate
MAX_IMPROBABLE_SCORE = 0.05  # mean over the models of the best score at the label
# Rotated: mean over labels and models of the best score at the label, in the stored image and in the rotated image.
MAX_STORED_SCORE, MIN_ROTATED_SCORE = 0.1, 0.6


@dataclass(frozen=True, eq=False)
class AuditModel:
    """One detector of the audit.

    Attributes:
        name: File name without suffix.
        detector: The opened model.
        sha256: SHA-256 digest of the ONNX file.
    """

    name: str
    detector: OnnxDetector
    sha256: str


@dataclass(frozen=True, eq=False)
class Proposals:
    """Fused detections of several models in one image, sorted by descending score.

    Attributes:
        boxes_xyxy (array[N, 4], float64): xyxy, pixels of the image.
        scores (array[N], float64): Sum of the scores of a cluster divided by the number of all models, 0 to 1.
        num_models (array[N], int): Number of models that detect the box.
    """

    boxes_xyxy: NDArray[np.float64]
    scores: NDArray[np.float64]
    num_models: NDArray[np.int64]


@dataclass(frozen=True)
class Finding:
    """A label that is probably missing or wrong.

    Attributes:
        kind: `missing` (a person without label), `location` (a label that does not fit the person), `improbable`
            (a label where no model detects a person) or `rotated` (an image whose labels the models find only after a
            rotation).
        image_id: Identifier of the image in its split.
        path: Image file.
        score: Score of the proposal. For `improbable`: mean over the models of the best score at the label. For
            `rotated`: mean over labels and models of that score in the rotated image.
        num_models: Number of models that detect the proposal; 0 without proposal.
        label_xyxy: Box of the label, xyxy, pixels; None for `missing` and `rotated`.
        proposal_xyxy: Box of the proposal, xyxy, pixels; None for `improbable` and `rotated`.
        iou: IoU of label and proposal; 0 if one of them does not exist.
        rotation: For `rotated`: degrees, counterclockwise, after which the people stand upright.
    """

    kind: FindingKind
    image_id: int | str
    path: Path
    score: float
    num_models: int
    label_xyxy: tuple[float, ...] | None
    proposal_xyxy: tuple[float, ...] | None
    iou: float = 0.0
    rotation: int = 0

    @property
    def sort_key(self) -> tuple[float, float]:
        """Key that sorts findings of one kind, the most certain first."""
        if self.kind in ("missing", "rotated"):
            return -self.score, 0.0
        if self.kind == "location":
            return -self.score * (1 - self.iou), 0.0
        assert self.label_xyxy is not None
        return self.score, self.label_xyxy[1] - self.label_xyxy[3]  # among equals the tallest first


@dataclass(frozen=True)
class SplitAudit:
    """Result of the audit of one split.

    Attributes:
        split: Name of the split.
        num_images: Number of images.
        num_labels: Number of labels that are not ignored.
        matched_ious: IoU of each label that a proposal matches (at least `MIN_LOCATION_IOU`).
        findings: All findings, sorted by kind and certainty.
    """

    split: str
    num_images: int
    num_labels: int
    matched_ious: tuple[float, ...]
    findings: tuple[Finding, ...]

    def select(self, kind: FindingKind) -> list[Finding]:
        """Return the findings of one kind, the most certain first.

        Args:
            kind: Kind of the findings.
        """
        return [finding for finding in self.findings if finding.kind == kind]

    @property
    def found_ious(self) -> list[float]:
        """IoU of each label that the models find (at least `FOUND_IOU`)."""
        return [iou for iou in self.matched_ious if iou >= FOUND_IOU]


def audit_split(
    split: str,
    samples: Sequence[Sample],
    detections: Sequence[Sequence[Detections]],
    min_score: float = PROPOSAL_SCORE,
) -> SplitAudit:
    """Audit the labels of a split.

    Args:
        split: Name of the split.
        samples: Samples of the split.
        detections: For each model, the detections of each sample, down to a score of about 0.01.
        min_score: Minimum score of a proposal, 0 to 1.

    Returns:
        The result.
    """
    findings: list[Finding] = []
    matched_ious: list[float] = []
    for index, sample in enumerate(samples):
        image_detections = [model_detections[index] for model_detections in detections]
        proposals = _make_proposals(image_detections, min_score)
        pairs = _match_labels(sample.ground_truth, proposals)
        matched_ious += [iou for _, _, iou in pairs]
        bad_pairs = [pair for pair in pairs if _is_bad_location(pair, proposals, len(detections))]
        findings += [_make_location_finding(sample, proposals, *pair) for pair in bad_pairs]
        findings += _find_missing(sample, proposals, [proposal for _, proposal, _ in bad_pairs])
        findings += _find_improbable(sample, image_detections)
    findings.sort(key=lambda finding: (FINDING_KINDS.index(finding.kind), *finding.sort_key))
    num_labels = sum(int((~sample.ground_truth.ignore).sum()) for sample in samples)
    return SplitAudit(split, len(samples), num_labels, tuple(matched_ious), tuple(findings))


def select_rotation_candidates(samples: Sequence[Sample], detections: Sequence[Sequence[Detections]]) -> list[int]:
    """Return the indices of the samples whose labels the models do not find.

    Args:
        samples: Samples of the split.
        detections: For each model, the detections of each sample.
    """
    scores = [
        _score_labels(sample.ground_truth, [model_detections[index] for model_detections in detections])
        for index, sample in enumerate(samples)
    ]
    return [
        index
        for index, (sample, score) in enumerate(zip(samples, scores, strict=True))
        if score < MAX_STORED_SCORE and not sample.ground_truth.ignore.all()
    ]


def find_rotated(
    samples: Sequence[Sample], rotated_detections: Mapping[int, Sequence[Sequence[Detections]]]
) -> list[Finding]:
    """Find images whose labels the models find after a rotation.

    Args:
        samples: Samples whose labels the models do not find in the stored image.
        rotated_detections: For each rotation in degrees, counterclockwise: for each model, the detections of each
            sample in its rotated image, in pixels of the stored image.

    Returns:
        The findings, the most certain first.
    """
    findings = []
    for index, sample in enumerate(samples):
        scores = {
            rotation: _score_labels(sample.ground_truth, [model_detections[index] for model_detections in detections])
            for rotation, detections in rotated_detections.items()
        }
        best = max(scores, key=lambda rotation: scores[rotation])
        if scores[best] >= MIN_ROTATED_SCORE:
            findings.append(
                Finding("rotated", sample.image_id, sample.path, scores[best], 0, None, None, rotation=best)
            )
    return sorted(findings, key=lambda finding: finding.sort_key)


def _make_proposals(detections: Sequence[Detections], min_score: float) -> Proposals:
    """Fuse the detections of several models in one image."""
    candidates = []
    for item in detections:
        is_candidate = item.scores >= FUSION_MIN_SCORE
        candidates.append(Detections(item.boxes_xyxy[is_candidate], item.scores[is_candidate]))
    fused, num_models = fuse_detections(candidates)
    kept = fused.scores >= min_score
    return Proposals(fused.boxes_xyxy[kept].astype(float), fused.scores[kept].astype(float), num_models[kept])


def _find_missing(sample: Sample, proposals: Proposals, located: Sequence[int]) -> list[Finding]:
    """Find proposals that are no label.

    A finding counts as a label for the weaker proposals after it, and so do the proposals `located` of bad locations.
    """
    is_label = ~sample.ground_truth.ignore
    labels = [*sample.ground_truth.boxes_xyxy[is_label], *sample.ground_truth.visible_xyxy[is_label]]
    labels += list(proposals.boxes_xyxy[list(located)])
    ignored = list(sample.ground_truth.boxes_xyxy[~is_label])
    findings = []
    for box, score, num_models in zip(proposals.boxes_xyxy, proposals.scores, proposals.num_models, strict=True):
        if _max_iou(box, labels) > MAX_MISSING_IOU or _max_inside_ratio(box, labels + ignored) > MAX_INSIDE_RATIO:
            continue
        labels.append(box)
        findings.append(
            Finding("missing", sample.image_id, sample.path, float(score), int(num_models), None, tuple(box.tolist()))
        )
    return findings


def _match_labels(ground_truth: GroundTruth, proposals: Proposals) -> list[tuple[int, int, float]]:
    """Assign proposals to labels one to one; return label, proposal and IoU of each pair."""
    rows = np.flatnonzero(~ground_truth.ignore)
    ious = np.maximum(
        box_iou(ground_truth.boxes_xyxy[rows], proposals.boxes_xyxy),
        box_iou(ground_truth.visible_xyxy[rows], proposals.boxes_xyxy),
    )  # [labels, proposals]
    ious[ious < MIN_LOCATION_IOU] = 0
    pairs = zip(*linear_sum_assignment(ious, maximize=True), strict=True)
    return [(int(rows[row]), int(column), float(ious[row, column])) for row, column in pairs if ious[row, column] > 0]


def _is_bad_location(pair: tuple[int, int, float], proposals: Proposals, num_models: int) -> bool:
    """Return whether a label differs from a proposal of the majority of the models."""
    _, proposal, iou = pair
    return iou < MAX_LOCATION_IOU and bool(2 * proposals.num_models[proposal] > num_models)


def _make_location_finding(sample: Sample, proposals: Proposals, label: int, proposal: int, iou: float) -> Finding:
    return Finding(
        "location",
        sample.image_id,
        sample.path,
        float(proposals.scores[proposal]),
        int(proposals.num_models[proposal]),
        tuple(sample.ground_truth.boxes_xyxy[label].tolist()),
        tuple(proposals.boxes_xyxy[proposal].tolist()),
        iou,
    )


def _find_improbable(sample: Sample, detections: Sequence[Detections]) -> list[Finding]:
    """Find labels at which no model detects anything, even at a very low score."""
    ground_truth, findings = sample.ground_truth, []
    for row in np.flatnonzero(~ground_truth.ignore):
        box_pair = np.stack([ground_truth.boxes_xyxy[row], ground_truth.visible_xyxy[row]])
        best_scores = [
            np.where(box_iou(box_pair, one.boxes_xyxy).max(0) >= MIN_LOCATION_IOU, one.scores, 0).max(initial=0)
            for one in detections
        ]
        score = float(np.mean(best_scores))
        if score < MAX_IMPROBABLE_SCORE:
            label = tuple(ground_truth.boxes_xyxy[row].tolist())
            findings.append(Finding("improbable", sample.image_id, sample.path, score, 0, label, None))
    return findings


def _score_labels(ground_truth: GroundTruth, detections: Sequence[Detections]) -> float:
    """Return the mean over labels and models of the best score at the label; 0 without labels."""
    labels = ground_truth.boxes_xyxy[~ground_truth.ignore]
    best_scores = [
        np.where(box_iou(labels, one.boxes_xyxy) >= FOUND_IOU, one.scores, 0).max(axis=1, initial=0)
        for one in detections
    ]  # per model [labels]
    return float(np.mean(best_scores)) if len(labels) else 0.0


def _max_iou(box: NDArray[np.float64], others: Sequence[Boxes]) -> float:
    return float(box_iou(box[None], np.array(others).reshape(-1, 4)).max(initial=0))


def _max_inside_ratio(box: NDArray[np.float64], regions: Sequence[Boxes]) -> float:
    """Return the largest fraction of a box that is inside one region."""
    inside = box_intersection(box[None], np.array(regions).reshape(-1, 4)).max(initial=0)
    return float(inside / max(box_area(box[None])[0], 1e-9))
