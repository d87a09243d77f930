"""Settings of a run from recipe and flags, as far as they can be merged and checked without torch.

Arguments may have the spelling of other training tools, such as `imgsz=640`, `--img-size 640` or `--lr0 0.01`.
"""

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hkd_det.config import apply_override, suggest_name
from hkd_det.datasets.catalog import list_splits
from hkd_det.distill import METHODS
from hkd_det.errors import DataError, UsageError, import_package
from hkd_det.files import read_yaml
from hkd_det.letterbox import parse_imgsz
from hkd_det.onnxrt.model_config import resolve_model_config
from hkd_det.shipped import DEFAULT_MODEL, FINETUNE_RECIPE, resolve_model
from hkd_det.train.config import TrainConfig

MODEL_NAMES = (
    "teacher-r50", "student-r18", "mini-teacher", "mini-student", "slim-student", "yolox-nano", "yolox-nano-hswish",
    "yolox-nano-relu", "yolox-pico-hswish", "yolox-nano-x2", "yolox-nano-x3", "yolox-tiny", "yolox-s", "fasterrcnn-r50",
    "fasterrcnn-r18",
)  # fmt: skip
SETTING_FLAGS = (
    "data", "model", "weights", "teacher", "teacher_config", "unlabeled", "epochs", "patience", "batch", "backbone",
    "pretrained", "device", "workers", "seed", "tensorboard",
)  # fmt: skip
DERIVED_FLAGS = ("recipe", "imgsz", "distill", "set")  # flags that determine settings in another way
AUTO_BATCH = "auto"
DEFAULT_ARCHITECTURE = "yolox-nano-hswish"  # of the shipped detector that is fine-tuned by default
TENSORBOARD_HINT = "Run pip install 'hkd-det[tensorboard]'."

STUDENT_FROM_TEACHER = {"blockwise", "cdd"}  # methods whose `student_source` is not "config"; no import of torch

# Words of `yolo detect train data=...` that select what hkd-train does anyway.
COMMAND_WORDS = {"detect", "train", "task=detect", "mode=train"}
# Other names of flags and settings.
ALIASES = {
    "img": "imgsz",
    "img_size": "imgsz",
    "image_size": "imgsz",
    "batch_size": "batch",
    "num_workers": "workers",
    "max_epochs": "epochs",
    "num_epochs": "epochs",
    "lr0": "lr",
    "learning_rate": "lr",
    "early_stopping_patience": "patience",
}
# Names without an equal setting, and what to use instead.
REMEDIES = {
    "amp": "Use --set precision=bf16 or --set precision=fp32 (default: auto).",
    "cache": "Images are always cached. Use --set cache_mib=N for the size of the cache.",
    "cfg": "Use --recipe YAML.",
    "classes": "Person is the only class. Use `category` in the data YAML to choose it.",
    "close_mosaic": "Use --set no_aug_ratio=0.1, a ratio of the epochs.",
    "cos_lr": "The learning rate always follows a cosine. Omit it.",
    "deterministic": "Runs with the same --seed are repeatable on a CPU. Omit it.",
    "fraction": "List the images to use in a text file, as `train` of the data YAML.",
    "freeze": "All layers are trained. Use --set freeze_bn=true for the batch normalization, or a smaller --set lr=.",
    "hyp": "Use --recipe YAML.",
    "lrf": "The learning rate falls to 2 % of its peak. Omit it.",
    "half": "Use --set precision=bf16 or --set precision=fp32 (default: auto).",
    "momentum": "The optimizer is AdamW with its default momenta. Omit it.",
    "optimizer": "The optimizer is always AdamW. Omit it.",
    "plots": "Curves and validation images are always written. Omit it.",
    "rect": "Use --imgsz WxH for an input that is not square.",
    "save_period": "Every epoch is saved in last.pt. Omit it.",
    "single_cls": "Person is the only class. Omit it.",
    "val": "Every epoch is validated. Omit it.",
    "warmup_epochs": "Use --set warmup_ratio=0.05, a ratio of the steps.",
}


def merge_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Combine the recipe with the flags, which take precedence, and check them as far as possible without torch.

    Args:
        arguments: Parsed flags of a new run.

    Returns:
        Values for `TrainConfig`. `--set distill.METHOD.KEY=VALUE` is not applied yet, and `batch` can be "auto".

    Raises:
        UsageError: A flag is invalid or missing.
        DataError: A file is missing or invalid.
    """
    settings = _load_recipe(Path(arguments.recipe)) if arguments.recipe else _load_default_recipe(arguments)
    settings |= {name: value for name in SETTING_FLAGS if (value := getattr(arguments, name)) is not None}
    if arguments.imgsz:
        settings["imgsz_hw"] = parse_imgsz(arguments.imgsz)
    if arguments.distill is not None:
        settings["distill"] = {name.strip(): {} for name in arguments.distill.split(",") if name.strip()}
    if not isinstance(settings.setdefault("distill", {}), dict):
        raise UsageError(f"distill: expected a mapping of {', '.join(METHODS)}.")
    for assignment in arguments.set:
        if not assignment.startswith("distill."):
            settings = apply_override(TrainConfig, settings, assignment)
    settings["device"] = _parse_device(str(settings.get("device", "auto")))
    _resolve_shipped_models(settings, arguments.from_scratch)
    _check_values(settings, arguments.recipe)
    _check_requirements(settings)
    _check_files(settings)
    return settings


def check_resume_flags(arguments: argparse.Namespace) -> None:
    """Check the flags of a resumed run.

    Args:
        arguments: Parsed flags with `resume`.

    Raises:
        UsageError: A flag has no effect: a resumed run keeps its settings.
        DataError: There is no such run.
    """
    given = [name for name in (*SETTING_FLAGS, *DERIVED_FLAGS) if getattr(arguments, name) not in (None, "", [])]
    ignored = [name for name in given if not (name == "data" and arguments.download)]
    if ignored:
        flags = " ".join(f"--{name.replace('_', '-')}" for name in ignored)
        raise UsageError(f"--resume: the run keeps its settings, {flags} would have no effect. Omit them.")
    find_resumed_state(Path(arguments.resume))


def find_resumed_state(save_path: Path) -> Path:
    """Return the `last.pt` of a run.

    Args:
        save_path: Directory of the run, or the file itself.

    Raises:
        DataError: There is no such run.
    """
    if not save_path.exists():
        raise DataError(f"--resume {save_path}: no such run. Check the path.")
    path = save_path if save_path.suffix == ".pt" else save_path / "last.pt"
    if not path.exists():
        raise DataError(
            f"--resume {save_path}: contains no last.pt, because no epoch was finished. Start the run again."
        )
    return path


def make_required_error(flag: str) -> UsageError:
    """Return the error about a missing flag.

    Args:
        flag: Name of the flag.
    """
    return UsageError(f"--{flag}: required. Set it, or --recipe YAML, or --resume RUN.")


def _check_values(settings: dict[str, Any], recipe: str) -> None:
    """Check names, types and ranges of all settings that need no torch."""
    batch = settings.get("batch", TrainConfig.batch)
    if batch == AUTO_BATCH and settings["device"] == "cpu":
        raise UsageError("--batch auto: measures the memory of a GPU, and --device is cpu. Set a number of images.")
    needs_torch = ("teacher", "teacher_config", "distill", "unlabeled", "weights", "backbone", "pretrained")
    plain = {name: value for name, value in settings.items() if name not in needs_torch}
    required = {name: str(settings.get(name) or "-") for name in ("data", "model", "save_dir")}
    TrainConfig.from_dict({**plain, **required, "batch": 1 if batch == AUTO_BATCH else batch}, recipe)
    model = str(settings.get("model") or "")
    if model.endswith((".pt", ".pth", ".onnx", ".yaml")):
        name = Path(model).stem
        raise UsageError(f"--model {model}: expected a name, got a file. Use --model {name}, or --weights {model}.")
    if model and model not in MODEL_NAMES and not model.startswith("yolo"):
        raise UsageError(
            f"--model {model}: no such model. Choose one of {', '.join(MODEL_NAMES)}, or a YOLO model such as yolo11n."
        )
    if settings.get("tensorboard"):
        import_package("tensorboard", hint=TENSORBOARD_HINT)


def _check_requirements(settings: dict[str, Any]) -> None:
    """Check which settings need each other."""
    if unknown := [name for name in settings["distill"] if name not in METHODS]:
        raise UsageError(f"--distill {unknown[0]}: no such method{suggest_name(str(unknown[0]), METHODS)}")
    if not settings.get("data"):
        raise make_required_error("data")
    if settings["distill"] and not settings.get("teacher"):
        raise make_required_error("teacher")
    if settings.get("teacher") and not settings["distill"]:
        raise UsageError(
            f"--teacher {settings['teacher']}: requires --distill METHODS. In a recipe, set distill: {{METHOD: {{}}}}."
        )
    if not any(settings.get(name) for name in ("model", "weights", "teacher")):
        raise make_required_error("model")


def _check_files(settings: dict[str, Any]) -> None:
    """Check that the dataset is known and that the files of --weights and --teacher exist."""
    list_splits(settings["data"])
    for name in ("weights", "teacher", "teacher_config"):
        path = Path(settings.get(name) or ".")
        path = resolve_model_config(path) if name == "teacher_config" else path
        if not path.exists():
            raise DataError(f"--{name.replace('_', '-')} {path}: no such file. Check the path.")


def _parse_device(text: str) -> str:
    """Return the device name; numbers are CUDA devices, as in other tools."""
    if text.isascii() and text.isdigit():
        return f"cuda:{int(text)}"
    if re.fullmatch(r"[0-9]+(,[0-9]+)+", text):
        num_devices = text.count(",") + 1
        raise UsageError(
            f"--device {text}: a process uses one device. For several, set CUDA_VISIBLE_DEVICES={text} and start "
            f"torchrun --nproc-per-node {num_devices} -m hkd_det.train.cli without --device."
        )
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", text):
        raise UsageError(f"--device {text}: expected auto, cpu, cuda or cuda:N.")
    return text


def _load_recipe(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except DataError as error:
        hint = "See the recipes directory for examples."
        raise DataError(f"--recipe: {error} {hint}") from None
    if not isinstance(content, dict):
        raise DataError(f"--recipe: {path}: expected a mapping `key: value`, got {type(content).__name__}.")
    return content


def _resolve_shipped_models(settings: dict[str, Any], from_scratch: bool) -> None:
    """Replace names of shipped detectors by their files."""
    if from_scratch and settings.get("weights"):
        raise UsageError(f"--from-scratch: excludes the initial weights {settings['weights']}. Omit one of them.")
    for name in ("weights", "teacher"):
        if settings.get(name):
            settings[name] = str(resolve_model(settings[name]))


def _load_default_recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a run without recipe: fine-tuning of the shipped detector if no flag names a student.

    With --unlabeled the shipped detector is adapted to the images also if --teacher and --distill are given, unless a
    method derives the student from the teacher.
    """
    methods = {name.strip() for name in (arguments.distill or "").split(",")}
    has_student = arguments.model or arguments.weights or methods & STUDENT_FROM_TEACHER
    if has_student or ((arguments.teacher or arguments.distill is not None) and not arguments.unlabeled):
        return {}
    if arguments.from_scratch:
        return {"model": DEFAULT_ARCHITECTURE}
    if os.environ.get("RANK", "0") == "0":
        print(
            f"Fine-tuning the shipped detector {DEFAULT_MODEL} with the settings of {FINETUNE_RECIPE}. "
            "Use --from-scratch for random weights, or --model and --weights for another detector."
        )
    return _load_recipe(FINETUNE_RECIPE)


def parse_with_peer_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments, also in the spelling of other tools.

    Args:
        parser: Parser of hkd-train.
        argv: Arguments; those of the process if None.

    Returns:
        The flags.

    Raises:
        UsageError: An argument is unknown. The message names the flag to use.
    """
    arguments, extras = parser.parse_known_args(argv)
    if not extras:
        return arguments
    translated = [word for name, value in _split_arguments(extras) for word in _translate(parser, name, value)]
    return parser.parse_args(translated, arguments)


def _split_arguments(words: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return name and value of `name=value`, `--name=value`, `--name value` and `--name`."""
    pairs: list[tuple[str, str | None]] = []
    rest = [word for word in words if word not in COMMAND_WORDS]
    while rest:
        name, has_value, value = rest.pop(0).partition("=")
        if has_value:
            pairs.append((name, value))
        elif name.startswith("-") and rest and not rest[0].startswith("-") and "=" not in rest[0]:
            pairs.append((name, rest.pop(0)))
        else:
            pairs.append((name, None))
    return pairs


def _translate(parser: argparse.ArgumentParser, name: str, value: str | None) -> list[str]:
    """Return the flags of hkd-train for one argument."""
    key = name.lstrip("-").replace("-", "_").lower()
    key = ALIASES.get(key, key)
    written = name if value is None else f"{name}={value}"
    switches = {action.dest: action.nargs == 0 for action in parser._actions}
    if hint := REMEDIES.get(key):
        raise UsageError(f"{written}: not a flag of hkd-train. {hint}")
    settings = {field.name for field in fields(TrainConfig)}
    if key not in switches and key not in settings:
        problem = "no such flag" if name.startswith("-") or value is not None else "expected a flag or NAME=VALUE"
        raise UsageError(f"{written}: {problem}. {_make_hint(parser, key)}")
    if value is None and not switches.get(key):
        raise UsageError(f"{written}: expected a value. {_make_hint(parser, key)}")
    if switches.get(key):
        if value is not None and value.lower() not in ("true", "false"):
            raise UsageError(f"{written}: expected True or False, got {value}.")
        return [] if value is not None and value.lower() == "false" else [f"--{key.replace('_', '-')}"]
    return [f"--{key.replace('_', '-')}", str(value)] if key in switches else ["--set", f"{key}={value}"]


def _make_hint(parser: argparse.ArgumentParser, key: str) -> str:
    flags = [option for action in parser._actions for option in action.option_strings]
    similar = difflib.get_close_matches(f"--{key.replace('_', '-')}", flags, 1, cutoff=0.75)
    return f"Did you mean {similar[0]}?" if similar else "hkd-train --help lists all flags."
