"""Short complete runs with MoKD: all families, and resume."""

import csv
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from hkd_det.distill.hkd import HKDConfig
from hkd_det.distill.mokd import MoKDConfig
from hkd_det.distill.noisy_teacher import NoisyTeacherConfig
from hkd_det.models import zoo as sizes
from hkd_det.models.checkpoint import DetectorCheckpoint, load_training_state, save_detector_checkpoint
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
from hkd_det.models.ultralytics import UltralyticsSpec, make_ultralytics_spec
from hkd_det.train import trainer as runs
from hkd_det.train.config import TrainConfig
from hkd_det.train.trainer import train

pytestmark = pytest.mark.slow
TINY = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
TWO_STAGE = FasterRCNNSpec("resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=(16, 32, 64, 128, 256))


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    model_yaml = deepcopy(make_ultralytics_spec("yolo11n").model_yaml)
    model_yaml["scales"][model_yaml["scale"]][1] = 0.0625
    monkeypatch.setitem(sizes.MODELS, "mini-student", TINY)
    monkeypatch.setitem(sizes.MODELS, "fasterrcnn-r18", TWO_STAGE)
    monkeypatch.setitem(sizes.MODELS, "yolo11n", UltralyticsSpec("yolo11n", {**model_yaml, "nc": 1}))  # type: ignore[arg-type]


def make_config(data_yaml: Path, run: Path, teacher: Path, methods: dict[str, Any], **changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "data": str(data_yaml), "model": "mini-student", "save_dir": str(run), "imgsz_hw": (64, 96), "epochs": 2,
        "batch": 4, "workers": 0, "device": "cpu", "no_aug_ratio": 0.0, "teacher": str(teacher), "distill": methods,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def teachers(tmp_path: Path) -> dict[str, Path]:
    torch.manual_seed(3)
    paths = {"dense": tmp_path / "dense.pt", "two-stage": tmp_path / "two.pt"}
    save_detector_checkpoint(
        paths["dense"], DetectorCheckpoint("tiny", TINY, HKDDetector(TINY).state_dict(), {}, 1, 1.0)
    )
    two_stage_weights = FasterRCNN(TWO_STAGE).state_dict()
    save_detector_checkpoint(paths["two-stage"], DetectorCheckpoint("two", TWO_STAGE, two_stage_weights, {}, 1, 1.0))
    return paths


@pytest.mark.parametrize(
    ("model", "teacher", "mokd"),
    [
        ("mini-student", "dense", MoKDConfig()),
        ("fasterrcnn-r18", "two-stage", MoKDConfig("min-norm")),
        ("fasterrcnn-r18", "two-stage", MoKDConfig(gradient_level="feature")),
        ("fasterrcnn-r18", "dense", MoKDConfig()),
        ("yolo11n", "dense", MoKDConfig("min-norm", gradient_level="feature")),
    ],
    ids=lambda value: f"{value.solver}-{value.gradient_level}" if isinstance(value, MoKDConfig) else value,
)
def test_hkd_with_noisy_teacher_and_mokd_trains(
    data_yaml: Path, tmp_path: Path, teachers: dict[str, Path], model: str, teacher: str, mokd: MoKDConfig
) -> None:
    methods = {"hkd": HKDConfig(), "noisy_teacher": NoisyTeacherConfig(), "mokd": mokd}
    result = train(
        make_config(
            data_yaml, tmp_path / "run", teachers[teacher], methods, model=model, no_aug_ratio=0.5, no_distill_ratio=0.5
        )
    )
    first, last = result.history
    assert set(first.metrics) == {"mokd_cosine", "mokd_norm_ratio_log10", "mokd_det_weight"} and not last.metrics
    assert -1 <= first.metrics["mokd_cosine"] <= 1 and 0 < first.metrics["mokd_det_weight"] < 1
    rows = list(csv.DictReader((tmp_path / "run" / "results.csv").read_text().splitlines()))
    assert float(rows[0]["mokd_det_weight"]) == first.metrics["mokd_det_weight"] and rows[1]["mokd_det_weight"] == ""
    state = load_training_state(tmp_path / "run" / "last.pt")["distiller"]
    assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize(
    "mokd", [MoKDConfig(gradient_level="feature"), MoKDConfig("amortized")], ids=lambda s: s.solver
)
def test_resumed_run_equals_uninterrupted_run(
    data_yaml: Path,
    tmp_path: Path,
    teachers: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    mokd: MoKDConfig,
) -> None:
    methods = {"hkd": HKDConfig(), "noisy_teacher": NoisyTeacherConfig(), "mokd": mokd}
    train(make_config(data_yaml, tmp_path / "whole", teachers["dense"], methods))

    def interrupt(*_args: object) -> float:
        raise KeyboardInterrupt

    config = make_config(data_yaml, tmp_path / "cut", teachers["dense"], methods)
    original = runs.Trainer._compute_lr
    with monkeypatch.context() as patch:
        patch.setattr(
            runs.Trainer, "_compute_lr", lambda self, step: interrupt() if step == 4 else original(self, step)
        )
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(config, resume=True)
    whole, resumed = (load_training_state(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    for name, value in whole["distiller"].items():
        assert torch.equal(value, resumed["distiller"][name]), name
    assert whole["balancer"] == resumed["balancer"]
    assert [past["metrics"] for past in whole["history"]] == [past["metrics"] for past in resumed["history"]]
