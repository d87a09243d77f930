"""COCO files with the annotations of a split and the missing people that a label audit found."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from hkd_det.datasets.audit import CERTAIN_SCORE, Finding
from hkd_det.datasets.catalog import dataset_license, find_coco_source
from hkd_det.datasets.coco import list_annotated_categories, read_coco_content
from hkd_det.datasets.person_classes import assign_class_roles
from hkd_det.errors import DataError, UsageError
from hkd_det.files import write_text
from hkd_det.structures import Boxes, Sample, box_area, clip_boxes, xywh_from_xyxy

AuditedAs = Literal["ignore", "label", "detections"]
SPLIT_PLACEHOLDER = "{split}"


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
    for split, path in paths.items():
        source = find_coco_source(data, split)
        if path.is_dir():
            raise UsageError(f"--write-audited {path}: expected a file, got a directory. Pass {path / 'audited.json'}.")
        if source and path.resolve() == source.annotations.resolve():
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
