"""Compactors and cost model: identical outputs after insertion and fusing, exact complexity."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.layers import GroupNorm1
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hkd_det.distill.cdd.compactor import (
    Compactor,
    NormWithCompactor,
    find_compactors,
    find_prunable_layers,
    fuse_compactors,
    insert_compactors,
)
from hkd_det.distill.cdd.importance import ChannelCostModel, filter_deployed_layers
from hkd_det.models.base import BaseDetector, ProposalOutputs
from hkd_det.models.checkpoint import build_from_spec
from hkd_det.models.faster_rcnn import FasterRCNN
from hkd_det.models.surgery import ModelChanges
from hkd_det.models.zoo import count_params_and_flops

HW = (64, 96)
IMAGES = torch.randint(0, 255, (2, 3, *HW), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def collect_outputs(detector: BaseDetector) -> list[Tensor]:
    output: Any = detector(IMAGES)
    if isinstance(output, ProposalOutputs):
        return [*output.features, output.objectness, output.box_deltas]
    branches = [branch for branch in (output.one2many, output.one2one) if branch is not None]
    return [tensor for branch in branches for tensor in (branch.logits, branch.boxes_xyxy)]


def count_conv_flops(detector: BaseDetector) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        detector.predict(torch.zeros(1, 3, *HW))
    return counter.get_flop_counts()["Global"][torch.ops.aten.convolution]


def insert_random_compactors(detector: BaseDetector) -> dict[str, int]:
    """Insert compactors with random weights, mask a third of the rows, and return the remaining widths."""
    widths = {}
    for site in insert_compactors(detector, find_prunable_layers(detector)):
        compactor = site.compactor
        channels = len(compactor.masked)
        with torch.no_grad():
            compactor.weight.add_(0.3 * torch.randn_like(compactor.weight))
            compactor.masked[torch.randperm(channels)[: channels // 3]] = True
            compactor.weight[compactor.masked] = 0
        widths[site.layer.conv] = int((~compactor.masked).sum())
    return widths


def test_only_batch_normalized_layers_are_prunable(native_detector: BaseDetector) -> None:
    """A group normalization mixes channels, so it cannot be fused into a convolution."""
    grouped = {**native_detector.spec.backbone_kwargs, "norm_layer": GroupNorm1}
    detector = build_from_spec(replace(native_detector.spec, backbone_kwargs=grouped)).eval()
    layers = find_prunable_layers(detector)
    assert layers and all(layer.conv.startswith("head.") for layer in layers) and len(detector.prunable_layers()) > 6
    with torch.no_grad():
        insert_random_compactors(detector)
        for a, b in zip(collect_outputs(detector), collect_outputs(fuse_compactors(detector)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_new_compactors_do_not_change_outputs(detector: BaseDetector) -> None:
    with torch.no_grad():
        before = collect_outputs(detector)
        insert_compactors(detector, find_prunable_layers(detector))
        for a, b in zip(before, collect_outputs(detector), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_fused_network_equals_masked_network(detector: BaseDetector) -> None:
    widths = insert_random_compactors(detector)
    with torch.no_grad():
        fused = fuse_compactors(detector)
        for actual, expected in zip(collect_outputs(fused), collect_outputs(detector), strict=True):
            scale = max(1.0, float(expected.abs().max()))
            assert float((actual - expected).abs().max()) <= 1e-5 * scale
    assert fused.changes.widths == {
        layer.conv: widths[layer.conv]
        for layer in find_prunable_layers(fused)
        if widths[layer.conv] < detector.get_submodule(layer.conv).out_channels
    }
    rebuilt = build_from_spec(fused.spec, fused.changes)
    rebuilt.load_state_dict(fused.state_dict())
    assert not any(isinstance(module, Compactor | NormWithCompactor) for module in fused.modules())


def test_fused_network_can_be_pruned_again(native_detector: BaseDetector) -> None:
    insert_random_compactors(native_detector)
    once = fuse_compactors(native_detector)
    insert_random_compactors(once)
    twice = fuse_compactors(once)
    assert all(twice.changes.widths[name] <= width for name, width in once.changes.widths.items())
    with torch.no_grad():
        for actual, expected in zip(collect_outputs(twice), collect_outputs(once), strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_levels_share_a_compactor_within_each_copy(native_detector: BaseDetector) -> None:
    """The EMA model is a copy: it has its own compactor weights, one per shared convolution."""
    layers = find_prunable_layers(native_detector)
    insert_compactors(native_detector, layers)
    copy = deepcopy(native_detector)
    names = [name for name in native_detector.state_dict() if "compactor.weight" in name]
    assert len(names) == len(layers) == len([p for n, p in native_detector.named_parameters() if "compactor" in n])
    site = next(site for site in find_compactors(copy) if len(site.layer.norms) > 1)
    with torch.no_grad():
        before = collect_outputs(native_detector)
        site.compactor.weight.mul_(2)
        assert all(torch.equal(a, b) for a, b in zip(before, collect_outputs(native_detector), strict=True))
    for name in site.layer.norms:
        module: Any = copy.get_submodule(name)
        inputs = torch.randn(1, len(site.compactor.masked), 2, 2)
        torch.testing.assert_close(module(inputs), 2 * module.norm(inputs))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_cost_model_equals_counted_complexity(detector: BaseDetector, seed: int) -> None:
    layers = filter_deployed_layers(detector, find_prunable_layers(detector), HW)
    cost_model = ChannelCostModel(detector, layers, HW)
    assert cost_model.compute_complexity(cost_model.widths) == count_params_and_flops(detector, HW)
    generator = torch.Generator().manual_seed(seed)
    widths = [int(torch.randint(1, width + 1, (), generator=generator)) for width in cost_model.widths]
    pruned = build_from_spec(
        detector.spec, ModelChanges(widths={layer.conv: width for layer, width in zip(layers, widths, strict=True)})
    )
    predicted, counted = cost_model.compute_complexity(widths), count_params_and_flops(pruned.eval(), HW)
    if isinstance(detector, FasterRCNN):  # the number of proposals in the second stage is random
        assert predicted.num_params == counted.num_params
        assert predicted.flops - cost_model.initial_complexity.flops == count_conv_flops(pruned) - count_conv_flops(
            detector
        )
    else:
        assert predicted == counted


def test_rows_are_the_weights_of_a_1x1_convolution() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 5, 3, 4)
    for is_dense in (True, False):
        compactor = Compactor(5, is_dense)
        nn.init.normal_(compactor.weight)
        rows = compactor.rows.detach() if is_dense else torch.diag(compactor.rows.detach()[:, 0])
        torch.testing.assert_close(compactor(features), torch.einsum("ij,bjhw->bihw", rows, features))
        torch.testing.assert_close(compactor.apply_to_vectors(features.mean((2, 3))), compactor(features).mean((2, 3)))
