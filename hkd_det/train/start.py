"""From the command's flags to a run: a new one, or one that goes on. Needs torch.

`hkd-train --list-layers`: the layers of detectors that can be named in a recipe's `distill.hkd.feature_layers`.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from hkd_det.config import apply_override
from hkd_det.errors import DataError, UsageError
from hkd_det.letterbox import parse_imgsz
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import load_training_state
from hkd_det.models.feature_layers import format_feature_layers, list_feature_layers
from hkd_det.models.zoo import build_model, get_spec, load_detector, model_name
from hkd_det.train.baseline import compare_with_control, control_config, format_comparison
from hkd_det.train.config import TrainConfig
from hkd_det.train.trainer import train

SETTING_FLAGS = (
    "data", "model", "weights", "teacher", "teacher_config", "unlabeled", "epochs", "batch", "backbone",
    "pretrained", "device", "workers", "seed",
)  # fmt: skip


DERIVED_FLAGS = ("recipe", "imgsz", "distill", "set")  # that decide settings, each in a way of its own


def start_training(arguments: argparse.Namespace) -> int:
    """Train as `hkd-train`'s flags say; returns the exit code."""
    if arguments.resume:
        _check_resume_flags(arguments)
        config = _load_resumed_config(Path(arguments.resume))
    else:
        config = _build_new_config(arguments)
    control = control_config(config) if arguments.baseline else None
    before = _read_mtime_ns(config.save_path / "last.pt")
    try:
        train(config, resume=bool(arguments.resume))
        if control:
            train(control, resume=bool(arguments.resume) and _is_started(control))
            if os.environ.get("RANK", "0") == "0":
                print(format_comparison(compare_with_control(config)))
    except KeyboardInterrupt:
        # Under --exist-ok last.pt is the earlier run's until this one has finished an epoch.
        if arguments.resume or _read_mtime_ns(config.save_path / "last.pt") != before:
            command = f"hkd-train --resume {config.save_dir}{' --baseline' if control else ''}"
            print(f"hkd-train: the finished epochs are kept; go on with: {command}", file=sys.stderr)
        elif (config.save_path / "blockwise/plan.json").exists():
            print("hkd-train: the finished blocks are kept; the same command goes on with the others", file=sys.stderr)
        raise
    return 0


def _read_mtime_ns(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _is_started(control: TrainConfig) -> bool:
    """Whether the control's folder holds a run of these settings, not one whose place it is to take (--exist-ok)."""
    path = control.save_path / "last.pt"
    return (
        path.exists()
        and TrainConfig.from_dict({**load_training_state(path)["config"], "save_dir": control.save_dir}) == control
    )


def _build_new_config(arguments: argparse.Namespace) -> TrainConfig:
    config = _merge_settings(arguments)
    if not _get_initial_checkpoint(config.as_dict()):
        get_spec(config.model)
    folders = [config.save_path, *([control_config(config).save_path] if arguments.baseline else [])]
    for folder in folders:
        if (folder / "last.pt").exists() and not arguments.exist_ok:
            raise UsageError(
                f"{folder} already holds a run: --resume {config.save_path} goes on with it, "
                "--name NAME starts another, --exist-ok starts over in its place"
            )
    return config


def _merge_settings(arguments: argparse.Namespace) -> TrainConfig:
    """The recipe's settings, if one is given, under those of the flags."""
    settings = _load_recipe(Path(arguments.recipe)) if arguments.recipe else {}
    settings |= {name: value for name in SETTING_FLAGS if (value := getattr(arguments, name)) is not None}
    if arguments.imgsz:
        settings["imgsz_hw"] = parse_imgsz(arguments.imgsz)
    if arguments.distill is not None:
        settings["distill"] = {name.strip(): {} for name in arguments.distill.split(",") if name.strip()}
    for assignment in arguments.set:
        settings = apply_override(TrainConfig, settings, assignment)
    if _has_method(settings, "cdd") and not settings.get("model"):
        settings.setdefault("weights", settings.get("teacher", ""))
    start = _get_initial_checkpoint(settings)
    if start:
        model = model_name(Path(start))
        if settings.setdefault("model", model) != model:
            raise UsageError(f"--model {settings['model']}: {start} is a {model}; leave --model out to start from it")
    begins_as_teacher = _has_method(settings, "cdd") or _has_method(settings, "blockwise")
    for flag in ("data", "teacher" if begins_as_teacher else "model", "model"):
        if not settings.get(flag):
            raise UsageError(f"--{flag} is needed (or --recipe YAML, or --resume RUN)")
    if arguments.name or arguments.project or "save_dir" not in settings:
        distill = settings.get("distill")
        methods = map(str, distill) if isinstance(distill, dict) else ()  # what else it may be, is refused below
        name = arguments.name or "-".join([str(settings["model"]), *methods])
        settings["save_dir"] = str(Path(arguments.project or "runs/train") / name)
    return TrainConfig.from_dict(settings, arguments.recipe)


def _get_initial_checkpoint(settings: dict[str, Any]) -> str:
    """The checkpoint whose shape and weights the student has at its start, or ""."""
    return str(settings.get("teacher" if _has_method(settings, "blockwise") else "weights") or "")


def _has_method(settings: dict[str, Any], method: str) -> bool:
    distill = settings.get("distill")
    return isinstance(distill, dict) and distill.get(method) is not None


def _load_recipe(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"--recipe {path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"--recipe {path}: not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise DataError(f"--recipe {path}: expected settings, `key: value`")
    return content


def _check_resume_flags(arguments: argparse.Namespace) -> None:
    """UsageError for flags that would not be heard: a resumed run has the settings that it began with."""
    asked = [name for name in (*SETTING_FLAGS, *DERIVED_FLAGS) if getattr(arguments, name) not in (None, "", [])]
    unheard = [name for name in asked if not (name == "data" and arguments.download)]
    if unheard:
        flags = " ".join(f"--{name.replace('_', '-')}" for name in unheard)
        raise UsageError(f"--resume goes on with the run's own settings; leave out {flags}, or start another run")


def _load_resumed_config(save_path: Path) -> TrainConfig:
    path = save_path if save_path.suffix == ".pt" else save_path / "last.pt"
    if not path.exists():
        raise DataError(f"--resume {save_path}: no last.pt there; no epoch was finished, start the run again")
    return TrainConfig.from_dict({**load_training_state(path)["config"], "save_dir": str(path.parent)})


def print_feature_layers(arguments: argparse.Namespace) -> int:
    """Print a table for each detector that the flags name; returns the exit code, 0.

    Raises UsageError where none is named, and what building or reading it raises.
    """
    detectors: dict[str, BaseDetector] = {}
    if arguments.weights:
        detectors[f"--weights {arguments.weights}"] = load_detector(Path(arguments.weights))
    elif arguments.model:
        detectors[f"--model {arguments.model}"] = build_model(arguments.model, arguments.backbone or "")
    if arguments.teacher:
        detectors[f"--teacher {arguments.teacher}"] = load_detector(Path(arguments.teacher))
    if not detectors:
        raise UsageError("--list-layers: whose? --model NAME, --weights CHECKPOINT or --teacher CHECKPOINT")
    imgsz_hw = parse_imgsz(arguments.imgsz) if arguments.imgsz else TrainConfig.imgsz_hw
    for name, detector in detectors.items():
        print(
            f"{name}, maps at {imgsz_hw[1]}x{imgsz_hw[0]}:\n{format_feature_layers(list_feature_layers(detector), imgsz_hw)}"
        )
    return 0
