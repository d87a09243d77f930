"""The part of `hkd-train` that needs torch: from flags to a new or resumed run, and the list of feature layers."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from hkd_det.distill import METHODS, load_method, override_method
from hkd_det.errors import HkdError, UsageError
from hkd_det.letterbox import parse_imgsz
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import load_training_state
from hkd_det.models.feature_layers import format_feature_layers, list_feature_layers
from hkd_det.models.zoo import build_model, get_spec, load_detector, read_model_name
from hkd_det.train.auto_batch import find_batch
from hkd_det.train.baseline import compare_with_baseline, format_comparison, make_baseline_config
from hkd_det.train.config import TrainConfig
from hkd_det.train.run_guard import handle_interrupts
from hkd_det.train.settings import AUTO_BATCH, find_resumed_state, make_required_error
from hkd_det.train.trainer import train


def start_training(arguments: argparse.Namespace, settings: dict[str, Any]) -> int:
    """Train as the flags of `hkd-train` request.

    Args:
        arguments: Parsed flags.
        settings: Result of `merge_settings`; empty for a resumed run.

    Returns:
        Exit code.
    """
    if arguments.resume:
        config = _load_resumed_config(Path(arguments.resume))
    else:
        config = _build_new_config(arguments, settings)
    baseline = make_baseline_config(config) if arguments.baseline else None
    before = _read_mtime_ns(config.save_path / "last.pt")
    try:
        with handle_interrupts():
            train(config, resume=bool(arguments.resume))
            if baseline:
                train(baseline, resume=bool(arguments.resume) and _is_started(baseline))
                if os.environ.get("RANK", "0") == "0":
                    print(format_comparison(compare_with_baseline(config)))
    except (KeyboardInterrupt, HkdError, OSError) as error:
        # With --exist-ok, last.pt belongs to the earlier run until this one has finished an epoch.
        is_interrupted = isinstance(error, KeyboardInterrupt)
        is_changed = _read_mtime_ns(config.save_path / "last.pt") != before
        if is_changed or (arguments.resume and is_interrupted):
            command = f"hkd-train --resume {config.save_dir}{' --baseline' if baseline else ''}"
            print(f"hkd-train: the finished epochs are saved. Continue with: {command}", file=sys.stderr)
        elif is_interrupted and any((config.save_path / name).is_dir() for name in config.distill):
            print("hkd-train: the prepared student is saved so far. Continue with the same command.", file=sys.stderr)
        raise
    return 0


def print_feature_layers(arguments: argparse.Namespace) -> int:
    """Print the feature layers of each detector that the flags name, with the size of their outputs.

    Args:
        arguments: Parsed flags.

    Returns:
        Exit code.

    Raises:
        UsageError: If no detector is named.
    """
    detectors: dict[str, BaseDetector] = {}
    if arguments.weights:
        detectors[f"--weights {arguments.weights}"] = load_detector(Path(arguments.weights))
    elif arguments.model:
        detectors[f"--model {arguments.model}"] = build_model(arguments.model, arguments.backbone or "")
    if arguments.teacher:
        detectors[f"--teacher {arguments.teacher}"] = load_detector(Path(arguments.teacher))
    if not detectors:
        raise UsageError("--list-layers: requires a detector. Add --model, --weights or --teacher.")
    imgsz_hw = parse_imgsz(arguments.imgsz) if arguments.imgsz else TrainConfig.imgsz_hw
    for name, detector in detectors.items():
        table = format_feature_layers(list_feature_layers(detector), imgsz_hw)
        print(f"{name}, features at {imgsz_hw[1]}x{imgsz_hw[0]}:\n{table}")
    return 0


def _read_mtime_ns(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _is_started(baseline: TrainConfig) -> bool:
    """Return whether the directory holds a run of these settings, not an earlier one that --exist-ok replaces."""
    path = baseline.save_path / "last.pt"
    if not path.exists():
        return False
    saved = load_training_state(path)["config"]
    return TrainConfig.from_dict({**saved, "save_dir": baseline.save_dir}) == baseline


def _build_new_config(arguments: argparse.Namespace, settings: dict[str, Any]) -> TrainConfig:
    config = resolve_settings(arguments, settings)
    if not _get_initial_checkpoint(config.as_dict()):
        get_spec(config.model)
    directories = [config.save_path]
    if arguments.baseline:
        directories.append(make_baseline_config(config).save_path)
    for directory in directories:
        if (directory / "last.pt").exists() and not arguments.exist_ok:
            raise UsageError(
                f"{directory}: already contains a run. Continue it with --resume {config.save_path}, choose another "
                "--name, or replace it with --exist-ok."
            )
    return config


def resolve_settings(arguments: argparse.Namespace, settings: dict[str, Any]) -> TrainConfig:
    """Complete settings with what checkpoints and methods determine.

    Args:
        arguments: Parsed flags.
        settings: Result of `merge_settings`.

    Returns:
        The configuration of the run.

    Raises:
        HkdError: A file or a combination of settings is invalid.
    """
    for assignment in arguments.set:
        if assignment.startswith("distill."):
            settings["distill"] = override_method(settings["distill"], assignment)
    sources = _get_student_sources(settings)
    if "teacher" in sources and not settings.get("model"):
        settings.setdefault("weights", settings.get("teacher", ""))
    if checkpoint := _get_initial_checkpoint(settings):
        model = read_model_name(Path(checkpoint), settings.get("model") or "")
        if settings.setdefault("model", model) != model:
            raise UsageError(f"--model {settings['model']}: {checkpoint} is a {model}. Omit --model to use it.")
    # A student that starts from the teacher needs no --model.
    for flag in ("teacher" if sources - {"config"} else "model", "model"):
        if not settings.get(flag):
            raise make_required_error(flag)
    settings["save_dir"] = _choose_save_dir(arguments, settings)
    if settings.get("batch") == AUTO_BATCH:
        settings["batch"] = find_batch(TrainConfig.from_dict({**settings, "batch": 1}, arguments.recipe))
    return TrainConfig.from_dict(settings, arguments.recipe)


def _get_student_sources(settings: dict[str, Any]) -> set[str]:
    """Return `DistillMethod.student_source` of the methods in use; unknown names are reported later."""
    methods = [name for name, value in settings["distill"].items() if value is not None and name in METHODS]
    return {load_method(name).student_source for name in methods}


def _get_initial_checkpoint(settings: dict[str, Any]) -> str:
    """Return the checkpoint that gives the architecture of the student, or an empty string."""
    return str(settings.get("teacher" if "prepared" in _get_student_sources(settings) else "weights") or "")


def _choose_save_dir(arguments: argparse.Namespace, settings: dict[str, Any]) -> str:
    if not (arguments.name or arguments.project) and "save_dir" in settings:
        return str(settings["save_dir"])
    name = arguments.name or "-".join([str(settings["model"]), *map(str, settings["distill"])])
    return str(Path(arguments.project or "runs/train") / name)


def _load_resumed_config(save_path: Path) -> TrainConfig:
    path = find_resumed_state(save_path)
    return TrainConfig.from_dict({**load_training_state(path)["config"], "save_dir": str(path.parent)})
