"""A folded network is plain, says what the masked one said, and costs what the ledger told."""

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
from hkd_det.distill.cdd.cost_model import ChannelCostModel, filter_deployed_layers
from hkd_det.models.base import BaseDetector, ProposalOutputs
from hkd_det.models.checkpoint import build_from_spec
from hkd_det.models.faster_rcnn import FasterRCNN
from hkd_det.models.surgery import ModelChanges
from hkd_det.models.zoo import count_params_and_flops

HW = (64, 96)
PICTURE = torch.randint(0, 255, (2, 3, *HW), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def said(detector: BaseDetector) -> list[Tensor]:
    output: Any = detector(PICTURE)
    if isinstance(output, ProposalOutputs):
        return [*output.features, output.objectness, output.box_deltas]
    branches = [branch for branch in (output.many, output.one) if branch is not None]
    return [part for branch in branches for part in (branch.logits, branch.boxes_xyxy)]


def convolutions(detector: BaseDetector) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        detector.predict(torch.zeros(1, 3, *HW))
    return counter.get_flop_counts()["Global"][torch.ops.aten.convolution]


def shaken(detector: BaseDetector) -> dict[str, int]:
    """Compactors somewhere, some rows 0 and masked; the widths that are left."""
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


def test_only_batch_normalised_layers_shed_channels(ours: BaseDetector) -> None:
    """A group normalisation mixes channels: no convolution could take its place."""
    grouped = {**ours.spec.backbone_arguments, "norm_layer": GroupNorm1}
    detector = build_from_spec(replace(ours.spec, backbone_arguments=grouped)).eval()
    layers = find_prunable_layers(detector)
    assert layers and all(layer.conv.startswith("head.") for layer in layers) and len(detector.prunable_layers()) > 6
    with torch.no_grad():
        shaken(detector)
        for a, b in zip(said(detector), said(fuse_compactors(detector)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_fresh_compactors_change_nothing(detector: BaseDetector) -> None:
    with torch.no_grad():
        before = said(detector)
        insert_compactors(detector, find_prunable_layers(detector))
        for a, b in zip(before, said(detector), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_folding_equals_masking(detector: BaseDetector) -> None:
    widths = shaken(detector)
    with torch.no_grad():
        plain = fuse_compactors(detector)
        for mine, other in zip(said(plain), said(detector), strict=True):
            scale = max(1.0, float(other.abs().max()))
            assert float((mine - other).abs().max()) <= 1e-5 * scale
    assert plain.changes.widths == {
        layer.conv: widths[layer.conv]
        for layer in find_prunable_layers(plain)
        if widths[layer.conv] < detector.get_submodule(layer.conv).out_channels
    }
    again = build_from_spec(plain.spec, plain.changes)
    again.load_state_dict(plain.state_dict())
    assert not any(isinstance(module, Compactor | NormWithCompactor) for module in plain.modules())


def test_a_folded_network_can_shrink_again(ours: BaseDetector) -> None:
    shaken(ours)
    once = fuse_compactors(ours)
    shaken(once)
    twice = fuse_compactors(once)
    assert all(twice.changes.widths[name] <= width for name, width in once.changes.widths.items())
    with torch.no_grad():
        for mine, other in zip(said(twice), said(once), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_levels_share_one_compactor_and_copies_their_own(ours: BaseDetector) -> None:
    """Else the moving average would follow the student's own weights, or average them once a level."""
    layers = find_prunable_layers(ours)
    insert_compactors(ours, layers)
    twin = deepcopy(ours)
    names = [name for name in ours.state_dict() if "compactor.weight" in name]
    assert len(names) == len(layers) == len([p for n, p in ours.named_parameters() if "compactor" in n])
    site = next(site for site in find_compactors(twin) if len(site.layer.norms) > 1)
    with torch.no_grad():
        before = said(ours)
        site.compactor.weight.mul_(2)
        assert all(torch.equal(a, b) for a, b in zip(before, said(ours), strict=True))
    for name in site.layer.norms:
        module: Any = twin.get_submodule(name)
        inputs = torch.randn(1, len(site.compactor.masked), 2, 2)
        torch.testing.assert_close(module(inputs), 2 * module.norm(inputs))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_ledger_tells_what_the_network_of_these_widths_costs(detector: BaseDetector, seed: int) -> None:
    layers = filter_deployed_layers(detector, find_prunable_layers(detector), HW)
    ledger = ChannelCostModel(detector, layers, HW)
    assert ledger.compute_complexity(ledger.widths) == count_params_and_flops(detector, HW)
    chance = torch.Generator().manual_seed(seed)
    widths = [int(torch.randint(1, width + 1, (), generator=chance)) for width in ledger.widths]
    narrow = build_from_spec(
        detector.spec, ModelChanges(widths={layer.conv: width for layer, width in zip(layers, widths, strict=True)})
    )
    told, true = ledger.compute_complexity(widths), count_params_and_flops(narrow.eval(), HW)
    if isinstance(detector, FasterRCNN):  # how many regions its second stage judges, by no convolution, is chance
        assert told.num_params == true.num_params
        assert told.flops - ledger.initial_complexity.flops == convolutions(narrow) - convolutions(detector)
    else:
        assert told == true


def test_rows_hold_what_a_channel_is_made_of() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 5, 3, 4)
    for mixes in (True, False):
        compactor = Compactor(5, mixes)
        nn.init.normal_(compactor.weight)
        rows = compactor.rows.detach() if mixes else torch.diag(compactor.rows.detach()[:, 0])
        torch.testing.assert_close(compactor(features), torch.einsum("ij,bjhw->bihw", rows, features))
        torch.testing.assert_close(compactor.apply_to_vectors(features.mean((2, 3))), compactor(features).mean((2, 3)))
