"""From the command's flags to a run: a new one, or one that goes on. Needs torch."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from hkd_det.errors import DataError, UsageError
from hkd_det.imgsz import parse_imgsz
from hkd_det.models.sizes import spec_of
from hkd_det.settings import with_setting
from hkd_det.train.checkpoint import read_state
from hkd_det.train.config import TrainConfig
from hkd_det.train.control import compare, control_of, told
from hkd_det.train.run import train
from hkd_det.train.teachers import name_of

FLAGS = (
    "data", "model", "init", "teacher", "teacher_description", "unlabelled", "epochs", "batch", "backbone",
    "pretrained", "device", "workers", "seed",
)  # fmt: skip
MORE_FLAGS = ("recipe", "imgsz", "distill", "keep_flops", "set")  # that decide settings, each in a way of its own


def start(arguments: argparse.Namespace) -> int:
    """Train as `hkd-train`'s flags say; returns the exit code."""
    if arguments.resume:
        _check_nothing_else_is_asked(arguments)
        config = _resumed(Path(arguments.resume))
    else:
        config = _fresh(arguments)
    control = control_of(config) if arguments.control else None
    before = _stamp(config.run_dir / "last.pt")
    try:
        train(config, resume=bool(arguments.resume))
        if control:
            train(control, resume=bool(arguments.resume) and _was_begun(control))
            if os.environ.get("RANK", "0") == "0":
                print(told(compare(config)))
    except KeyboardInterrupt:
        # Under --exist-ok last.pt is the earlier run's until this one has finished an epoch.
        if arguments.resume or _stamp(config.run_dir / "last.pt") != before:
            command = f"hkd-train --resume {config.run}{' --control' if control else ''}"
            print(f"hkd-train: the finished epochs are kept; go on with: {command}", file=sys.stderr)
        elif (config.run_dir / "blockwise/plan.json").exists():
            print("hkd-train: the finished blocks are kept; the same command goes on with the others", file=sys.stderr)
        raise
    return 0


def _stamp(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _was_begun(control: TrainConfig) -> bool:
    """Whether the control's folder holds a run of these settings, not one whose place it is to take (--exist-ok)."""
    path = control.run_dir / "last.pt"
    return path.exists() and TrainConfig.from_dict({**read_state(path)["config"], "run": control.run}) == control


def _fresh(arguments: argparse.Namespace) -> TrainConfig:
    config = _asked(arguments)
    if not _starts_from(config.as_dict()):
        spec_of(config.model)
    folders = [config.run_dir, *([control_of(config).run_dir] if arguments.control else [])]
    for folder in folders:
        if (folder / "last.pt").exists() and not arguments.exist_ok:
            raise UsageError(
                f"{folder} already holds a run: --resume {config.run_dir} goes on with it, "
                "--name NAME starts another, --exist-ok starts over in its place"
            )
    return config


def _asked(arguments: argparse.Namespace) -> TrainConfig:
    """The recipe's settings, if one is given, under those of the flags."""
    settings = _recipe(Path(arguments.recipe)) if arguments.recipe else {}
    settings |= {name: value for name in FLAGS if (value := getattr(arguments, name)) is not None}
    if arguments.imgsz:
        settings["imgsz_hw"] = parse_imgsz(arguments.imgsz)
    if arguments.distill is not None:
        settings["distill"] = {name.strip(): {} for name in arguments.distill.split(",") if name.strip()}
    if arguments.keep_flops is not None:
        settings["distill"] = _keeping(settings.get("distill"), arguments.keep_flops)
    for assignment in arguments.set:
        settings = with_setting(TrainConfig, settings, assignment)
    if _uses(settings, "cdd") and not settings.get("model"):
        settings.setdefault("init", settings.get("teacher", ""))
    start = _starts_from(settings)
    if start:
        model = name_of(Path(start))
        if settings.setdefault("model", model) != model:
            raise UsageError(f"--model {settings['model']}: {start} is a {model}; leave --model out to start from it")
    begins_as_teacher = _uses(settings, "cdd") or _uses(settings, "blockwise")
    for flag in ("data", "teacher" if begins_as_teacher else "model", "model"):
        if not settings.get(flag):
            raise UsageError(f"--{flag} is needed (or --recipe YAML, or --resume RUN)")
    if arguments.name or arguments.project or "run" not in settings:
        distill = settings.get("distill")
        methods = map(str, distill) if isinstance(distill, dict) else ()  # what else it may be, is refused below
        name = arguments.name or "-".join([str(settings["model"]), *methods])
        settings["run"] = str(Path(arguments.project or "runs/train") / name)
    return TrainConfig.from_dict(settings, arguments.recipe)


def _starts_from(settings: dict[str, Any]) -> str:
    """The checkpoint whose shape and weights the student has at its start, or ""."""
    return str(settings.get("teacher" if _uses(settings, "blockwise") else "init") or "")


def _uses(settings: dict[str, Any], method: str) -> bool:
    distill = settings.get("distill")
    return isinstance(distill, dict) and distill.get(method) is not None


def _keeping(distill: Any, share: str) -> dict[str, Any]:
    if not isinstance(distill, dict) or not isinstance(distill.get("cdd"), dict):
        raise UsageError(f"--keep-flops {share} is for students that shrink: add --distill cdd")
    return {**distill, "cdd": {**distill["cdd"], "keep_flops": share}}


def _recipe(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"--recipe {path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"--recipe {path}: not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise DataError(f"--recipe {path}: expected settings, `key: value`")
    return content


def _check_nothing_else_is_asked(arguments: argparse.Namespace) -> None:
    """UsageError for flags that would not be heard: a resumed run has the settings that it began with."""
    asked = [name for name in (*FLAGS, *MORE_FLAGS) if getattr(arguments, name) not in (None, "", [])]
    unheard = [name for name in asked if not (name == "data" and arguments.download)]
    if unheard:
        flags = " ".join(f"--{name.replace('_', '-')}" for name in unheard)
        raise UsageError(f"--resume goes on with the run's own settings; leave out {flags}, or start another run")


def _resumed(run_dir: Path) -> TrainConfig:
    path = run_dir if run_dir.suffix == ".pt" else run_dir / "last.pt"
    if not path.exists():
        raise DataError(f"--resume {run_dir}: no last.pt there; no epoch was finished, start the run again")
    return TrainConfig.from_dict({**read_state(path)["config"], "run": str(path.parent)})
