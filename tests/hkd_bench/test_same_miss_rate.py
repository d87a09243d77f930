"""Training, `hkd-export --verify` and `hkd-bench` report the same miss rate for the same weights and images."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from hkd_bench.cli import main as bench_main
from hkd_bench.result import read_result
from hkd_deploy import open_detector
from hkd_deploy.export.cli import main as export_main
from hkd_det.models import zoo
from hkd_det.models.detector import HKDDetectorSpec
from hkd_det.train.config import TrainConfig
from hkd_det.train.history import find_best_record
from hkd_det.train.trainer import train

TINY = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
NUM_TRAIN, NUM_VAL = 16, 50


def write_split(root: Path, split: str, count: int, seed: int) -> None:
    """Write images of several sizes, none of them that of the input, with one to three dark persons each."""
    rng = np.random.default_rng(seed)
    (root / split).mkdir()
    images, annotations = [], []
    for index in range(count):
        height, width = int(rng.integers(90, 150)), int(rng.integers(120, 260))
        image = rng.integers(150, 255, (height, width, 3)).astype(np.uint8)
        for _ in range(int(rng.integers(1, 4))):
            box_height = int(rng.integers(52, 85))
            x, y = int(rng.integers(0, width - 40)), int(rng.integers(0, height - box_height))
            box_width = int(box_height * 0.41)
            image[y : y + box_height, x : x + box_width] = rng.integers(0, 90, 3)
            box = [x, y, min(box_width, width - x), box_height]
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, "category_id": 1, "bbox": box})
        cv2.imwrite(str(root / split / f"{index:03}.png"), image)
        images.append({"id": index + 1, "file_name": f"{index:03}.png", "width": width, "height": height})
    categories = [{"id": 1, "name": "person"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"{split}.json").write_text(json.dumps(content))


@pytest.fixture
def data_yaml(tmp_path: Path) -> Path:
    for split, count, seed in (("train", NUM_TRAIN, 1), ("val", NUM_VAL, 2)):
        write_split(tmp_path, split, count, seed)
    splits = {split: {"images": split, "annotations": f"{split}.json"} for split in ("train", "val")}
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump({"format": "coco", "path": ".", **splits}))
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("one_round")
def test_training_verification_and_bench_have_one_miss_rate(
    data_yaml: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Training evaluates batches in torch, the others single images in ONNX Runtime.

    A YOLOX of this size has equal scores, among which torch and ONNX Runtime can select differently.
    """
    monkeypatch.setitem(zoo.MODELS, "mini-student", TINY)
    config = TrainConfig(
        str(data_yaml), "mini-student", str(tmp_path / "run"), (96, 160), epochs=12, batch=4, lr=4e-3, workers=0,
        device="cpu",
    )  # fmt: skip
    trained = train(config)
    assert 0.02 < trained.miss_rate < 0.98, "the rates of a model that detects no person are equal anyway"
    capsys.readouterr()
    exported = trained.best.with_suffix(".onnx")
    assert export_main([str(trained.best), "--data", str(data_yaml)]) == 0
    of_torch, of_onnx = re.findall(r" (\d+\.\d\d) % ", capsys.readouterr().out)
    assert of_torch == of_onnx == f"{100 * trained.miss_rate:.2f}"
    out = tmp_path / "bench.json"
    assert bench_main([str(exported), "--data", str(data_yaml), "--runs", "3", "--json", str(out)]) == 0
    (model,) = read_result(out).models
    assert model.miss_rates["Reasonable"] == pytest.approx(trained.miss_rate, abs=1e-9)
    best = find_best_record(trained.history)
    assert open_detector(exported).metadata.conf == pytest.approx(best.threshold, abs=1e-3)
