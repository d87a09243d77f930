"""Graph flags: parsing, and rejected combinations."""

import argparse
from pathlib import Path

import pytest

from hkd_deploy.export.cli import _add_graph_arguments, main, make_export_options
from hkd_deploy.model_metadata import ExportOptions
from hkd_det.models.checkpoint import DetectorCheckpoint, save_detector_checkpoint
from hkd_det.models.zoo import build_model

TRAINED_HW = (512, 640)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", ExportOptions(TRAINED_HW)),
        ("--imgsz 320x256 --batch 4", ExportOptions((256, 320), 4)),
        ("--dynamic", ExportOptions(TRAINED_HW, None)),
        ("--dynamic batch", ExportOptions(TRAINED_HW, None)),
        ("--dynamic size --batch 2", ExportOptions(TRAINED_HW, 2, dynamic_size=True)),
        ("--dynamic size,batch", ExportOptions(TRAINED_HW, None, dynamic_size=True)),
        ("--letterbox", ExportOptions(TRAINED_HW, letterbox_hw=(1080, 1920))),
        ("--letterbox --max-imgsz 1280x720", ExportOptions(TRAINED_HW, letterbox_hw=(720, 1280))),
        ("--no-preprocess --raw", ExportOptions(TRAINED_HW, preprocess=False, raw=True)),
    ],
)
def test_make_export_options_parses_flags(flags: str, expected: ExportOptions) -> None:
    parser = argparse.ArgumentParser()
    _add_graph_arguments(parser)
    assert make_export_options(parser.parse_args(flags.split()), TRAINED_HW) == expected


def test_export_options_max_hw() -> None:
    assert ExportOptions(TRAINED_HW).max_hw == TRAINED_HW
    assert ExportOptions(TRAINED_HW, letterbox_hw=(1080, 1920)).max_hw == (1080, 1920)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    detector = build_model("mini-student")
    config = {"data": "none", "imgsz_hw": list(TRAINED_HW)}
    save_detector_checkpoint(path, DetectorCheckpoint.from_detector(detector, "mini-student", config, 1, 1.0))
    return path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--raw --letterbox", "--raw: not available with --letterbox"),
        ("--no-preprocess --letterbox", "--no-preprocess: not available with --letterbox"),
        ("--dynamic size --letterbox", "--dynamic size: not available with --letterbox"),
        ("--no-preprocess --precision fp16", "--no-preprocess: not available with --precision"),
        ("--raw --openvino", "--raw: not available with --openvino"),
        ("--trt --trt-profile abc", "--trt-profile abc: expected "),
        ("--imgsz 640x500", "multiples of 32"),
        ("--batch 0", "--batch 0: expected at least 1"),
        ("--batch -2", "--batch -2: expected at least 1"),
        ("--batch 4 --dynamic", "--batch 4: not available with --dynamic batch"),
        ("--dynamic width", "--dynamic width: expected batch, size or batch,size"),
        ("--dynamic batch,", "expected batch, size"),
        ("--letterbox --max-imgsz 1920", "--max-imgsz 1920"),
        ("--letterbox --max-imgsz 0x9", "--max-imgsz 0x9"),
        ("--max-imgsz 1920x1080", "requires --letterbox"),
    ],
)
def test_invalid_flags_end_in_one_line(
    weights: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    assert main([str(weights), "--no-verify", *flags.split()]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert list(weights.parent.iterdir()) == [weights]
