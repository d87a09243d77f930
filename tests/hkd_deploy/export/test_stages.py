"""Where an exported file differs from torch is found: the stage, and the layer, whatever follows it."""

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
from hkd_deploy.export.options import ExportOptions
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import DetectorCheckpoint
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
from hkd_det.models.ultralytics import UltralyticsDetector, UltralyticsSpec, make_ultralytics_spec

OPTIONS = ExportOptions((64, 96))
SPEC = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=12)
BATCH = np.random.default_rng(0).integers(0, 255, (1, 64, 96, 3), dtype=np.uint8)


def yolo(name: str) -> UltralyticsDetector:
    layout = deepcopy(make_ultralytics_spec(name).model_yaml)
    layout["scales"][layout["scale"]][1] = 0.0625
    return UltralyticsDetector(UltralyticsSpec(name, layout))


def lively(detector: BaseDetector) -> BaseDetector:
    """Normalisations that do something, and scores that are not all the same."""
    for name, module in detector.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.2, 1.0)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.weight, 0.8, 1.6)
        elif name in ("head.many", "head.one"):
            torch.nn.init.normal_(module.weight, std=0.5)  # type: ignore[arg-type]
    return detector.eval()


def exported(detector: BaseDetector, folder: Path) -> tuple[ExportModule, Path]:
    checkpoint = DetectorCheckpoint("x", detector.spec, detector.state_dict(), {"data": "none"}, 1, 1.0)
    export_onnx(checkpoint, folder / "x.onnx", OPTIONS)
    return ExportModule(detector, OPTIONS).eval(), folder / "x.onnx"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportModule, Path]:
    torch.manual_seed(0)
    return exported(lively(HKDDetector(SPEC)), tmp_path_factory.mktemp("ours"))


def negated(path: Path, node_name: str) -> Path:
    """The file with the weights of a node turned round."""
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.name == node_name)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    return saved(model, path)


def saved(model: onnx.ModelProto, path: Path) -> Path:
    spoiled = path.with_name("spoiled.onnx")
    onnx.save(model, spoiled)
    return spoiled


@pytest.mark.parametrize(
    ("node", "stage", "layer"),
    [
        ("/backbone/body/conv1/conv1.3/Conv", "backbone", "backbone.body.conv1.3"),
        ("/backbone/body/layer4/layer4.0/conv2/Conv", "backbone", "backbone.body.layer4.0.conv2"),
        ("/neck/outputs.1/outputs.1.0/Conv", "neck", "neck.outputs.1.0"),
        ("/head/tower_sides/convs.1_2/Conv", "head", "head.tower_sides.convs.1"),
        ("/head/many/Conv", "head", "head.many"),
    ],
)
def test_exactly_the_spoiled_layer_is_named(ours: tuple[ExportModule, Path], node: str, stage: str, layer: str) -> None:
    said = locate_difference(ours[0], negated(ours[1], node), BATCH)
    assert f"the first stage that differs is {stage} (by " in said
    assert f"the worst layer is {layer} (given the same input, by " in said


def test_a_wrong_mean_is_preprocessing(ours: tuple[ExportModule, Path]) -> None:
    model = onnx.load(ours[1])
    mean = next(node for node in model.graph.node if node.name == "/Sub").input[1]
    value = next(node for node in model.graph.node if node.output[0] == mean).attribute[0].t
    value.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value) + np.float32(20), value.name))
    said = locate_difference(ours[0], saved(model, ours[1]), BATCH)
    assert "the first stage that differs is preprocessing (by " in said and "every layer agrees" in said


def test_boxes_with_their_corners_exchanged_are_decoding(ours: tuple[ExportModule, Path]) -> None:
    model = onnx.load(ours[1])
    given = {node.output[0]: node for node in model.graph.node}
    corners = given["boxes"]
    while corners.op_type != "Concat":  # back over the choice and the ranking
        corners = given[corners.input[0]]
    corners.input[:] = reversed(corners.input)
    said = locate_difference(ours[0], saved(model, ours[1]), BATCH)
    assert "the first stage that differs is decoding (all " in said and "every layer agrees" in said


def test_what_agrees_is_not_blamed(ours: tuple[ExportModule, Path]) -> None:
    assert locate_difference(*ours, BATCH).startswith("it agrees as soon as its inside is looked at")


def test_nodes_without_names(ours: tuple[ExportModule, Path]) -> None:
    model = onnx.load(ours[1])
    for number, node in enumerate(model.graph.node):
        node.name = f"node_{number}"
    assert "no node's name says" in locate_difference(ours[0], saved(model, ours[1]), BATCH)


@pytest.mark.parametrize(
    ("name", "node", "layer"),
    [
        ("ours", "/neck/downs.1/downs.1.0/Conv", "neck.downs.1.0"),
        ("yolo11n", "/detector/model.13/m.0/cv2/conv/Conv", "network.model.13.m.0.cv2.conv"),
        ("yolo26n", "/model.2/m.0/cv2/conv/Conv", "network.model.2.m.0.cv2.conv"),
        pytest.param("faster r-cnn", "/head/cls_logits_2/Conv", "rpn.head.cls_logits", marks=pytest.mark.slow),
    ],
)
def test_the_layers_of_every_family_pair(tmp_path: Path, name: str, node: str, layer: str) -> None:
    """All that an intact file computes by weights; and one that is spoiled stands out among them."""
    torch.manual_seed(0)
    makers = {
        "ours": lambda: HKDDetector(SPEC),
        "faster r-cnn": lambda: FasterRCNN(FasterRCNNSpec("resnet18", 0.25, 16, 32)),
    }
    deployed, path = exported(lively(makers[name]() if name in makers else yolo(name)), tmp_path)
    model = onnx.load(path)
    layers, _, _ = compare_layers(deployed, model, BATCH)
    weighty = sum(
        node.op_type in ("Conv", "Gemm") and any(node.input[1] == tensor.name for tensor in model.graph.initializer)
        for node in model.graph.node
    )
    modules = dict(deployed.named_modules())
    paired = [one for one in layers if isinstance(modules.get(one.name), torch.nn.Conv2d | torch.nn.Linear)]
    assert len(paired) >= weighty - 1 > 30  # YOLO11's box decoding is a convolution that has no weights of its own
    assert max(one.layer_error for one in layers) < 1e-5
    spoiled, _, _ = compare_layers(deployed, onnx.load(negated(path, node)), BATCH)
    assert {one.name.removeprefix("detector.") for one in spoiled if one.layer_error > 1e-4} == {layer}
