"""Detections written in COCO's result format are read back without a difference."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkd_det.metrics.coco_files import read_coco_detections, read_coco_ground_truth, write_coco_detections
from hkd_det.structures import Detections

COORDINATE = st.floats(0, 4000, width=32)
ROW = st.tuples(COORDINATE, COORDINATE, COORDINATE, COORDINATE, st.floats(0, 1, width=32))


def make_detections(rows: list[tuple[float, ...]]) -> Detections:
    values = np.array(rows, np.float32).reshape(-1, 5)
    corners = np.sort(values[:, :4].reshape(-1, 2, 2), axis=1).reshape(-1, 4)  # x1 <= x2, y1 <= y2
    return Detections(corners, values[:, 4])


@pytest.mark.slow
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(images=st.lists(st.lists(ROW, max_size=5), min_size=1, max_size=4), is_text=st.booleans())
def test_written_results_are_read_exactly(tmp_path: Path, images: list[list[tuple[float, ...]]], is_text: bool) -> None:
    image_ids = [f"{number:02d}.jpg" if is_text else number for number in range(10, 10 + len(images))]
    content = {
        "images": [{"id": image_id, "file_name": f"{image_id}.png"} for image_id in image_ids],
        "annotations": [],
        "categories": [{"id": 3, "name": "person"}],
    }
    (tmp_path / "val.json").write_text(json.dumps(content))
    detections = [make_detections(rows) for rows in images]
    write_coco_detections(tmp_path / "detections.json", image_ids, detections, category_id=3)
    table = read_coco_detections(tmp_path / "detections.json", read_coco_ground_truth(tmp_path / "val.json"))
    assert len(table) == sum(map(len, detections))
    for index, expected in enumerate(detections):
        rows = table.image_index == index
        x, y, width, height = table.boxes_xywh[rows].T
        corners = np.stack([x, y, x + width, y + height], axis=1)
        assert np.array_equal(corners, expected.boxes_xyxy.astype(np.float64))
        assert np.array_equal(table.scores[rows], expected.scores.astype(np.float64))
