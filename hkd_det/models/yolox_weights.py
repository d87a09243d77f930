"""Weights of YOLOX from Megvii's public files: .pth checkpoints, and .onnx files of its export script.

Both contain 80 classes, of which the first is person, expect BGR images and begin with a Focus layer. `load_yolox`
converts them: the detector has one class, expects RGB images and gives the same scores and boxes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from hkd_det.errors import DataError
from hkd_det.models.batch_norm import restore_batch_norm, update_bn_stats
from hkd_det.models.yolox import YOLOX, Activation, YOLOXSpec
from hkd_det.ops.hooks import observe_calls

FOCUS_CELLS = ((0, 0), (1, 0), (0, 1), (1, 1))  # (row, column) of the four groups of three channels
PERSON_CLASS_ID = 0
NUM_STATISTICS_IMAGES = 192
DEPTHS = (0.33, 0.67, 1.0, 1.33)


def is_yolox_file(path: Path) -> bool:
    """Return whether a file has weights of YOLOX: a .pth checkpoint, or an .onnx file with its first layers."""
    if not path.is_file():
        return False
    if path.suffix == ".pth":
        return True
    if path.suffix != ".onnx":
        return False
    try:
        convs = _read_onnx_convs(path)
    except Exception:  # noqa: BLE001 - onnx raises many types for broken files; its reader reports them later
        return False
    return len(convs) > 60 and convs[0][0].shape[1:] == (12, 3, 3)


def load_yolox(path: Path, act: Activation = "silu") -> YOLOX:
    """Load YOLOX from a .pth or .onnx file of Megvii.

    Args:
        path: The file.
        act: Activation of the detector. With another one than silu, call `fit_batch_norm` before use.

    Returns:
        The detector in evaluation mode on the CPU. Normalizations that an .onnx file has fused are identities.

    Raises:
        DataError: If the file is not readable or does not fit YOLOX.
    """
    read = _read_onnx if path.suffix == ".onnx" else _read_checkpoint
    try:
        spec, weights = read(path)
        detector = YOLOX(replace(spec, act=act))
        detector.load_state_dict(weights)
    except Exception as error:  # both libraries and missing layers raise many types
        raise DataError(
            f"{path}: not a YOLOX file ({type(error).__name__}: {str(error)[:100]}). "
            "Provide a .pth checkpoint of Megvii's YOLOX or an .onnx file of its export script."
        ) from error
    return detector.eval()


def fit_batch_norm(detector: YOLOX, iterate_images: Callable[[int], Iterator[Tensor]]) -> None:
    """Prepare a detector of `load_yolox` for training: estimate the statistics of its normalizations.

    The statistics of the network with SiLU do not change its outputs. With another activation, the weights stay those
    of the SiLU network, and the statistics are estimated again.

    Args:
        detector: Detector of `load_yolox`, on the CPU.
        iterate_images: Yields at least the given number of images, [B, 3, H, W] RGB.
    """
    batches = list(_take_images(iterate_images(NUM_STATISTICS_IMAGES)))
    original = YOLOX(replace(detector.spec, act="silu"))
    original.load_state_dict(detector.state_dict())
    restore_batch_norm(original, batches)
    detector.load_state_dict(original.state_dict())
    if detector.spec.act != "silu":
        update_bn_stats(detector, batches)


def _take_images(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    count = 0
    for images in batches:
        yield images
        count += len(images)
        if count >= NUM_STATISTICS_IMAGES:
            return


def _read_checkpoint(path: Path) -> tuple[YOLOXSpec, dict[str, Tensor]]:
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
    return spec, weights


def _convert_name(name: str) -> str:
    """Return our name of a parameter of Megvii: `backbone.backbone.stem.conv.conv` -> `backbone.stem.conv`."""
    if name.startswith("backbone.backbone."):
        return name.removeprefix("backbone.").replace("stem.conv.", "stem.", 1)
    return name.replace("backbone.", "neck.", 1)


def _read_onnx(path: Path) -> tuple[YOLOXSpec, dict[str, Tensor]]:
    """Assign the convolutions of the graph to those of the network, which run in the same order."""
    convs = _read_onnx_convs(path)
    width, depthwise = convs[0][0].shape[0] / 64, convs[1][0].shape[1] == 1
    for depth in DEPTHS:
        spec = YOLOXSpec(depth, width, depthwise)
        detector = YOLOX(spec).eval()
        names = _list_convs(detector)
        if len(names) == len(convs):
            break
    else:
        raise ValueError(f"{len(convs)} convolutions")
    weights = detector.state_dict()
    for (name, norm), (weight, bias) in zip(names, convs, strict=True):
        if name == "backbone.stem.conv":
            weight = _convert_focus(weight)  # noqa: PLW2901 - same weight
        if name.startswith("head.cls_preds."):
            weight, bias = weight[PERSON_CLASS_ID, None], bias[PERSON_CLASS_ID, None]  # noqa: PLW2901
        weights[f"{name}.weight"] = weight
        if norm is None:
            weights[f"{name}.bias"] = bias
            continue
        weights[f"{norm}.weight"], weights[f"{norm}.bias"] = torch.ones_like(bias), bias
        weights[f"{norm}.running_mean"] = torch.zeros_like(bias)
        weights[f"{norm}.running_var"] = torch.full_like(bias, 1 - detector.backbone.stem.bn.eps)
    return spec, weights


def _read_onnx_convs(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Return weight and bias of each convolution of a graph, in execution order."""
    graph = onnx.load(str(path)).graph
    values = {value.name: value for value in graph.initializer}

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
