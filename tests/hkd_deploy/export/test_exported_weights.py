"""Exporting the weights of an ONNX file again, with another input size or another graph."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hkd_deploy import open_detector
from hkd_deploy.export.cli import main
from hkd_deploy.trt.onnx_file import read_onnx_metadata
from hkd_det.models.checkpoint import DetectorCheckpoint, save_detector_checkpoint
from hkd_det.models.yolox import YOLOX, YOLOXSpec
from hkd_det.shipped import DEFAULT_MODEL, resolve_model

IMAGE = np.random.default_rng(0).integers(0, 255, (90, 120, 3)).astype(np.uint8)


@pytest.mark.slow
def test_graph_of_another_size_equals_that_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    detector = YOLOX(YOLOXSpec(width=0.125)).eval()
    config = {"data": "none", "imgsz_hw": [64, 64], "setup": "All"}
    save_detector_checkpoint(Path("best.pt"), DetectorCheckpoint.from_detector(detector, "tiny", config, 3, 0.25))
    assert main(["best.pt", "--no-verify"]) == 0
    assert main(["best.pt", "--imgsz", "96x64", "--no-verify", "--output", "expected.onnx"]) == 0
    assert main(["best.onnx", "--imgsz", "96x64", "--no-verify"]) == 0
    with open_detector("expected.onnx") as expected_detector, open_detector("best-96x64.onnx") as actual_detector:
        expected, actual = expected_detector(IMAGE, conf=0.0), actual_detector(IMAGE, conf=0.0)
    assert len(actual) == len(expected) > 0
    np.testing.assert_allclose(actual.scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(actual.boxes_xyxy, expected.boxes_xyxy, atol=1e-2)
    expected_metadata, metadata = (read_onnx_metadata(Path(name)) for name in ("expected.onnx", "best-96x64.onnx"))
    assert {**metadata, "date": ""} == {**expected_metadata, "date": ""}


@pytest.mark.slow
def test_shipped_model_is_exported_next_to_a_copy_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = resolve_model(DEFAULT_MODEL)
    assert main([DEFAULT_MODEL, "--dynamic", "size", "--no-verify"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"hkd-cpu.onnx", "hkd-cpu-320x320.onnx"}
    with open_detector(shipped) as shipped_detector, open_detector("hkd-cpu-320x320.onnx") as detector:
        image = np.resize(IMAGE, (320, 320, 3))  # without padding, which depends on the graph
        expected, actual = shipped_detector(image, conf=0.001), detector(image, conf=0.001)
        assert detector.metadata.dynamic and detector.metadata.conf == shipped_detector.metadata.conf
    np.testing.assert_allclose(actual.scores, expected.scores, atol=1e-4)


def test_errors_name_flag_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(resolve_model(DEFAULT_MODEL), "student.onnx")
    Path("hkd-cpu.onnx").write_bytes(b"another file")
    for arguments, message in (
        (["student.onnx"], "student.onnx: no conversion selected. "),
        ([DEFAULT_MODEL, "--imgsz", "64x64"], "hkd-cpu.onnx: not the shipped model of this name. "),
        (
            ["student.onnx", "--imgsz", "64x64", "--no-verify", "--output", "student.onnx"],
            "is the file of the weights.",
        ),
        (["student.onnx", "--trt", "--output", "other.onnx"], "other.onnx: an .onnx file from student.onnx requires "),
        (["student.onnx", "--imgsz", "60x60", "--no-verify"], "--imgsz 60x60: "),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    Path("hkd-cpu.onnx").rename("other.onnx")
    assert main(["other.onnx", "--imgsz", "64x64", "--no-verify"]) == 2
    assert "--imgsz: requires weights (.pt) or an .onnx file of a YOLOX model" in capsys.readouterr().err
