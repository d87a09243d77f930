"""Listed taps of all three families against strides and widths that the networks' definitions give."""

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


def thin_yolo(name: str) -> UltralyticsDetector:
    layout = deepcopy(make_ultralytics_spec(name).model_yaml)
    layout["scales"][layout["scale"]][1] = 0.0625
    return UltralyticsDetector(UltralyticsSpec(name, layout))


def listed(detector: BaseDetector, part: str) -> list[tuple[str, int, int]]:
    taps = [(one.info, one.part) for one in list_feature_layers(detector)]
    return [(tap.name, tap.stride, tap.channels) for tap, where in taps if where == part]


def test_ours_are_the_stages_the_necks_layers_and_the_ends_of_the_heads_towers() -> None:
    detector = HKDDetector(OURS)
    stages = [(f"backbone.body.layer{i + 1}", 4 * 2**i, width) for i, width in enumerate((8, 12, 16, 20))]
    assert listed(detector, "backbone") == [("backbone.body.act1", 2, 16), *stages]
    necks = [("laterals", (8, 16, 32)), ("downs", (16, 32)), ("outputs", (8, 16, 32))]
    assert listed(detector, "neck") == [(f"neck.{a}.{i}", s, 24) for a, strides in necks for i, s in enumerate(strides)]
    towers = ("cls_tower", "one2one_tower", "reg_tower")
    assert listed(detector, "head") == [
        (f"head.{tower}.norms.{i}.1", 8 * 2**i, 24) for tower in towers for i in range(3)
    ]


def test_a_faster_rcnns_are_the_stages_and_the_pyramid() -> None:
    """Its heads run once a level, so none of their layers has a map of one stride."""
    detector = FasterRCNN(TWO_STAGE)
    stages = [(f"backbone.body.layer{i + 1}", 4 * 2**i, 8 * 2**i) for i in range(4)]
    assert listed(detector, "backbone") == [("backbone.body.act1", 2, 64), *stages]
    assert listed(detector, "neck") == [
        (f"backbone.fpn.{kind}_blocks.{i}", 4 * 2**i, 24) for kind in ("inner", "layer") for i in range(4)
    ]
    assert not listed(detector, "head")


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo26n"])
def test_a_yolo_models_are_its_definitions_layers(name: str) -> None:
    """Strides by counting its convolutions of stride 2 and its upsampling, widths by its own blocks."""
    detector = thin_yolo(name)
    modules = detector.network.model
    strides: list[int] = []
    for layer in modules[:-1]:
        before = 1 if layer.i == 0 else strides[layer.f if isinstance(layer.f, int) and layer.f >= 0 else -1]
        halves = any(m.stride == (2, 2) for m in layer.modules() if isinstance(m, nn.Conv2d))
        strides.append(before // 2 if isinstance(layer, nn.Upsample) else before * 2 if halves else before)
    found = listed(detector, "backbone") + listed(detector, "neck")
    assert len(found) > 8 and {tap.name for tap in detector.feature_info()} <= {name for name, _, _ in found}
    for layer, stride, channels in found:
        block = modules[int(layer.rpartition(".")[2])]
        last = [m for m in block.modules() if isinstance(m, nn.Conv2d)] if block.type.endswith("Conv") else [block.cv2]
        assert stride == strides[block.i]
        assert channels == getattr(last[-1], "conv", last[-1]).out_channels
    kinds = {one.partition("model.")[2].split(".")[1] for one, _, _ in listed(detector, "head")}
    assert kinds == {"cv2", "cv3"} | ({"one2one_cv2", "one2one_cv3"} if detector.is_end2end else set())


@pytest.mark.parametrize(
    "make", [lambda: HKDDetector(OURS), lambda: FasterRCNN(TWO_STAGE), lambda: thin_yolo("yolo11n")]
)
def test_the_defaults_are_marked_and_the_list_is_short(make: type[BaseDetector]) -> None:
    detector = make().train()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    listed = list_feature_layers(detector)
    assert [one.info for one in listed if one.is_default] == detector.feature_info()
    assert len(listed) <= 25
    assert detector.training and all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


def test_any_layer_with_a_map_can_be_found_in_the_order_asked() -> None:
    names = ["neck.outputs.2", "backbone.body.layer3.0.conv1", "neck.outputs.0"]
    wanted = [FeatureInfo(names[0], 32, 24), FeatureInfo(names[1], 16, 16), FeatureInfo(names[2], 8, 24)]
    assert find_feature_layers(HKDDetector(OURS), names, "taps") == wanted


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("neck.output.1", r"taps: neck\.output\.1: no such layer\. Did you mean neck\.outputs\.1\?"),
        ("head.one2many", r"head\.one2many: the layer has no single feature map\. Did you mean"),  # runs once a level
        ("neck", r"neck: the layer has no single feature map\. Did you mean neck\."),  # gives several
        ("xyz", r"xyz: no such layer\. Did you mean \w"),
    ],
)
def test_what_is_no_layer_with_a_map_is_refused_with_the_nearest_name(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        find_feature_layers(HKDDetector(OURS), [name], "taps")


def test_the_table_tells_the_maps_sizes_and_the_defaults() -> None:
    lines = format_feature_layers(list_feature_layers(HKDDetector(OURS)), (160, 224)).splitlines()
    row = next(line for line in lines if "neck.outputs.1" in line)
    assert row.split() == ["*", "neck.outputs.1", "neck", "16", "24", "14x10"]
    assert sum(line.split()[:1] == ["*"] and "neck" in line for line in lines) == 3
