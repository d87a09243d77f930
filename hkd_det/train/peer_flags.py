"""Arguments in the spelling of other training tools, such as `imgsz=640`, `--img-size 640` or `--lr0 0.01`."""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import fields

from hkd_det.errors import UsageError
from hkd_det.train.config import TrainConfig

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
    "hyp": "Use --recipe YAML.",
    "lrf": "The learning rate falls to 2 % of its peak. Omit it.",
    "momentum": "The optimizer is AdamW with its default momenta. Omit it.",
    "optimizer": "The optimizer is always AdamW. Omit it.",
    "save_period": "Every epoch is saved in last.pt. Omit it.",
    "single_cls": "Person is the only class. Omit it.",
    "warmup_epochs": "Use --set warmup_ratio=0.05, a ratio of the steps.",
}


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
