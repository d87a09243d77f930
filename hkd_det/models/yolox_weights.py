"""Weights of YOLOX from files: .pth checkpoints of Megvii, .onnx files of Megvii's export script and of hkd-export.

Megvii's files contain 80 classes, of which the first is person, expect BGR images and begin with a Focus layer.
`load_yolox` converts them: the detector has one class, expects RGB images and gives the same scores and boxes.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from hkd_det.config import dataclass_from_dict
from hkd_det.errors import DataError, UsageError
from hkd_det.models.feature_layers import observe_calls
from hkd_det.models.surgery import NO_CHANGES, ModelChanges
from hkd_det.models.yolox import YOLOX, YOLOXSpec
from hkd_det.models.yolox_narrow import narrow_yolox

FOCUS_CELLS = ((0, 0), (1, 0), (0, 1), (1, 1))  # (row, column) of the four groups of three channels
PERSON_CLASS_ID = 0
NUM_STATISTICS_IMAGES = 192
MAX_FIT_PIXELS = (
    64 * 320 * 320
)  # of the images that a narrower network is fitted to: all features are in memory at once
MIN_FIT_IMAGES = 8
STEM_SCALE = 256.0
DEPTHS = (0.33, 0.67, 1.0, 1.33)
ARCHITECTURE_KEY = "hkd.architecture"  # metadata of hkd-export


def is_yolox_file(path: Path) -> bool:
    """Return whether a file has weights of YOLOX: a .pth checkpoint, or an .onnx file that `load_yolox` reads."""
    if not path.is_file():
        return False
    if path.suffix == ".pth":
        return True
    if path.suffix != ".onnx":
        return False
    try:
        model = onnx.load(str(path))
        convs = _read_convs(model.graph)
    except Exception:  # noqa: BLE001 - onnx raises many types for broken files; its reader reports them later
        return False
    is_megvii = len(convs) > 60 and convs[0][0].shape[1:] == (12, 3, 3)
    return is_megvii or _read_architecture(model).get("spec", {}).get("family") == "yolox"


def load_yolox(path: Path) -> YOLOX:
    """Load YOLOX from a .pth or .onnx file of Megvii, or from an .onnx file of hkd-export.

    Args:
        path: The file.

    Returns:
        The detector in evaluation mode on the CPU, with the activation of the file. Normalizations that an .onnx file
        has fused are identities; call `prepare_yolox` before training.

    Raises:
        DataError: If the file is not readable or does not fit YOLOX.
    """
    read = _read_onnx if path.suffix == ".onnx" else _read_checkpoint
    try:
        detector, weights = read(path)
        detector.load_state_dict(weights)
    except Exception as error:  # both libraries and missing layers raise many types
        raise DataError(
            f"{path}: not a YOLOX file ({type(error).__name__}: {str(error)[:100]}). Provide a .pth checkpoint of "
            "Megvii's YOLOX, an .onnx file of its export script, or an .onnx file of hkd-export with FP32 weights."
        ) from error
    return detector.eval()


def prepare_yolox(source: YOLOX, spec: YOLOXSpec, iterate_images: Callable[[int], Iterator[Tensor]]) -> YOLOX:
    """Prepare a detector of `load_yolox` for training: estimate the statistics of its normalizations.

    With the architecture of the file, the outputs do not change. With another activation, the weights stay the same,
    and the statistics are estimated again. With a multiple of the width, channels are copied (`widen_yolox`).
    With fewer channels, they are selected, and the weights are fitted (`narrow_yolox`).

    Args:
        source: Detector of `load_yolox`, on the CPU. It is modified.
        spec: Architecture of the result, `can_start_from` the one of the file.
        iterate_images: Yields at least the given number of images, [B, 3, H, W] RGB.

    Returns:
        The detector.

    Raises:
        UsageError: The file has a pruned network, and the result has another number of channels.
    """
    is_resized = spec.get_channels() != source.spec.get_channels()
    if is_resized and source.changes != NO_CHANGES:
        raise UsageError(
            "--weights: a pruned network can only keep its channels. Omit --model, or use the weights before pruning."
        )
    _scale_stem(source)
    batches = list(_take_images(iterate_images(NUM_STATISTICS_IMAGES)))
    restore_batch_norm(source, batches)
    if (factor := spec.get_channels()[0] // source.spec.get_channels()[0]) > 1:
        source = widen_yolox(source, factor)
    if spec.act != source.spec.act:
        detector = YOLOX(replace(source.spec, act=spec.act), source.changes).eval()
        detector.load_state_dict(source.state_dict())
        update_bn_stats(detector, batches)
        source = detector
    if spec.get_channels() != source.spec.get_channels():
        images = torch.cat(batches)
        num_images = max(MIN_FIT_IMAGES, MAX_FIT_PIXELS // (images.shape[2] * images.shape[3]))
        source = narrow_yolox(source, spec, images[:num_images])
        restore_batch_norm(source, batches)
    return source


@torch.no_grad()
def widen_yolox(source: YOLOX, factor: int, noise: float = 0.02) -> YOLOX:
    """Build a network with `factor` times the channels that computes the same function (Net2Net, Chen et al. 2016).

    Every channel is copied, and the weights that read it are divided by the number of copies. Noise on the weights of
    the copies lets training separate them.

    Args:
        source: Detector without changes.
        factor: Copies of each channel, at least 1.
        noise: Standard deviation of the relative noise. 0 keeps the outputs up to rounding.

    Returns:
        The wide detector in evaluation mode.
    """
    wide = YOLOX(replace(source.spec, width=source.spec.width * factor)).eval()
    weights = wide.state_dict()
    for name, value in source.state_dict().items():
        widened = value
        if value.ndim and weights[name].shape[0] != value.shape[0]:
            widened = widened.repeat_interleave(factor, 0)
        if value.ndim == 4 and weights[name].shape[1] != value.shape[1]:
            widened = widened.repeat_interleave(factor, 1) / factor
        if value.ndim == 4:
            widened = widened * (1 + noise * torch.randn_like(widened))
        weights[name] = widened
    wide.load_state_dict(weights)
    return wide


@torch.no_grad()
def restore_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Give batch normalizations the statistics of their inputs without changing what the network computes.

    A network whose normalizations were fused into the convolutions has identities in their place. In training mode, an
    identity would normalize its input and change the output. With true statistics, training starts from the same
    function.

    Args:
        model: Network to change. Its mode is restored.
        batches (iterable of Tensor[B, 3, H, W]): Images, as for `model`.
    """
    moments = _measure_moments(model, batches)
    for norm, (mean, var) in moments.items():
        assert norm.running_mean is not None and norm.running_var is not None
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * gain
        norm.weight.copy_(gain * (var + norm.eps).sqrt())
        norm.bias.copy_(shift + gain * mean)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


@torch.no_grad()
def update_bn_stats(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Estimate the running statistics again as plain means over batches (Precise-BN, Wu and Johnson 2021).

    Args:
        model: Network to change. Its mode is restored.
        batches (iterable of Tensor[B, 3, H, W]): Images, as for `model`.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momentums = [norm.momentum for norm in norms]
    was_training = model.training
    model.train()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
    for images in batches:
        model(images)
    for norm, momentum in zip(norms, momentums, strict=True):
        norm.momentum = momentum
    model.train(was_training)


@torch.no_grad()
def _scale_stem(detector: YOLOX) -> None:
    """Multiply the weights of the first convolution by 256, and divide the weights of its normalization.

    The outputs stay equal. Adam moves every weight by about the learning rate. Images have values up to 255, so the
    weights of the first convolution are small, and such a step would change the features more than all other layers.
    """
    stem = detector.backbone.stem
    assert stem.bn.running_mean is not None
    stem.conv.weight.mul_(STEM_SCALE)
    stem.bn.running_mean.mul_(STEM_SCALE)
    stem.bn.weight.div_(STEM_SCALE)


def _take_images(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    count = 0
    for images in batches:
        yield images
        count += len(images)
        if count >= NUM_STATISTICS_IMAGES:
            return


def _measure_moments(model: nn.Module, batches: Iterable[Tensor]) -> dict[nn.BatchNorm2d, tuple[Tensor, Tensor]]:
    """Return mean and variance per channel of the inputs of all batch normalizations, in evaluation mode."""
    sums: dict[nn.BatchNorm2d, tuple[Tensor, Tensor, int]] = {}

    def add_input(_name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.BatchNorm2d):
            values = inputs[0].double()
            total, squares, count = sums.get(module, (0.0, 0.0, 0))
            sums[module] = (
                total + values.sum((0, 2, 3)),
                squares + values.square().sum((0, 2, 3)),
                count + values[:, 0].numel(),
            )

    was_training = model.training
    model.eval()
    with observe_calls(model, on_input=add_input):
        for images in batches:
            model(images)
    model.train(was_training)
    means = {norm: (total / count, squares / count) for norm, (total, squares, count) in sums.items()}
    return {
        norm: (mean.float(), (square - mean.square()).clamp(min=0).float()) for norm, (mean, square) in means.items()
    }


def _read_checkpoint(path: Path) -> tuple[YOLOX, dict[str, Tensor]]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    source: dict[str, Tensor] = content.get("model", content)
    weights = {_convert_name(name): value for name, value in source.items()}
    stem = weights["backbone.stem.conv.weight"]
    num_blocks = sum(name.startswith("backbone.dark2.1.m.") and name.endswith("conv1.conv.weight") for name in weights)
    spec = YOLOXSpec(round(num_blocks / 3, 2), stem.shape[0] / 64, "backbone.dark2.0.dconv.conv.weight" in weights)
    weights["backbone.stem.conv.weight"] = _convert_focus(stem)
    for name, value in weights.items():
        if name.startswith("head.cls_preds."):
            weights[name] = value[PERSON_CLASS_ID, None]
    return YOLOX(spec), weights


def _convert_name(name: str) -> str:
    """Return our name of a parameter of Megvii: `backbone.backbone.stem.conv.conv` -> `backbone.stem.conv`."""
    if name.startswith("backbone.backbone."):
        return name.removeprefix("backbone.").replace("stem.conv.", "stem.", 1)
    return name.replace("backbone.", "neck.", 1)


def _read_onnx(path: Path) -> tuple[YOLOX, dict[str, Tensor]]:
    """Assign the convolutions of the graph to those of the network, which run in the same order."""
    model = onnx.load(str(path))
    convs = _read_convs(model.graph)
    is_megvii = convs[0][0].shape[1:] == (12, 3, 3)
    detector = _build_megvii(convs) if is_megvii else _build_exported(_read_architecture(model))
    weights = detector.state_dict()
    for (name, norm), (weight, bias) in zip(_list_convs(detector), convs, strict=True):
        if is_megvii and name == "backbone.stem.conv":
            weight = _convert_focus(weight)  # noqa: PLW2901 - same weight
        if is_megvii and name.startswith("head.cls_preds."):
            weight, bias = weight[PERSON_CLASS_ID, None], bias[PERSON_CLASS_ID, None]  # noqa: PLW2901
        weights[f"{name}.weight"] = weight
        if norm is None:
            weights[f"{name}.bias"] = bias
            continue
        weights[f"{norm}.weight"], weights[f"{norm}.bias"] = torch.ones_like(bias), bias
        weights[f"{norm}.running_mean"] = torch.zeros_like(bias)
        weights[f"{norm}.running_var"] = torch.full_like(bias, 1 - detector.backbone.stem.bn.eps)
    return detector, weights


def _build_megvii(convs: list[tuple[Tensor, Tensor]]) -> YOLOX:
    """Build the network with as many convolutions as the file has; Megvii's file does not state its depth."""
    width, depthwise = convs[0][0].shape[0] / 64, convs[1][0].shape[1] == 1
    for depth in DEPTHS:
        detector = YOLOX(YOLOXSpec(depth, width, depthwise)).eval()
        if len(_list_convs(detector)) == len(convs):
            return detector
    raise ValueError(f"{len(convs)} convolutions")


def _read_architecture(model: onnx.ModelProto) -> dict[str, Any]:
    """Return the architecture that hkd-export stored in a file, or an empty mapping."""
    values = [entry.value for entry in model.metadata_props if entry.key == ARCHITECTURE_KEY]
    return dict(json.loads(values[0])) if values else {}


def _build_exported(architecture: dict[str, Any]) -> YOLOX:
    spec = {key: value for key, value in architecture["spec"].items() if key != "family"}
    return YOLOX(dataclass_from_dict(YOLOXSpec, spec), ModelChanges.from_dict(architecture["changes"])).eval()


def _read_convs(graph: onnx.GraphProto) -> list[tuple[Tensor, Tensor]]:
    """Return weight and bias of each convolution of a graph, in execution order."""
    values = {value.name: value for value in graph.initializer}
    for node in graph.node:  # the exporter of torch stores equal tensors once and copies them
        if node.op_type == "Identity" and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]]

    def to_tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(values[name]).copy()).float()

    return [(to_tensor(node.input[1]), to_tensor(node.input[2])) for node in graph.node if node.op_type == "Conv"]


def _list_convs(detector: YOLOX) -> list[tuple[str, str | None]]:
    """Return the names of the convolutions in execution order, each with its normalization or None."""
    order: list[str] = []

    def add(name: str, module: nn.Module, *_: Any) -> None:
        if isinstance(module, nn.Conv2d):
            order.append(name)

    with torch.no_grad(), observe_calls(detector, on_output=add):
        detector(torch.zeros(1, 3, 64, 64))
    modules = dict(detector.named_modules())
    norms = [name.removesuffix("conv") + "bn" for name in order]
    return [(name, norm if norm in modules else None) for name, norm in zip(order, norms, strict=True)]


def _convert_focus(weight: Tensor) -> Tensor:
    """Convert the 3x3 convolution after Focus to a 6x6 convolution of stride 2, and BGR to RGB."""
    kernel = weight.new_zeros(weight.shape[0], 3, 6, 6)
    parts = weight.view(len(weight), 4, 3, 3, 3)
    for part, (row, column) in enumerate(FOCUS_CELLS):
        kernel[:, :, row::2, column::2] = parts[:, part]
    return kernel.flip(1)
