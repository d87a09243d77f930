"""Registry of distillation methods.

A method is one file with a subclass of `hkd_det.distill.base.DistillMethod`, and one entry in `METHODS`. Method modules
are imported on use, so this module does not import torch.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hkd_det.config import apply_override, dataclass_from_dict, suggest_name
from hkd_det.errors import UsageError

if TYPE_CHECKING:
    from hkd_det.distill.base import DistillMethod

METHODS: dict[str, str] = {
    "hkd": "hkd_det.distill.hkd:HKD",
    "dense": "hkd_det.distill.dense:DenseDistillation",
    "soft_labels": "hkd_det.distill.dense:SoftLabels",
    "cwd": "hkd_det.distill.cwd:CWD",
    "crosskd": "hkd_det.distill.crosskd:CrossKD",
    "noisy_teacher": "hkd_det.distill.noisy_teacher:NoisyTeacher",
    "mokd": "hkd_det.distill.mokd:MoKD",
    "blockwise": "hkd_det.distill.blockwise:Blockwise",
    "cdd": "hkd_det.distill.cdd:CDD",
}
"""Name in recipes and `--distill` -> `module:Class`. Methods run in this order."""


def load_method(name: str) -> "type[DistillMethod]":
    """Import and return the class of a registered method.

    Args:
        name: Key of `METHODS`.

    Raises:
        UsageError: If no method has this name.
    """
    if name not in METHODS:
        raise UsageError(f"--distill {name}: no such method. Choose from {', '.join(METHODS)}.")
    module, _, class_name = METHODS[name].partition(":")
    method: type[DistillMethod] = getattr(importlib.import_module(module), class_name)
    return method


def parse_methods(values: Mapping[str, Any]) -> dict[str, Any]:
    """Build the configuration of each method in the `distill:` section of a recipe.

    Args:
        values: Method name -> mapping of its settings, or a finished configuration. None leaves the method out.

    Returns:
        Method name -> configuration dataclass, in the order of `METHODS`.

    Raises:
        UsageError: For an unknown method or key, or an invalid value.
    """
    if unknown := [name for name in values if name not in METHODS]:
        raise UsageError(f"distill.{unknown[0]}: no such method{suggest_name(str(unknown[0]), METHODS)}")
    if not values:
        return {}  # without an import of torch
    finished = {name: value for name, value in values.items() if dataclasses.is_dataclass(value)}
    parsed: Any = dataclass_from_dict(
        _make_section(), {k: v for k, v in values.items() if k not in finished}, "distill"
    )
    configs = {name: finished.get(name, getattr(parsed, name)) for name in METHODS}
    return {name: config for name, config in configs.items() if config is not None}


def override_method(values: Any, assignment: str) -> dict[str, Any]:
    """Apply `distill.METHOD.KEY=VALUE` (from `--set`) to the `distill:` section of a recipe.

    Args:
        values: Section before the change: method name -> mapping of its settings.
        assignment: Text of the flag.

    Returns:
        The changed section.

    Raises:
        UsageError: For an unknown key, an invalid value, or a method that the section does not contain.
    """
    recipe = dataclasses.make_dataclass("Recipe", [("distill", _make_section())])
    changed: dict[str, Any] = apply_override(recipe, {"distill": values}, assignment)["distill"]
    return changed


def check_methods(configs: Mapping[str, Any]) -> dict[str, Any]:
    """Check that the methods can be combined.

    Args:
        configs: Method name -> configuration, as `parse_methods` returns it.

    Returns:
        The configurations adapted to each other, such as a loss that another method already computes.

    Raises:
        UsageError: If two methods exclude each other, or a method needs another one.
    """
    for name in configs:
        excluded = [other for other in configs if other in load_method(name).conflicts]
        if excluded:
            raise UsageError(
                f"--distill {name},{','.join(excluded)}: these methods change the same layers. Train with one, then "
                "start a second run with the other from the first run's best.pt (--weights)."
            )
    return {name: load_method(name).resolve_config(config, configs) for name, config in configs.items()}


def check_teacher(configs: Mapping[str, Any], capabilities: frozenset[str], teacher: str) -> None:
    """Check that the teacher provides what the methods need.

    Args:
        configs: Method name -> configuration.
        capabilities: What the teacher provides: "features", "logits", "detections", "same_architecture".
        teacher: File name of the teacher, for the message.

    Raises:
        UsageError: If a capability is missing.
    """
    for name, config in configs.items():
        missing = load_method(name).required_capabilities(config) - capabilities
        if missing:
            possible = [other for other in METHODS if load_method(other).requires == frozenset({"detections"})]
            provided = ", ".join(sorted(capabilities))
            hint = f" Use --distill {' or '.join(possible)}." if "detections" in capabilities else ""
            raise UsageError(
                f"--distill {name}: requires {', '.join(sorted(missing))} of the teacher, and {teacher} provides only "
                f"{provided}.{load_method(name).capability_hint}{hint}"
            )


def _make_section() -> type:
    """Build the dataclass that describes the `distill:` section: one optional field per method."""
    return dataclasses.make_dataclass(
        "DistillSection", [(name, load_method(name).Config | None, None) for name in METHODS], frozen=True
    )
