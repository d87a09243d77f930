"""Short complete runs with a YOLO model as student or as teacher."""

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
HKD_LOSSES = {"hkd_pyramid", "hkd_region", "hkd_cls", "hkd_box"}


def make_thin_spec(name: str, classes: int = 1) -> UltralyticsSpec:
    model_yaml = deepcopy(make_ultralytics_spec(name).model_yaml)
    model_yaml["scales"][model_yaml["scale"]][1] = 0.0625
    return UltralyticsSpec(name, {**model_yaml, "nc": classes})


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.MODELS, "mini-student", TINY)
    for name in ("yolov8n", "yolo11n", "yolo26n"):
        monkeypatch.setitem(sizes.MODELS, name, make_thin_spec(name))  # type: ignore[arg-type]


def make_config(data_yaml: Path, run: Path, model: str, teacher: Path | None, **changes: object) -> TrainConfig:
    distillation = {"teacher": str(teacher), "distill": {"hkd": HKDConfig()}} if teacher else {}
    values: dict[str, object] = {
        "data": str(data_yaml), "model": model, "save_dir": str(run), "imgsz_hw": (64, 96), "epochs": 2, "batch": 4,
        "workers": 0, "device": "cpu", "no_aug_ratio": 0.0,
    }  # fmt: skip
    return TrainConfig(**{**values, **distillation, **changes})  # type: ignore[arg-type]


def save_teacher(path: Path) -> Path:
    torch.manual_seed(3)
    save_detector_checkpoint(path, DetectorCheckpoint("tiny", TINY, HKDDetector(TINY).state_dict(), {}, 1, 1.0))
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_models")
@pytest.mark.parametrize(("name", "loss"), [("yolo11n", "dfl"), ("yolo26n", "box_one2one")])
def test_yolo_student_and_teacher_train_with_native_detector(
    data_yaml: Path, tmp_path: Path, name: str, loss: str
) -> None:
    result = train(make_config(data_yaml, tmp_path / "yolo", name, save_teacher(tmp_path / "teacher.pt")))
    assert result.history[0].losses.keys() >= HKD_LOSSES | {"cls", "box", loss}
    best = load_detector_checkpoint(result.best)
    assert best.spec == make_thin_spec(name) and isinstance(best.build(), UltralyticsDetector)
    native = train(make_config(data_yaml, tmp_path / "ours", "mini-student", result.best))
    assert native.history[0].losses.keys() >= HKD_LOSSES
    assert isinstance(load_detector_checkpoint(native.best).build(), HKDDetector)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_models")
def test_named_layers_and_noise_resume_exactly(data_yaml: Path, tmp_path: Path) -> None:
    """The random numbers of the noise depend on the epoch, so a resumed run repeats them."""
    yolo = train(make_config(data_yaml, tmp_path / "yolo", "yolo11n", None, epochs=1)).best
    hkd_layers, yolo_layers = ("backbone.body.layer3", "neck.outputs.0"), ("network.model.16", "network.model.22")
    for model, teacher, layer_pairs in (
        ("yolo11n", save_teacher(tmp_path / "teacher.pt"), LayerPairs(yolo_layers, hkd_layers)),
        ("mini-student", yolo, LayerPairs(hkd_layers, yolo_layers)),
    ):
        distillation = {
            "distill": {"hkd": HKDConfig(feature_layers=layer_pairs), "noisy_teacher": NoisyTeacherConfig()}
        }
        config = make_config(data_yaml, tmp_path / model, model, teacher, **distillation)
        assert train(config).history[-1].losses.keys() >= HKD_LOSSES | {"noisy_teacher"}
    interrupted = replace(config, save_dir=str(tmp_path / "cut"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_compute_lr", interrupt_at(5, Trainer._compute_lr))  # third step of the second epoch
        with pytest.raises(KeyboardInterrupt):
            train(interrupted)
    train(interrupted, resume=True)
    whole, resumed = (load_training_state(run.save_path / "last.pt")["distiller"] for run in (config, interrupted))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def interrupt_at(step: int, function: Callable[[Trainer, int], float]) -> Callable[[Trainer, int], float]:
    def call(trainer: Trainer, current_step: int) -> float:
        if current_step == step:
            raise KeyboardInterrupt
        return function(trainer, current_step)

    return call


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_models")
def test_yolo_training_learns_dark_boxes(data_yaml: Path, tmp_path: Path) -> None:
    no_aug = {"mosaic": 0.0, "multi_scale": 0.0, "ema_decay": 0.9}
    result = train(make_config(data_yaml, tmp_path, "yolov8n", None, epochs=20, lr=1e-2, **no_aug))
    assert result.history[-1].losses["box"] < 0.6 * result.history[0].losses["box"]
    assert result.miss_rate < 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_models")
def test_ultralytics_file_trains_native_student(data_yaml: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = UltralyticsDetector(make_thin_spec("yolo11n", 3)).network
    network.names = {0: "person", 1: "dog", 2: "car"}
    torch.save({"model": network}, tmp_path / "yolo11n.pt")
    flags = [
        "--data", str(data_yaml), "--model", "mini-student", "--teacher", str(tmp_path / "yolo11n.pt"),
        "--distill", "hkd", "--imgsz", "96x64", "--epochs", "1", "--batch", "4", "--workers", "0", "--device", "cpu",
        "--project", str(tmp_path), "--name", "run",
    ]  # fmt: skip
    assert main(flags) == 0
    assert "hkd_pyramid" in (tmp_path / "run" / "results.csv").read_text()


def test_teacher_type_follows_file_content(tmp_path: Path) -> None:
    assert isinstance(load_detector(save_teacher(tmp_path / "teacher.pt")), HKDDetector)
    with pytest.raises(DataError, match=r"nothing\.pt: no such checkpoint"):
        load_detector(tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("no pickle")
    with pytest.raises(DataError, match=r"text\.pt: not a checkpoint"):
        load_detector(tmp_path / "text.pt")
