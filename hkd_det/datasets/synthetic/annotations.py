"""CityPersons' own files: `anno_*.mat` and the gtBboxCityPersons JSON tree."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io

from hkd_det.datasets.synthetic.scene import AnnotationRecord
from hkd_det.files import atomic_write, write_text

JSON_LABELS = ("ignore", "pedestrian", "rider", "sitting person", "person (other)", "person group")


@dataclass(frozen=True)
class ImageAnnotations:
    """One picture's place in the tree, `city` and file stem (CITY_000000_000000), and its records."""

    city: str
    stem: str
    records: list[AnnotationRecord]


def write_citypersons_mat(path: Path, split: str, annotations: Sequence[ImageAnnotations]) -> None:
    """`anno_train.mat` or `anno_val.mat`, nested as the official ones: a (1, N) cell of (1, 1) structs."""
    cells = np.empty((1, len(annotations)), object)
    for index, picture in enumerate(annotations):
        rows = [
            [record.label, *record.box_xywh, record.instance_id, *record.visible_xywh] for record in picture.records
        ]
        struct = np.empty((1, 1), [("cityname", "O"), ("im_name", "O"), ("bbs", "O")])
        struct[0, 0] = (
            picture.city,
            f"{picture.stem}_leftImg8bit.png",
            np.array(rows, np.int16 if np.min(rows, initial=0) < 0 else np.uint16).reshape(-1, 10),
        )
        cells[0, index] = struct
    with atomic_write(path) as aside:
        scipy.io.savemat(aside, {f"anno_{split}_aligned": cells}, do_compression=True)


def write_citypersons_json(path: Path, size_hw: tuple[int, int], records: Sequence[AnnotationRecord]) -> None:
    """`*_gtBboxCityPersons.json` of one picture."""
    objects = [
        {
            "instanceId": record.instance_id,
            "bbox": list(record.box_xywh),
            "bboxVis": list(record.visible_xywh),
            "label": JSON_LABELS[record.label],
        }
        for record in records
    ]
    write_text(path, json.dumps({"imgHeight": size_hw[0], "imgWidth": size_hw[1], "objects": objects}, indent=1))
