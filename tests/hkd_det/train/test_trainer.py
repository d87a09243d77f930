"""Short complete runs: files, learning, resume, and errors."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hkd_det.datasets.catalog import load_dataset
from hkd_det.distill.hkd import HKDConfig
from hkd_det.errors import DataError, UsageError
from hkd_det.models import zoo as sizes
from hkd_det.models.checkpoint import (
    DetectorCheckpoint,
    load_detector_checkpoint,
    load_training_state,
    save_detector_checkpoint,
    save_training_state,
)
from hkd_det.models.detector import HKDDetectorSpec
from hkd_det.train.cli import main
from hkd_det.train.config import TrainConfig
from hkd_det.train.context import check_annotations
from hkd_det.train.engine import EvalResult
from hkd_det.train.trainer import train

TINY = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
RUN_FILES = {"best.pt", "last.pt", "config.yaml", "results.csv", "results.png", "val_errors.jpg", ".lock"}


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.MODELS, "mini-student", TINY)


def make_config(data_yaml: Path, run: Path, **changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "data": str(data_yaml), "model": "mini-student", "save_dir": str(run), "imgsz_hw": (64, 96), "epochs": 3,
        "batch": 4, "workers": 0, "device": "cpu",
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


def equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("tiny_models")
def test_run_writes_checkpoints_settings_and_history(data_yaml: Path, tmp_path: Path) -> None:
    result = train(make_config(data_yaml, tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == RUN_FILES
    best = load_detector_checkpoint(result.best)
    assert best.model == "mini-student" and best.spec == TINY and best.miss_rate == result.miss_rate
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 4
    assert result.history[-1].losses["cls"] < result.history[0].losses["cls"] * 1.5


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_models")
def test_training_learns_dark_boxes(data_yaml: Path, tmp_path: Path) -> None:
    result = train(make_config(data_yaml, tmp_path, epochs=30, lr=3e-3, mosaic=0.0, multi_scale=0.0, ema_decay=0.9))
    first, last = (sum(result.history[epoch].losses.values()) for epoch in (0, -1))
    assert last < 0.6 * first
    assert result.miss_rate < 0.4


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_models")
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_equals_uninterrupted_run(
    data_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """The distilled run is interrupted in the middle of the second epoch."""
    teacher = train(make_config(data_yaml, tmp_path / "teacher", epochs=1)).best
    distillation = {"teacher": str(teacher), "distill": {"hkd": HKDConfig()}, "workers": workers}
    train(make_config(data_yaml, tmp_path / "whole", **distillation))

    def interrupt(*_args: object) -> float:
        raise KeyboardInterrupt

    config = make_config(data_yaml, tmp_path / "cut", **distillation)
    with monkeypatch.context() as patch:
        from hkd_det.train import trainer as run

        original = run.Trainer._compute_lr
        patch.setattr(run.Trainer, "_compute_lr", lambda self, step: interrupt() if step == 4 else original(self, step))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert len(load_training_state(tmp_path / "cut" / "last.pt")["history"]) == 1
    train(config, resume=True)
    whole, resumed = (load_training_state(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert equal_states(whole["distiller"], resumed["distiller"]) and equal_states(whole["ema"], resumed["ema"])
    assert [e["losses"] for e in whole["history"]] == [e["losses"] for e in resumed["history"]]
    new_teacher = DetectorCheckpoint.from_detector(
        load_detector_checkpoint(teacher).build(), "mini-student", {}, 2, 0.5
    )
    save_detector_checkpoint(teacher, new_teacher)
    with pytest.raises(DataError, match="has changed since"):
        train(config, resume=True)


@pytest.mark.slow
def test_killed_and_resumed_run_equals_uninterrupted_run(data_yaml: Path, tmp_path: Path) -> None:
    """SIGKILL ends the process twice; `--resume` continues to the same final weights."""
    base = [sys.executable, "-c", "import sys; from hkd_det.train.cli import main; sys.exit(main())"]
    common = ["--data", str(data_yaml), "--model", "mini-student", "--imgsz", "96x64", "--epochs", "4", "--batch", "4"]
    flags = [*common, "--workers", "0", "--device", "cpu", "--project", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*base, *flags, "--name", "whole"], check=True, env=environment, capture_output=True)
    command = [*base, *flags, "--name", "killed"]
    for after_epochs in (1, 2):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        results = tmp_path / "killed" / "results.csv"
        deadline = time.monotonic() + 120
        while not (results.exists() and len(results.read_text().splitlines()) > after_epochs):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        command = [*base, "--resume", str(tmp_path / "killed")]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    whole, resumed = (load_training_state(tmp_path / name / "last.pt") for name in ("whole", "killed"))
    assert equal_states(whole["ema"], resumed["ema"]) and len(resumed["history"]) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_models")
def test_full_disk_keeps_earlier_files(
    data_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(data_yaml, tmp_path / "run", epochs=1)
    train(config)
    before = (tmp_path / "run" / "last.pt").read_bytes()

    def raise_disk_full(_path: Path, _content: object) -> int:
        raise OSError(28, "No space left on device", str(_path))

    monkeypatch.setattr(Path, "write_bytes", raise_disk_full)
    flags = ["--data", str(data_yaml), "--model", "mini-student", "--imgsz", "96x64", "--epochs", "1", "--batch", "4"]
    code = main([*flags, "--workers", "0", "--project", str(tmp_path), "--name", "run", "--exist-ok"])
    assert code == 1 and "No space left on device" in capsys.readouterr().err
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".") and p.name != ".lock"]


def test_run_does_not_overwrite_its_input(data_yaml: Path, tmp_path: Path) -> None:
    """A resumed run would otherwise use its own output as teacher."""
    best = str(tmp_path / "elsewhere/../best.pt")
    for inputs in ({"weights": best}, {"teacher": best, "distill": {"hkd": HKDConfig()}}):
        with pytest.raises(UsageError, match=f"--{next(iter(inputs))} .* overwrite it"):
            make_config(data_yaml, tmp_path, **inputs)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_models")
def test_unsuitable_state_is_rejected_in_one_line(
    data_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A state without a balancer, as an older version writes it, and a state of a detector with other shapes."""
    train(make_config(data_yaml, tmp_path, epochs=1))
    older = {name: value for name, value in load_training_state(tmp_path / "last.pt").items() if name != "balancer"}
    state = (tmp_path / "last.pt").read_bytes()
    save_training_state(tmp_path / "last.pt", older)
    assert main(["--resume", str(tmp_path)]) == 1
    (tmp_path / "last.pt").write_bytes(state)
    monkeypatch.setitem(sizes.MODELS, "mini-student", replace(TINY, channels=8))
    assert main(["--resume", str(tmp_path)]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hkd-train: ")]
    assert len(errors) == 2 and all("does not fit this run" in line and "Start a new run" in line for line in errors)
    assert "'balancer'" in errors[0]


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_models")
def test_checkpoint_of_other_model_is_rejected(data_yaml: Path, tmp_path: Path) -> None:
    train(make_config(data_yaml, tmp_path, epochs=1))
    with pytest.raises(DataError, match="mini-teacher"):
        train(make_config(data_yaml, tmp_path, model="mini-teacher", epochs=1), resume=True)
    with pytest.raises(DataError, match="state"):
        load_detector_checkpoint(tmp_path / "last.pt")
    broken = tmp_path / "broken.pt"
    broken.write_bytes((tmp_path / "best.pt").read_bytes()[:1000])
    with pytest.raises(DataError, match="not a checkpoint"):
        load_detector_checkpoint(broken)


def test_validation_images_of_the_training_are_logged(
    data_yaml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = load_dataset(str(data_yaml), "train")
    check_annotations(make_config(data_yaml, tmp_path), samples, samples)
    assert "validation images are also training images" in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_models")
def test_patience_ends_the_run_and_its_continuation(
    data_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The miss rate is 30 % in all epochs, so that two epochs follow the first one."""
    from hkd_det.train import trainer

    original = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda *args: replace(original(*args), miss_rate=0.3))
    config = make_config(data_yaml, tmp_path, epochs=9, patience=2)
    epochs: list[int] = []
    assert len(train(config, on_epoch=lambda record: epochs.append(record.epoch)).history) == 3
    assert epochs == [1, 2, 3]
    assert "stopped after 3 epochs: 2 epochs without a lower miss rate" in capsys.readouterr().out
    assert len(train(config, resume=True).history) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_models")
def test_last_line_warns_about_a_run_that_is_worse_than_before(
    data_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hkd_det.train import trainer

    weights = str(train(make_config(data_yaml, tmp_path / "first", epochs=1)).best)
    original, miss_rates = trainer.evaluate, iter([0.2, 0.4])

    def evaluate_with_known_rate(*args: Any) -> EvalResult:
        result, miss_rate = original(*args), next(miss_rates)
        return replace(result, miss_rate=miss_rate, result=replace(result.result, value=miss_rate))

    monkeypatch.setattr(trainer, "evaluate", evaluate_with_known_rate)
    config = make_config(data_yaml, tmp_path / "second", epochs=1, weights=weights)
    capsys.readouterr()
    record = train(config).history[0]
    lines = capsys.readouterr().out.splitlines()
    assert any("initial weights: MR^-2 Reasonable 20.00 %" in line for line in lines)
    warned = record.recall > 0  # a detector without detections has another warning
    assert "warning: " in lines[-1] and ("worse than before training" in lines[-1]) == warned
    if warned:  # four validation images
        assert "+20.00 points (95 % interval over images: " in lines[-1]
        assert "): no conclusion: fewer than 50 images or 50 persons). Keep the initial weights" in lines[-1]
    assert "recall" in lines[-3] and "AP " in lines[-3] and "best.pt" in lines[-3]
    assert "MR^-2 Reasonable of best.pt: 95 % interval" in lines[-2]
    assert load_training_state(tmp_path / "second" / "last.pt")["results"]["initial"]["value"] == 0.2
    assert train(config, resume=True).history == [record]
    assert capsys.readouterr().out.splitlines()[-1].partition("warning: ")[2] == lines[-1].partition("warning: ")[2]
    assert record.time_s > 0 and record.lr > 0 and 0 <= record.ap <= record.ap50 <= 1


def test_validation_ignores_the_scores_that_exported_models_ignore() -> None:
    from hkd_deploy.export.graph import MIN_SCORE as EXPORTED_MIN_SCORE
    from hkd_det.train.engine import MIN_SCORE

    assert MIN_SCORE == EXPORTED_MIN_SCORE


@pytest.mark.parametrize(
    ("precision", "capability", "expected"),
    [("auto", "AVX512", True), ("auto", "AVX2", False), ("bf16", "AVX2", True), ("fp32", "AVX512", False)],
)
def test_auto_precision_avoids_emulated_bfloat16(
    monkeypatch: pytest.MonkeyPatch, precision: str, capability: str, expected: bool
) -> None:
    from hkd_det.train.engine import uses_bf16

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert uses_bf16(precision, torch.device("cpu")) == expected
    assert uses_bf16(precision, torch.device("cuda", 0)) == (precision == "bf16")
