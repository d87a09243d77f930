"""Baseline run without the teacher, and its comparison with the distilled run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import UsageError
from hkd_det.metrics.citypersons import SETUPS, evaluate
from hkd_det.metrics.tables import DetectionTable, GroundTruthTable
from hkd_det.models import zoo as sizes
from hkd_det.models.checkpoint import load_detector_checkpoint, save_training_state
from hkd_det.models.detector import HKDDetectorSpec
from hkd_det.structures import Detections
from hkd_det.train import baseline, start
from hkd_det.train.cli import main
from hkd_det.train.config import TrainConfig

TINY = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
FLAGS = ["--imgsz", "96x64", "--batch", "4", "--workers", "0", "--device", "cpu"]


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.MODELS, "mini-student", TINY)


def make_perfect_detections(data_yaml: Path) -> list[Detections]:
    return [
        Detections(s.ground_truth.boxes_xyxy, np.ones(len(s.ground_truth), np.float32))
        for s in load_dataset(str(data_yaml), "val")
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_models")
def test_baseline_differs_by_teacher_only(data_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--data", str(data_yaml), "--model", "mini-student", *FLAGS, "--project", str(tmp_path)]
    assert main([*common, "--epochs", "1", "--name", "teacher"]) == 0
    distill_flags = ["--teacher", str(tmp_path / "teacher/best.pt"), "--distill", "hkd", "--epochs", "2", "--baseline"]
    assert main([*common, *distill_flags, "--name", "distilled"]) == 0
    assert "Effect of the teacher" in capsys.readouterr().out
    assert main([*common, "--epochs", "2", "--name", "plain"]) == 0
    baseline_run, plain_run = (
        load_detector_checkpoint(tmp_path / name / "best.pt") for name in ("distilled-baseline", "plain")
    )
    assert all(torch.equal(value, plain_run.weights[name]) for name, value in baseline_run.weights.items())
    report = json.loads((tmp_path / "distilled/baseline.json").read_text())
    assert report["difference"]["ci_low"] <= report["difference"]["ci_high"]
    for which, folder in (("distilled", "distilled"), ("baseline", "distilled-baseline")):
        assert (
            report[which]["miss_rates"]["Reasonable"]
            == load_detector_checkpoint(tmp_path / folder / "best.pt").miss_rate
        )


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_models")
def test_comparison_uses_setup_of_the_run(data_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--data", str(data_yaml), "--model", "mini-student", *FLAGS, "--project", str(tmp_path), "--epochs", "1"]
    assert main([*common, "--name", "teacher"]) == 0
    distill_flags = [
        "--teacher",
        str(tmp_path / "teacher/best.pt"),
        "--distill",
        "hkd",
        "--baseline",
        "--set",
        "setup=bare",
    ]
    assert main([*common, *distill_flags, "--name", "distilled"]) == 0
    printed = capsys.readouterr().out
    assert "Effect of the teacher, MR^-2 bare" in printed and "recall at " in printed and "AP50" in printed
    assert "points (95 % interval over images: " in printed  # four images: no conclusion
    assert "): no conclusion: fewer than 50 images" in printed or "): neither detects a person; one seed" in printed
    report = json.loads((tmp_path / "distilled/baseline.json").read_text())
    assert (
        report["distilled"]["miss_rates"]["bare"] == load_detector_checkpoint(tmp_path / "distilled/best.pt").miss_rate
    )


def test_interrupt_prints_resume_command_with_baseline(
    data_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(config: TrainConfig, resume: bool) -> None:
        assert not resume
        config.save_path.mkdir()
        (config.save_path / "last.pt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "train", cut)
    (tmp_path / "best.pt").touch()
    teacher = str(tmp_path / "best.pt")
    distill_flags = ["--model", "mini-student", "--teacher", teacher, "--distill", "hkd", "--baseline"]
    assert main(["--data", str(data_yaml), *distill_flags, "--project", str(tmp_path), "--name", "run"]) == 130
    assert f"hkd-train --resume {tmp_path / 'run'} --baseline" in capsys.readouterr().err


def test_interrupt_before_first_epoch_prints_no_resume(
    data_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Started over with --exist-ok and broken off in its first epoch: last.pt is still the earlier run's."""

    def cut(_config: TrainConfig, resume: bool) -> None:
        assert not resume
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "train", cut)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/last.pt").touch()
    flags = ["--model", "mini-student", "--project", str(tmp_path), "--name", "run", "--exist-ok"]
    assert main(["--data", str(data_yaml), *flags]) == 130
    assert "--resume" not in capsys.readouterr().err


@pytest.mark.parametrize(("seed", "goes_on"), [(0, True), (1, False)])
def test_baseline_of_earlier_run_is_not_resumed(
    seed: int, goes_on: bool, data_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--exist-ok leaves it there until the new run's control takes its place; its miss rate would be compared."""
    run = TrainConfig(str(data_yaml), "mini-student", str(tmp_path / "run"), teacher="t.pt", distill={"hkd": {}})
    older = replace(baseline.make_baseline_config(run), seed=seed)
    save_training_state(tmp_path / "run/last.pt", {"config": run.as_dict()})
    save_training_state(tmp_path / "run-baseline/last.pt", {"config": older.as_dict()})
    resumed = []
    monkeypatch.setattr(start, "train", lambda config, resume: resumed.append((Path(config.save_dir).name, resume)))
    monkeypatch.setattr(start, "compare_with_baseline", lambda _config: None)
    monkeypatch.setattr(start, "format_comparison", lambda _brought: "")
    assert main(["--resume", str(tmp_path / "run"), "--baseline"]) == 0
    assert resumed == [("run", True), ("run-baseline", goes_on)]


def test_existing_baseline_is_not_overwritten(
    data_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run-baseline").mkdir()
    (tmp_path / "run-baseline/last.pt").touch()
    distill_flags = ["--model", "mini-student", "--teacher", "hkd-cpu", "--distill", "dense", "--baseline"]
    assert main(["--data", str(data_yaml), *distill_flags, "--project", str(tmp_path), "--name", "run"]) == 2
    assert "run-baseline: already contains a run" in capsys.readouterr().err


def test_baseline_does_not_overwrite_teacher(data_yaml: Path, tmp_path: Path) -> None:
    teacher = str(tmp_path / "run-baseline/best.pt")
    run = TrainConfig(str(data_yaml), "mini-student", str(tmp_path / "run"), teacher=teacher, distill={"hkd": {}})
    with pytest.raises(UsageError, match="overwrite it"):
        baseline.make_baseline_config(run)


def test_baseline_without_teacher_exits_with_code_2(data_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(data_yaml), "--model", "mini-student", "--baseline"]) == 2
    assert "--teacher" in capsys.readouterr().err


def test_every_height_belongs_to_one_setup() -> None:
    rng = np.random.default_rng(0)
    heights_px = np.concatenate([rng.uniform(20, 400, 300), baseline.HEIGHT_BINS_PX])
    boxes = np.stack([np.zeros_like(heights_px), np.zeros_like(heights_px), heights_px / 2, heights_px], 1)
    count = len(heights_px)
    table = GroundTruthTable(1, np.zeros(count, int), boxes, heights_px, np.ones(count), np.zeros(count, bool))
    no_detections = DetectionTable.from_detections([Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))])
    rates = evaluate(table, no_detections, [*baseline.make_height_setups(), SETUPS["All"]])
    assert sum(rate.num_gt for name, rate in rates.items() if name != "All") == rates["All"].num_gt == count


@pytest.mark.usefixtures("tiny_models")
def test_perfect_detections_have_zero_miss_rate(data_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detections = make_perfect_detections(data_yaml)
    monkeypatch.setattr(baseline, "predict_dataset", lambda *_: detections)
    metrics, _ = baseline.measure_detector(
        sizes.build_model("mini-student"), load_dataset(str(data_yaml), "val"), (64, 96)
    )
    assert metrics.ap == pytest.approx(1) and metrics.miss_rates["Reasonable"] == metrics.miss_rates["All"] == 0
    assert (metrics.ap50, metrics.recall, metrics.threshold) == (pytest.approx(1), 1, 1)
    assert metrics.parameters == sum(p.numel() for p in sizes.build_model("mini-student").parameters())
