"""Which layers of a detector can be tapped: found by running it once on an empty picture.

Which taps are compared: chosen by name in the recipe, else paired by stride.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from hkd_det.errors import UsageError
from hkd_det.letterbox import format_imgsz
from hkd_det.models.base import BaseDetector, DetectorPart, FeatureInfo
from hkd_det.ops.hooks import observe_calls

PROBE_HW = (128, 192)  # not square, so that what is pooled to one cell is no map of stride 128


STRIDES = (1, 2, 4, 8, 16, 32, 64)


CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class ListedLayer:
    """A layer worth tapping, the part it lies in, and whether it is tapped unless somebody chooses otherwise."""

    info: FeatureInfo
    part: DetectorPart
    is_default: bool


def list_feature_layers(detector: BaseDetector) -> list[ListedLayer]:
    """The layers worth tapping, in the order of the detector's modules: of what follows one another at one stride and
    width the last, of a block what leaves it, no predictions; and all the layers that are tapped by default.
    """
    maps = _record_features(detector)
    default = {tap.name for tap in detector.feature_info()}
    worth = {
        _select_representative(name, maps, default) for name in _collect_layers(detector, detector, "", maps)
    } | default
    ordered = [name for name, _ in detector.named_modules() if name in worth]
    return [
        ListedLayer(_make_feature_info(name, maps[name]), detector.part_of(name), name in default) for name in ordered
    ]


def find_feature_layers(detector: BaseDetector, names: Sequence[str], setting: str) -> list[FeatureInfo]:
    """The named layers' strides and channels, in the order of the names; any layer with a map will do, listed or not.

    `asked` is the setting that names them. Raises UsageError, which tells the nearest name, for one that is no layer or
    that gives no single map of a known stride.
    """
    maps = _record_features(detector)
    modules = dict(detector.named_modules())
    for name in names:
        if name not in maps:
            fault = "gives no single map at a stride of the input" if name in modules else "no such layer"
            near = difflib.get_close_matches(name, maps, 1, cutoff=0.0)[0]
            raise UsageError(f"{setting}: {name}: {fault}; did you mean {near}? hkd-train --list-layers shows them")
    return [_make_feature_info(name, maps[name]) for name in names]


def format_feature_layers(layers: Sequence[ListedLayer], imgsz_hw: tuple[int, int]) -> str:
    """The list as a table for the terminal, * before the defaults, with the maps' sizes for pictures of `imgsz_hw`."""
    width = max(len(one.info.name) for one in layers)
    lines = [f"  {'layer':<{width}}  {'part':<8}  {'stride':>6}  {'channels':>8}  {'map':>9}"]
    for one in layers:
        map_hw = (imgsz_hw[0] // one.info.stride, imgsz_hw[1] // one.info.stride)
        lines.append(
            f"{'*' if one.is_default else ' '} {one.info.name:<{width}}  {one.part:<8}  {one.info.stride:>6}  "
            f"{one.info.channels:>8}  {format_imgsz(map_hw):>9}"
        )
    return "\n".join([*lines, "* tapped by default"])


def _record_features(detector: BaseDetector) -> dict[str, Tensor]:
    """Every module that ran once and gave one map [1, C, H, W] at a stride of the input, with that map, in order."""
    outputs: dict[str, list[Any]] = {}

    def record(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.setdefault(name, []).append(output)

    modes = {module: module.training for module in detector.modules()}
    device = next(detector.parameters()).device
    try:
        with torch.no_grad(), observe_calls(detector, on_output=record):
            detector.eval()(torch.zeros(1, 3, *PROBE_HW, device=device))
    finally:
        for module, training in modes.items():
            module.training = training
    return {name: seen[0] for name, seen in outputs.items() if len(seen) == 1 and _infer_stride(seen[0])}


def _infer_stride(output: Any) -> int | None:
    if not isinstance(output, Tensor) or output.ndim != 4:
        return None
    return next((step for step in STRIDES if output.shape[2:] == (PROBE_HW[0] // step, PROBE_HW[1] // step)), None)


def _make_feature_info(name: str, output: Tensor) -> FeatureInfo:
    stride = _infer_stride(output)
    assert stride is not None
    return FeatureInfo(name, stride, output.shape[1])


def _collect_layers(detector: BaseDetector, module: nn.Module, name: str, features: dict[str, Tensor]) -> list[str]:
    """The layers in `module` that are worth tapping, by the names under which they learn."""
    children = [(child, f"{name}.{part}" if name else part) for part, child in module.named_children()]
    if not children:
        # One layer. A bare convolution in a head is a prediction.
        told = isinstance(module, nn.Conv2d) and name in features and detector.part_of(name) == "head"
        return [name] if name in features and not told and any(True for _ in module.parameters()) else []
    if name in features and not isinstance(module, CONTAINERS):
        return [name]  # a block: what is inside is its own affair
    inner = [one for child, path in children for one in _collect_layers(detector, child, path, features)]
    if name in features:
        return [name] if all(not list(child.children()) for child, _ in children) else inner[-1:]
    if not isinstance(module, CONTAINERS):
        return inner
    return [next(reversed(list(alike))) for _, alike in groupby(inner, key=lambda one: features[one].shape)]


def _select_representative(name: str, features: dict[str, Tensor], default_names: set[str]) -> str:
    """Of the modules that give this very map (a stage, its last block, that block's activation) the outermost, and of
    two the later; but the one that is tapped by default if it is among them.
    """
    place, shape = features[name].data_ptr(), features[name].shape
    same = [other for other, output in features.items() if output.data_ptr() == place and output.shape == shape]
    return min(reversed(same), key=lambda other: (other not in default_names, other.count(".")))


def pair_by_stride(student: list[FeatureInfo], teacher: list[FeatureInfo]) -> list[tuple[FeatureInfo, FeatureInfo]]:
    """For each teacher tap the student tap of the nearest stride (in octaves), the finer one in a draw."""
    if not student or not teacher:
        raise UsageError("nothing to distil: student or teacher has no taps")

    def distance(mine: FeatureInfo, other: FeatureInfo) -> tuple[float, int]:
        return max(mine.stride / other.stride, other.stride / mine.stride), mine.stride

    return [(min(student, key=lambda mine: distance(mine, other)), other) for other in teacher]


@dataclass(frozen=True)
class LayerPairs:
    """Layers by name, as `hkd-train --list-layers` shows them; the first of one is compared with the first of the other.

    Their strides may differ, the adapters make up for it. Empty: the ends of both pyramids' levels, paired by stride.
    """

    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()


def select_layers(
    student: BaseDetector, teacher: BaseDetector, layer_pairs: LayerPairs
) -> tuple[list[FeatureInfo], list[FeatureInfo]]:
    """The layers of both that are recorded: those named, in that order, or all that are tapped by default.

    Raises UsageError for lists of different lengths and for a name that is no layer with a map.
    """
    if len(layer_pairs.student) != len(layer_pairs.teacher):
        raise UsageError(
            f"distill.hkd.feature_layers: {len(layer_pairs.student)} layers of the student and {len(layer_pairs.teacher)} of the teacher; "
            "they are compared in pairs, so name as many of each, or none"
        )
    if not layer_pairs.student:
        return student.feature_info(), teacher.feature_info()
    return (
        find_feature_layers(student, layer_pairs.student, "distill.hkd.feature_layers.student"),
        find_feature_layers(teacher, layer_pairs.teacher, "distill.hkd.feature_layers.teacher"),
    )


def pair_layers(
    student_layers: Sequence[FeatureInfo], teacher_layers: Sequence[FeatureInfo], layer_pairs: LayerPairs
) -> list[tuple[FeatureInfo, FeatureInfo]]:
    """What is compared with what, of the layers that `tapped` gives."""
    if layer_pairs.student:
        return list(zip(student_layers, teacher_layers, strict=True))
    return pair_by_stride(list(student_layers), list(teacher_layers))
