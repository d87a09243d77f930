"""Location of the first stage and the layer in which an exported file differs from torch."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from hkd_deploy.export.diagnose import compare_layers, locate_difference
from hkd_deploy.export.exporter import export_onnx
from hkd_deploy.export.graph import ExportModule
from hkd_deploy.model_metadata import ExportOptions
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import DetectorCheckpoint
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
from hkd_det.models.ultralytics import UltralyticsDetector, UltralyticsSpec, make_ultralytics_spec

OPTIONS = ExportOptions((64, 96))
SPEC = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=12)
BATCH = np.random.default_rng(0).integers(0, 255, (1, 64, 96, 3), dtype=np.uint8)


def make_yolo(name: str) -> UltralyticsDetector:
    model_yaml = deepcopy(make_ultralytics_spec(name).model_yaml)
    model_yaml["scales"][model_yaml["scale"]][1] = 0.0625
    return UltralyticsDetector(UltralyticsSpec(name, model_yaml))


def randomize(detector: BaseDetector) -> BaseDetector:
    """Set random batch-norm statistics and head weights, so that outputs differ."""
    for name, module in detector.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.2, 1.0)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.weight, 0.8, 1.6)
        elif name in ("head.one2many", "head.one2one"):
            torch.nn.init.normal_(module.weight, std=0.5)  # type: ignore[arg-type]
    return detector.eval()


def export(detector: BaseDetector, folder: Path) -> tuple[ExportModule, Path]:
    checkpoint = DetectorCheckpoint("x", detector.spec, detector.state_dict(), {"data": "none"}, 1, 1.0)
    export_onnx(checkpoint, folder / "x.onnx", OPTIONS)
    return ExportModule(detector, OPTIONS).eval(), folder / "x.onnx"


@pytest.fixture(scope="module")
def hkd(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportModule, Path]:
    torch.manual_seed(0)
    return export(randomize(HKDDetector(SPEC)), tmp_path_factory.mktemp("hkd"))


def negate_weights(path: Path, node_name: str) -> Path:
    """Write a copy of a file in which the weights of one node have the opposite sign."""
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.name == node_name)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    return save_changed(model, path)


def save_changed(model: onnx.ModelProto, path: Path) -> Path:
    changed = path.with_name("changed.onnx")
    onnx.save(model, changed)
    return changed


@pytest.mark.parametrize(
    ("node", "stage", "layer"),
    [
        ("/backbone/body/conv1/conv1.3/Conv", "backbone", "backbone.body.conv1.3"),
        ("/backbone/body/layer4/layer4.0/conv2/Conv", "backbone", "backbone.body.layer4.0.conv2"),
        ("/neck/outputs.1/outputs.1.0/Conv", "neck", "neck.outputs.1.0"),
        ("/head/reg_tower/convs.1_2/Conv", "head", "head.reg_tower.convs.1"),
        ("/head/one2many/Conv", "head", "head.one2many"),
    ],
)
def test_locate_difference_names_changed_layer(
    hkd: tuple[ExportModule, Path], node: str, stage: str, layer: str
) -> None:
    message = locate_difference(hkd[0], negate_weights(hkd[1], node), BATCH)
    assert f"the first stage that differs is {stage} (relative error " in message
    assert f"the worst layer is {layer} (given the same input, " in message


def test_locate_difference_of_wrong_mean_is_preprocessing(hkd: tuple[ExportModule, Path]) -> None:
    model = onnx.load(hkd[1])
    mean = next(node for node in model.graph.node if node.name == "/Sub").input[1]
    value = next(node for node in model.graph.node if node.output[0] == mean).attribute[0].t
    value.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value) + np.float32(20), value.name))
    message = locate_difference(hkd[0], save_changed(model, hkd[1]), BATCH)
    assert "the first stage that differs is preprocessing (" in message and "every layer agrees" in message


def test_locate_difference_of_swapped_corners_is_decoding(hkd: tuple[ExportModule, Path]) -> None:
    model = onnx.load(hkd[1])
    producers = {node.output[0]: node for node in model.graph.node}
    corners = producers["boxes"]
    while corners.op_type != "Concat":  # before selection and ranking
        corners = producers[corners.input[0]]
    corners.input[:] = reversed(corners.input)
    message = locate_difference(hkd[0], save_changed(model, hkd[1]), BATCH)
    assert "the first stage that differs is decoding (all " in message and "every layer agrees" in message


def test_locate_difference_of_intact_file_blames_no_layer(hkd: tuple[ExportModule, Path]) -> None:
    message = locate_difference(*hkd, BATCH)
    assert message.startswith("all layers agree") and "differ only by rounding" in message


def test_locate_difference_without_node_names(hkd: tuple[ExportModule, Path]) -> None:
    model = onnx.load(hkd[1])
    for number, node in enumerate(model.graph.node):
        node.name = f"node_{number}"
    assert "no node name matches a torch layer" in locate_difference(hkd[0], save_changed(model, hkd[1]), BATCH)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "node", "layer"),
    [
        ("hkd", "/neck/downs.1/downs.1.0/Conv", "neck.downs.1.0"),
        ("yolo11n", "/detector/model.13/m.0/cv2/conv/Conv", "network.model.13.m.0.cv2.conv"),
        ("yolo26n", "/model.2/m.0/cv2/conv/Conv", "network.model.2.m.0.cv2.conv"),
        ("faster r-cnn", "/head/cls_logits_2/Conv", "rpn.head.cls_logits"),
    ],
)
def test_compare_layers_pairs_layers_of_every_family(tmp_path: Path, name: str, node: str, layer: str) -> None:
    """Every layer with weights is compared, and exactly the changed layer differs."""
    torch.manual_seed(0)
    makers = {
        "hkd": lambda: HKDDetector(SPEC),
        "faster r-cnn": lambda: FasterRCNN(FasterRCNNSpec("resnet18", 0.25, 16, 32)),
    }
    export_module, path = export(randomize(makers[name]() if name in makers else make_yolo(name)), tmp_path)
    model = onnx.load(path)
    layers, _, _ = compare_layers(export_module, model, BATCH)
    num_weighted = sum(
        node.op_type in ("Conv", "Gemm") and any(node.input[1] == tensor.name for tensor in model.graph.initializer)
        for node in model.graph.node
    )
    modules = dict(export_module.named_modules())
    paired = [entry for entry in layers if isinstance(modules.get(entry.name), torch.nn.Conv2d | torch.nn.Linear)]
    assert len(paired) >= num_weighted - 1 > 30  # the box decoding of YOLO11 is a convolution without trained weights
    assert max(entry.layer_error for entry in layers) < 1e-5
    changed, _, _ = compare_layers(export_module, onnx.load(negate_weights(path, node)), BATCH)
    assert {entry.name.removeprefix("detector.") for entry in changed if entry.layer_error > 1e-4} == {layer}
