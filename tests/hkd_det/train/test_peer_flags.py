"""Spellings of other tools are translated, or answered with the flag to use."""

import subprocess
import sys
from pathlib import Path

import pytest

from hkd_det.train.cli import _build_train_parser, main
from hkd_det.train.settings import merge_settings, parse_with_peer_flags


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["imgsz=640"], "imgsz_hw", (640, 640)),
        (["--img-size", "640"], "imgsz_hw", (640, 640)),
        (["--img", "640"], "imgsz_hw", (640, 640)),
        (["detect", "train", "epochs=3"], "epochs", 3),
        (["--batch-size=8"], "batch", 8),
        (["batch=auto", "device=0"], "batch", "auto"),
        (["batch=-1", "device=0"], "batch", "auto"),
        (["--device", "0"], "device", "cuda:0"),
        (["device=1"], "device", "cuda:1"),
        (["--lr0", "0.002"], "lr", 0.002),
        (["lr0=0.002", "imgsz=640"], "lr", 0.002),
        (["mosaic=0.1"], "mosaic", 0.1),
        (["patience=7"], "patience", 7),
        (["workers=0", "--set", "seed=4"], "seed", 4),
    ],
)
def test_peer_spelling_is_accepted(words: list[str], name: str, value: object, data_yaml: Path) -> None:
    flags = ["--data", str(data_yaml), "--model", "mini-student", *words]
    settings = merge_settings(parse_with_peer_flags(_build_train_parser(), flags))
    assert settings[name] == value


def test_peer_switch_is_translated(data_yaml: Path) -> None:
    flags = [f"data={data_yaml}", "model=mini-student", "exist_ok=True", "from_scratch=False"]
    arguments = parse_with_peer_flags(_build_train_parser(), flags)
    assert (arguments.exist_ok, arguments.from_scratch, arguments.model) == (True, False, "mini-student")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer=SGD"], "optimizer=SGD: not a flag of hkd-train. The optimizer is always AdamW."),
        (["--close-mosaic", "10"], "--set no_aug_ratio=0.1"),
        (["--hyp=x.yaml"], "--recipe YAML"),
        (["epohcs=3"], "epohcs=3: no such flag. Did you mean --epochs?"),
        (["--quiet"], "--quiet: no such flag. hkd-train --help lists all flags."),
        (["epochs", "3"], "epochs: expected a value. Did you mean --epochs?"),
        (["--weight-decay"], "--weight-decay: expected a value."),
        (["street.yaml"], "street.yaml: expected a flag or NAME=VALUE."),
        (["exist_ok=maybe"], "expected True or False, got maybe."),
        (["--device", "0,1"], "torchrun --nproc-per-node 2"),
        (["--model", "yolo11n.pt"], "Use --model yolo11n, or --weights yolo11n.pt."),
        (["--batch", "auto", "--device", "cpu"], "--batch auto: measures the memory of a GPU"),
        (["--freeze", "10"], "--set freeze_bn=true"),
        (["fraction=0.5"], "List the images to use in a text file"),
        (["val=True"], "Every epoch is validated."),
        (["--patience", "-1"], "patience: expected at least 0, got -1."),
    ],
)
def test_other_argument_is_answered_in_one_line(
    words: list[str], message: str, data_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", str(data_yaml), *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hkd-train: ")]
    assert len(lines) == 1 and message in lines[0]


FLAG_ERRORS = """
import sys
from hkd_det.train.cli import main

base = ["--data", sys.argv[1], "--model", "mini-student"]
for flags in (
    ["--epochs", "0"], ["--imgsz", "100"], ["--device", "tpu"], ["--set", "lr=fast"], ["--set", "speed=1"],
    ["--teacher", "t.pt"], ["--distill", "hdk", "--teacher", "t.pt"], ["--distill", "hkd"], ["--model", "huge"],
    ["--data", "nowhere.yaml"], ["--weights", "nowhere.pt"], ["--resume", "nowhere"], ["imgsz=100"],
):
    assert main([*base, *flags]) in (1, 2), flags
assert not {"torch", "timm", "torchvision"} & sys.modules.keys()
"""


def test_flag_errors_come_before_torch_is_imported(data_yaml: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FLAG_ERRORS, str(data_yaml)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 13


def test_batch_that_is_no_number_names_the_values(data_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--data", str(data_yaml), "--batch", "3.5"])
    assert "--batch: expected a number of images or auto, got 3.5" in capsys.readouterr().err
