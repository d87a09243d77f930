"""The methods in docs/how-to/add-a-method.md, registered and trained by hkd-train as the page describes."""

import csv
import importlib.util
import json
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from hkd_det.distill import METHODS
from hkd_det.models import zoo
from hkd_det.models.checkpoint import DetectorCheckpoint, save_detector_checkpoint
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.train.cli import main

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "add-a-method.md"
TINY = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)


@pytest.fixture(params=["first", "second"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Save the code of the page, register one of its two methods, and return the name of the method."""
    code, entry, second = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    ((name, target),) = yaml.safe_load("{" + entry + "}").items()
    module_name = target.partition(":")[0]
    if request.param == "second":
        name, target = "pooled_cosine", f"{module_name}:PooledCosine"
    path = tmp_path / "method.py"
    path.write_text(code + second, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module_name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, name, target)
    return str(name)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four images of 96 x 64 pixels with one box each, as COCO files."""
    rng = np.random.default_rng(0)
    images = [{"id": i, "file_name": f"{i}.png", "width": 96, "height": 64} for i in range(4)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [20, 4, 22, 55]} for i in range(4)]
    for image in images:
        cv2.imwrite(str(tmp_path / str(image["file_name"])), rng.integers(0, 255, (64, 96, 3)).astype(np.uint8))
    categories = [{"id": 1, "name": "person"}]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    split = {"images": ".", "annotations": "coco.json"}
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump({"format": "coco", "path": ".", "train": split, "val": split}))
    return path


@pytest.mark.slow
def test_documented_method_trains_by_the_command(
    method: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(zoo.MODELS, "mini-student", TINY)
    torch.manual_seed(0)
    teacher = tmp_path / "teacher.pt"
    checkpoint = DetectorCheckpoint("mini-student", TINY, HKDDetector(TINY).state_dict(), {}, 1, 1.0)
    save_detector_checkpoint(teacher, checkpoint)
    flags = ["--data", str(data), "--model", "mini-student", "--teacher", str(teacher), "--imgsz", "96x64"]
    flags += ["--epochs", "1", "--batch", "4", "--workers", "0", "--device", "cpu", "--project", str(tmp_path)]
    flags += ["--name", "run", "--set", "no_aug_ratio=0", "--distill", method]
    assert main([*flags, "--set", f"distill.{method}.weight=-1"]) == 2
    assert main([*flags, "--set", f"distill.{method}.weight=2"]) == 0
    (row,) = csv.DictReader((tmp_path / "run" / "results.csv").read_text().splitlines())
    assert float(row[method]) > 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["distill"] == {method: {"weight": 2.0}}
