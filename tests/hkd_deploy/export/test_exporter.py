"""Exported ONNX files: parity with torch, metadata, refusals, and the command."""

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
from hkd_deploy.export.exporter import export_detector, export_onnx, make_metadata
from hkd_deploy.export.parity import ParityError, compute_box_difference
from hkd_deploy.model_metadata import ExportOptions
from hkd_det.letterbox import Letterbox
from hkd_det.models.checkpoint import DetectorCheckpoint, save_detector_checkpoint, weights_sha256
from hkd_det.models.zoo import build_model, count_params_and_flops

IMAGE_DIR = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set")) / "inria" / "test"
IMGSZ_HW = (128, 160)


@pytest.fixture(scope="module")
def checkpoint() -> DetectorCheckpoint:
    """Build an untrained detector with updated batch-norm statistics and scores that differ."""
    torch.manual_seed(0)
    detector = build_model("mini-student")
    torch.nn.init.normal_(detector.head.one2many.weight, std=0.5)
    torch.nn.init.normal_(detector.head.one2one.weight, std=0.5)
    detector.train()
    with torch.no_grad():
        for _ in range(3):
            detector(torch.rand(4, 3, 64, 64) * 255)
    config = {"data": "street.yaml", "imgsz_hw": list(IMGSZ_HW)}
    return DetectorCheckpoint("mini-student", detector.spec, detector.eval().state_dict(), config, 1, 0.5)


@pytest.fixture(scope="module")
def image_paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Real images if HKD_TEST_DATA is set, else noise with edges."""
    if IMAGE_DIR.is_dir():
        return sorted(IMAGE_DIR.glob("*.jpg"))[:4]
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for index in range(4):
        noise = cv2.resize(rng.integers(0, 255, (12, 16, 3)).astype(np.uint8), (320, 240))
        cv2.imwrite(str(folder / f"{index}.png"), noise)
    return sorted(folder.glob("*.png"))


@pytest.fixture(scope="module")
def model_path(checkpoint: DetectorCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as an ONNX file."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_onnx(checkpoint, path, ExportOptions(IMGSZ_HW))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, None])
def test_export_detector_agrees_with_torch(
    checkpoint: DetectorCheckpoint, image_paths: list[Path], tmp_path: Path, batch: int | None
) -> None:
    parity = export_detector(checkpoint, tmp_path / "model.onnx", ExportOptions(IMGSZ_HW, batch), image_paths)
    assert parity.num_images == 4 and parity.box_error_px <= 0.5 and parity.score_error <= 1e-3


def test_open_detector_returns_torch_detections(
    checkpoint: DetectorCheckpoint, image_paths: list[Path], model_path: Path
) -> None:
    """End to end, in pixels of the original image."""
    image = cv2.imread(str(image_paths[0]))[:, :, ::-1].copy()
    with open_detector(model_path) as detector:
        detections = detector(image)
    letterbox = Letterbox(image.shape[:2], IMGSZ_HW)
    with torch.no_grad():
        boxes, scores = checkpoint.build().predict(torch.from_numpy(letterbox.apply(image)).permute(2, 0, 1)[None])
    valid = scores[0].numpy() >= 0.001
    assert len(detections) == valid.sum() > 10
    np.testing.assert_allclose(detections.scores, scores[0].numpy()[valid], atol=1e-4)
    expected_boxes = letterbox.boxes_to_source(boxes[0].numpy()[valid])
    assert (
        compute_box_difference(expected_boxes, scores[0].numpy()[valid], detections.boxes_xyxy, detections.scores) < 0.5
    )


def test_export_onnx_writes_metadata(checkpoint: DetectorCheckpoint, model_path: Path) -> None:
    with open_detector(model_path) as detector:
        metadata = detector.metadata
    complexity = count_params_and_flops(checkpoint.build(), IMGSZ_HW)
    assert (metadata.model, metadata.imgsz_hw, metadata.batch) == ("mini-student", IMGSZ_HW, 1)
    assert (metadata.parameters, metadata.flops) == (complexity.num_params, complexity.flops)
    assert metadata.weights_sha256 == weights_sha256(checkpoint.weights) and metadata.data == "street.yaml"
    model = onnx.load(model_path)
    assert model.opset_import[0].version == 17 and model.ir_version <= 8
    assert {prop.key for prop in model.metadata_props} >= {"names", "stride", "task", "imgsz", "author", "license"}
    assert "NonMaxSuppression" not in {node.op_type for node in model.graph.node}


def test_make_metadata_license_states_data_terms(checkpoint: DetectorCheckpoint, tmp_path: Path) -> None:
    """For a public dataset, a custom dataset, and a data YAML that is not available."""
    own = tmp_path / "own.yaml"
    own.write_text("train: images\nlicense: ours, for sale\n")
    for data, ending in (
        ("caltech", "allow: research; cite Dollár et al. 2012"),
        (str(own), "allow: ours, for sale"),
        ("elsewhere.yaml", "as their training data allows"),
    ):
        source = replace(checkpoint, config={**checkpoint.config, "data": data})
        license_text = make_metadata(source, ExportOptions(IMGSZ_HW))["license"]
        assert license_text.startswith("Apache-2.0 (code); weights: ") and license_text.endswith(ending), data


@pytest.mark.slow
def test_export_detector_of_different_outputs_writes_nothing(
    checkpoint: DetectorCheckpoint, image_paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hkd_deploy.export import exporter

    original_export = exporter.export_onnx

    def export_with_changed_bias(source: DetectorCheckpoint, path: Path, options: ExportOptions) -> None:
        original_export(source, path, options)
        model = onnx.load(path)
        bias = next(t for t in model.graph.initializer if t.name.endswith("head.one2many.bias"))
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 0.5, bias.name))
        onnx.save(model, path)

    monkeypatch.setattr(exporter, "export_onnx", export_with_changed_bias)
    with pytest.raises(ParityError, match="scores: 0\\.0"):
        export_detector(checkpoint, tmp_path / "model.onnx", ExportOptions(IMGSZ_HW), image_paths)
    assert list(tmp_path.iterdir()) == []


def test_compute_box_difference_matches_by_score() -> None:
    boxes = np.array([[0, 0, 10, 10], [50, 50, 60, 60]], np.float32)
    scores = np.array([0.5, 0.4999], np.float32)
    assert compute_box_difference(boxes, scores, boxes[::-1], scores) == 0
    assert compute_box_difference(boxes, scores, boxes + 0.25, scores) == 0.25
    assert compute_box_difference(boxes, scores, boxes, scores - 0.1) == np.inf


@pytest.mark.slow
def test_command_exports_weights_and_reports_errors(
    checkpoint: DetectorCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
        ([str(tmp_path / "best.onnx")], 2, "Set --precision, --trt"),
        ([str(tmp_path / "street.yaml")], 2, "expected best.pt"),
    ):
        assert main(flags) == code
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1


@pytest.mark.slow
def test_command_exports_checkpoint_without_settings(
    checkpoint: DetectorCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of another training loop contains neither the input size nor the dataset."""
    weights = tmp_path / "best.pt"
    save_detector_checkpoint(weights, replace(checkpoint, config={}))
    for flags, message in (
        (["--no-verify"], "--imgsz: required, because the checkpoint does not contain an input size. Set "),
        (["--imgsz", "96x64"], f"{weights}: the checkpoint does not name its dataset. Set --data, or --no-verify."),
    ):
        assert main([str(weights), *flags]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1
    assert main([str(weights), "--imgsz", "96x64", "--no-verify"]) == 0
    with open_detector(tmp_path / "best.onnx") as detector:
        assert detector.metadata.imgsz_hw == (64, 96) and detector.metadata.data == "unknown"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch"), [("mini-student", 1), ("mini-student", None), ("student-r18", 1)])
def test_export_onnx_output_builds_on_tensorrt(
    name: str, batch: int | None, tmp_path: Path, tensorrt_builds: Callable[..., dict[str, Any]]
) -> None:
    detector = build_model(name)
    source = DetectorCheckpoint(name, detector.spec, detector.state_dict(), {"data": "none"}, 1, 1.0)
    export_onnx(source, tmp_path / "model.onnx", ExportOptions(IMGSZ_HW, batch))
    built = tensorrt_builds(tmp_path / "model.onnx", (1, *IMGSZ_HW, 3), (4, *IMGSZ_HW, 3))
    assert built["input"] == "UINT8" and list(built["outputs"]) == ["boxes", "scores", "count"]
