"""Prunable layers, and models that are built with fewer channels or with separable blocks."""

import pytest
import torch
from timm.layers import BlurPool2d
from torch import nn

from hkd_det.errors import UsageError
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.surgery import ModelChanges

BASIC = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=2)
BOTTLENECK = HKDDetectorSpec("resnet14t", {"channels": (4, 4, 8, 8), "stem_width": 8}, channels=12, head_depth=1)
ANTI_ALIASED = HKDDetectorSpec(
    "resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8, "aa_layer": BlurPool2d}, channels=16, head_depth=1
)
GROUPED = HKDDetectorSpec("resnext50_32x4d", {"layers": (1, 1, 1, 1)}, channels=16, head_depth=1)
IMAGE = torch.randint(0, 255, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def randomize_norms(detector: HKDDetector) -> HKDDetector:
    """Replace the initial statistics, weights and scores by random ones."""
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    nn.init.normal_(detector.head.one2many.weight, std=0.5)
    nn.init.normal_(detector.head.one2one.weight, std=0.5)
    return detector.eval()


@pytest.mark.parametrize("spec", [BASIC, BOTTLENECK])
def test_prunable_layer_is_read_by_its_consumers_only(spec: HKDDetectorSpec) -> None:
    torch.manual_seed(0)
    detector = randomize_norms(HKDDetector(spec))
    modules: dict[str, nn.Module] = dict(detector.named_modules())
    blocks = 8 if spec is BOTTLENECK else 4
    assert len(detector.prunable_layers()) == blocks + 3 * spec.head_depth
    with torch.no_grad():
        for layer in detector.prunable_layers():
            for name in layer.consumers:
                modules[name].weight[:, 0] = 0  # type: ignore[index,operator]
        before = detector(IMAGE)
        for layer in detector.prunable_layers():
            for name in layer.norms:
                modules[name].bias[0] += 3.0  # type: ignore[index,operator]
        after = detector(IMAGE)
        assert torch.equal(before.one2many.logits, after.one2many.logits) and torch.equal(
            before.one2one.logits, after.one2one.logits
        )
        assert torch.equal(before.one2many.box_logits, after.one2many.box_logits)
        for layer in detector.prunable_layers():
            for name in layer.norms:
                modules[name].bias[1] += 3.0  # type: ignore[index,operator]
        assert not torch.allclose(detector(IMAGE).one2many.logits, before.one2many.logits)


def test_grouped_and_anti_aliased_layers_are_not_prunable() -> None:
    inside = {layer.conv for layer in HKDDetector(GROUPED).prunable_layers() if "backbone" in layer.conv}
    assert not inside  # conv1 is read by a grouped convolution, conv2 is one
    anti_aliased = {layer.conv for layer in HKDDetector(ANTI_ALIASED).prunable_layers()}
    dense = {layer.conv for layer in HKDDetector(BASIC).prunable_layers()}
    assert {name for name in dense - anti_aliased if "backbone" in name} == {
        f"backbone.body.layer{stage}.0.conv1" for stage in (2, 3, 4)
    }


@pytest.mark.parametrize("spec", [BASIC, BOTTLENECK])
def test_model_is_built_with_the_widths_of_its_changes(spec: HKDDetectorSpec) -> None:
    layers = HKDDetector(spec).prunable_layers()
    widths = {layer.conv: 1 + index % 3 for index, layer in enumerate(layers)}
    pruned = HKDDetector(spec, ModelChanges(widths=widths))
    modules: dict[str, nn.Module] = dict(pruned.named_modules())
    for layer in layers:
        assert modules[layer.conv].out_channels == widths[layer.conv]
        assert all(modules[name].in_channels == widths[layer.conv] for name in layer.consumers)
        assert all(modules[name].num_features == widths[layer.conv] for name in layer.norms)
    assert pruned(IMAGE).one2many.logits.shape == HKDDetector(spec)(IMAGE).one2many.logits.shape
    assert pruned.prunable_layers() == layers


def test_pruned_layer_can_be_made_separable() -> None:
    inner, reader = "backbone.body.layer1.0.conv1", "backbone.body.layer1.0.conv2"
    changed = HKDDetector(BASIC, ModelChanges({inner: 3}, (inner, reader))).eval()
    modules: dict[str, nn.Module] = dict(changed.named_modules())
    assert modules[f"{inner}.pointwise2"].out_channels == modules[f"{reader}.depthwise1"].in_channels == 3
    assert changed(IMAGE).one2many.logits.shape == HKDDetector(BASIC)(IMAGE).one2many.logits.shape
    assert not {inner, reader} & {layer.conv for layer in changed.prunable_layers()}


@pytest.mark.parametrize(
    ("widths", "message"),
    [({"backbone.body.conv1": 3}, "no prunable layer"),
     ({"head.one2one_tower.convs.0": 0}, "expected 1 to 16 channels, got 0"),
     ({"head.one2one_tower.convs.0": 17}, "expected 1 to 16 channels, got 17")],
)  # fmt: skip
def test_invalid_widths_raise(widths: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        HKDDetector(BASIC, ModelChanges(widths=widths))
