"""Results of a label audit.

Figures for the terminal, `audit.json`, one self-contained HTML page with thumbnails, and COCO files with the
annotations of a split and the missing people.
"""

import base64
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import jinja2
import numpy as np
import yaml
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
from hkd_det.datasets.catalog import dataset_license, find_coco_source, list_coco_files
from hkd_det.datasets.check_report import IGNORED_COLOR, PERSON_COLOR, ImageRGB
from hkd_det.datasets.check_summary import escape_nonprintable
from hkd_det.datasets.coco import list_annotated_categories, read_coco_content
from hkd_det.datasets.person_classes import assign_class_roles
from hkd_det.errors import DataError, UsageError
from hkd_det.files import write_text
from hkd_det.image import read_image
from hkd_det.structures import Boxes, Sample, box_area, clip_boxes, xywh_from_xyxy

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
AuditedAs = Literal["ignore", "label", "detections"]
SPLIT_PLACEHOLDER = "{split}"


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


@dataclass(frozen=True)
class AuditedSplit:
    """A written file, as a split of a data YAML.

    Attributes:
        annotations: The COCO file.
        images: Directory that the file names are relative to.
        categories: Names of the person categories.
        ignored_categories: Names of the categories whose boxes are ignore regions.
        num_labels: Number of added labels.
        num_ignore_regions: Number of added ignore regions.
    """

    annotations: Path
    images: Path
    categories: tuple[str, ...]
    ignored_categories: tuple[str, ...]
    num_labels: int
    num_ignore_regions: int


def plan_audited_files(data: str, template: str, splits: Sequence[str]) -> dict[str, Path]:
    """Return the output file of each split, before the audit starts.

    Args:
        data: Name in datasets.yaml, or path of a data YAML.
        template: Value of --write-audited. `{split}` is replaced; without it, several splits get the suffix `_SPLIT`.
        splits: Names of the splits.

    Raises:
        UsageError: A file is a directory, or is an annotation file of the dataset.
        DataError: A file cannot be written.
    """
    if SPLIT_PLACEHOLDER not in template and len(splits) > 1:
        path = Path(template)
        template = str(path.with_name(f"{path.stem}_{SPLIT_PLACEHOLDER}{path.suffix}"))
    paths = {split: Path(template.replace(SPLIT_PLACEHOLDER, split)) for split in splits}
    sources = {source.resolve() for source in list_coco_files(data)}
    for path in paths.values():
        if path.is_dir():
            raise UsageError(f"--write-audited {path}: expected a file, got a directory. Pass {path / 'audited.json'}.")
        if path.resolve() in sources:
            raise UsageError(f"--write-audited {path}: contains the annotations of --data. Choose another file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise DataError(f"--write-audited {path}: no permission to write in {path.parent}. Choose another file.")
    return paths


def write_audited_split(
    path: Path,
    data: str,
    split: str,
    readable: Sequence[tuple[Sample, tuple[int, int]]],
    missing: Sequence[Finding],
    audited_as: AuditedAs,
) -> AuditedSplit:
    """Write the annotations of a split and the missing people.

    The records of a COCO file are copied unchanged. Other formats, and splits of several COCO files, are converted.

    Args:
        path: Output file.
        data: Name in datasets.yaml, or path of a data YAML.
        split: Name of the split.
        readable: Samples of the split with height and width of their images in pixels.
        missing: Findings of the kind `missing`.
        audited_as: "ignore" adds ignore regions. "label" adds labels for scores from `CERTAIN_SCORE`, and ignore
            regions for lower scores. "detections" does the same without the annotations of the split.

    Returns:
        The file as a split.
    """
    source = find_coco_source(data, split)
    if source:
        content, images = read_coco_content(source.annotations), source.images
        categories = list_annotated_categories(content)
        roles = assign_class_roles(categories, source.category, source.ignore_category, str(source.annotations))
        person_id = next(key for key in categories if key in roles.persons)
        persons = tuple(name for key, name in categories.items() if key in roles.persons)
        ignored = tuple(name for key, name in categories.items() if key in roles.ignored)
    else:
        images = Path(os.path.commonpath([str(sample.path.parent.resolve()) for sample, _ in readable]))
        content, person_id, persons, ignored = _convert_to_coco(readable, images), 1, ("person",), ()
    if audited_as == "detections":
        content["annotations"] = []
    sizes = {sample.image_id: size_hw for sample, size_hw in readable}
    ids = [
        record["id"] for record in content["annotations"] if isinstance(record, dict) and type(record.get("id")) is int
    ]
    first_id, num_labels = max(ids, default=0) + 1, 0
    for number, finding in enumerate(missing):
        is_label = audited_as != "ignore" and finding.score >= CERTAIN_SCORE
        num_labels += is_label
        assert finding.proposal_xyxy is not None
        box = clip_boxes(np.array([finding.proposal_xyxy]), sizes[finding.image_id])
        record = {"id": first_id + number, "image_id": finding.image_id, "category_id": person_id}
        record |= _make_box_fields(box[0], is_ignored=not is_label)
        record |= {"source": "audit", "score": round(finding.score, 4), "num_models": finding.num_models}
        content["annotations"].append(record)
    write_text(path, json.dumps(content) + "\n")
    return AuditedSplit(path, images, persons, ignored, num_labels, len(missing) - num_labels)


def write_audited_yaml(path: Path, data: str, splits: dict[str, AuditedSplit]) -> None:
    """Write a data YAML that names the audited files.

    Args:
        path: Output file.
        data: Name in datasets.yaml, or path of a data YAML: the original dataset.
        splits: The file of each split.
    """
    first = next(iter(splits.values()))
    content: dict[str, Any] = {"format": "coco", "category": _unwrap(first.categories)}
    if first.ignored_categories:
        content["ignore_category"] = _unwrap(first.ignored_categories)
    if dataset_license(data):
        content["license"] = dataset_license(data)
    for name, split in splits.items():
        content[name] = {"images": str(split.images.resolve()), "annotations": str(split.annotations.resolve())}
    write_text(path, yaml.safe_dump(content, sort_keys=False, width=1000, allow_unicode=True))


def _unwrap(names: tuple[str, ...]) -> str | list[str]:
    return names[0] if len(names) == 1 else list(names)


def _convert_to_coco(readable: Sequence[tuple[Sample, tuple[int, int]]], images: Path) -> dict[str, Any]:
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for sample, (height, width) in readable:
        file_name = os.path.relpath(sample.path.resolve(), images)
        records.append({"id": sample.image_id, "file_name": file_name, "width": width, "height": height})
        ground_truth = sample.ground_truth
        for full, visible, ignored in zip(
            ground_truth.boxes_xyxy, ground_truth.visible_xyxy, ground_truth.ignore, strict=True
        ):
            record: dict[str, Any] = {"id": len(annotations) + 1, "image_id": sample.image_id, "category_id": 1}
            record |= _make_box_fields(full, bool(ignored))
            if not np.array_equal(clip_boxes(full[None], (height, width))[0], visible):  # hidden or outside the image
                record["vis_bbox"] = _make_bbox(visible)
            annotations.append(record)
    return {"images": records, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}


def _make_box_fields(box_xyxy: Boxes, is_ignored: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {"bbox": _make_bbox(box_xyxy), "area": round(float(box_area(box_xyxy[None])[0]), 2)}
    return {**fields, "iscrowd": int(is_ignored)} | ({"ignore": 1} if is_ignored else {})


def _make_bbox(box_xyxy: Boxes) -> list[float]:
    return [round(side, 3) for side in xywh_from_xyxy(box_xyxy.astype(np.float64))[0].tolist()]
