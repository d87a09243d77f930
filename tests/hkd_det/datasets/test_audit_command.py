"""`hkd-train --check --audit`: findings, page, cache, audited annotations and errors, with a model of known output."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper

from hkd_det.datasets.audit import Finding
from hkd_det.datasets.audit_report import PROPOSAL_COLOR, TILE_PX, draw_finding
from hkd_det.datasets.catalog import load_dataset
from hkd_det.datasets.check_report import PERSON_COLOR
from hkd_det.onnxrt.detector import OnnxDetector
from hkd_det.structures import GroundTruth, Sample
from hkd_det.train.cli import main

SHARED = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set"))
NO_TORCH = """
import importlib.abc, sys

class BlockImports(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm", "onnx"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, BlockImports())
from hkd_det.train.cli import main
sys.exit(main(sys.argv[1:]))
"""
BOX = [20.0, 10.0, 30.0, 60.0]  # xywh of the only box that the model detects; images have 100 x 80 pixels


def write_model(path: Path) -> Path:
    """Write a model that detects `BOX` with the mean brightness of the image, 0 to 1, as score."""
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=0),  # [B]
        helper.make_node("Unsqueeze", ["mean", "one"], ["scores"]),  # [B, 1]
        helper.make_node("Unsqueeze", ["scores", "two"], ["column"]),  # [B, 1, 1]
        helper.make_node("Mul", ["column", "zero"], ["zeros"]),
        helper.make_node("Add", ["zeros", "box"], ["boxes"]),
    ]
    x, y, width, height = BOX
    constants = [
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
        helper.make_tensor("two", TensorProto.INT64, [1], [2]),
        helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
        helper.make_tensor("box", TensorProto.FLOAT, [1, 1, 4], [x, y, x + width, y + height]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["b", 3, 80, 100])
    outputs = [
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["b", 1, 4]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["b", 1]),
    ]
    graph = helper.make_graph(nodes, "brightness", [images], outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    path.with_suffix(".yaml").write_text("output_format: boxes-scores\ninput_scale: 1\n")
    return path


# brightness of each image, and its labels (xywh)
CASES: dict[str, tuple[int, list[list[float]]]] = {
    "missing": (204, []),
    "fits": (204, [BOX]),
    "shifted": (204, [[30.0, 10.0, 30.0, 60.0]]),  # IoU 20 / 40
    "improbable": (0, [[50.0, 20.0, 20.0, 40.0]]),
    "weak": (102, []),
    "empty": (20, []),
}


def write_coco_data(root: Path, splits: tuple[str, ...] = ("val",)) -> Path:
    """Write a COCO dataset with the images of `CASES` in each split, and records that only COCO files contain."""
    root.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (name, (brightness, boxes)) in enumerate(CASES.items()):
        cv2.imwrite(str(root / f"{name}.png"), np.full((80, 100, 3), brightness, np.uint8))
        images.append({"id": f"id-{number}", "file_name": f"{name}.png", "width": 100, "height": 80, "license": 3})
        for box in boxes:
            record = {"id": 10 * number, "image_id": f"id-{number}", "category_id": 7, "bbox": box}
            annotations.append({**record, "segmentation": [[1, 2, 3]], "iscrowd": 0})
    content = {"info": {"year": 2026}, "images": images, "annotations": annotations}
    categories = [{"id": 1, "name": "car"}, {"id": 7, "name": "Person"}]
    entry: dict[str, Any] = {"format": "coco", "license": "CC BY 4.0"}
    for split in splits:
        (root / f"{split}.json").write_text(json.dumps({**content, "categories": categories}))
        entry[split] = {"images": ".", "annotations": f"{split}.json"}
    (root / "my.yaml").write_text(yaml.safe_dump(entry))
    return root / "my.yaml"


def write_yolo_data(root: Path) -> Path:
    """Write the images and labels of `CASES` as a YOLO dataset with two image directories."""
    for number, (name, (brightness, boxes)) in enumerate(CASES.items()):
        images, labels = root / "images" / str(number % 2), root / "labels" / str(number % 2)
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(images / f"{name}.png"), np.full((80, 100, 3), brightness, np.uint8))
        rows = [(0, (x + w / 2) / 100, (y + h / 2) / 80, w / 100, h / 80) for x, y, w, h in boxes]
        (labels / f"{name}.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
    (root / "my.yaml").write_text("train: [images/0, images/1]\nnames: [person]\n")
    return root / "my.yaml"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_model(tmp_path / "model.onnx")


def run(data: Path, model: Path, *flags: str) -> int:
    return main(["--data", str(data), "--check", "--audit", str(model), *flags])


def read_findings(split: str = "val") -> dict[str, dict[str, Any]]:
    """Return the findings of the written JSON file by name of the image."""
    content = json.loads(Path("runs/check/my/audit.json").read_text())
    findings = content["splits"][split]["findings"]
    by_name = {Path(finding["file"]).stem: finding for finding in findings}
    assert len(by_name) == len(findings)
    browser = Path("runs/check/my/images.html").read_text()
    assert all(f'"audit_{finding["kind"]}","audit"' in browser for finding in findings)
    return by_name


def test_audit_reports_each_kind(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(write_coco_data(tmp_path / "data"), model) == 0
    findings = read_findings()
    assert {name: finding["kind"] for name, finding in findings.items()} == {
        "missing": "missing",
        "weak": "missing",
        "shifted": "location",
        "improbable": "improbable",
    }
    assert findings["missing"]["proposal_xyxy"] == [20, 10, 50, 70] and findings["missing"]["label_xyxy"] is None
    assert findings["missing"]["score"] == pytest.approx(0.8, abs=1e-3) and findings["missing"]["num_models"] == 1
    assert findings["shifted"]["label_xyxy"] == [30, 10, 60, 70] and findings["shifted"]["iou"] == 0.5
    assert findings["improbable"]["proposal_xyxy"] is None and findings["missing"]["image_id"] == "id-0"
    printed = capsys.readouterr().out
    for line in (
        r"images, labels\s+6, 3",
        r"found .*2 \(66.7%\)",
        r"missing labels\s+2 in 2 images; 1 with a score from",
    ):
        assert re.search(line, printed), line
    page = Path("runs/check/my/audit.html").read_text()
    assert page.count("<figure>") == page.count("data:image/jpeg;base64,") == 4
    assert not re.findall(r'(?:src|href)="(?!data:)|url\(|@import', page)
    assert page.index("missing.png, score 0.80") < page.index("weak.png, score 0.40") < page.index("IoU 0.50")


def test_audit_score_is_the_lower_limit(tmp_path: Path, model: Path) -> None:
    assert run(write_coco_data(tmp_path / "data"), model, "--audit-score", "0.45") == 0
    assert "missing" in read_findings() and "weak" not in read_findings()


def test_two_models_agree(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_model(tmp_path / "other.onnx")
    other.with_suffix(".yaml").rename(tmp_path / "config.yaml")
    flags = ("--audit-config", f",{tmp_path / 'config.yaml'}")
    assert main(["--data", str(write_coco_data(tmp_path)), "--check", "--audit", f"{model},{other}", *flags]) == 0
    assert read_findings()["missing"]["num_models"] == 2
    assert "2 of them by all models" in capsys.readouterr().out
    assert "2 of 2 models" in Path("runs/check/my/audit.html").read_text()


@pytest.mark.slow
def test_second_run_uses_the_cached_detections(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_coco_data(tmp_path / "data")
    assert run(data, model) == 0
    first = read_findings()
    calls: list[int] = []
    detect = OnnxDetector.__call__

    def count(self: OnnxDetector, images: Any) -> Any:
        calls.append(len(images))
        return detect(self, images)

    monkeypatch.setattr(OnnxDetector, "__call__", count)
    assert run(data, model) == 0 and calls == [] and read_findings() == first
    cv2.imwrite(str(tmp_path / "data" / "fits.png"), np.zeros((80, 100, 3), np.uint8))
    # All images, and the two black ones with labels in three rotations.
    assert run(data, model) == 0 and sum(calls) == len(CASES) + 3 * 2
    assert read_findings()["fits"]["kind"] == "improbable"
    calls.clear()
    cache = Path("runs/check/my/detections_val_1.npz")
    cache.write_bytes(cache.read_bytes()[:50])
    assert run(data, model) == 0 and sum(calls) == len(CASES)
    model.with_suffix(".yaml").write_text("output_format: boxes-scores\ninput_scale: 0.1\n")
    assert run(data, model) == 0 and sum(calls) > 2 * len(CASES) and "missing" not in read_findings()


@pytest.mark.slow
@pytest.mark.parametrize(("audited_as", "num_labels"), [("ignore", 0), ("label", 1)])
def test_audited_coco_file_keeps_every_record(tmp_path: Path, model: Path, audited_as: str, num_labels: int) -> None:
    data = write_coco_data(tmp_path / "data")
    out = tmp_path / "new" / "audited.json"
    assert run(data, model, "--write-audited", str(out), "--audited-as", audited_as) == 0
    before, after = (json.loads(path.read_text()) for path in (tmp_path / "data" / "val.json", out))
    assert {**after, "annotations": after["annotations"][:3]} == before
    strong, weak = after["annotations"][3:]
    assert strong["bbox"] == weak["bbox"] == BOX and strong["area"] == 1800 and strong["category_id"] == 7
    assert (strong["id"], weak["id"]) == (31, 32) and (strong["image_id"], weak["image_id"]) == ("id-0", "id-4")
    assert strong["source"] == weak["source"] == "audit" and weak["score"] == pytest.approx(0.4, abs=1e-3)
    assert strong["iscrowd"] == strong.get("ignore", 0) == 1 - num_labels  # a score of 0.8; the label has no `ignore`
    assert weak["iscrowd"] == weak["ignore"] == 1
    samples = {sample.path.stem: sample for sample in load_dataset("runs/check/my/audited.yaml", "val")}
    assert samples["missing"].ground_truth.ignore.tolist() == [not num_labels]
    assert samples["missing"].path.is_file() and samples["weak"].ground_truth.ignore.tolist() == [True]
    assert yaml.safe_load(Path("runs/check/my/audited.yaml").read_text())["license"] == "CC BY 4.0"


def test_detections_replace_all_annotations(tmp_path: Path, model: Path) -> None:
    data = write_coco_data(tmp_path / "data")
    flags = ["--write-audited", "detections.json", "--audited-as", "detections", "--audit-score", "0.3"]
    assert run(data, model, *flags) == 0
    before, after = (json.loads(path.read_text()) for path in (tmp_path / "data" / "val.json", Path("detections.json")))
    assert after["images"] == before["images"]
    assert all(record["source"] == "audit" for record in after["annotations"])
    samples = load_dataset("runs/check/my/audited.yaml", "val")
    found = {sample.path.stem: sample.ground_truth.ignore.tolist() for sample in samples if len(sample.ground_truth)}
    assert found == {"missing": [False], "fits": [False], "shifted": [False], "weak": [True]}


def test_audited_file_of_another_format(tmp_path: Path, model: Path) -> None:
    data = write_yolo_data(tmp_path / "data")
    assert run(data, model, "--write-audited", "audited.json") == 0
    original = {sample.path.resolve(): sample for sample in load_dataset(str(data), "train")}
    audited = load_dataset("runs/check/my/audited.yaml", "train")
    assert len(audited) == len(original) == len(CASES)
    for sample in audited:
        before = original[sample.path.resolve()].ground_truth
        count = len(before)
        np.testing.assert_allclose(sample.ground_truth.boxes_xyxy[:count], before.boxes_xyxy, atol=2e-3)
        assert not sample.ground_truth.ignore[:count].any()
        added = sample.ground_truth.boxes_xyxy[count:].tolist()
        assert added == ([[20, 10, 50, 70]] if sample.path.stem in ("missing", "weak") else [])
        assert sample.ground_truth.ignore[count:].all() and sample.size_hw == (80, 100)


@pytest.mark.skipif(not SHARED.is_dir(), reason="HKD_TEST_DATA is not set")
@pytest.mark.slow
def test_audited_file_keeps_hidden_parts(tmp_path: Path, model: Path) -> None:
    """CityPersons: full boxes beyond the image, visible boxes, ignore regions."""
    entry = {"format": "citypersons", "path": str(SHARED / "citypersons"), "skip_missing": True, "train": "train"}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(entry))
    assert run(tmp_path / "my.yaml", model, "--write-audited", "{split}/a.json", "--audit-score", "1") == 0
    assert Path("train/a.json").is_file()
    before, after = (load_dataset(data, "train") for data in ("my.yaml", "runs/check/my/audited.yaml"))
    assert sum(len(sample.ground_truth) for sample in before) > 20
    for one, other in zip(before, after, strict=True):
        assert one.path.resolve() == other.path.resolve()
        for name in ("boxes_xyxy", "visible_xyxy", "ignore"):
            np.testing.assert_allclose(
                getattr(one.ground_truth, name), getattr(other.ground_truth, name), atol=2e-3, err_msg=name
            )


@pytest.mark.slow
def test_several_splits_have_one_file_each(tmp_path: Path, model: Path) -> None:
    data = write_coco_data(tmp_path / "data", ("train", "val"))
    assert run(data, model, "--write-audited", "new.json") == 0
    assert Path("new_train.json").is_file() and Path("new_val.json").is_file() and not Path("new.json").exists()
    assert load_dataset("runs/check/my/audited.yaml", "train") and load_dataset("runs/check/my/audited.yaml", "val")
    assert run(data, model, "--write-audited", "{split}-new.json") == 0 and Path("val-new.json").is_file()


@pytest.mark.slow
def test_training_accepts_audited_annotations(tmp_path: Path, model: Path) -> None:
    data = write_coco_data(tmp_path / "data", ("train", "val"))
    assert run(data, model, "--write-audited", "new.json", "--audited-as", "label") == 0
    flags = ["--epochs", "1", "--imgsz", "64", "--batch", "2", "--workers", "0", "--device", "cpu"]
    assert main(["--data", "runs/check/my/audited.yaml", "--model", "mini-student", "--name", "a", *flags]) == 0


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--audit", "gone.onnx"], 1, "gone.onnx: no such model file"),
        (["--audit", "bad.onnx"], 1, "bad.onnx: ONNX Runtime .* cannot load it"),
        (["--audit", "plain.onnx"], 1, r"plain.onnx: .*no model configuration found.*--audit-config.*plain.yaml"),
        (["--audit", "best.pt"], 2, "--audit best.pt: expected an ONNX file.*hkd-export"),
        (["--audit", ""], 2, "--audit .*: expected an ONNX file"),
        (["--audit", "model.onnx,model.onnx"], 2, "named twice"),
        (["--audit", "model.onnx", "--audit-config", "a.yaml,b.yaml"], 2, "--audit-config: expected one YAML file"),
        (["--audit", "model.onnx", "--audit-config", "gone.yaml"], 1, "gone.yaml: no such file"),
        (
            ["--audit", "model.onnx", "--audit-score", "1.5"],
            2,
            "--audit-score: expected a number above 0, at most 1",
        ),
        (["--audit", "model.onnx", "--device", "tpu"], 2, "--device: expected cpu, cuda or cuda:N, got tpu"),
        (["--audit", "model.onnx", "--audited-as", "label"], 2, "--audited-as: requires --write-audited"),
        (["--audit", "model.onnx", "--write-audited", "data"], 2, "--write-audited data: expected a file, got a dir"),
        (["--audit", "model.onnx", "--write-audited", "data/val.json"], 2, "contains the annotations of --data"),
        (["--audit", "model.onnx", "--write-audited", "bad.onnx/a.json"], 1, "bad.onnx: (File exists|Not a directory)"),
        (["--write-audited", "a.json"], 2, "--write-audited: requires --audit"),
        (["--audit-score", "0.4"], 2, "--audit-score: requires --audit"),
    ],
)
@pytest.mark.usefixtures("model")
def test_error_is_one_line(
    flags: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    write_model(tmp_path / "plain.onnx").with_suffix(".yaml").unlink()
    write_coco_data(tmp_path / "data")
    assert main(["--data", "data/my.yaml", "--check", *flags]) == code
    errors = capsys.readouterr().err
    assert re.search(message, errors) and len(errors.splitlines()) == 1, errors
    assert not Path("runs").exists()  # found before the check starts


def test_audit_without_check_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", "a.yaml", "--audit", "model.onnx"]) == 2
    assert capsys.readouterr().err == "hkd-train: --audit: requires --check. Add --check.\n"


def test_audit_without_images_is_an_error(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_coco_data(tmp_path / "data")
    for path in (tmp_path / "data").glob("*.png"):
        path.unlink()
    assert run(data, model) == 1
    assert capsys.readouterr().err.count("\n") == 1 and Path("runs/check/my/errors.txt").read_text()


def test_wrong_output_format_is_one_line(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.with_suffix(".yaml").write_text("output_format: yolox-raw\n")
    assert run(write_coco_data(tmp_path / "data"), model) == 1
    assert "Change output_format in the model configuration" in capsys.readouterr().err


@pytest.mark.slow
def test_audit_runs_without_torch(tmp_path: Path, model: Path) -> None:
    data = write_coco_data(tmp_path / "data")
    command = [sys.executable, "-c", NO_TORCH, "--data", str(data), "--check", "--audit", str(model)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "missing labels" in done.stdout, done.stderr


def make_finding(label: tuple[float, ...] | None, proposal: tuple[float, ...] | None, path: Path) -> Finding:
    return Finding("location", 1, path, 0.8, 1, label, proposal, 0.5)


@pytest.fixture
def draw(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that draws a finding in a gray image of 400 x 300 pixels."""
    cv2.imwrite(str(tmp_path / "a.png"), np.full((300, 400, 3), 90, np.uint8))

    def draw_boxes(label: tuple[float, ...] | None, proposal: tuple[float, ...] | None) -> Any:
        sample = Sample(1, tmp_path / "a.png", GroundTruth.empty())
        return draw_finding(make_finding(label, proposal, tmp_path / "a.png"), sample)

    return draw_boxes


def test_thumbnail_shows_label_and_proposal_at_their_place(draw: Callable[..., Any]) -> None:
    """A square of 1.8 * 100 = 180 pixels around the boxes is enlarged to the tile."""
    tile = draw((150, 100, 190, 200), (160, 100, 200, 200))
    scale, left, top = TILE_PX / 180, 175 - 90, 150 - 90
    for color, (x1, y1, x2, y2) in ((PERSON_COLOR, (150, 100, 190, 200)), (PROPOSAL_COLOR, (160, 100, 200, 200))):
        mask = (tile == color).all(2)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        for actual, expected in ((rows[0], y1 - top), (rows[-1], y2 - top), (columns[0], x1 - left)):
            assert abs(actual - expected * scale) <= 3
        if color == PROPOSAL_COLOR:
            assert abs(columns[-1] - (x2 - left) * scale) <= 3


@pytest.mark.parametrize("box", [(0, 0, 400, 300), (399, 299, 400, 300), (-900, -900, -800, -800), (0, 0, 1e6, 1e6)])
def test_thumbnail_of_any_box(draw: Callable[..., Any], box: tuple[float, ...]) -> None:
    assert draw(box, None).shape == draw(None, box).shape == (TILE_PX, TILE_PX, 3)
