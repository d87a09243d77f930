"""Short complete runs with `--distill blockwise`: results, interruption, families, and errors."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from hkd_det.distill.base import RunContext
from hkd_det.distill.blockwise import Blockwise, stage
from hkd_det.distill.blockwise.worker import BlockwiseConfig
from hkd_det.distill.dense import SoftLabelConfig
from hkd_det.distill.hkd import HKDConfig
from hkd_det.distill.mokd import MoKDConfig
from hkd_det.distill.noisy_teacher import NoisyTeacherConfig
from hkd_det.errors import DataError, UnavailableError, UsageError
from hkd_det.models.base import ModelSpec
from hkd_det.models.checkpoint import (
    DetectorCheckpoint,
    build_from_spec,
    load_detector_checkpoint,
    load_training_state,
    save_detector_checkpoint,
)
from hkd_det.models.detector import HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNNSpec
from hkd_det.models.feature_layers import LayerPairs
from hkd_det.models.ultralytics import UltralyticsSpec, make_ultralytics_spec
from hkd_det.train import trainer as run
from hkd_det.train.cli import main
from hkd_det.train.config import TrainConfig
from hkd_det.train.trainer import TrainResult, train

TINY = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
QUICK: dict[str, Any] = {"min_channels": 16, "num_images": 16, "epochs": 1, "batch": 8}
BLOCKS = [f"backbone.body.{name}" for name in ("layer3.0.conv2", "layer4.0.conv1", "layer4.0.conv2")]


def write_checkpoint(path: Path, spec: ModelSpec = TINY) -> Path:
    torch.manual_seed(3)
    save_detector_checkpoint(path, DetectorCheckpoint("tiny", spec, build_from_spec(spec).state_dict(), {}, 1, 1.0))
    return path


def make_config(
    data_yaml: Path, folder: Path, teacher: Path, methods: dict[str, Any], **changes: object
) -> TrainConfig:
    values: dict[str, object] = {
        "data": str(data_yaml), "model": "tiny", "save_dir": str(folder), "imgsz_hw": (64, 96), "epochs": 1, "batch": 4,
        "workers": 0, "device": "cpu", "no_aug_ratio": 0.0, "teacher": str(teacher), "distill": methods,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


def make_methods(**changes: Any) -> dict[str, Any]:
    return {"blockwise": BlockwiseConfig(**{**QUICK, **changes})}


def load_weights(folder: Path, file: str = "blockwise/assembled.pt") -> dict[str, Tensor]:
    return load_detector_checkpoint(folder / file).weights


def equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextmanager
def interrupt_call(count: int, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Iterator[None]:
    """Raise KeyboardInterrupt in call number `count` of a function."""
    original, calls = getattr(owner, name), []

    def call(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.slow
def test_command_replaces_reports_and_fine_tunes(data_yaml: Path, tmp_path: Path) -> None:
    teacher = write_checkpoint(tmp_path / "teacher.pt")
    flags = [
        "--data", str(data_yaml), "--teacher", str(teacher), "--distill", "blockwise", "--imgsz", "96x64",
        "--epochs", "1", "--batch", "4", "--workers", "0", "--device", "cpu", "--project", str(tmp_path),
        "--name", "run", "--set", "distill.blockwise.evaluate_blocks=true",
        *[part for name, value in QUICK.items() for part in ("--set", f"distill.blockwise.{name}={value}")],
    ]  # fmt: skip
    assert main(flags) == 0
    folder = tmp_path / "run"
    files = {path.name for path in (folder / "blockwise").iterdir()}
    assert files == {"assembled.pt", "blocks", "plan.json", "run_stats.json", "report.json"}
    report = json.loads((folder / "blockwise/report.json").read_text())
    assert [block["layer"] for block in report["blocks"]] == BLOCKS == list(report["block_miss_rates"])
    assert report["run_stats"]["makespan_s"] >= report["run_stats"]["lower_bound_s"] == pytest.approx(report["sum_s"])
    assembled, best = (
        load_detector_checkpoint(folder / "blockwise/assembled.pt"),
        load_detector_checkpoint(folder / "best.pt"),
    )
    assert assembled.miss_rate == report["miss_rate"]
    assert assembled.changes == best.changes and list(best.changes.separable) == BLOCKS
    # 9 C_in C_out weights for 9 C_in + C_in C_out + 2 C_out + 9 C_out + C_out^2.
    shapes = [tuple(build_from_spec(TINY).get_submodule(name).weight.shape[:2]) for name in BLOCKS]
    saved = sum(9 * o * i - (9 * i + i * o + 2 * o + 9 * o + o * o) for o, i in shapes)
    assert report["parameters"][0] - report["parameters"][1] == saved > 0
    assert main(flags) == 2  # the directory contains a run


@pytest.mark.slow
def test_interrupted_block_training_continues(data_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = write_checkpoint(tmp_path / "teacher.pt")
    cut = make_config(data_yaml, tmp_path / "cut", teacher, make_methods())
    with interrupt_call(3, monkeypatch, stage, "train_block"):
        train(cut)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut/blockwise/blocks").iterdir()}
    assert sorted(path.stem for path in finished) == BLOCKS[:2]
    (tmp_path / "cut/blockwise/.images-half.npy").touch()
    (tmp_path / "cut/blockwise/tmp.dask").mkdir()
    train(cut)
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())
    assert not [p for p in (tmp_path / "cut/blockwise").iterdir() if p.name.startswith(".") or p.suffix == ".dask"]
    assert json.loads((tmp_path / "cut/blockwise/report.json").read_text())["run_stats"] is None
    train(make_config(data_yaml, tmp_path / "whole", teacher, make_methods(cache_mib=0)))
    assert equal_states(load_weights(tmp_path / "cut"), load_weights(tmp_path / "whole"))
    assert equal_states(load_weights(tmp_path / "cut", "best.pt"), load_weights(tmp_path / "whole", "best.pt"))


def test_other_teacher_or_setting_starts_over(data_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = write_checkpoint(tmp_path / "teacher.pt")
    with interrupt_call(3, monkeypatch, stage, "train_block"):
        train(make_config(data_yaml, tmp_path / "run", teacher, make_methods()))
    old = (tmp_path / f"run/blockwise/blocks/{BLOCKS[0]}.pt").read_bytes()
    with interrupt_call(2, monkeypatch, stage, "train_block"):
        train(make_config(data_yaml, tmp_path / "run", teacher, make_methods(epochs=2)))
    blocks = list((tmp_path / "run/blockwise/blocks").iterdir())
    assert [path.stem for path in blocks] == BLOCKS[:1] and blocks[0].read_bytes() != old


def test_other_batch_samples_other_images_and_starts_over(
    data_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = write_checkpoint(tmp_path / "teacher.pt")
    for batch in (4, 6):
        with interrupt_call(2, monkeypatch, stage, "train_block"):
            train(make_config(data_yaml, tmp_path / "run", teacher, make_methods(), batch=batch))
        views = (tmp_path / "run/blockwise/images.npy").read_bytes()
        blocks = [path.read_bytes() for path in (tmp_path / "run/blockwise/blocks").iterdir()]
        (tmp_path / f"run/{batch}").write_bytes(b"".join([views, *blocks]))
        assert len(blocks) == 1
    assert (tmp_path / "run/4").read_bytes() != (tmp_path / "run/6").read_bytes()


@pytest.mark.slow
def test_interrupted_fine_tuning_ends_with_same_weights(
    data_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, methods = write_checkpoint(tmp_path / "teacher.pt"), make_methods()
    whole = make_config(data_yaml, tmp_path / "whole", teacher, methods, epochs=2)
    cut = make_config(data_yaml, tmp_path / "cut", teacher, methods, epochs=2)
    train(whole)
    with interrupt_call(5, monkeypatch, run.Trainer, "_compute_lr"):  # second step of the second epoch
        train(cut)
    assert len(load_training_state(tmp_path / "cut/last.pt")["history"]) == 1
    with monkeypatch.context() as patch:
        patch.setattr(stage, "train_block", None)  # all blocks are trained
        train(cut, resume=True)
    ends = [load_training_state(tmp_path / name / "last.pt") for name in ("whole", "cut")]
    assert equal_states(ends[0]["distiller"], ends[1]["distiller"]) and equal_states(ends[0]["ema"], ends[1]["ema"])


@contextmanager
def kill_one_worker(blocks: Path) -> Iterator[None]:
    """Kill one Dask worker with SIGKILL after the first block is written."""
    finished, killed = threading.Event(), threading.Event()

    def kill() -> None:
        while not finished.wait(0.01) and not killed.is_set():
            if list(blocks.glob("*.pt")):
                children = psutil.Process().children(recursive=True)
                worker = next(child for child in children if "spawn_main" in " ".join(child.cmdline()))
                os.kill(worker.pid, signal.SIGKILL)
                killed.set()

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
        assert killed.is_set()
    finally:
        finished.set()
        thread.join()


@pytest.mark.slow
def test_killed_workers_do_not_change_the_network(data_yaml: Path, tmp_path: Path) -> None:
    """Two workers with one of them killed give the network of one process, for two schedules and caches."""
    teacher, changes = write_checkpoint(tmp_path / "teacher.pt"), {"epochs": 20, "num_images": 32}
    train(make_config(data_yaml, tmp_path / "in-process", teacher, make_methods(**changes)))
    for scheduler, cache_mib in (("work-stealing", 0), ("round-robin", 64)):
        folder = tmp_path / scheduler
        methods = make_methods(workers=2, scheduler=scheduler, cache_mib=cache_mib, **changes)
        with kill_one_worker(folder / "blockwise/blocks"):
            train(make_config(data_yaml, folder, teacher, methods))
        assert equal_states(load_weights(tmp_path / "in-process"), load_weights(folder))
        assert equal_states(load_weights(tmp_path / "in-process", "best.pt"), load_weights(folder, "best.pt"))
        report = json.loads((folder / "blockwise/report.json").read_text())
        assert report["run_stats"]["num_workers"] == 2 and report["scheduler"] == scheduler


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "losses"),
    [
        ({"hkd": HKDConfig()}, {"hkd_pyramid", "hkd_region", "hkd_cls", "hkd_box"}),
        pytest.param(
            {"hkd": HKDConfig(), "noisy_teacher": NoisyTeacherConfig(), "mokd": MoKDConfig()},
            {"hkd_pyramid"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_fine_tuning_with_teacher_has_losses(
    data_yaml: Path, tmp_path: Path, changes: dict[str, Any], losses: set[str]
) -> None:
    methods = {"blockwise": BlockwiseConfig(**QUICK), **changes}
    result = train(make_config(data_yaml, tmp_path / "run", write_checkpoint(tmp_path / "teacher.pt"), methods))
    assert result.history[0].losses.keys() >= losses


def make_thin_yolo_spec() -> UltralyticsSpec:
    model_yaml = deepcopy(make_ultralytics_spec("yolo11n").model_yaml)
    model_yaml["scales"][model_yaml["scale"]][1] = 0.0625
    return UltralyticsSpec("yolo11n", {**model_yaml, "nc": 1})


@pytest.mark.slow
def test_faster_rcnn_is_replaced_blockwise(data_yaml: Path, tmp_path: Path) -> None:
    spec = FasterRCNNSpec("resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=(16, 32, 64, 128, 256))
    _check_family(data_yaml, tmp_path, spec)


@pytest.mark.slow
def test_yolo_is_replaced_blockwise(data_yaml: Path, tmp_path: Path) -> None:
    _check_family(data_yaml, tmp_path, make_thin_yolo_spec())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "shared"),
    [
        (TINY, tuple(f"head.{tower}.convs.0" for tower in ("cls_tower", "one2one_tower", "reg_tower"))),
        (FasterRCNNSpec("resnet18", 0.125, 16, 16, (16, 32, 64, 128, 256)), ("rpn.head.conv.0.0",)),
    ],
)
def test_neck_and_shared_head_are_replaced(
    data_yaml: Path, tmp_path: Path, spec: ModelSpec, shared: tuple[str, ...]
) -> None:
    teacher = write_checkpoint(tmp_path / "teacher.pt", spec)
    result = train(make_config(data_yaml, tmp_path / "run", teacher, make_methods(parts=("neck", "head"))))
    best = load_detector_checkpoint(result.best)
    assert best.changes.separable_shared == shared and set(best.changes.separable) > set(shared)
    report = json.loads((tmp_path / "run/blockwise/report.json").read_text())
    # 9 C^2 weights for 9 C + C^2 + C + 9 C + C^2: a shared block has a bias of C instead of a normalization of 2 C.
    num_neck = len(best.changes.separable) - len(shared)
    saved = (num_neck + len(shared)) * (9 * 256 - 18 * 16 - 2 * 256) - num_neck * 2 * 16 - len(shared) * 16
    assert report["parameters"][0] - report["parameters"][1] == saved
    assert report["flops"][1] < report["flops"][0]
    best.build()


def _check_family(data_yaml: Path, tmp_path: Path, spec: ModelSpec) -> None:
    result = _train_blockwise(data_yaml, tmp_path, spec)
    best = load_detector_checkpoint(result.best)
    assert best.spec == spec and best.changes.separable
    assert all(f"{name}.pointwise2.weight" in best.weights for name in best.changes.separable)
    best.build()


def _train_blockwise(data_yaml: Path, tmp_path: Path, spec: ModelSpec) -> TrainResult:
    return train(
        make_config(
            data_yaml, tmp_path / "run", write_checkpoint(tmp_path / "teacher.pt", spec), make_methods(min_channels=8)
        )
    )


@pytest.mark.slow
def test_block_above_max_mr_increase_is_left_out(
    data_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The miss rates are set: of the teacher, of each block alone, and of the assembled network."""
    from hkd_det.train import context

    rates = iter([0.5, 0.5, 0.7, 0.55, 0.6, 0.5, 0.9, 0.9, 0.9])
    monkeypatch.setattr(context, "evaluate", lambda *_: SimpleNamespace(miss_rate=next(rates)))
    teacher = write_checkpoint(tmp_path / "teacher.pt")
    train(make_config(data_yaml, tmp_path / "run", teacher, make_methods(evaluate_blocks=True, max_mr_increase=0.1)))
    report = json.loads((tmp_path / "run/blockwise/report.json").read_text())
    assert report["excluded_layers"] == [BLOCKS[1]] and report["miss_rate"] == 0.6
    assert load_detector_checkpoint(tmp_path / "run/best.pt").changes.separable == (BLOCKS[0], BLOCKS[2])
    with pytest.raises(DataError, match=r"every block alone raises the miss rate by more, at least 40\.00 points"):
        train(
            make_config(data_yaml, tmp_path / "none", teacher, make_methods(evaluate_blocks=True, max_mr_increase=0.1))
        )


def test_invalid_blockwise_run_is_reported_at_once(
    data_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = write_checkpoint(tmp_path / "teacher.pt")
    flags = ["--data", str(data_yaml), "--teacher", str(teacher), "--distill", "blockwise"]
    for extra_flags, message in {
        ("--baseline",): "no student without it",
        ("--weights", str(teacher)): "starts from the teacher, not from --weights",
        ("--model", "mini-student"): "is a tiny. Omit --model",
        ("--pretrained", "imagenet"): "starts from a checkpoint",
        ("--set", "distill.blockwise.parts=tail"): "expected one of backbone, neck, head",
    }.items():
        assert main([*flags, *extra_flags, "--project", str(tmp_path / "runs")]) == 2
        assert message in capsys.readouterr().err
    for invalid in (
        {"input_source": "student", "workers": 2},
        {"workers": 2, "cluster": "tcp://a:1"},
        {"max_mr_increase": 0.1},
    ):
        with pytest.raises(UsageError, match=r"distill\.blockwise"):
            make_methods(**invalid)
    config = make_config(data_yaml, tmp_path / "run", teacher, make_methods())
    with pytest.raises(UsageError, match="not under torchrun"):
        Blockwise.prepare_student(config.distill["blockwise"], RunContext(world_size=2))
    with pytest.raises(DataError, match="no times of these blocks"):
        train(make_config(data_yaml, tmp_path / "run", teacher, make_methods(timing_report=str(data_yaml))))
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UnavailableError, match="distributed"):
        train(make_config(data_yaml, tmp_path / "run", teacher, make_methods(workers=2)))
    assert not (tmp_path / "runs").exists() and not (tmp_path / "run/blockwise/images.npy").exists()


def test_invalid_fine_tuning_is_reported_before_block_training(data_yaml: Path, tmp_path: Path) -> None:
    teacher, folder = write_checkpoint(tmp_path / "teacher.pt"), tmp_path / "run"
    invalid = {
        "blockwise": BlockwiseConfig(**QUICK),
        "hkd": HKDConfig(feature_layers=LayerPairs(("neck",), ("nowhere",))),
    }
    with pytest.raises(UsageError, match=r"distill\.hkd\.feature_layers"):
        train(make_config(data_yaml, folder, teacher, invalid))
    methods = {"blockwise": BlockwiseConfig(**QUICK), "soft_labels": SoftLabelConfig()}
    with pytest.raises(DataError, match="no such directory"):
        train(make_config(data_yaml, folder, teacher, methods, unlabeled=("nowhere",)))
    assert not folder.exists()
