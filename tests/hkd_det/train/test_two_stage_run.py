"""Whole small runs with Faster R-CNN: alone, as teacher and student, and under a dense teacher."""

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
LEVELS = {"hkd_pyramid", "hkd_region", "hkd_logit"}
TASK = {"rpn_cls", "rpn_box", "cls", "box"}


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.MODELS, "fasterrcnn-r50", TEACHER)
    monkeypatch.setitem(sizes.MODELS, "fasterrcnn-r18", STUDENT)
    monkeypatch.setitem(sizes.MODELS, "mini-teacher", DENSE)


def run(people: Path, folder: Path, model: str = "fasterrcnn-r18", **changes: object) -> TrainResult:
    return train(configured(people, folder, model, **changes))


def configured(people: Path, folder: Path, model: str = "fasterrcnn-r18", **changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "data": str(people), "model": model, "save_dir": str(folder), "imgsz_hw": (64, 96), "epochs": 1, "batch": 4,
        "workers": 0, "device": "cpu", "no_aug_ratio": 0.0,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def teacher(people: Path, tmp_path: Path) -> str:
    return str(run(people, tmp_path / "teacher", "fasterrcnn-r50").best)


def test_pair_trains_and_checkpoint_predicts_the_same(people: Path, tmp_path: Path, teacher: str) -> None:
    result = run(
        people,
        tmp_path / "student",
        teacher=teacher,
        distill={"hkd": HKDConfig(), "noisy_teacher": NoisyTeacherConfig("targets")},
    )
    assert result.history[0].losses.keys() == TASK | LEVELS
    assert all(value > 0 for value in result.history[0].losses.values())
    loaded = load_detector_checkpoint(result.best)
    assert loaded.spec == STUDENT and load_detector_checkpoint(Path(teacher)).spec == TEACHER
    twin = loaded.build()
    twin.load_state_dict(load_training_state(tmp_path / "student" / "last.pt")["ema"])
    pictures = torch.randint(0, 255, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        (boxes, scores), (again, same) = (detector.predict(pictures, 20) for detector in (twin, loaded.build()))
    assert torch.equal(boxes, again) and torch.equal(scores, same) and boxes.shape == (2, 20, 4)


@pytest.mark.slow
def test_training_reduces_losses(people: Path, tmp_path: Path) -> None:
    result = run(people, tmp_path, epochs=25, lr=3e-3, mosaic=0.0, multi_scale=0.0, ema_decay=0.9, no_aug_ratio=0.1)
    first, last = result.history[0].losses, result.history[-1].losses
    assert last["rpn_cls"] < 0.5 * first["rpn_cls"] and last["cls"] < 0.5 * first["cls"]


def test_teacher_alone_trains_until_last_epochs(people: Path, tmp_path: Path, teacher: str) -> None:
    taught = {"hkd": HKDConfig(det_loss_weight=0.0)}
    result = run(people, tmp_path / "alone", teacher=teacher, distill=taught, epochs=2, no_aug_ratio=0.5)
    first, last = (record.losses for record in result.history)
    assert all(first[name] == 0 for name in TASK) and all(first[name] > 0 for name in LEVELS)
    assert last.keys() == TASK and last["cls"] > 0


def test_resumed_run_equals_uninterrupted_run(people: Path, tmp_path: Path, teacher: str) -> None:
    """Samples and noise are drawn anew: the epoch, not what went before, decides how."""
    taught = {
        "teacher": teacher,
        "distill": {"hkd": HKDConfig(), "noisy_teacher": NoisyTeacherConfig("targets")},
        "epochs": 2,
    }
    run(people, tmp_path / "whole", **taught)

    def cut(*_arguments: object) -> float:
        raise KeyboardInterrupt

    config = configured(people, tmp_path / "cut", **taught)
    with pytest.MonkeyPatch.context() as patch:
        from hkd_det.train import trainer as runs

        kept = runs.Trainer._compute_lr
        patch.setattr(runs.Trainer, "_compute_lr", lambda self, step: cut() if step == 4 else kept(self, step))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(config, resume=True)
    whole, resumed = (load_training_state(tmp_path / name / "last.pt")["distiller"] for name in ("whole", "cut"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_dense_teacher_trains_two_stage_student(people: Path, tmp_path: Path) -> None:
    dense = run(people, tmp_path / "dense", "mini-teacher")
    result = run(people, tmp_path / "taught", teacher=str(dense.best), distill={"hkd": HKDConfig()})
    assert {"hkd_pyramid", "hkd_region", "hkd_cls", "hkd_box"} <= result.history[0].losses.keys()
