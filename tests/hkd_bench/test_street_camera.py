"""Tests of `benchmarks/studies/street_camera.py`: its ground truth against the pixels that people change."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from hkd_det.datasets.synthetic.scene import IGNORE, PEDESTRIAN, AnnotationRecord

STUDY = Path(__file__).parents[2] / "benchmarks" / "studies" / "street_camera.py"


@pytest.fixture(scope="module")
def street() -> ModuleType:
    pytest.importorskip("av")
    spec = importlib.util.spec_from_file_location("street_camera", STUDY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_boxes_contain_what_differs_from_the_empty_scene(street: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    num_frames, interval_s, num_persons = 16, 30.0, 0
    frames = list(street.iterate_frames(num_frames, interval_s, seed=2))
    monkeypatch.setattr(street, "sample_visits", lambda *_: [])
    empty_frames = list(street.iterate_frames(num_frames, interval_s, seed=2))
    for (image, records), (empty, no_records) in zip(frames, empty_frames, strict=True):
        assert not no_records
        changed = np.abs(image.astype(int) - empty).max(2) > 20
        explained = np.zeros_like(changed)
        for record in records:
            x, y, width, height = record.box_xywh
            margin = round(0.35 * height)  # arms, the stride and the shadow
            explained[max(0, y - 3) : y + height + margin, max(0, x - margin) : x + width + margin] = True
            left, top, visible_width, visible_height = record.visible_xywh
            inside = changed[max(0, top) : top + visible_height, max(0, left) : left + visible_width]
            if record.label == PEDESTRIAN and visible_width * visible_height > 0.8 * width * height and left >= 0:
                num_persons += 1
                assert inside.mean() > 0.15
        assert changed.any() == bool(records)
        assert not (changed & ~explained).any()
    assert num_persons >= 10


def test_sequences_have_empty_and_crowded_minutes(street: ModuleType) -> None:
    visits = street.sample_visits(3600.0, np.random.default_rng(0))
    present = [sum(visit.start_s <= time_s < visit.end_s for visit in visits) for time_s in np.arange(0, 3600, 20)]
    assert min(present) == 0 and max(present) >= 8


def test_people_who_are_half_outside_are_ignore_regions(street: ModuleType) -> None:
    height, width = street.SIZE_HW
    boxes = [(10, 20, 40, 100), (-30, 20, 40, 100), (width - 30, height - 60, 40, 100), (width + 5, 20, 40, 100)]
    records = [AnnotationRecord(PEDESTRIAN, index, box, box) for index, box in enumerate(boxes)]
    records.append(AnnotationRecord(IGNORE, 9, boxes[0], boxes[0]))
    coco = street.make_coco([[], records])
    assert [(one["bbox"], one["ignore"]) for one in coco["annotations"]] == [
        ([10, 20, 40, 100], 0),
        ([0, 20, 10, 100], 1),
        ([width - 30, height - 60, 30, 60], 1),
        ([10, 20, 40, 100], 1),
    ]
    assert {one["image_id"] for one in coco["annotations"]} == {2} and len(coco["images"]) == 2
