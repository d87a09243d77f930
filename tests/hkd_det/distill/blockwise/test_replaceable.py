"""What can be replaced, family by family, against what is known of these networks."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hkd_det.distill.blockwise.blocks import ReplaceableConv, find_replaceable_convs
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import build_from_spec
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNNSpec
from hkd_det.models.surgery import ModelChanges
from hkd_det.models.ultralytics import UltralyticsSpec, make_ultralytics_spec

HW = (64, 96)


def thin_yolo() -> UltralyticsSpec:
    layout = deepcopy(make_ultralytics_spec("yolo11n").model_yaml)
    layout["scales"][layout["scale"]][1] = 0.0625
    return UltralyticsSpec("yolo11n", {**layout, "nc": 1})


def norms(layers: list[ReplaceableConv]) -> dict[str, str]:
    return {layer.name: layer.norm for layer in layers}


def test_every_inner_convolution_of_a_residual_backbone(teacher: BaseDetector) -> None:
    body = "backbone.body"
    expected = {f"{body}.layer{n}.0.conv{i}": f"{body}.layer{n}.0.bn{i}" for n in (1, 2, 3, 4) for i in (1, 2)}
    # Of the deep stem the last one alone has eight channels, in and out.
    expected[f"{body}.conv1.6"] = f"{body}.bn1"
    assert norms(find_replaceable_convs(teacher, HW, ("backbone",), 8)) == expected
    assert {layer.name for layer in find_replaceable_convs(teacher, HW, ("backbone",), 16)} == {
        f"{body}.layer3.0.conv2", f"{body}.layer4.0.conv1", f"{body}.layer4.0.conv2"
    }  # fmt: skip


def test_sixteen_of_resnet50_as_published() -> None:
    layers = find_replaceable_convs(HKDDetector(HKDDetectorSpec("resnet50", channels=32)), HW, ("backbone",), 16)
    assert len(layers) == 16 and all(layer.norm == layer.name.replace("conv2", "bn2") for layer in layers)


@pytest.mark.parametrize("spec", [FasterRCNNSpec("resnet18", 0.125, 8, 16, (16, 32, 64, 128, 256)), thin_yolo()])
def test_other_families(spec: FasterRCNNSpec | UltralyticsSpec) -> None:
    torch.manual_seed(0)
    detector = build_from_spec(spec).eval()
    layers = find_replaceable_convs(detector, HW, ("backbone",), 4)
    if isinstance(spec, FasterRCNNSpec):
        body = "backbone.body"
        blocks = [f"{body}.layer{n}.{b}" for n in (1, 2, 3, 4) for b in (0, 1)]
        assert norms(layers) == {f"{block}.conv{i}": f"{block}.bn{i}" for block in blocks for i in (1, 2)}
    else:
        assert len(layers) >= 10 and all(layer.norm == layer.name.removesuffix("conv") + "bn" for layer in layers)
        assert max(int(layer.name.split(".")[2]) for layer in layers) < len(spec.model_yaml["backbone"])
    names = tuple(layer.name for layer in layers)
    assert set(dict(build_from_spec(spec, ModelChanges(separable=names)).named_modules())) >= {
        f"{name}.depthwise1" for name in names
    }


def test_parts_of_a_detector(teacher: BaseDetector) -> None:
    in_neck = find_replaceable_convs(teacher, HW, ("neck",), 8)
    assert in_neck and all(layer.name.startswith("neck.") for layer in in_neck)
    # Our head's convolutions are shared by the levels: no block could learn them from one.
    with pytest.raises(UsageError, match="head hold no 3x3"):
        find_replaceable_convs(teacher, HW, ("head",), 8)


def test_work_is_what_a_counter_counts(teacher: BaseDetector) -> None:
    """Against torch's own counter, on the network as it is and with one block in its place."""
    layers = find_replaceable_convs(teacher, HW, ("backbone",), 8)
    chosen = layers[4]
    changed = build_from_spec(teacher.spec, ModelChanges(separable=(chosen.name,))).eval()
    per_module: list[dict[str, int]] = []
    for network in (teacher, changed):
        with torch.no_grad(), FlopCounterMode(display=False, depth=9) as counter:
            network(torch.zeros(1, 3, *HW))
        counts = counter.get_flop_counts()
        name = f"{type(network).__name__}.{chosen.name}"
        per_module.append({"layer": sum(counts[name].values()) // 2, "all": counter.get_total_flops() // 2})
    assert per_module[0]["layer"] == chosen.macs and per_module[1]["layer"] == chosen.macs_block
    assert per_module[0]["all"] - per_module[1]["all"] == chosen.macs - chosen.macs_block
    assert chosen.estimate_macs(is_cached=False) - chosen.estimate_macs(is_cached=True) == chosen.macs_before
    before = [m for n, m in teacher.named_modules() if isinstance(m, nn.Conv2d)]
    assert len(before) > len(layers) and [x.macs_before for x in layers] == sorted(x.macs_before for x in layers)
