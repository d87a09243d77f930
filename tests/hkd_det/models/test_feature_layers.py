"""Feature layers: listing, lookup by name and the printed table."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector, FeatureInfo
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
from hkd_det.models.feature_layers import find_feature_layers, format_feature_layers, list_feature_layers
from hkd_det.models.ultralytics import UltralyticsDetector, UltralyticsSpec, make_ultralytics_spec

OURS = HKDDetectorSpec("resnet10t", {"channels": (8, 12, 16, 20), "stem_width": 8}, channels=24, head_depth=2)
TWO_STAGE = FasterRCNNSpec("resnet18", width_mult=0.125, channels=24, head_width=16)


def make_thin_yolo(name: str) -> UltralyticsDetector:
    model_yaml = deepcopy(make_ultralytics_spec(name).model_yaml)
    model_yaml["scales"][model_yaml["scale"]][1] = 0.0625
    return UltralyticsDetector(UltralyticsSpec(name, model_yaml))


def list_part(detector: BaseDetector, part: str) -> list[tuple[str, int, int]]:
    layers = [(layer.info, layer.part) for layer in list_feature_layers(detector)]
    return [(info.name, info.stride, info.channels) for info, layer_part in layers if layer_part == part]


def test_list_hkd_has_stages_neck_and_ends_of_towers() -> None:
    detector = HKDDetector(OURS)
    stages = [(f"backbone.body.layer{i + 1}", 4 * 2**i, width) for i, width in enumerate((8, 12, 16, 20))]
    assert list_part(detector, "backbone") == [("backbone.body.act1", 2, 16), *stages]
    necks = [("laterals", (8, 16, 32)), ("downs", (16, 32)), ("outputs", (8, 16, 32))]
    assert list_part(detector, "neck") == [
        (f"neck.{a}.{i}", s, 24) for a, strides in necks for i, s in enumerate(strides)
    ]
    towers = ("cls_tower", "one2one_tower", "reg_tower")
    assert list_part(detector, "head") == [
        (f"head.{tower}.norms.{i}.1", 8 * 2**i, 24) for tower in towers for i in range(3)
    ]


def test_list_faster_rcnn_has_stages_and_pyramid() -> None:
    """The heads run once per level, so none of their layers has a single feature map."""
    detector = FasterRCNN(TWO_STAGE)
    stages = [(f"backbone.body.layer{i + 1}", 4 * 2**i, 8 * 2**i) for i in range(4)]
    assert list_part(detector, "backbone") == [("backbone.body.act1", 2, 64), *stages]
    assert list_part(detector, "neck") == [
        (f"backbone.fpn.{kind}_blocks.{i}", 4 * 2**i, 24) for kind in ("inner", "layer") for i in range(4)
    ]
    assert not list_part(detector, "head")


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo26n"])
def test_list_yolo_has_the_layers_of_its_definition(name: str) -> None:
    """Strides are counted from convolutions of stride 2 and upsampling, widths are read from the blocks."""
    detector = make_thin_yolo(name)
    modules = detector.network.model
    strides: list[int] = []
    for layer in modules[:-1]:
        before = 1 if layer.i == 0 else strides[layer.f if isinstance(layer.f, int) and layer.f >= 0 else -1]
        is_downsampling = any(m.stride == (2, 2) for m in layer.modules() if isinstance(m, nn.Conv2d))
        strides.append(before // 2 if isinstance(layer, nn.Upsample) else before * 2 if is_downsampling else before)
    layers = list_part(detector, "backbone") + list_part(detector, "neck")
    assert len(layers) > 8 and {info.name for info in detector.feature_info()} <= {name for name, _, _ in layers}
    for layer, stride, channels in layers:
        block = modules[int(layer.rpartition(".")[2])]
        last = [m for m in block.modules() if isinstance(m, nn.Conv2d)] if block.type.endswith("Conv") else [block.cv2]
        assert stride == strides[block.i]
        assert channels == getattr(last[-1], "conv", last[-1]).out_channels
    kinds = {name.partition("model.")[2].split(".")[1] for name, _, _ in list_part(detector, "head")}
    assert kinds == {"cv2", "cv3"} | ({"one2one_cv2", "one2one_cv3"} if detector.is_end2end else set())


@pytest.mark.parametrize(
    "make", [lambda: HKDDetector(OURS), lambda: FasterRCNN(TWO_STAGE), lambda: make_thin_yolo("yolo11n")]
)
def test_list_restores_modes_and_buffers(make: type[BaseDetector]) -> None:
    detector = make().train()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    assert list_feature_layers(detector)
    assert detector.training and all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


def test_find_returns_any_feature_layer_in_order() -> None:
    names = ["neck.outputs.2", "backbone.body.layer3.0.conv1", "neck.outputs.0"]
    expected = [FeatureInfo(names[0], 32, 24), FeatureInfo(names[1], 16, 16), FeatureInfo(names[2], 8, 24)]
    assert find_feature_layers(HKDDetector(OURS), names, "layers") == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("neck.output.1", r"layers: neck\.output\.1: no such layer\. Did you mean neck\.outputs\.1\?"),
        ("head.one2many", r"head\.one2many: the layer has no single feature map\. Did you mean"),  # runs once per level
        ("neck", r"neck: the layer has no single feature map\. Did you mean neck\."),  # returns several
        ("xyz", r"xyz: no such layer\. Did you mean \w"),
    ],
)
def test_find_invalid_name_raises_with_suggestion(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_feature_layers(HKDDetector(OURS), [name], "layers")


def test_table_has_sizes_and_defaults() -> None:
    lines = format_feature_layers(list_feature_layers(HKDDetector(OURS)), (160, 224)).splitlines()
    row = next(line for line in lines if "neck.outputs.1" in line)
    assert row.split() == ["*", "neck.outputs.1", "neck", "16", "24", "14x10"]
    assert sum(line.split()[:1] == ["*"] and "neck" in line for line in lines) == 3
