"""Short complete runs with `--distill cdd`: the command, resume, combinations, families, and errors."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hkd_det.distill import check_methods, parse_methods
from hkd_det.distill.blockwise.worker import BlockwiseConfig
from hkd_det.distill.cdd.compactor import Compactor
from hkd_det.distill.cdd.losses import CDDConfig
from hkd_det.distill.hkd import HKDConfig
from hkd_det.distill.mokd import MoKDConfig
from hkd_det.distill.noisy_teacher import NoisyTeacherConfig
from hkd_det.errors import UsageError
from hkd_det.models import zoo as sizes
from hkd_det.models.checkpoint import (
    DetectorCheckpoint,
    load_detector_checkpoint,
    load_training_state,
    save_detector_checkpoint,
)
from hkd_det.models.detector import HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNNSpec
from hkd_det.models.surgery import NO_CHANGES
from hkd_det.models.zoo import count_params_and_flops
from hkd_det.train import trainer as runs
from hkd_det.train.cli import main
from hkd_det.train.config import TrainConfig
from hkd_det.train.trainer import TrainResult, train

TINY = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
WIDE = replace(TINY, backbone_kwargs={"channels": (12, 12, 24, 24), "stem_width": 8})
TWO_STAGE = FasterRCNNSpec("resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=(16, 32, 64, 128, 256))
HW = (64, 96)
CDD = CDDConfig(keep_flops=0.8)
CDD_LOSSES = {"cdd_feature", "cdd_cls"}


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, spec in {"mini-student": TINY, "mini-teacher": WIDE, "fasterrcnn-r18": TWO_STAGE}.items():
        monkeypatch.setitem(sizes.MODELS, name, spec)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return save_model(tmp_path / "teacher.pt", "mini-student")


def save_model(path: Path, model: str) -> Path:
    torch.manual_seed(3)
    detector = sizes.build_model(model)
    save_detector_checkpoint(path, DetectorCheckpoint(model, sizes.get_spec(model), detector.state_dict(), {}, 1, 1.0))
    return path


def make_config(data_yaml: Path, folder: Path, teacher: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "data": str(data_yaml), "model": "mini-student", "save_dir": str(folder), "imgsz_hw": HW, "epochs": 2,
        "batch": 4, "workers": 0, "device": "cpu", "teacher": str(teacher), "weights": str(teacher),
        "distill": {"cdd": CDD},
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def compute_flops_ratio(result: TrainResult, teacher: Path) -> float:
    before, after = (
        count_params_and_flops(load_detector_checkpoint(path).build(), HW).flops for path in (teacher, result.best)
    )
    return after / before


@pytest.mark.slow
def test_command_prunes_copy_of_teacher_to_plain_network(data_yaml: Path, tmp_path: Path, teacher: Path) -> None:
    flags = ["--data", str(data_yaml), "--imgsz", "96x64", "--epochs", "2", "--batch", "4", "--workers", "0"]
    flags += ["--device", "cpu", "--project", str(tmp_path), "--name", "cdd", "--set", "lr=1e-9"]
    assert main([*flags, "--teacher", str(teacher), "--distill", "cdd", "--set", "distill.cdd.keep_flops=0.8"]) == 0
    best, state = load_detector_checkpoint(tmp_path / "cdd/best.pt"), load_training_state(tmp_path / "cdd/last.pt")
    before, after = (
        count_params_and_flops(network, HW) for network in (load_detector_checkpoint(teacher).build(), best.build())
    )
    assert 0.75 < after.flops / before.flops <= 0.8
    assert best.spec == TINY and best.changes.widths and not best.changes.separable
    stem = "backbone.body.conv1.0.weight"
    torch.testing.assert_close(best.weights[stem], load_detector_checkpoint(teacher).weights[stem], atol=1e-6, rtol=0)
    # All channels are selected after two thirds of the run, so only the second epoch can be the best.
    assert [epoch["meets_target"] for epoch in state["history"]] == [False, True] and best.epoch == 2
    detector = sizes.build_from_spec(best.spec, best.changes)
    detector.load_state_dict(best.weights)
    assert not any(isinstance(module, Compactor) for module in detector.modules())


@pytest.mark.slow
def test_compactors_have_no_weight_decay(
    data_yaml: Path, tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decay: dict[str, float] = {}

    def record(trainer: runs.Trainer, *_: object) -> None:
        groups = trainer.optimizer.param_groups
        by_id = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
        decay.update({name: by_id[id(parameter)] for name, parameter in trainer.distiller.named_parameters()})

    monkeypatch.setattr(runs.Trainer, "fit", record)
    train(make_config(data_yaml, tmp_path / "run", teacher, weight_decay=0.1))
    compactors = {name for name in decay if name.endswith(".compactor.weight")}
    assert len(compactors) == 7 and {decay[name] for name in compactors} == {0.0}
    convs = {name for name in decay if name.endswith(("conv1.weight", "conv2.weight"))}
    assert convs and {decay[name] for name in convs} == {0.1}


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_run(data_yaml: Path, tmp_path: Path, teacher: Path) -> None:
    """The run is interrupted while channels fade; queues and background samples are restored."""
    settings = {"distill": {"cdd": CDD, "hkd": HKDConfig()}, "epochs": 3}
    train(make_config(data_yaml, tmp_path / "whole", teacher, **settings))
    config = make_config(data_yaml, tmp_path / "cut", teacher, **settings)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        original = runs.Trainer._compute_lr
        patch.setattr(
            runs.Trainer, "_compute_lr", lambda self, step: interrupt() if step == 5 else original(self, step)
        )
        with pytest.raises(KeyboardInterrupt):
            train(config)
    middle = load_training_state(tmp_path / "cut/last.pt")["distiller"]
    masked = [value for name, value in middle.items() if name.endswith("compactor.masked")]
    assert any(mask.any() for mask in masked)
    train(config, resume=True)
    whole, resumed = (load_training_state(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    for part in ("distiller", "ema"):
        assert whole[part].keys() == resumed[part].keys()
        assert all(torch.equal(value, resumed[part][name]) for name, value in whole[part].items())
    best, resumed_best = (load_detector_checkpoint(tmp_path / name / "best.pt") for name in ("whole", "cut"))
    assert best.changes == resumed_best.changes
    assert all(torch.equal(value, resumed_best.weights[name]) for name, value in best.weights.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({"hkd": HKDConfig()}, {"hkd_pyramid", "hkd_cls"}),
        ({"hkd": HKDConfig(), "mokd": MoKDConfig()}, {"hkd_pyramid"}),
        ({"noisy_teacher": NoisyTeacherConfig()}, set()),
    ],
)
def test_cdd_combines_with_other_methods(
    data_yaml: Path, tmp_path: Path, teacher: Path, others: dict[str, Any], expected: set[str]
) -> None:
    methods = {"cdd": CDD, **others}
    result = train(make_config(data_yaml, tmp_path / "run", teacher, distill=methods, epochs=1))
    losses, metrics = result.history[0].losses, result.history[0].metrics
    assert (
        losses.keys() >= expected | CDD_LOSSES
        and metrics["cdd_lasso"] > 0
        and compute_flops_ratio(result, teacher) <= 0.8
    )
    assert (losses["cdd_cls"] > 0) == ("hkd" not in others)  # HKD computes the score loss


@pytest.mark.slow
def test_wider_new_student_is_pruned(data_yaml: Path, tmp_path: Path, teacher: Path) -> None:
    result = train(make_config(data_yaml, tmp_path / "run", teacher, model="mini-teacher", weights="", epochs=1))
    wide = save_model(tmp_path / "wide.pt", "mini-teacher")
    assert load_detector_checkpoint(result.best).spec == WIDE and compute_flops_ratio(result, wide) <= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("model", ["fasterrcnn-r18", "yolo26n"])
def test_other_families_are_pruned(
    data_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    if model == "yolo26n":
        model_yaml = dict(sizes.get_spec(model).model_yaml)  # type: ignore[union-attr]
        model_yaml["scales"] = {model_yaml["scale"]: [0.33, 0.0625, 1024]}
        monkeypatch.setitem(sizes.MODELS, model, replace(sizes.get_spec(model), model_yaml=model_yaml))  # type: ignore[type-var]
    teacher = save_model(tmp_path / "teacher.pt", model)
    methods = {"cdd": CDDConfig(keep_flops=1.0, keep_parameters=0.97, min_channels=2)}
    result = train(make_config(data_yaml, tmp_path / "run", teacher, model=model, epochs=1, distill=methods))
    before, after = (
        count_params_and_flops(load_detector_checkpoint(path).build(), HW).num_params for path in (teacher, result.best)
    )
    assert after <= 0.97 * before and result.history[0].losses["cdd_cls"] >= 0
    assert load_detector_checkpoint(result.best).changes != NO_CHANGES


@pytest.mark.slow
def test_two_processes_prune_together(data_yaml: Path, tmp_path: Path, teacher: Path) -> None:
    flags = ["--data", str(data_yaml), "--imgsz", "96x64", "--epochs", "1", "--batch", "4", "--workers", "0"]
    flags += ["--device", "cpu", "--project", str(tmp_path), "--name", "two", "--teacher", str(teacher)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "hkd_det.train.cli", *flags, "--distill", "cdd", "--set", "distill.cdd.keep_flops=0.8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    before, after = (
        count_params_and_flops(load_detector_checkpoint(path).build(), HW)
        for path in (teacher, tmp_path / "two/best.pt")
    )
    assert after.flops <= 0.8 * before.flops


def test_invalid_cdd_run_is_reported_at_once(data_yaml: Path, tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(UsageError, match="cdd,blockwise"):
        check_methods({"cdd": CDD, "blockwise": BlockwiseConfig()})
    assert list(parse_methods({"cdd": CDD, "mokd": MoKDConfig()})) == ["mokd", "cdd"]
    with pytest.raises(UsageError, match=r"keep_flops=0\.1:.*mini-student"):
        train(make_config(data_yaml, tmp_path / "run", teacher, distill={"cdd": CDDConfig(keep_flops=0.1)}))
    with pytest.raises(UsageError, match="same_architecture"):
        train(make_config(data_yaml, tmp_path / "run", save_model(tmp_path / "two.pt", "fasterrcnn-r18"), weights=""))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distill", "cdd", "--baseline"], "cdd derives the student"),
        (["--distill", "hkd", "--set", "distill.cdd.keep_flops=0.5", "--model", "mini-student"], "cdd is not in use"),
        (["--distill", "cdd", "--set", "distill.cdd.keep_flops=half"], "expected a number, got 'half'"),
        (["--distill", "cdd", "--set", "distill.cdd.keep_flops=1"], "nothing to prune"),
    ],
)
def test_invalid_cdd_flags_exit_with_code_2(
    data_yaml: Path, tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    common = ["--data", str(data_yaml), "--imgsz", "96x64", "--teacher", str(teacher), "--project", str(tmp_path)]
    assert main([*common, *flags]) == 2
    assert message in capsys.readouterr().err
