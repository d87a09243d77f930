"""`hkd-train --list-taps`: the layers of detectors that can be named in a recipe's `distill.hkd.taps`."""

import argparse
from pathlib import Path

from hkd_det.errors import UsageError
from hkd_det.imgsz import parse_imgsz
from hkd_det.models.family import BaseDetector
from hkd_det.models.sizes import build_model
from hkd_det.models.tap_list import format_feature_layers, list_feature_layers
from hkd_det.train.config import TrainConfig
from hkd_det.train.teachers import load_detector


def print_feature_layers(arguments: argparse.Namespace) -> int:
    """Print a table for each detector that the flags name; returns the exit code, 0.

    Raises UsageError where none is named, and what building or reading it raises.
    """
    detectors: dict[str, BaseDetector] = {}
    if arguments.init:
        detectors[f"--init {arguments.init}"] = load_detector(Path(arguments.init))
    elif arguments.model:
        detectors[f"--model {arguments.model}"] = build_model(arguments.model, arguments.backbone or "")
    if arguments.teacher:
        detectors[f"--teacher {arguments.teacher}"] = load_detector(Path(arguments.teacher))
    if not detectors:
        raise UsageError("--list-taps: whose? --model NAME, --init CHECKPOINT or --teacher CHECKPOINT")
    imgsz_hw = parse_imgsz(arguments.imgsz) if arguments.imgsz else TrainConfig.imgsz_hw
    for name, detector in detectors.items():
        print(
            f"{name}, maps at {imgsz_hw[1]}x{imgsz_hw[0]}:\n{format_feature_layers(list_feature_layers(detector), imgsz_hw)}"
        )
    return 0
