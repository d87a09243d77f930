"""A folded network is plain, says what the masked one said, and costs what the ledger told."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.layers import GroupNorm1
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hkd_det.distill.capacity.compactor import Compacted, Compactor, can_shed, compact, sites_of
from hkd_det.distill.capacity.folding import folded
from hkd_det.distill.capacity.ledger import Ledger, deployed_layers
from hkd_det.models.families import build
from hkd_det.models.family import PersonDetector
from hkd_det.models.faster_rcnn import FasterRcnn
from hkd_det.models.prediction import TwoStage
from hkd_det.models.sizes import cost
from hkd_det.models.surgery import Changes

HW = (64, 96)
PICTURE = torch.randint(0, 255, (2, 3, *HW), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def said(detector: PersonDetector) -> list[Tensor]:
    output: Any = detector(PICTURE)
    if isinstance(output, TwoStage):
        return [*output.maps, output.objectness, output.deltas]
    branches = [branch for branch in (output.many, output.one) if branch is not None]
    return [part for branch in branches for part in (branch.logits, branch.boxes_xyxy)]


def convolutions(detector: PersonDetector) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        detector.detect(torch.zeros(1, 3, *HW))
    return counter.get_flop_counts()["Global"][torch.ops.aten.convolution]


def shaken(detector: PersonDetector) -> dict[str, int]:
    """Compactors somewhere, some rows 0 and masked; the widths that are left."""
    widths = {}
    for site in compact(detector, can_shed(detector)):
        compactor = site.compactor
        channels = len(compactor.masked)
        with torch.no_grad():
            compactor.weight.add_(0.3 * torch.randn_like(compactor.weight))
            compactor.masked[torch.randperm(channels)[: channels // 3]] = True
            compactor.weight[compactor.masked] = 0
        widths[site.layer.conv] = int((~compactor.masked).sum())
    return widths


def test_only_batch_normalised_layers_shed_channels(ours: PersonDetector) -> None:
    """A group normalisation mixes channels: no convolution could take its place."""
    grouped = {**ours.spec.backbone_arguments, "norm_layer": GroupNorm1}
    detector = build(replace(ours.spec, backbone_arguments=grouped)).eval()
    layers = can_shed(detector)
    assert layers and all(layer.conv.startswith("head.") for layer in layers) and len(detector.inner_layers()) > 6
    with torch.no_grad():
        shaken(detector)
        for a, b in zip(said(detector), said(folded(detector)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_fresh_compactors_change_nothing(detector: PersonDetector) -> None:
    with torch.no_grad():
        before = said(detector)
        compact(detector, can_shed(detector))
        for a, b in zip(before, said(detector), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_folding_equals_masking(detector: PersonDetector) -> None:
    widths = shaken(detector)
    with torch.no_grad():
        plain = folded(detector)
        for mine, other in zip(said(plain), said(detector), strict=True):
            scale = max(1.0, float(other.abs().max()))
            assert float((mine - other).abs().max()) <= 1e-5 * scale
    assert plain.changes.widths == {
        layer.conv: widths[layer.conv]
        for layer in can_shed(plain)
        if widths[layer.conv] < detector.get_submodule(layer.conv).out_channels
    }
    again = build(plain.spec, plain.changes)
    again.load_state_dict(plain.state_dict())
    assert not any(isinstance(module, Compactor | Compacted) for module in plain.modules())


def test_a_folded_network_can_shrink_again(ours: PersonDetector) -> None:
    shaken(ours)
    once = folded(ours)
    shaken(once)
    twice = folded(once)
    assert all(twice.changes.widths[name] <= width for name, width in once.changes.widths.items())
    with torch.no_grad():
        for mine, other in zip(said(twice), said(once), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_levels_share_one_compactor_and_copies_their_own(ours: PersonDetector) -> None:
    """Else the moving average would follow the student's own weights, or average them once a level."""
    layers = can_shed(ours)
    compact(ours, layers)
    twin = deepcopy(ours)
    names = [name for name in ours.state_dict() if "compactor.weight" in name]
    assert len(names) == len(layers) == len([p for n, p in ours.named_parameters() if "compactor" in n])
    site = next(site for site in sites_of(twin) if len(site.layer.norms) > 1)
    with torch.no_grad():
        before = said(ours)
        site.compactor.weight.mul_(2)
        assert all(torch.equal(a, b) for a, b in zip(before, said(ours), strict=True))
    for name in site.layer.norms:
        module: Any = twin.get_submodule(name)
        inputs = torch.randn(1, len(site.compactor.masked), 2, 2)
        torch.testing.assert_close(module(inputs), 2 * module.norm(inputs))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_ledger_tells_what_the_network_of_these_widths_costs(detector: PersonDetector, seed: int) -> None:
    layers = deployed_layers(detector, can_shed(detector), HW)
    ledger = Ledger(detector, layers, HW)
    assert ledger.cost(ledger.widths) == cost(detector, HW)
    chance = torch.Generator().manual_seed(seed)
    widths = [int(torch.randint(1, width + 1, (), generator=chance)) for width in ledger.widths]
    narrow = build(
        detector.spec, Changes(widths={layer.conv: width for layer, width in zip(layers, widths, strict=True)})
    )
    told, true = ledger.cost(widths), cost(narrow.eval(), HW)
    if isinstance(detector, FasterRcnn):  # how many regions its second stage judges, by no convolution, is chance
        assert told.parameters == true.parameters
        assert told.flops - ledger.start.flops == convolutions(narrow) - convolutions(detector)
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
        torch.testing.assert_close(compactor.of_pooled(features.mean((2, 3))), compactor(features).mean((2, 3)))
