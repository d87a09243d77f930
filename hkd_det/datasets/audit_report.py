"""Report of a label audit: figures for the terminal, `audit.json`, and one self-contained HTML page with thumbnails."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.audit import (
    CERTAIN_SCORE,
    FINDING_KINDS,
    FOUND_IOU,
    MAX_IMPROBABLE_SCORE,
    MAX_INSIDE_RATIO,
    MAX_LOCATION_IOU,
    MAX_MISSING_IOU,
    MAX_STORED_SCORE,
    MIN_LOCATION_IOU,
    MIN_ROTATED_SCORE,
    AuditModel,
    Finding,
    FindingKind,
    SplitAudit,
)
from hkd_det.datasets.check_report import IGNORED_COLOR, PERSON_COLOR, ImageRGB
from hkd_det.datasets.check_summary import escape_nonprintable
from hkd_det.files import write_text
from hkd_det.image import read_image
from hkd_det.structures import Sample

TEMPLATE = Path(__file__).with_name("audit_report.html.j2")
MAX_SHOWN = 60  # thumbnails per kind and split; audit.json contains all findings
TILE_PX = 220
CONTEXT_RATIO = 1.8  # side of a thumbnail divided by the longer side of its boxes
MIN_CONTEXT_PX = 64
PROPOSAL_COLOR, OUTLINE_COLOR = (255, 255, 255), (0, 0, 0)  # RGB

TITLES: dict[FindingKind, str] = {
    "missing": "Probable missing labels",
    "location": "Badly placed or loose boxes",
    "improbable": "Improbable labels",
    "rotated": "Rotated images",
}


@dataclass(frozen=True, eq=False)
class Thumbnail:
    """A finding on the page.

    Attributes:
        caption: File name, score, agreement and IoU.
        image_uri: Data URI of the thumbnail, a JPEG image.
    """

    caption: str
    image_uri: str


def make_audit_rows(audit: SplitAudit, num_models: int) -> list[tuple[str, str]]:
    """Return name and value of each figure of a split.

    Args:
        audit: Result of the split.
        num_models: Number of models.
    """
    ious = np.array(audit.found_ious)
    found = f"{len(ious) / audit.num_labels:.1%}" if audit.num_labels else "no labels"
    missing = audit.select("missing")
    num_certain = sum(finding.score >= CERTAIN_SCORE for finding in missing)
    num_agreed = sum(finding.num_models == num_models for finding in missing)
    agreed = f", {num_agreed:,} of them by all models" if num_models > 1 else ""
    rows = [
        ("images, labels", f"{audit.num_images:,}, {audit.num_labels:,}"),
        (f"labels found (IoU from {FOUND_IOU:g})", f"{len(ious):,} ({found})"),
        (
            "IoU of found labels",
            f"median {np.median(ious):.2f}; {(ious >= 0.75).mean():.0%} from 0.75" if len(ious) else "-",
        ),
        (TITLES["missing"].lower(), f"{_count(missing)}{agreed}; {num_certain:,} with a score from {CERTAIN_SCORE:g}"),
    ]
    rows += [(TITLES[kind].lower(), _count(audit.select(kind))) for kind in ("location", "improbable")]
    return [*rows, (TITLES["rotated"].lower(), f"{len(audit.select('rotated')):,}")]


def write_audit_json(
    path: Path, data: str, models: Sequence[AuditModel], audits: Sequence[SplitAudit], min_score: float
) -> None:
    """Write all findings as JSON.

    Args:
        path: Output file.
        data: Name of the dataset.
        models: The detectors.
        audits: Result of each split.
        min_score: Minimum score of a proposal.
    """
    content = {
        "data": data,
        "models": [{"file": str(model.detector.path), "sha256": model.sha256} for model in models],
        "thresholds": {
            "min_score": min_score,
            "max_missing_iou": MAX_MISSING_IOU,
            "max_inside_ratio": MAX_INSIDE_RATIO,
            "location_iou": [MIN_LOCATION_IOU, MAX_LOCATION_IOU],
            "max_improbable_score": MAX_IMPROBABLE_SCORE,
            "max_stored_score": MAX_STORED_SCORE,
            "min_rotated_score": MIN_ROTATED_SCORE,
        },
        "splits": {audit.split: _make_split_record(audit) for audit in audits},
    }
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_audit_page(
    path: Path,
    data: str,
    models: Sequence[AuditModel],
    audits: Sequence[SplitAudit],
    samples: Sequence[Sequence[Sample]],
) -> None:
    """Write the HTML page with the most certain findings of each kind and split.

    Args:
        path: Output file.
        data: Name of the dataset.
        models: The detectors.
        audits: Result of each split.
        samples: Samples of each split.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    splits = []
    for audit, split_samples in zip(audits, samples, strict=True):
        samples_by_id = {sample.image_id: sample for sample in split_samples}
        sections = []
        for kind in FINDING_KINDS:
            findings = audit.select(kind)
            thumbnails = [
                Thumbnail(_make_caption(one, len(models)), _encode_uri(draw_finding(one, samples_by_id[one.image_id])))
                for one in findings[:MAX_SHOWN]
            ]
            sections.append((TITLES[kind], len(findings), thumbnails))
        splits.append((audit.split, make_audit_rows(audit, len(models)), sections))
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    names = ", ".join(model.name for model in models)
    write_text(path, template.render(data=data, models=names, splits=splits))


def draw_finding(finding: Finding, sample: Sample) -> ImageRGB:
    """Draw the surroundings of a finding: its label, its proposal, and the other annotations as thin lines.

    A finding without label and proposal is the whole image.

    Args:
        finding: The finding.
        sample: Sample of the image.

    Returns:
        array[TILE_PX, TILE_PX, 3]: RGB, uint8.
    """
    image = read_image(finding.path)
    boxes = np.array([box for box in (finding.label_xyxy, finding.proposal_xyxy) if box])
    size_hw = image.shape[0], image.shape[1]
    x1, y1, x2, y2 = _compute_crop(boxes, size_hw) if len(boxes) else (0, 0, size_hw[1], size_hw[0])
    scale = TILE_PX / max(x2 - x1, y2 - y1)
    size = max(1, round((x2 - x1) * scale)), max(1, round((y2 - y1) * scale))
    crop = cv2.resize(image[y1:y2, x1:x2], size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    tile = np.full((TILE_PX, TILE_PX, 3), 24, np.uint8)
    tile[: crop.shape[0], : crop.shape[1]] = crop
    offset = np.array([x1, y1, x1, y1])

    def draw_box(box: Sequence[float] | NDArray[np.floating], color: tuple[int, int, int], width: int) -> None:
        left, top, right, bottom = ((np.asarray(box) - offset) * scale).clip(-1e4, 1e4).round().astype(int).tolist()
        cv2.rectangle(tile, (left, top), (right, bottom), color, width)

    for box, ignored in zip(sample.ground_truth.boxes_xyxy, sample.ground_truth.ignore, strict=True):
        draw_box(box, IGNORED_COLOR if ignored else PERSON_COLOR, 1)
    if finding.label_xyxy:
        draw_box(finding.label_xyxy, PERSON_COLOR, 3)
    if finding.proposal_xyxy:  # white between black lines: visible on any background, and without color
        draw_box(finding.proposal_xyxy, OUTLINE_COLOR, 4)
        draw_box(finding.proposal_xyxy, PROPOSAL_COLOR, 2)
    return tile


def _compute_crop(boxes_xyxy: NDArray[np.float64], size_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return a square around the boxes, moved into the image and clipped to it, with at least one pixel."""
    low, high = boxes_xyxy[:, :2].min(0), boxes_xyxy[:, 2:].max(0)
    side = max(MIN_CONTEXT_PX, CONTEXT_RATIO * float((high - low).max()))
    size_wh = np.array(size_hw[::-1])
    start = np.clip((low + high - side) / 2, 0, np.maximum(0, size_wh - side)).astype(int)
    end = np.clip(start + max(1, round(side)), 1, size_wh)
    return int(start[0]), int(start[1]), int(end[0]), int(end[1])


def _make_caption(finding: Finding, num_models: int) -> str:
    parts = [escape_nonprintable(finding.path.name), f"score {finding.score:.2f}"]
    if finding.proposal_xyxy and num_models > 1:
        parts.append(f"{finding.num_models} of {num_models} models")
    if finding.kind == "location":
        parts.append(f"IoU {finding.iou:.2f}")
    if finding.kind == "rotated":
        parts.append(f"rotate by {finding.rotation} degrees counterclockwise")
    return ", ".join(parts)


def _encode_uri(image_rgb: ImageRGB) -> str:
    jpeg = cv2.imencode(".jpg", cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode("ascii")


def _count(findings: Sequence[Finding]) -> str:
    num_images = len({finding.image_id for finding in findings})
    return f"{len(findings):,} in {num_images:,} image{'' if num_images == 1 else 's'}"


def _make_split_record(audit: SplitAudit) -> dict[str, Any]:
    ious = audit.found_ious
    return {
        "num_images": audit.num_images,
        "num_labels": audit.num_labels,
        "num_labels_found": len(ious),
        "median_iou": round(float(np.median(ious)), 4) if ious else None,
        **{f"num_{kind}": len(audit.select(kind)) for kind in FINDING_KINDS},
        "findings": [_make_record(finding) for finding in audit.findings],
    }


def _make_record(finding: Finding) -> dict[str, Any]:
    label, proposal = (
        [round(side, 2) for side in box] if box else None for box in (finding.label_xyxy, finding.proposal_xyxy)
    )
    return {
        "kind": finding.kind,
        "image_id": finding.image_id,
        "file": str(finding.path),
        "score": round(finding.score, 4),
        "num_models": finding.num_models,
        "label_xyxy": label,
        "proposal_xyxy": proposal,
        "iou": round(finding.iou, 4),
        "rotation": finding.rotation,
    }
