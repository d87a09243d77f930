"""Training with ONNX teachers: exports of this project, a third-party model, and unsupported methods."""

import os
from pathlib import Path

import pytest
import torch

from hkd_deploy.export.cli import main as export
from hkd_det.datasets.catalog import load_dataset
from hkd_det.distill import parse_methods
from hkd_det.distill.dense import SoftLabelConfig
from hkd_det.distill.distiller import build_methods
from hkd_det.errors import DataError, UsageError
from hkd_det.image import read_image
from hkd_det.models import zoo as sizes
from hkd_det.models.checkpoint import load_detector_checkpoint
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.zoo import OnnxTeacher, load_onnx_teacher
from hkd_det.train.cli import main
from hkd_det.train.config import TrainConfig
from hkd_det.train.trainer import train

TINY = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
SHARED = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set"))
YOLOX, DESCRIPTION = SHARED / "models" / "yolox_nano.onnx", Path(__file__).parents[3] / "recipes/onnx/yolox.yaml"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.MODELS, "mini-student", TINY)


def make_config(data_yaml: Path, run: Path, **changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "data": str(data_yaml), "model": "mini-student", "save_dir": str(run), "imgsz_hw": (64, 96), "epochs": 1,
        "batch": 4, "workers": 0, "device": "cpu", "no_aug_ratio": 0.0,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


def export_detector(data_yaml: Path, folder: Path, **changes: object) -> Path:
    best = train(make_config(data_yaml, folder, **changes)).best
    assert export([str(best), "--dynamic"]) == 0
    return best.with_suffix(".onnx")


@pytest.mark.slow
def test_onnx_export_predicts_like_its_detector(data_yaml: Path, tmp_path: Path) -> None:
    """Boxes, clipped to the image, and scores of each image are equal."""
    path = export_detector(data_yaml, tmp_path)
    teacher, detector = load_onnx_teacher(path, CPU), load_detector_checkpoint(path.with_suffix(".pt")).build()
    images = torch.randint(0, 255, (3, 3, 64, 96), dtype=torch.uint8)
    detections = teacher.postprocess(teacher(images.contiguous(memory_format=torch.channels_last)), max_det=20)
    with torch.no_grad():
        boxes, scores = detector.predict(images, 20)
    for b in range(3):
        count = int((scores[b] > 1e-6).sum())  # suppressed points have scores near 0
        assert count > 5
        torch.testing.assert_close(detections.scores[b][:count], scores[b, :count], atol=1e-4, rtol=1e-3)
        inside = boxes[b, :count].clamp(min=torch.zeros(4), max=torch.tensor([96.0, 64.0, 96.0, 64.0]))
        torch.testing.assert_close(detections.boxes_xyxy[b][:count], inside, atol=0.1, rtol=1e-3)
    assert teacher.feature_info() == [] and not list(teacher.parameters())


@pytest.mark.slow
def test_onnx_teacher_trains_by_the_command(
    data_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = export_detector(data_yaml, tmp_path / "teacher")
    flags = [
        "--data", str(data_yaml), "--model", "mini-student", "--teacher", str(path),
        "--distill", "soft_labels,noisy_teacher", "--imgsz", "96x64", "--epochs", "2", "--batch", "4",
        "--workers", "0", "--device", "cpu", "--project", str(tmp_path), "--name", "run",
        "--unlabeled", str(data_yaml.parent / "val"),
    ]  # fmt: skip
    assert main(flags) == 2
    assert "set distill.noisy_teacher.mode=targets" in capsys.readouterr().err
    flags += ["--set", "distill.noisy_teacher.sigma=0.2", "--set", "distill.noisy_teacher.mode=targets"]  # in any order
    assert main(flags) == 0
    history = (tmp_path / "run" / "results.csv").read_text()
    assert "soft_cls" in history and "soft_box" in history
    assert load_detector_checkpoint(tmp_path / "run" / "best.pt").spec == TINY
    assert main(["--resume", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main([*flags[:-4], "--name", "other", "--distill", "hkd"]) == 2
    assert "provides only detections" in (error := capsys.readouterr().err) and "--distill soft_labels" in error


@pytest.mark.slow
@pytest.mark.skipif(not YOLOX.is_file(), reason="HKD_TEST_DATA is not set")
def test_third_party_onnx_teacher_trains(data_yaml: Path, tmp_path: Path) -> None:
    distillation = {"teacher": str(YOLOX), "teacher_config": str(DESCRIPTION)}
    result = train(make_config(data_yaml, tmp_path, **distillation, distill={"soft_labels": SoftLabelConfig()}))
    assert {"soft_cls", "soft_box"} <= result.history[0].losses.keys()


@pytest.mark.skipif(not YOLOX.is_file(), reason="HKD_TEST_DATA is not set")
def test_third_party_teacher_predicts_same_in_batch() -> None:
    teacher = load_onnx_teacher(YOLOX, CPU, DESCRIPTION)
    image = read_image(sorted((SHARED / "inria" / "test").iterdir())[0])
    expected = teacher.model([image])[0].filter(0.3)
    batch = torch.from_numpy(image).permute(2, 0, 1)[None].expand(2, -1, -1, -1)
    for boxes, scores in zip(*vars(teacher(batch)).values(), strict=True):
        assert torch.equal(scores[: len(expected)], torch.from_numpy(expected.scores)) and len(expected) > 0
        assert torch.equal(boxes[: len(expected)], torch.from_numpy(expected.boxes_xyxy))


@pytest.mark.parametrize("names", ["hkd", "blockwise", "noisy_teacher", "hkd,soft_labels"])
def test_method_beyond_detections_raises_usage_error(data_yaml: Path, tmp_path: Path, names: str) -> None:
    with pytest.raises(UsageError, match=r"model\.onnx provides only detections.*--distill soft_labels"):
        make_config(data_yaml, tmp_path, teacher="model.onnx", distill={name: {} for name in names.split(",")})


@pytest.mark.parametrize("flags", [["--distill", "blockwise"], ["--distill", "cdd"], ["--list-layers"]])
def test_onnx_file_is_no_student_and_has_no_layers(
    data_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    (tmp_path / "model.onnx").touch()
    assert main(["--data", str(data_yaml), "--teacher", str(tmp_path / "model.onnx"), *flags]) == 2
    error = capsys.readouterr().err
    assert "this ONNX file has no feature maps" in error and "--distill soft_labels" in error


def test_build_methods_rejects_hkd_with_onnx_teacher(tmp_path: Path) -> None:
    class Closed:
        path = tmp_path / "closed.onnx"

    with pytest.raises(
        UsageError, match=r"requires features, logits of the teacher, and closed\.onnx provides only detections"
    ):
        build_methods(parse_methods({"hkd": {}}), HKDDetector(TINY), OnnxTeacher(Closed()), Closed.path)  # type: ignore[arg-type]


def test_teacher_config_requires_onnx_teacher(data_yaml: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--teacher-config: .* \.onnx"):
        make_config(data_yaml, tmp_path, teacher="best.pt", teacher_config="a.yaml", distill={"hkd": {}})
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    config = make_config(data_yaml, tmp_path / "run", teacher=str(tmp_path / "model.onnx"), distill={"soft_labels": {}})
    with pytest.raises(DataError, match=r"model\.onnx: ONNX Runtime .* cannot load it"):
        train(config)
    assert len(load_dataset(str(data_yaml), "val")) == 4
