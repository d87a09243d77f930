"""Replaceable convolutions of each model family, compared with the known structure of the networks."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hkd_det.distill.blockwise.blocks import ReplaceableConv, find_replaceable_convs
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector, DetectorPart
from hkd_det.models.checkpoint import build_from_spec
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNNSpec
from hkd_det.models.surgery import ModelChanges
from hkd_det.models.ultralytics import UltralyticsSpec, make_ultralytics_spec

HW = (64, 96)


def make_tiny_yolo() -> UltralyticsSpec:
    model_yaml = deepcopy(make_ultralytics_spec("yolo11n").model_yaml)
    model_yaml["scales"][model_yaml["scale"]][1] = 0.0625
    return UltralyticsSpec("yolo11n", {**model_yaml, "nc": 1})


def map_norms(layers: list[ReplaceableConv]) -> dict[str, str]:
    assert not any(layer.is_shared for layer in layers)
    return {layer.name: layer.norms[0] for layer in layers}


def test_all_3x3_convolutions_of_a_residual_backbone_are_found(teacher: BaseDetector) -> None:
    body = "backbone.body"
    expected = {f"{body}.layer{n}.0.conv{i}": f"{body}.layer{n}.0.bn{i}" for n in (1, 2, 3, 4) for i in (1, 2)}
    # Only the last convolution of the deep stem has eight input and output channels.
    expected[f"{body}.conv1.6"] = f"{body}.bn1"
    assert map_norms(find_replaceable_convs(teacher, HW, ("backbone",), 8)) == expected
    assert {layer.name for layer in find_replaceable_convs(teacher, HW, ("backbone",), 16)} == {
        f"{body}.layer3.0.conv2", f"{body}.layer4.0.conv1", f"{body}.layer4.0.conv2"
    }  # fmt: skip


@pytest.mark.slow
def test_resnet50_has_sixteen_as_in_the_paper() -> None:
    layers = find_replaceable_convs(HKDDetector(HKDDetectorSpec("resnet50", channels=32)), HW, ("backbone",), 16)
    assert len(layers) == 16 and all(layer.norms == (layer.name.replace("conv2", "bn2"),) for layer in layers)


@pytest.mark.parametrize("spec", [FasterRCNNSpec("resnet18", 0.125, 8, 16, (16, 32, 64, 128, 256)), make_tiny_yolo()])
def test_faster_rcnn_and_ultralytics_backbones(spec: FasterRCNNSpec | UltralyticsSpec) -> None:
    torch.manual_seed(0)
    detector = build_from_spec(spec).eval()
    layers = find_replaceable_convs(detector, HW, ("backbone",), 4)
    if isinstance(spec, FasterRCNNSpec):
        body = "backbone.body"
        blocks = [f"{body}.layer{n}.{b}" for n in (1, 2, 3, 4) for b in (0, 1)]
        assert map_norms(layers) == {f"{block}.conv{i}": f"{block}.bn{i}" for block in blocks for i in (1, 2)}
    else:
        assert len(layers) >= 10 and all(layer.norms == (layer.name.removesuffix("conv") + "bn",) for layer in layers)
        assert max(int(layer.name.split(".")[2]) for layer in layers) < len(spec.model_yaml["backbone"])
    names = tuple(layer.name for layer in layers)
    assert set(dict(build_from_spec(spec, ModelChanges(separable=names)).named_modules())) >= {
        f"{name}.depthwise1" for name in names
    }


def test_neck_and_shared_head_are_replaceable(teacher: BaseDetector) -> None:
    in_neck = find_replaceable_convs(teacher, HW, ("neck",), 8)
    assert in_neck and all(layer.name.startswith("neck.") and not layer.is_shared for layer in in_neck)
    # One convolution per tower, called at the strides 8, 16 and 32 with one normalization each.
    assert {layer.name: layer.norms for layer in find_replaceable_convs(teacher, HW, ("head",), 8)} == {
        f"head.{tower}.convs.0": tuple(f"head.{tower}.norms.{level}.0" for level in range(3))
        for tower in ("cls_tower", "one2one_tower", "reg_tower")
    }
    with pytest.raises(UsageError, match=r"parts=head: no 3x3 convolution with at least 64 channels"):
        find_replaceable_convs(teacher, HW, ("head",), 64)


def test_shared_convolution_of_the_region_proposal_head_is_found() -> None:
    torch.manual_seed(0)
    detector = build_from_spec(FasterRCNNSpec("resnet18", 0.125, 8, 16, (16, 32, 64, 128, 256))).eval()
    (layer,) = find_replaceable_convs(detector, HW, ("head",), 8)
    assert layer.norms == ("",) * 5 and [shape[1:] for shape in layer.input_shapes] == [
        (16, 24), (8, 12), (4, 6), (2, 3), (1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize("part", ["neck", "head"])
def test_macs_of_merged_part_match_torch_flop_counter(teacher: BaseDetector, part: DetectorPart) -> None:
    layers = find_replaceable_convs(teacher, HW, (part,), 8)
    names = tuple(layer.name for layer in layers)
    shared = tuple(layer.name for layer in layers if layer.is_shared)
    changed = build_from_spec(teacher.spec, ModelChanges(separable=names, separable_shared=shared)).eval()
    for network, macs in ((teacher, [layer.macs for layer in layers]), (changed, [x.macs_block for x in layers])):
        with torch.no_grad(), FlopCounterMode(display=False, depth=9) as counter:
            network(torch.zeros(1, 3, *HW))
        counts = counter.get_flop_counts()
        assert [sum(counts[f"{type(network).__name__}.{name}"].values()) // 2 for name in names] == macs
    # By hand: 16 channels at 8x12, 4x6 and 2x3 positions, 9 C^2 weights against 18 C + 2 C^2.
    if part == "head":
        positions = 96 + 24 + 6
        assert [(x.macs, x.macs_block) for x in layers] == 3 * [(positions * 9 * 256, positions * (18 * 16 + 2 * 256))]


def test_macs_match_torch_flop_counter(teacher: BaseDetector) -> None:
    """Checks the original network and one with a block in it."""
    layers = find_replaceable_convs(teacher, HW, ("backbone",), 8)
    layer = layers[4]
    changed = build_from_spec(teacher.spec, ModelChanges(separable=(layer.name,))).eval()
    counted: list[dict[str, int]] = []
    for network in (teacher, changed):
        with torch.no_grad(), FlopCounterMode(display=False, depth=9) as counter:
            network(torch.zeros(1, 3, *HW))
        counts = counter.get_flop_counts()
        name = f"{type(network).__name__}.{layer.name}"
        counted.append({"layer": sum(counts[name].values()) // 2, "all": counter.get_total_flops() // 2})
    assert counted[0]["layer"] == layer.macs and counted[1]["layer"] == layer.macs_block
    assert counted[0]["all"] - counted[1]["all"] == layer.macs - layer.macs_block
    assert layer.estimate_macs(is_cached=False) - layer.estimate_macs(is_cached=True) == layer.macs_before
    convs = [module for module in teacher.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) > len(layers) and [x.macs_before for x in layers] == sorted(x.macs_before for x in layers)
