"""Backbones: weights of timm, torchvision and EfficientNet-PyTorch, and the normalization they expect."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor

from hkd_det.errors import DataError
from hkd_det.models.detector import Backbone, get_normalization, load_backbone_weights

LITE0 = "tf_efficientnet_lite0"
# (number in EfficientNet-PyTorch, stage and number in timm) of some blocks of EfficientNet-Lite0.
BLOCKS = [(0, "0.0"), (1, "1.0"), (2, "1.1"), (5, "3.0"), (10, "4.2"), (15, "6.0")]


def make_efficientnet_weights() -> dict[str, Tensor]:
    """Return random weights of EfficientNet-Lite0 under the names of EfficientNet-PyTorch, in its order of layers."""
    torch.manual_seed(0)
    full = timm.create_model(LITE0)
    names, number = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}, 0
    for stage_number, stage in enumerate(full.blocks):
        for block_number, block in enumerate(stage):
            prefix = f"blocks.{stage_number}.{block_number}"
            layers = ["_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
            if hasattr(block, "conv_pwl"):
                layers = ["_expand_conv", "_bn0", *layers]
            own = [name for name, module in block.named_children() if any(True for _ in module.parameters())]
            names |= {f"{prefix}.{name}": f"_blocks.{number}.{layer}" for name, layer in zip(own, layers, strict=True)}
            number += 1
    weights = {}
    for name, value in full.state_dict().items():
        part, _, key = name.rpartition(".")
        weights[f"{names.get(part, '_fc')}.{key}"] = torch.rand_like(value) if value.is_floating_point() else value
    return weights


def test_weights_of_efficientnet_pytorch_are_renamed(tmp_path: Path) -> None:
    weights = make_efficientnet_weights()
    torch.save(weights, tmp_path / "lite0.pth")
    backbone = Backbone(LITE0, (8, 16, 32))
    load_backbone_weights(backbone, LITE0, str(tmp_path / "lite0.pth"))
    loaded = backbone.body.state_dict()
    assert torch.equal(loaded["conv_stem.weight"], weights["_conv_stem.weight"])
    assert torch.equal(loaded["bn1.bias"], weights["_bn0.bias"])
    for number, block in BLOCKS:
        first, last = ("conv_dw", "conv_pw") if number == 0 else ("conv_pw", "conv_pwl")
        source = "_depthwise_conv" if number == 0 else "_expand_conv"
        assert torch.equal(loaded[f"blocks.{block}.{first}.weight"], weights[f"_blocks.{number}.{source}.weight"])
        assert torch.equal(loaded[f"blocks.{block}.{last}.weight"], weights[f"_blocks.{number}._project_conv.weight"])


def test_weights_of_torchvision_fit(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    load_backbone_weights(Backbone("resnet18", (8, 16, 32)), "resnet18", str(tmp_path / "resnet18.pth"))


def test_weights_of_another_backbone_are_reported(tmp_path: Path) -> None:
    torch.save(make_efficientnet_weights(), tmp_path / "lite0.pth")
    with pytest.raises(DataError, match=r"fits \d+ of \d+ tensors of backbone resnet18"):
        load_backbone_weights(Backbone("resnet18", (8, 16, 32)), "resnet18", str(tmp_path / "lite0.pth"))


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [("resnet18", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]), (LITE0, [127.5] * 3, [127.5] * 3)],
)
def test_normalization_is_that_of_the_weights(name: str, mean: list[float], std: list[float]) -> None:
    normalization = get_normalization(name)
    torch.testing.assert_close(normalization["mean"].flatten(), torch.tensor(mean))
    torch.testing.assert_close(normalization["std"].flatten(), torch.tensor(std))
