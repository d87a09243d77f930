"""The part of `hkd-train` that needs torch: from flags to a new or resumed run, and the list of feature layers."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from hkd_det.config import apply_override
from hkd_det.distill import METHODS, load_method, override_method
from hkd_det.errors import DataError, UsageError
from hkd_det.files import read_yaml
from hkd_det.letterbox import parse_imgsz
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import load_training_state
from hkd_det.models.feature_layers import format_feature_layers, list_feature_layers
from hkd_det.models.zoo import build_model, get_spec, load_detector, read_model_name
from hkd_det.shipped import DEFAULT_MODEL, FINETUNE_RECIPE, resolve_model
from hkd_det.train.baseline import compare_with_baseline, format_comparison, make_baseline_config
from hkd_det.train.config import TrainConfig
from hkd_det.train.trainer import train

SETTING_FLAGS = (
    "data", "model", "weights", "teacher", "teacher_config", "unlabeled", "epochs", "batch", "backbone", "pretrained",
    "device", "workers", "seed",
)  # fmt: skip
DERIVED_FLAGS = ("recipe", "imgsz", "distill", "set")  # flags that determine settings in another way


def start_training(arguments: argparse.Namespace) -> int:
    """Train as the flags of `hkd-train` request.

    Args:
        arguments: Parsed flags.

    Returns:
        Exit code.
    """
    if arguments.resume:
        _check_resume_flags(arguments)
        config = _load_resumed_config(Path(arguments.resume))
    else:
        config = _build_new_config(arguments)
    baseline = make_baseline_config(config) if arguments.baseline else None
    before = _read_mtime_ns(config.save_path / "last.pt")
    try:
        train(config, resume=bool(arguments.resume))
        if baseline:
            train(baseline, resume=bool(arguments.resume) and _is_started(baseline))
            if os.environ.get("RANK", "0") == "0":
                print(format_comparison(compare_with_baseline(config)))
    except KeyboardInterrupt:
        # With --exist-ok, last.pt belongs to the earlier run until this one has finished an epoch.
        if arguments.resume or _read_mtime_ns(config.save_path / "last.pt") != before:
            command = f"hkd-train --resume {config.save_dir}{' --baseline' if baseline else ''}"
            print(f"hkd-train: the finished epochs are saved. Continue with: {command}", file=sys.stderr)
        elif any((config.save_path / name).is_dir() for name in config.distill):
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


def _build_new_config(arguments: argparse.Namespace) -> TrainConfig:
    config = _merge_settings(arguments)
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


def _merge_settings(arguments: argparse.Namespace) -> TrainConfig:
    """Combine the recipe with the flags, which take precedence."""
    settings = _load_recipe(Path(arguments.recipe)) if arguments.recipe else _load_default_recipe(arguments)
    settings |= {name: value for name in SETTING_FLAGS if (value := getattr(arguments, name)) is not None}
    if arguments.imgsz:
        settings["imgsz_hw"] = parse_imgsz(arguments.imgsz)
    if arguments.distill is not None:
        settings["distill"] = {name.strip(): {} for name in arguments.distill.split(",") if name.strip()}
    if not isinstance(settings.setdefault("distill", {}), dict):
        raise UsageError(f"distill: expected a mapping of {', '.join(METHODS)}.")
    for assignment in arguments.set:
        if assignment.startswith("distill."):
            settings["distill"] = override_method(settings["distill"], assignment)
        else:
            settings = apply_override(TrainConfig, settings, assignment)
    _resolve_shipped_models(settings, arguments.from_scratch)
    sources = _get_student_sources(settings)
    if "teacher" in sources and not settings.get("model"):
        settings.setdefault("weights", settings.get("teacher", ""))
    if checkpoint := _get_initial_checkpoint(settings):
        model = read_model_name(Path(checkpoint), settings.get("model") or "")
        if settings.setdefault("model", model) != model:
            raise UsageError(f"--model {settings['model']}: {checkpoint} is a {model}. Omit --model to use it.")
    # A student that starts from the teacher needs no --model.
    for flag in ("data", "teacher" if sources - {"config"} else "model", "model"):
        if not settings.get(flag):
            raise UsageError(f"--{flag}: required. Set it, or --recipe YAML, or --resume RUN.")
    settings["save_dir"] = _choose_save_dir(arguments, settings)
    return TrainConfig.from_dict(settings, arguments.recipe)


def _get_student_sources(settings: dict[str, Any]) -> set[str]:
    """Return `DistillMethod.student_source` of the methods in use; unknown names are reported later."""
    methods = [name for name, value in settings["distill"].items() if value is not None and name in METHODS]
    return {load_method(name).student_source for name in methods}


def _get_initial_checkpoint(settings: dict[str, Any]) -> str:
    """Return the checkpoint that gives the architecture of the student, or an empty string."""
    return str(settings.get("teacher" if "prepared" in _get_student_sources(settings) else "weights") or "")


def _load_recipe(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except DataError as error:
        hint = "See the recipes directory for examples."
        raise DataError(f"--recipe: {error} {hint}") from None
    if not isinstance(content, dict):
        raise DataError(f"--recipe: {path}: expected a mapping `key: value`, got {type(content).__name__}.")
    return content


def _choose_save_dir(arguments: argparse.Namespace, settings: dict[str, Any]) -> str:
    if not (arguments.name or arguments.project) and "save_dir" in settings:
        return str(settings["save_dir"])
    name = arguments.name or "-".join([str(settings["model"]), *map(str, settings["distill"])])
    return str(Path(arguments.project or "runs/train") / name)


def _resolve_shipped_models(settings: dict[str, Any], from_scratch: bool) -> None:
    """Replace names of shipped detectors by their files."""
    if from_scratch and settings.get("weights"):
        raise UsageError(f"--from-scratch: excludes the initial weights {settings['weights']}. Omit one of them.")
    for name in ("weights", "teacher"):
        if settings.get(name):
            settings[name] = str(resolve_model(settings[name]))


def _load_default_recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a run without recipe: fine-tuning of the shipped detector if no flag names a model."""
    if arguments.model or arguments.weights or arguments.teacher or arguments.distill is not None:
        return {}
    if arguments.from_scratch:
        return {"model": read_model_name(resolve_model(None))}
    if os.environ.get("RANK", "0") == "0":
        print(
            f"Fine-tuning the shipped detector {DEFAULT_MODEL} with the settings of {FINETUNE_RECIPE}. "
            "Use --from-scratch for random weights, or --model and --weights for another detector."
        )
    return _load_recipe(FINETUNE_RECIPE)


def _check_resume_flags(arguments: argparse.Namespace) -> None:
    """Raise UsageError for flags without effect: a resumed run keeps its settings."""
    given = [name for name in (*SETTING_FLAGS, *DERIVED_FLAGS) if getattr(arguments, name) not in (None, "", [])]
    ignored = [name for name in given if not (name == "data" and arguments.download)]
    if ignored:
        flags = " ".join(f"--{name.replace('_', '-')}" for name in ignored)
        raise UsageError(f"--resume: the run keeps its settings, {flags} would have no effect. Omit them.")


def _load_resumed_config(save_path: Path) -> TrainConfig:
    if not save_path.exists():
        raise DataError(f"--resume {save_path}: no such run. Check the path.")
    path = save_path if save_path.suffix == ".pt" else save_path / "last.pt"
    if not path.exists():
        raise DataError(
            f"--resume {save_path}: contains no last.pt, because no epoch was finished. Start the run again."
        )
    return TrainConfig.from_dict({**load_training_state(path)["config"], "save_dir": str(path.parent)})
