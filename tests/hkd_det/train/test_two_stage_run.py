"""Short complete runs with Faster R-CNN: without teacher, with a two-stage and with a dense teacher."""

from pathlib import Path

import pytest
import torch

from hkd_det.distill.hkd import HKDConfig
from hkd_det.distill.noisy_teacher import NoisyTeacherConfig
from hkd_det.models import zoo as sizes
from hkd_det.models.checkpoint import load_detector_checkpoint, load_training_state
from hkd_det.models.detector import HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNNSpec
from hkd_det.train.config import TrainConfig
from hkd_det.train.trainer import TrainResult, train

ANCHORS = (16, 32, 64, 128, 256)
STUDENT = FasterRCNNSpec("resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=ANCHORS)
TEACHER = FasterRCNNSpec("resnet18", width_mult=0.25, channels=12, head_width=24, anchor_sizes=ANCHORS)
DENSE = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
HKD_LOSSES = {"hkd_pyramid", "hkd_region", "hkd_logit"}
DET_LOSSES = {"rpn_cls", "rpn_box", "cls", "box"}


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.MODELS, "fasterrcnn-r50", TEACHER)
    monkeypatch.setitem(sizes.MODELS, "fasterrcnn-r18", STUDENT)
    monkeypatch.setitem(sizes.MODELS, "mini-teacher", DENSE)


def run_training(data_yaml: Path, folder: Path, model: str = "fasterrcnn-r18", **changes: object) -> TrainResult:
    return train(make_config(data_yaml, folder, model, **changes))


def make_config(data_yaml: Path, folder: Path, model: str = "fasterrcnn-r18", **changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "data": str(data_yaml), "model": model, "save_dir": str(folder), "imgsz_hw": (64, 96), "epochs": 1, "batch": 4,
        "workers": 0, "device": "cpu", "no_aug_ratio": 0.0,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def teacher(data_yaml: Path, tmp_path: Path) -> str:
    return str(run_training(data_yaml, tmp_path / "teacher", "fasterrcnn-r50").best)


@pytest.mark.slow
def test_pair_trains_and_checkpoint_predicts_the_same(data_yaml: Path, tmp_path: Path, teacher: str) -> None:
    result = run_training(
        data_yaml,
        tmp_path / "student",
        teacher=teacher,
        distill={"hkd": HKDConfig(), "noisy_teacher": NoisyTeacherConfig("targets")},
    )
    assert result.history[0].losses.keys() == DET_LOSSES | HKD_LOSSES
    assert all(value > 0 for value in result.history[0].losses.values())
    loaded = load_detector_checkpoint(result.best)
    assert loaded.spec == STUDENT and load_detector_checkpoint(Path(teacher)).spec == TEACHER
    from_ema = loaded.build()
    from_ema.load_state_dict(load_training_state(tmp_path / "student" / "last.pt")["ema"])
    images = torch.randint(0, 255, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        (boxes, scores), (ema_boxes, ema_scores) = (
            detector.predict(images, 20) for detector in (loaded.build(), from_ema)
        )
    assert torch.equal(boxes, ema_boxes) and torch.equal(scores, ema_scores) and boxes.shape == (2, 20, 4)


@pytest.mark.slow
def test_training_reduces_losses(data_yaml: Path, tmp_path: Path) -> None:
    result = run_training(
        data_yaml, tmp_path, epochs=25, lr=3e-3, mosaic=0.0, multi_scale=0.0, ema_decay=0.9, no_aug_ratio=0.1
    )
    first, last = result.history[0].losses, result.history[-1].losses
    assert last["rpn_cls"] < 0.5 * first["rpn_cls"] and last["cls"] < 0.5 * first["cls"]


@pytest.mark.slow
def test_teacher_alone_trains_until_last_epochs(data_yaml: Path, tmp_path: Path, teacher: str) -> None:
    methods = {"hkd": HKDConfig(det_loss_weight=0.0)}
    changes = {"epochs": 2, "no_aug_ratio": 0.5, "no_distill_ratio": 0.5}
    result = run_training(data_yaml, tmp_path / "alone", teacher=teacher, distill=methods, **changes)
    first, last = (record.losses for record in result.history)
    assert first.keys() == HKD_LOSSES and all(value > 0 for value in first.values())
    assert last.keys() == DET_LOSSES and last["cls"] > 0


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_run(data_yaml: Path, tmp_path: Path, teacher: str) -> None:
    """Random numbers of samples and noise depend on the epoch only."""
    distillation = {
        "teacher": teacher,
        "distill": {"hkd": HKDConfig(), "noisy_teacher": NoisyTeacherConfig("targets")},
        "epochs": 2,
    }
    run_training(data_yaml, tmp_path / "whole", **distillation)

    def interrupt(*_args: object) -> float:
        raise KeyboardInterrupt

    config = make_config(data_yaml, tmp_path / "cut", **distillation)
    with pytest.MonkeyPatch.context() as patch:
        from hkd_det.train import trainer as runs

        original = runs.Trainer._compute_lr
        patch.setattr(
            runs.Trainer, "_compute_lr", lambda self, step: interrupt() if step == 4 else original(self, step)
        )
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(config, resume=True)
    whole, resumed = (load_training_state(tmp_path / name / "last.pt")["distiller"] for name in ("whole", "cut"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_dense_teacher_trains_two_stage_student(data_yaml: Path, tmp_path: Path) -> None:
    dense = run_training(data_yaml, tmp_path / "dense", "mini-teacher")
    result = run_training(data_yaml, tmp_path / "distilled", teacher=str(dense.best), distill={"hkd": HKDConfig()})
    assert {"hkd_pyramid", "hkd_region", "hkd_cls", "hkd_box"} <= result.history[0].losses.keys()
