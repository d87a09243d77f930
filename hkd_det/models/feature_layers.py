"""Feature layers: which layers of a detector have a feature map, which layers distillation compares, and forward hooks.

A layer has a feature map if it runs once per image and returns one tensor [B, C, H, W] at a stride of the input.
Hooks record feature maps or observe the calls of modules. They do not change the model.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hkd_det.console import format_table
from hkd_det.errors import UsageError
from hkd_det.letterbox import format_imgsz
from hkd_det.models.base import BaseDetector, DetectorPart, FeatureInfo

PROBE_HW = (128, 192)  # not square, so that a globally pooled map is not mistaken for one of stride 128
STRIDES = (1, 2, 4, 8, 16, 32, 64)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

OnInput = Callable[[str, nn.Module, tuple[Any, ...]], None]
OnOutput = Callable[[str, nn.Module, tuple[Any, ...], Any], None]


@dataclass(frozen=True)
class LayerPairs:
    """Layers to compare, by name: the first of the student with the first of the teacher, and so on.

    Strides and channels may differ; adapters match them. If both lists are empty, the output layers of the necks are
    compared, paired by stride. `hkd-train --list-layers` prints the names.

    Attributes:
        student: Layers of the student.
        teacher: Layers of the teacher.
    """

    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()


@dataclass(frozen=True)
class ListedLayer:
    """A layer that `list_feature_layers` returns.

    Attributes:
        info: Name, stride and channels.
        part: Part of the detector that contains the layer.
        is_default: Whether the layer is compared if no layers are configured.
    """

    info: FeatureInfo
    part: DetectorPart
    is_default: bool


def list_feature_layers(detector: BaseDetector) -> list[ListedLayer]:
    """List the layers that are useful for feature distillation, by running the detector once on an empty image.

    The list contains the last of several consecutive layers with the same stride and channels, the output of a block
    but no layer inside it, and all default layers. It contains no predictions.

    Args:
        detector: The detector. Its mode and buffers do not change.

    Returns:
        The layers in the order of `named_modules`.
    """
    features = _record_features(detector)
    default_names = {layer.name for layer in detector.feature_info()}
    collected = _collect_layers(detector, detector, "", features)
    names = {_select_representative(name, features, default_names) for name in collected} | default_names
    return [
        ListedLayer(_make_feature_info(name, features[name]), detector.part_of(name), name in default_names)
        for name, _ in detector.named_modules()
        if name in names
    ]


def find_feature_layers(detector: BaseDetector, names: Sequence[str], setting: str) -> list[FeatureInfo]:
    """Look up layers by name. Any layer with a feature map is accepted, whether listed or not.

    Args:
        detector: The detector.
        names: Layers as in `named_modules`.
        setting: Configuration key that contains the names, for error messages.

    Returns:
        The layers in the order of the names.

    Raises:
        UsageError: If a name is no layer with a feature map; the message suggests the most similar name.
    """
    features = _record_features(detector)
    modules = dict(detector.named_modules())
    for name in names:
        if name not in features:
            problem = "the layer has no single feature map" if name in modules else "no such layer"
            similar = difflib.get_close_matches(name, features, 1, cutoff=0.0)[0]
            raise UsageError(
                f"{setting}: {name}: {problem}. Did you mean {similar}? hkd-train --model NAME --list-layers lists all."
            )
    return [_make_feature_info(name, features[name]) for name in names]


def format_feature_layers(layers: Sequence[ListedLayer], imgsz_hw: tuple[int, int]) -> str:
    """Format layers as a table for the terminal. Default layers are marked with *.

    Args:
        layers: Layers to print.
        imgsz_hw: Height and width of the input, pixels, for the sizes of the feature maps.

    Returns:
        Lines without a trailing newline.
    """
    rows = []
    for layer in layers:
        feature_hw = (imgsz_hw[0] // layer.info.stride, imgsz_hw[1] // layer.info.stride)
        numbers = (str(layer.info.stride), str(layer.info.channels), format_imgsz(feature_hw))
        rows.append(("*" if layer.is_default else "", layer.info.name, layer.part, *numbers))
    table = format_table(rows, ("", "layer", "part", "stride", "channels", "size"), left_columns=3)
    return f"{table}\n* default"


def select_layers(
    student: BaseDetector, teacher: BaseDetector, layer_pairs: LayerPairs, setting: str
) -> tuple[list[FeatureInfo], list[FeatureInfo]]:
    """Return the layers to record: the configured ones in their order, or the default layers.

    Args:
        student: The student.
        teacher: The teacher.
        layer_pairs: Configured layers.
        setting: Configuration key of `layer_pairs`, for error messages, such as "distill.METHOD.feature_layers".

    Returns:
        student_layers: Layers of the student.
        teacher_layers: Layers of the teacher.

    Raises:
        UsageError: If the two lists have different lengths, or a name is no layer with a feature map.
    """
    if len(layer_pairs.student) != len(layer_pairs.teacher):
        raise UsageError(
            f"{setting}: expected as many layers of the student as of the teacher, got {len(layer_pairs.student)} and "
            f"{len(layer_pairs.teacher)}. They are compared in pairs."
        )
    if not layer_pairs.student:
        return student.feature_info(), teacher.feature_info()
    return (
        find_feature_layers(student, layer_pairs.student, f"{setting}.student"),
        find_feature_layers(teacher, layer_pairs.teacher, f"{setting}.teacher"),
    )


def pair_layers(
    student_layers: Sequence[FeatureInfo], teacher_layers: Sequence[FeatureInfo], layer_pairs: LayerPairs
) -> list[tuple[FeatureInfo, FeatureInfo]]:
    """Pair the layers of `select_layers`: in their order if they are configured, else by stride.

    Args:
        student_layers: Layers of the student.
        teacher_layers: Layers of the teacher.
        layer_pairs: Configured layers.

    Returns:
        Pairs of a student layer and a teacher layer.
    """
    if layer_pairs.student:
        return list(zip(student_layers, teacher_layers, strict=True))
    return pair_by_stride(list(student_layers), list(teacher_layers))


def pair_by_stride(student: list[FeatureInfo], teacher: list[FeatureInfo]) -> list[tuple[FeatureInfo, FeatureInfo]]:
    """Pair each teacher layer with the student layer of the nearest stride in octaves, the finer of two.

    Args:
        student: Layers of the student.
        teacher: Layers of the teacher.

    Returns:
        Pairs of a student layer and a teacher layer, in the order of the teacher.

    Raises:
        UsageError: If one of the lists is empty.
    """
    if not student or not teacher:
        raise UsageError("--teacher: student or teacher has no feature layers. Choose a method that needs none.")

    def distance(layer: FeatureInfo, teacher_layer: FeatureInfo) -> tuple[float, int]:
        return max(layer.stride / teacher_layer.stride, teacher_layer.stride / layer.stride), layer.stride

    return [(min(student, key=lambda layer: distance(layer, target)), target) for target in teacher]


def _record_features(detector: BaseDetector) -> dict[str, Tensor]:
    """Return the feature map [1, C, H, W] of every module that has one, in the order in which the modules ran."""
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
    return {name: calls[0] for name, calls in outputs.items() if len(calls) == 1 and _infer_stride(calls[0])}


def _infer_stride(output: Any) -> int | None:
    if not isinstance(output, Tensor) or output.ndim != 4:
        return None
    return next((stride for stride in STRIDES if output.shape[2:] == tuple(px // stride for px in PROBE_HW)), None)


def _make_feature_info(name: str, output: Tensor) -> FeatureInfo:
    stride = _infer_stride(output)
    assert stride is not None
    return FeatureInfo(name, stride, output.shape[1])


def _collect_layers(detector: BaseDetector, module: nn.Module, name: str, features: dict[str, Tensor]) -> list[str]:
    """Return the useful layers inside a module, recursively."""
    children = [
        (child, f"{name}.{child_name}" if name else child_name) for child_name, child in module.named_children()
    ]
    if not children:
        # A leaf. A bare convolution in a head is a prediction.
        is_prediction = isinstance(module, nn.Conv2d) and name in features and detector.part_of(name) == "head"
        has_parameters = any(True for _ in module.parameters())
        return [name] if name in features and not is_prediction and has_parameters else []
    if name in features and not isinstance(module, CONTAINERS):
        return [name]  # a block: its inner layers are not listed
    inner = [layer for child, path in children for layer in _collect_layers(detector, child, path, features)]
    if name in features:
        return [name] if all(not list(child.children()) for child, _ in children) else inner[-1:]
    if not isinstance(module, CONTAINERS):
        return inner
    return [list(group)[-1] for _, group in groupby(inner, key=lambda layer: features[layer].shape)]


def _select_representative(name: str, features: dict[str, Tensor], default_names: set[str]) -> str:
    """Return the name for a feature map that several modules return (a stage, its last block, that block's activation).

    A default layer is preferred, then the outermost module, then the later one.
    """
    address, shape = features[name].data_ptr(), features[name].shape
    same = [other for other, output in features.items() if output.data_ptr() == address and output.shape == shape]
    return min(reversed(same), key=lambda other: (other not in default_names, other.count(".")))


class FeatureHooks:
    """Keeps the last output of each given layer until `pop` (as timm's `FeatureHooks`).

    Args:
        model: Model whose layers are recorded.
        names: Layers as in `named_modules`.
        clone: Keep copies of the outputs. Required for layers whose output a later layer changes in place.

    Raises:
        UsageError: If the model has no layer of one of the names.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], clone: bool = False) -> None:
        modules = dict(model.named_modules())
        unknown = [name for name in names if name not in modules]
        if unknown:
            raise UsageError(f"{unknown[0]}: no such layer. hkd-train --model NAME --list-layers lists all.")
        self._outputs: dict[str, Tensor] = {}
        self._clone = clone
        self._layer_names = list(names)
        self._handles: list[RemovableHandle] = [
            modules[name].register_forward_hook(self._make_hook(name)) for name in self._layer_names
        ]

    def pop(self) -> list[Tensor]:
        """Return the recorded outputs in the order of the names, and remove them to free their memory."""
        outputs = [self._outputs[name] for name in self._layer_names]
        self._outputs.clear()
        return outputs

    def close(self) -> None:
        """Remove the hooks and drop all outputs."""
        for handle in self._handles:
            handle.remove()
        self._outputs.clear()

    def _make_hook(self, name: str) -> Any:
        def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._outputs[name] = output.clone() if self._clone else output

        return record


@contextmanager
def observe_calls(
    model: nn.Module,
    names: Iterable[str] | None = None,
    on_input: OnInput | None = None,
    on_output: OnOutput | None = None,
) -> Iterator[None]:
    """Call functions before and after every forward pass of given layers, inside a `with` block.

    Args:
        model: Model whose layers are observed.
        names: Layers as in `named_modules`. None: all layers except the model itself.
        on_input: Called with name, module and inputs before the layer runs.
        on_output: Called with name, module, inputs and output after the layer has run.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    with ExitStack() as stack:
        for name in modules if names is None else names:
            if on_input:
                stack.callback(modules[name].register_forward_pre_hook(_bind_input(on_input, name)).remove)
            if on_output:
                stack.callback(modules[name].register_forward_hook(_bind_output(on_output, name)).remove)
        yield


def _bind_input(on_input: OnInput, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda module, inputs: on_input(name, module, inputs)


def _bind_output(on_output: OnOutput, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    return lambda module, inputs, output: on_output(name, module, inputs, output)
