"""`hkd-train`: one line and an exit code for each user error, and the options that do not train."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hkd_det.distill import METHODS, load_method
from hkd_det.models.checkpoint import (
    DetectorCheckpoint,
    build_from_spec,
    load_detector_checkpoint,
    save_detector_checkpoint,
)
from hkd_det.models.detector import HKDDetectorSpec
from hkd_det.models.zoo import MODELS
from hkd_det.shipped import SHIPPED_MODELS
from hkd_det.train.cli import _build_train_parser, main
from hkd_det.train.config import FINETUNE_LR
from hkd_det.train.settings import (
    DEFAULT_ARCHITECTURE,
    MODEL_NAMES,
    STUDENT_FROM_TEACHER,
    merge_settings,
    parse_with_peer_flags,
)
from hkd_det.train.start import resolve_settings

FLAGS = ["--model", "mini-student", "--imgsz", "96x64", "--epochs", "1"]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--model", "mini-student"], 2, "--data"),
        (["--data", "nowhere.yaml", "--model", "huge"], 2, "mini-student"),
        (["--data", "x.yaml", *FLAGS, "--teacher", "t.pt"], 2, "--distill"),
        (["--data", "x.yaml", *FLAGS, "--distill", "hdk", "--teacher", "t.pt"], 2, "no such method. Did you mean hkd?"),
        (["--data", "x.yaml", "--distill", "cdd"], 2, "--teacher: required. Set it"),
        (["--data", "x.yaml", "--distill", "blockwise"], 2, "--teacher: required. Set it"),
        (["--data", "x.yaml", "--model", "mini-student", "--imgsz", "100"], 2, "multiples of 32"),
        (["--data", "x.yaml", *FLAGS, "--set", "lr=fast"], 2, "expected a number"),
        (["--data", "x.yaml", *FLAGS, "--set", "lr=inf"], 2, "lr: expected a finite number, got inf."),
        (["--data", "x.yaml", *FLAGS, "--set", "speed=1"], 2, "speed"),
        (["--data", "x.yaml", *FLAGS, "--set", "epochs=0"], 2, "epochs: expected at least 1, got 0."),
        (["--data", "x.yaml", *FLAGS, "--set", "mosaic=1.5"], 2, "mosaic: expected 0 to 1, got 1.5."),
        (
            ["--data", "x.yaml", *FLAGS, "--set", "clip_grad_norm=-1"],
            2,
            "clip_grad_norm: expected a number above 0, got -1.0.",
        ),
        (
            ["--data", "x.yaml", *FLAGS, "--set", "weight_decay=-1"],
            2,
            "weight_decay: expected at least 0, got -1.0.",
        ),
        (["--data", "x.yaml", *FLAGS, "--seed", "-1"], 2, "seed: expected at least 0, got -1."),
        (
            ["--data", "DATA", *FLAGS, "--teacher", "hkd-cpu", "--distill", "dense", "--set", "no_distill_ratio=1"],
            2,
            "leaves no epoch",
        ),
        (["--data", "DATA", *FLAGS, "--backbone", "resnet1"], 2, "resnet1"),
        (["--data", "DATA", *FLAGS, "--backbone", "vit_tiny_patch16_224"], 2, "vit_tiny"),
        (["--data", "x.yaml", *FLAGS, "--device", "tpu9"], 2, "--device"),
        (["--data", "x.yaml", *FLAGS, "--device", "mps"], 2, "--device mps: expected auto, cpu, cuda or cuda:N"),
        (["--data", "DATA", *FLAGS, "--device", "cuda:77"], 1, "CUDA"),
        (
            ["--data", "x.yaml", "--weights", "hkd-cpu", "--from-scratch"],
            2,
            "--from-scratch: excludes the initial weights",
        ),
        (["--resume", "nothing-here"], 1, "--resume nothing-here: no such run. Check the path."),
        (["--resume", "."], 1, "--resume .: contains no last.pt"),
        (["--resume", "nothing-here", "--epochs", "9", "--workers", "0", "--set", "lr=1"], 2, "--epochs --workers"),
    ],
)
def test_user_error_prints_one_line(
    flags: list[str], code: int, message: str, data_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*(str(data_yaml) if flag == "DATA" else flag for flag in flags), "--project", str(tmp_path)]) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("hkd-train: ") and message in error and len(error.splitlines()) == 1


def test_unknown_recipe_key_names_file_and_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epohcs: 3\n")
    assert main(["--data", "x.yaml", *FLAGS, "--recipe", str(recipe)]) == 2
    assert capsys.readouterr().err == f"hkd-train: {recipe}: epohcs: no such setting. Did you mean epochs?\n"


def test_recipe_without_method_mapping_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("distill: true\n")
    assert main(["--data", "x.yaml", *FLAGS, "--teacher", "t.pt", "--recipe", str(recipe)]) == 2
    assert "distill: expected a mapping of hkd" in capsys.readouterr().err


def test_help_names_every_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        main(["--help"])
    output = " ".join(capsys.readouterr().out.split())
    assert all(name in output for name in MODELS) and tuple(MODELS) == MODEL_NAMES


def test_list_layers_needs_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--list-layers", "--model", "mini-student", "--imgsz", "224x160"]) == 0
    output = capsys.readouterr().out
    row = next(line for line in output.splitlines() if "neck.outputs.0" in line)
    assert row.split() == ["*", "neck.outputs.0", "neck", "8", "40", "28x20"]
    assert not list(tmp_path.iterdir())
    assert main(["--list-layers", "--teacher", "nothing.pt"]) == 1
    assert main(["--list-layers"]) == 2
    assert "--list-layers: requires a detector" in capsys.readouterr().err


def test_download_continues_with_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets/citypersons/leftImg8bit").mkdir(parents=True)
    assert main(["--data", "citypersons", "--download", "--model", "huge"]) == 2
    captured = capsys.readouterr()
    assert "exists already" in captured.out and "--model huge" in captured.err


def test_existing_run_is_not_overwritten(data_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mini-student").mkdir()
    (tmp_path / "mini-student" / "last.pt").write_bytes(b"earlier run")
    assert main(["--data", str(data_yaml), *FLAGS, "--project", str(tmp_path)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "mini-student" / "last.pt").read_bytes() == b"earlier run"


def test_teacher_of_wrong_type_is_rejected(data_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = tmp_path / "yolo.pt"
    teacher.write_text("not a checkpoint")
    flags = ["--teacher", str(teacher), "--distill", "hkd", "--workers", "0", "--project", str(tmp_path / "runs")]
    assert main(["--data", str(data_yaml), *FLAGS, *flags]) == 1
    assert str(teacher) in capsys.readouterr().err


def test_split_without_persons_is_reported_before_training(
    data_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(data_yaml), *FLAGS, "--project", str(tmp_path), "--set", "setup=Reasonable_occ=heavy"]
    assert main(flags) == 1
    assert "setup=All" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_truncated_image_is_reported_by_name(
    data_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    shutil.copytree(data_yaml.parent, tmp_path / "data")
    image_path = tmp_path / "data" / "train" / "005.png"
    image_path.write_bytes(image_path.read_bytes()[:500])
    flags = [
        "--data",
        str(tmp_path / "data" / data_yaml.name),
        *FLAGS,
        "--workers",
        workers,
        "--project",
        str(tmp_path),
    ]
    assert main(flags) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "hkd-train: " in line]
    assert len(lines) == 1 and str(image_path) in lines[0] and "Traceback" not in lines[0]


@pytest.mark.slow
def test_any_timm_backbone_can_be_used(data_yaml: Path, tmp_path: Path) -> None:
    flags = ["--data", str(data_yaml), *FLAGS, "--workers", "0", "--project", str(tmp_path), "--batch", "4"]
    assert main([*flags, "--backbone", "mobilenetv3_small_050"]) == 0
    assert (
        load_detector_checkpoint(tmp_path / "mini-student" / "best.pt").build().spec.backbone == "mobilenetv3_small_050"
    )


@pytest.mark.slow
def test_interrupt_prints_resume_command_without_traceback(data_yaml: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "hkd_det.train.cli",
        "--data",
        str(data_yaml),
        *FLAGS[:-1],
        "500",
        "--workers",
        "2",
    ]
    process = subprocess.Popen([*command, "--project", str(tmp_path)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "mini-student" / "last.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "--resume" in error and "Traceback" not in error


def read_settings(data: Path, *flags: str) -> dict[str, object]:
    """Return the settings of the run that flags of hkd-train start."""
    arguments = parse_with_peer_flags(_build_train_parser(), ["--data", str(data), *flags])
    return resolve_settings(arguments, merge_settings(arguments)).as_dict()


def test_the_shipped_detector_is_fine_tuned_by_default(data_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, path = read_settings(data_yaml, "--epochs", "3"), str(SHIPPED_MODELS["hkd-cpu"].path)
    assert (settings["weights"], settings["teacher"], settings["model"]) == (path, path, DEFAULT_ARCHITECTURE)
    assert (settings["imgsz_hw"], settings["epochs"], list(settings["distill"])) == ([320, 320], 3, ["dense"])  # type: ignore[call-overload]
    assert "Fine-tuning the shipped detector hkd-cpu" in capsys.readouterr().out


def test_collected_images_adapt_the_shipped_detector(
    data_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--unlabeled", str(tmp_path), "--teacher", "hkd-cpu", "--distill", "soft_labels", "--set", "lr=1e-3"]
    settings, path = read_settings(data_yaml, *flags), str(SHIPPED_MODELS["hkd-cpu"].path)
    assert (settings["weights"], settings["teacher"], settings["model"]) == (path, path, DEFAULT_ARCHITECTURE)
    assert (settings["imgsz_hw"], settings["lr"], list(settings["distill"])) == ([320, 320], 1e-3, ["soft_labels"])  # type: ignore[call-overload]
    assert (settings["unlabeled"], settings["no_distill_ratio"]) == ([str(tmp_path)], 0.0)  # frames in all epochs
    assert "Fine-tuning the shipped detector hkd-cpu" in capsys.readouterr().out


def test_methods_that_derive_the_student_are_known_without_torch() -> None:
    derived = {name for name in METHODS if load_method(name).student_source != "config"}
    assert derived == STUDENT_FROM_TEACHER


@pytest.mark.parametrize(
    ("flags", "model"), [(["--from-scratch"], "yolox-nano-hswish"), (["--model", "slim-student"], "slim-student")]
)
def test_random_weights_on_request(flags: list[str], model: str, data_yaml: Path) -> None:
    settings = read_settings(data_yaml, *flags)
    assert (settings["weights"], settings["teacher"], settings["model"]) == ("", "", model)


@pytest.mark.parametrize(
    ("flags", "lr"),
    [
        (["--weights", "hkd-cpu"], FINETUNE_LR),
        (["--teacher", "TEACHER", "--distill", "cdd"], FINETUNE_LR),
        (["--teacher", "TEACHER", "--distill", "blockwise,hkd"], FINETUNE_LR),
        (["--weights", "TEACHER", "--set", "lr=1e-3"], 1e-3),
        (["--weights", "TEACHER", "--lr0", "0.02"], 0.02),
        (["--weights", "TEACHER", "--recipe", "RECIPE"], 3e-3),
        (["--model", "mini-student", "--teacher", "TEACHER", "--distill", "cdd"], 1e-3),
        (["--model", "mini-student", "--teacher", "TEACHER", "--distill", "hkd"], 1e-3),
        (["--from-scratch"], 1e-3),
        ([], 2e-4),
    ],
)
def test_start_of_the_student_determines_default_lr(
    flags: list[str], lr: float, data_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
    detector = build_from_spec(spec)
    save_detector_checkpoint(
        tmp_path / "t.pt", DetectorCheckpoint("mini-student", spec, detector.state_dict(), {}, 1, 1.0)
    )
    (tmp_path / "r.yaml").write_text("lr: 3.0e-3\n")
    paths = {"TEACHER": str(tmp_path / "t.pt"), "RECIPE": str(tmp_path / "r.yaml")}
    settings = read_settings(data_yaml, *[paths.get(flag, flag) for flag in flags])
    assert settings["lr"] == lr
    lines = [line for line in capsys.readouterr().out.splitlines() if "because the student starts from" in line]
    assert len(lines) == (lr == FINETUNE_LR)


def test_shipped_detector_can_be_teacher(data_yaml: Path) -> None:
    settings = read_settings(data_yaml, "--model", "slim-student", "--teacher", "hkd-cpu", "--distill", "soft_labels")
    assert (settings["weights"], settings["teacher"]) == ("", str(SHIPPED_MODELS["hkd-cpu"].path))
