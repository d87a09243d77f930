"""Whole small runs with a YOLO model as student and as teacher, our detectors on the other side."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hkd_det.distill.hkd import HKDConfig
from hkd_det.distill.noisy_teacher import NoisyTeacherConfig
from hkd_det.errors import DataError
from hkd_det.models import zoo as sizes
from hkd_det.models.checkpoint import (
    DetectorCheckpoint,
    load_detector_checkpoint,
    load_training_state,
    save_detector_checkpoint,
)
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.feature_layers import LayerPairs
from hkd_det.models.ultralytics import UltralyticsDetector, UltralyticsSpec, make_ultralytics_spec
from hkd_det.models.zoo import load_detector
from hkd_det.train.cli import main
from hkd_det.train.config import TrainConfig
from hkd_det.train.trainer import Trainer, train

TINY = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
TERMS = {"hkd_pyramid", "hkd_region", "hkd_cls", "hkd_box"}


def thin(name: str, classes: int = 1) -> UltralyticsSpec:
    layout = deepcopy(make_ultralytics_spec(name).model_yaml)
    layout["scales"][layout["scale"]][1] = 0.0625
    return UltralyticsSpec(name, {**layout, "nc": classes})


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.MODELS, "mini-student", TINY)
    for name in ("yolov8n", "yolo11n", "yolo26n"):
        monkeypatch.setitem(sizes.MODELS, name, thin(name))  # type: ignore[arg-type]


def settings(people: Path, run: Path, model: str, teacher: Path | None, **changes: object) -> TrainConfig:
    taught = {"teacher": str(teacher), "distill": {"hkd": HKDConfig()}} if teacher else {}
    values: dict[str, object] = {
        "data": str(people), "model": model, "save_dir": str(run), "imgsz_hw": (64, 96), "epochs": 2, "batch": 4,
        "workers": 0, "device": "cpu", "no_aug_ratio": 0.0,
    }  # fmt: skip
    return TrainConfig(**{**values, **taught, **changes})  # type: ignore[arg-type]


def our_teacher(path: Path) -> Path:
    torch.manual_seed(3)
    save_detector_checkpoint(path, DetectorCheckpoint("tiny", TINY, HKDDetector(TINY).state_dict(), {}, 1, 1.0))
    return path


@pytest.mark.usefixtures("tiny_models")
@pytest.mark.parametrize(("name", "own"), [("yolo11n", "dfl"), ("yolo26n", "box_one2one")])
def test_yolo_student_and_teacher_train_with_native_detector(people: Path, tmp_path: Path, name: str, own: str) -> None:
    taught = train(settings(people, tmp_path / "yolo", name, our_teacher(tmp_path / "teacher.pt")))
    assert taught.history[0].losses.keys() >= TERMS | {"cls", "box", own}
    best = load_detector_checkpoint(taught.best)
    assert best.spec == thin(name) and isinstance(best.build(), UltralyticsDetector)
    back = train(settings(people, tmp_path / "ours", "mini-student", taught.best))
    assert back.history[0].losses.keys() >= TERMS
    assert isinstance(load_detector_checkpoint(back.best).build(), HKDDetector)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_models")
def test_named_layers_and_noise_resume_exactly(people: Path, tmp_path: Path) -> None:
    """Run whole, and again from an epoch's end: noise is drawn by the epoch."""
    yolo = train(settings(people, tmp_path / "yolo", "yolo11n", None, epochs=1)).best
    ours, theirs = ("backbone.body.layer3", "neck.outputs.0"), ("network.model.16", "network.model.22")
    for model, teacher, taps in (
        ("yolo11n", our_teacher(tmp_path / "teacher.pt"), LayerPairs(theirs, ours)),
        ("mini-student", yolo, LayerPairs(ours, theirs)),
    ):
        taught = {"distill": {"hkd": HKDConfig(feature_layers=taps), "noisy_teacher": NoisyTeacherConfig()}}
        config = settings(people, tmp_path / model, model, teacher, **taught)
        assert train(config).history[-1].losses.keys() >= TERMS | {"noisy_teacher"}
    cut = replace(config, save_dir=str(tmp_path / "cut"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_compute_lr", stop_at(5, Trainer._compute_lr))  # in the second epoch's third step
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    train(cut, resume=True)
    whole, resumed = (load_training_state(one.save_path / "last.pt")["distiller"] for one in (config, cut))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def stop_at(step: int, kept: Callable[[Trainer, int], None]) -> Callable[[Trainer, int], None]:
    def set_rate(run: Trainer, at: int) -> None:
        if at == step:
            raise KeyboardInterrupt
        kept(run, at)

    return set_rate


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_models")
def test_yolo_training_learns_dark_boxes(people: Path, tmp_path: Path) -> None:
    plain = {"mosaic": 0.0, "multi_scale": 0.0, "ema_decay": 0.9}
    course = train(settings(people, tmp_path, "yolov8n", None, epochs=20, lr=1e-2, **plain))
    assert course.history[-1].losses["box"] < 0.6 * course.history[0].losses["box"]
    assert course.miss_rate < 0.5


@pytest.mark.usefixtures("tiny_models")
def test_ultralytics_file_trains_native_student(people: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = UltralyticsDetector(thin("yolo11n", 3)).network
    network.names = {0: "person", 1: "dog", 2: "car"}
    torch.save({"model": network}, tmp_path / "yolo11n.pt")
    flags = [
        "--data", str(people), "--model", "mini-student", "--teacher", str(tmp_path / "yolo11n.pt"), "--distill", "hkd",
        "--imgsz", "96x64", "--epochs", "1", "--batch", "4", "--workers", "0", "--device", "cpu",
        "--project", str(tmp_path), "--name", "run",
    ]  # fmt: skip
    assert main(flags) == 0
    assert "hkd_pyramid" in (tmp_path / "run" / "results.csv").read_text()


def test_teacher_type_follows_file_content(tmp_path: Path) -> None:
    assert isinstance(load_detector(our_teacher(tmp_path / "teacher.pt")), HKDDetector)
    with pytest.raises(DataError, match=r"nothing\.pt: no such checkpoint"):
        load_detector(tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("no pickle")
    with pytest.raises(DataError, match=r"text\.pt: not a readable checkpoint"):
        load_detector(tmp_path / "text.pt")
