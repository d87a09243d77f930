"""Fixtures: the model of the runtime tests, which detects the box of all bright pixels, and a dataset for it."""

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

SOURCE = Path(__file__).parents[1] / "hkd_deploy" / "conftest.py"


@pytest.fixture(scope="session")
def write_tiny_onnx() -> Callable[..., Path]:
    spec = importlib.util.spec_from_file_location("hkd_deploy_conftest", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    writer: Callable[..., Path] = module.write_tiny_onnx
    return writer


@pytest.fixture(scope="session")
def half_right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO dataset of two images with a bright rectangle each; in the second the ground truth is elsewhere."""
    root = tmp_path_factory.mktemp("half_right")
    images, annotations = [], []
    for number, gt_box in enumerate(([40, 10, 32, 70], [110, 10, 32, 70]), 1):
        image = np.zeros((96, 160, 3), np.uint8)
        image[10:80, 40:72] = 255
        cv2.imwrite(str(root / f"{number}.png"), image)
        images.append({"id": number, "file_name": f"{number}.png", "width": 160, "height": 96})
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": gt_box})
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    (root / "all.json").write_text(json.dumps(coco))
    path = root / "data.yaml"
    path.write_text(yaml.safe_dump({"format": "coco", "val": {"images": ".", "annotations": "all.json"}}))
    return path


@pytest.fixture
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command measures each model in one process instead of three: for tests that need no more."""
    from hkd_bench import bench

    monkeypatch.setattr(bench, "BenchOptions", partial(bench.BenchOptions, rounds=1, warmup=1, warmup_s=0))


@pytest.fixture
def write_tree(tmp_path: Path) -> Callable[[dict[str, object]], Path]:
    """Return a function that writes files below a root directory and returns it."""

    def write(files: dict[str, object]) -> Path:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        return tmp_path

    return write
