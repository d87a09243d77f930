"""Files of `--save-detections`: the detections of each model in COCO's result format."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hkd_det.datasets.catalog import find_coco_source
from hkd_det.datasets.coco import list_annotated_categories, read_coco_content
from hkd_det.datasets.person_classes import assign_class_roles
from hkd_det.metrics.coco_files import (
    PERSON_CATEGORY_ID,
    CocoGroundTruth,
    CocoId,
    read_coco_detections,
    write_coco_detections,
)
from hkd_det.metrics.tables import GroundTruthTable
from hkd_det.structures import Detections, Sample, xyxy_from_xywh


def list_detection_files(path: Path, names: Sequence[str]) -> list[Path]:
    """Return the file for the detections of each model.

    Args:
        path: Path of `--save-detections`.
        names: Names of the models.

    Returns:
        `path` for one model; for several, the name of each is added: detections-NAME.json.
    """
    if len(names) == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{stem}{path.suffix}") for stem in make_file_stems(names)]


def make_file_stems(names: Sequence[str]) -> list[str]:
    """Return a unique file name without suffix for each model.

    Args:
        names: Names of the models.
    """
    stems = [re.sub(r"[^\w.-]+", "_", name) for name in names]
    if len(set(stems)) < len(stems):
        stems = [f"{index}-{stem}" for index, stem in enumerate(stems, 1)]
    return stems


def find_category_id(data: str, split: str) -> CocoId | None:
    """Return the id of the first person class in the COCO file of a split, or None for other formats.

    Args:
        data: Name of a dataset, or path of its YAML file.
        split: Name of the split.
    """
    source = find_coco_source(data, split)
    if source is None:
        return None
    categories = list_annotated_categories(read_coco_content(source.annotations))
    roles = assign_class_roles(categories, source.category, source.ignore_category, str(source.annotations))
    category_id: CocoId = next(key for key in categories if key in roles.persons)
    return category_id


def write_detections(
    path: Path, samples: Sequence[Sample], detections: Sequence[Detections], category_id: CocoId | None
) -> None:
    """Write the detections of one model.

    Args:
        path: Output file (.json).
        samples: The images.
        detections: Detections in each image.
        category_id: Result of `find_category_id`. With None, the image id is the file name if these do not repeat.
    """
    image_ids: list[CocoId] = [sample.image_id for sample in samples]
    names = [sample.path.name for sample in samples]
    if category_id is None and len(set(names)) == len(names):
        image_ids = [*names]
    write_coco_detections(path, image_ids, detections, PERSON_CATEGORY_ID if category_id is None else category_id)


def read_detections(path: Path, samples: Sequence[Sample], category_id: CocoId | None) -> list[Detections]:
    """Read the detections of one model.

    Args:
        path: File of `write_detections`, or another file of COCO's result format.
        samples: The images.
        category_id: Result of `find_category_id`.

    Returns:
        Detections in each image.

    Raises:
        DataError: The file is missing or invalid, or names an image that is not among the samples.
    """
    ground_truth = CocoGroundTruth(
        path,
        tuple(sample.image_id for sample in samples),
        {PERSON_CATEGORY_ID if category_id is None else category_id: "person"},
        GroundTruthTable.from_samples([sample.ground_truth for sample in samples]),
        np.zeros(0),
        np.zeros(0, bool),
        file_names=tuple(sample.path.name for sample in samples),
    )
    table = read_coco_detections(path, ground_truth)
    ends = np.searchsorted(table.image_index, np.arange(1, len(samples)))
    boxes, scores = np.split(xyxy_from_xywh(table.boxes_xywh), ends), np.split(table.scores, ends)
    return [
        Detections(rows.astype(np.float32), values.astype(np.float32))
        for rows, values in zip(boxes, scores, strict=True)
    ]
