"""The exported file says what the trained detector says: to ONNX Runtime, to TensorRT, and about itself."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch

from hkd_deploy import open_detector
from hkd_deploy.export.cli import main
from hkd_deploy.export.exporter import export_detector, export_onnx
from hkd_deploy.export.options import ExportOptions
from hkd_deploy.export.parity import ParityError, compute_box_difference
from hkd_det.letterbox import Letterbox
from hkd_det.models.checkpoint import DetectorCheckpoint, save_detector_checkpoint, weights_sha256
from hkd_det.models.zoo import build_model, count_params_and_flops

PICTURES = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set")) / "inria" / "test"
SIZE_HW = (128, 160)


@pytest.fixture(scope="module")
def checkpoint() -> DetectorCheckpoint:
    """A detector whose statistics have moved and whose scores differ: not trained, but not blank either."""
    torch.manual_seed(0)
    detector = build_model("mini-student")
    torch.nn.init.normal_(detector.head.one2many.weight, std=0.5)
    torch.nn.init.normal_(detector.head.one2one.weight, std=0.5)
    detector.train()
    with torch.no_grad():
        for _ in range(3):
            detector(torch.rand(4, 3, 64, 64) * 255)
    config = {"data": "street.yaml", "imgsz_hw": list(SIZE_HW)}
    return DetectorCheckpoint("mini-student", detector.spec, detector.eval().state_dict(), config, 1, 0.5)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Real photographs where they lie beside the project, else noise with edges."""
    if PICTURES.is_dir():
        return sorted(PICTURES.glob("*.jpg"))[:4]
    folder, chance = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(4):
        noise = cv2.resize(chance.integers(0, 255, (12, 16, 3)).astype(np.uint8), (320, 240))
        cv2.imwrite(str(folder / f"{index}.png"), noise)
    return sorted(folder.glob("*.png"))


@pytest.mark.parametrize("batch", [1, None])
def test_parity_on_pictures(
    checkpoint: DetectorCheckpoint, pictures: list[Path], tmp_path: Path, batch: int | None
) -> None:
    parity = export_detector(checkpoint, tmp_path / "model.onnx", ExportOptions(SIZE_HW, batch), pictures)
    assert parity.num_images == 4 and parity.box_error_px <= 0.5 and parity.score_error <= 1e-3


def test_the_runtime_opens_it_and_finds_the_same_people(
    checkpoint: DetectorCheckpoint, pictures: list[Path], tmp_path: Path
) -> None:
    """End to end, in pixels of the original picture, against torch by hand."""
    export_onnx(checkpoint, tmp_path / "model.onnx", ExportOptions(SIZE_HW))
    picture = cv2.imread(str(pictures[0]))[:, :, ::-1].copy()
    with open_detector(tmp_path / "model.onnx") as detector:
        found = detector(picture)
    letterbox = Letterbox(picture.shape[:2], SIZE_HW)
    with torch.no_grad():
        boxes, scores = checkpoint.build().predict(torch.from_numpy(letterbox.apply(picture)).permute(2, 0, 1)[None])
    valid = scores[0].numpy() >= 0.001
    assert len(found) == valid.sum() > 10
    np.testing.assert_allclose(found.scores, scores[0].numpy()[valid], atol=1e-4)
    wanted = letterbox.boxes_to_source(boxes[0].numpy()[valid])
    assert compute_box_difference(wanted, scores[0].numpy()[valid], found.boxes_xyxy, found.scores) < 0.5


def test_the_file_describes_itself(checkpoint: DetectorCheckpoint, tmp_path: Path) -> None:
    export_onnx(checkpoint, tmp_path / "model.onnx", ExportOptions(SIZE_HW))
    with open_detector(tmp_path / "model.onnx") as detector:
        manifest = detector.metadata
    weight = count_params_and_flops(checkpoint.build(), SIZE_HW)
    assert (manifest.model, manifest.imgsz_hw, manifest.batch) == ("mini-student", SIZE_HW, 1)
    assert (manifest.parameters, manifest.flops) == (weight.num_params, weight.flops)
    assert manifest.weights_sha256 == weights_sha256(checkpoint.weights) and manifest.data == "street.yaml"
    model = onnx.load(tmp_path / "model.onnx")
    assert model.opset_import[0].version == 17 and model.ir_version <= 8
    assert {prop.key for prop in model.metadata_props} >= {"names", "stride", "task", "imgsz", "author", "license"}
    assert "NonMaxSuppression" not in {node.op_type for node in model.graph.node}


def test_the_licence_names_what_the_datas_owners_allow(checkpoint: DetectorCheckpoint, tmp_path: Path) -> None:
    """A public set's, a user's own, and neither where the yaml stayed behind on another machine."""
    own = tmp_path / "own.yaml"
    own.write_text("train: images\nlicense: ours, for sale\n")
    for data, ending in (
        ("caltech", "allow: research; cite Dollár et al. 2012"),
        (str(own), "allow: ours, for sale"),
        ("elsewhere.yaml", "as their training data allows"),
    ):
        trained = replace(checkpoint, config={**checkpoint.config, "data": data})
        export_onnx(trained, tmp_path / "model.onnx", ExportOptions(SIZE_HW))
        with open_detector(tmp_path / "model.onnx") as detector:
            licence = detector.metadata.license
        assert licence.startswith("Apache-2.0 (code); weights: ") and licence.endswith(ending), data


def test_a_file_that_differs_is_not_written(
    checkpoint: DetectorCheckpoint, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hkd_deploy.export import exporter as from_weights

    written = from_weights.export_onnx

    def spoiled(source: DetectorCheckpoint, path: Path, options: ExportOptions) -> None:
        written(source, path, options)
        model = onnx.load(path)
        bias = next(t for t in model.graph.initializer if t.name.endswith("head.one2many.bias"))
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 0.5, bias.name))
        onnx.save(model, path)

    monkeypatch.setattr(from_weights, "write_onnx", spoiled)
    with pytest.raises(ParityError, match="scores by"):
        export_detector(checkpoint, tmp_path / "model.onnx", ExportOptions(SIZE_HW), pictures)
    assert list(tmp_path.iterdir()) == []


def test_boxes_are_compared_by_score_not_by_rank() -> None:
    boxes = np.array([[0, 0, 10, 10], [50, 50, 60, 60]], np.float32)
    scores = np.array([0.5, 0.4999], np.float32)
    assert compute_box_difference(boxes, scores, boxes[::-1], scores) == 0
    assert compute_box_difference(boxes, scores, boxes + 0.25, scores) == 0.25
    assert compute_box_difference(boxes, scores, boxes, scores - 0.1) == np.inf


def test_command(checkpoint: DetectorCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "best.pt"
    save_detector_checkpoint(weights, checkpoint)
    assert main([str(weights), "--imgsz", "96x64", "--no-verify"]) == 0
    with open_detector(tmp_path / "best.onnx") as detector:
        assert detector.metadata.imgsz_hw == (64, 96)
    capsys.readouterr()
    for flags, code, message in (
        ([str(weights), "--output", "model.engine", "--no-verify"], 2, "--trt"),
        ([str(weights), "--data", str(tmp_path / "none.yaml")], 1, "none.yaml"),
        ([str(tmp_path / "none.pt")], 1, "none.pt"),
        ([str(tmp_path / "best.onnx")], 2, "is ONNX already"),
        ([str(tmp_path / "street.yaml")], 2, "expected best.pt"),
    ):
        assert main(flags) == code
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch"), [("mini-student", 1), ("mini-student", None), ("student-r18", 1)])
def test_tensorrt_parses_and_builds_it(
    name: str, batch: int | None, tmp_path: Path, tensorrt_builds: Callable[..., dict[str, Any]]
) -> None:
    detector = build_model(name)
    source = DetectorCheckpoint(name, detector.spec, detector.state_dict(), {"data": "none"}, 1, 1.0)
    export_onnx(source, tmp_path / "model.onnx", ExportOptions(SIZE_HW, batch))
    built = tensorrt_builds(tmp_path / "model.onnx", (1, *SIZE_HW, 3), (4, *SIZE_HW, 3))
    assert built["input"] == "UINT8" and list(built["outputs"]) == ["boxes", "scores", "count"]
