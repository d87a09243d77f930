"""Black boxes as teachers: our own exports, a real foreign model, and what cannot be asked of them."""

import os
from pathlib import Path

import pytest
import torch

from hkd_deploy.export.cli import main as export
from hkd_det.datasets.catalog import load_dataset
from hkd_det.distill import parse_methods
from hkd_det.distill.distiller import build_methods
from hkd_det.distill.soft_labels import SoftLabelConfig
from hkd_det.errors import DataError, UsageError
from hkd_det.image import read_image
from hkd_det.models import zoo as sizes
from hkd_det.models.checkpoint import load_detector_checkpoint
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.onnx_teacher import OnnxTeacher, load_onnx_teacher
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


def settings(people: Path, run: Path, **changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "data": str(people), "model": "mini-student", "save_dir": str(run), "imgsz_hw": (64, 96), "epochs": 1,
        "batch": 4, "workers": 0, "device": "cpu", "no_aug_ratio": 0.0,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


def exported(people: Path, folder: Path, **changes: object) -> Path:
    best = train(settings(people, folder, **changes)).best
    assert export([str(best), "--dynamic"]) == 0
    return best.with_suffix(".onnx")


def test_onnx_export_predicts_like_its_detector(people: Path, tmp_path: Path) -> None:
    """Boxes and scores, picture by picture; boxes cut at the picture's borders."""
    path = exported(people, tmp_path)
    teacher, detector = load_onnx_teacher(path, CPU), load_detector_checkpoint(path.with_suffix(".pt")).build()
    pictures = torch.randint(0, 255, (3, 3, 64, 96), dtype=torch.uint8)
    found = teacher.postprocess(teacher(pictures.contiguous(memory_format=torch.channels_last)), max_det=20)
    with torch.no_grad():
        boxes, scores = detector.predict(pictures, 20)
    for b in range(3):
        count = int((scores[b] > 1e-6).sum())  # points silenced by a better neighbour say next to nothing
        assert count > 5
        torch.testing.assert_close(found.scores[b][:count], scores[b, :count], atol=1e-4, rtol=1e-3)
        inside = boxes[b, :count].clamp(min=torch.zeros(4), max=torch.tensor([96.0, 64.0, 96.0, 64.0]))
        torch.testing.assert_close(found.boxes_xyxy[b][:count], inside, atol=0.1, rtol=1e-3)
    assert teacher.feature_info() == [] and not list(teacher.parameters())


def test_onnx_teacher_trains_by_the_command(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = exported(people, tmp_path / "teacher")
    flags = [
        "--data", str(people), "--model", "mini-student", "--teacher", str(path),
        "--distill", "soft_labels,noisy_teacher", "--imgsz", "96x64", "--epochs", "2", "--batch", "4",
        "--workers", "0", "--device", "cpu", "--project", str(tmp_path), "--name", "run",
        "--unlabeled", str(people.parent / "val"),
    ]  # fmt: skip
    assert main(flags) == 2
    assert "set distill.noisy_teacher.mode=targets" in capsys.readouterr().err
    flags += ["--set", "distill.noisy_teacher.sigma=0.2", "--set", "distill.noisy_teacher.mode=targets"]  # in any order
    assert main(flags) == 0
    course = (tmp_path / "run" / "results.csv").read_text()
    assert "soft_cls" in course and "soft_box" in course
    assert load_detector_checkpoint(tmp_path / "run" / "best.pt").spec == TINY
    assert main(["--resume", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main([*flags[:-4], "--name", "other", "--distill", "hkd"]) == 2
    assert "provides only detections" in (told := capsys.readouterr().err) and "--distill soft_labels" in told


@pytest.mark.slow
@pytest.mark.skipif(not YOLOX.is_file(), reason="HKD_TEST_DATA is not set")
def test_third_party_onnx_teacher_trains(people: Path, tmp_path: Path) -> None:
    taught = {"teacher": str(YOLOX), "teacher_config": str(DESCRIPTION)}
    result = train(settings(people, tmp_path, **taught, distill={"soft_labels": SoftLabelConfig()}))
    assert {"soft_cls", "soft_box"} <= result.history[0].losses.keys()


@pytest.mark.skipif(not YOLOX.is_file(), reason="HKD_TEST_DATA is not set")
def test_third_party_teacher_predicts_same_in_batch() -> None:
    teacher = load_onnx_teacher(YOLOX, CPU, DESCRIPTION)
    picture = read_image(sorted((SHARED / "inria" / "test").iterdir())[0])
    alone = teacher.model([picture])[0].filter(0.3)
    batch = torch.from_numpy(picture).permute(2, 0, 1)[None].expand(2, -1, -1, -1)
    for boxes, scores in zip(*vars(teacher(batch)).values(), strict=True):
        assert torch.equal(scores[: len(alone)], torch.from_numpy(alone.scores)) and len(alone) > 0
        assert torch.equal(boxes[: len(alone)], torch.from_numpy(alone.boxes_xyxy))


@pytest.mark.parametrize("names", ["hkd", "blockwise", "noisy_teacher", "hkd,soft_labels"])
def test_method_beyond_detections_raises_usage_error(people: Path, tmp_path: Path, names: str) -> None:
    with pytest.raises(UsageError, match=r"model\.onnx provides only detections.*--distill soft_labels"):
        settings(people, tmp_path, teacher="model.onnx", distill={name: {} for name in names.split(",")})


@pytest.mark.parametrize("asked", [["--distill", "blockwise"], ["--distill", "cdd"], ["--list-layers"]])
def test_onnx_file_is_no_student_and_has_no_layers(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[str]
) -> None:
    assert main(["--data", str(people), "--teacher", str(tmp_path / "model.onnx"), *asked]) == 2
    assert "an ONNX file has no feature maps" in (told := capsys.readouterr().err) and "--distill soft_labels" in told


def test_build_methods_rejects_hkd_with_onnx_teacher(tmp_path: Path) -> None:
    class Closed:
        path = tmp_path / "closed.onnx"

    with pytest.raises(
        UsageError, match=r"requires features, logits of the teacher, and closed\.onnx provides only detections"
    ):
        build_methods(parse_methods({"hkd": {}}), HKDDetector(TINY), OnnxTeacher(Closed()), Closed.path)  # type: ignore[arg-type]


def test_teacher_config_requires_onnx_teacher(people: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--teacher-config .* \.onnx"):
        settings(people, tmp_path, teacher="best.pt", teacher_config="a.yaml", distill={"hkd": {}})
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    taught = settings(people, tmp_path / "run", teacher=str(tmp_path / "model.onnx"), distill={"soft_labels": {}})
    with pytest.raises(DataError, match=r"model\.onnx: ONNX Runtime .* cannot load it"):
        train(taught)
    assert len(load_dataset(str(people), "val")) == 4
