"""Blocks for convolutions that all levels share: joint statistics, training, and the merged network."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hkd_det.distill.blockwise.blocks import LayerInputs, ReplaceableConv, assemble, find_replaceable_convs
from hkd_det.distill.blockwise.stage import get_input_cache_path, write_inputs
from hkd_det.distill.blockwise.worker import HOLDOUT_STEP, BlockTask, BlockwiseConfig, read_block, train_block
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import DetectorCheckpoint, load_detector_checkpoint, save_detector_checkpoint
from hkd_det.models.surgery import ModelChanges, SeparableConvBlock

HW = (64, 96)


@pytest.fixture
def layers(teacher: BaseDetector) -> list[ReplaceableConv]:
    return find_replaceable_convs(teacher, HW, ("head",), 8)


def make_task(
    teacher: BaseDetector, layer: ReplaceableConv, images_path: Path, output_path: Path, cache: Path | None = None
) -> BlockTask:
    config = BlockwiseConfig(epochs=20, batch=8, lr=1e-2)
    return BlockTask(layer, lambda: deepcopy(teacher), images_path, cache, (), output_path, config, 5, "cpu")


def compute_level_outputs(network: nn.Module, layer: ReplaceableConv, images: Tensor) -> list[Tensor]:
    """Return the outputs of the normalization of each level in a forward pass of the whole network."""
    modules, outputs = dict(network.named_modules()), {}
    handles = [
        modules[name].register_forward_hook(lambda _module, _inputs, output, key=name: outputs.update({key: output}))
        for name in layer.norms
    ]
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    return [outputs[name] for name in layer.norms]


def make_levels() -> list[Tensor]:
    """Return levels of different size, mean and scale."""
    generator = torch.Generator().manual_seed(0)
    sizes, scales = ((8, 12), (4, 6), (2, 3)), (1.0, 3.0, 0.2)
    return [
        k + s * torch.randn(4, 6, *hw, generator=generator) for k, (hw, s) in enumerate(zip(sizes, scales, strict=True))
    ]


def test_levels_are_normalized_with_common_statistics() -> None:
    """The running statistics equal those of one long row with the positions of all levels, computed by NumPy."""
    torch.manual_seed(0)
    block, levels = SeparableConvBlock(6, 10, (1, 1), bias=True).train(), make_levels()
    block.norm.momentum = 1.0  # type: ignore[assignment]
    with torch.no_grad():
        outputs = block.forward_levels(levels)
        hidden = [block.pointwise1(block.depthwise1(level)).transpose(0, 1).flatten(1).numpy() for level in levels]
    values = np.concatenate(hidden, 1)
    assert [output.shape for output in outputs] == [(4, 10, *level.shape[2:]) for level in levels]
    np.testing.assert_allclose(block.norm.running_mean, values.mean(1), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    np.testing.assert_allclose(block.norm.running_var, values.var(1, ddof=1), rtol=1e-4)  # type: ignore[arg-type]
    with torch.no_grad():
        for level, output in zip(levels, block.eval().forward_levels(levels), strict=True):
            torch.testing.assert_close(output, block(level))


def test_fused_block_equals_the_block_in_evaluation() -> None:
    torch.manual_seed(0)
    block, levels = SeparableConvBlock(6, 10, (1, 1), bias=True), make_levels()
    nn.init.uniform_(block.norm.weight, 0.5, 2)  # type: ignore[arg-type]
    nn.init.normal_(block.norm.bias)  # type: ignore[arg-type]
    with torch.no_grad():
        block.train().forward_levels(levels)
        fused = block.fuse_norm()
        for level in levels:
            torch.testing.assert_close(fused.train()(level), block.eval()(level), atol=1e-5, rtol=1e-4)
    assert fused.state_dict().keys() == SeparableConvBlock(6, 10, (1, 1), True, is_shared=True).state_dict().keys()


def test_inputs_of_all_levels_are_recorded_and_cached(
    teacher: BaseDetector, layers: list[ReplaceableConv], images_path: Path, tmp_path: Path
) -> None:
    images, layer = np.load(images_path), layers[2]
    assert layer.name == "head.reg_tower.convs.0"
    write_inputs(teacher, layers, images, tmp_path, batch=7)
    indices = np.array([5, 0, 11])
    with torch.no_grad():
        expected = teacher.forward_features(torch.from_numpy(images[indices]))  # the tower reads the levels of the neck
    for path in (None, get_input_cache_path(tmp_path, layer.name)):
        inputs = LayerInputs(teacher, layer, images, path).get_batch(indices)
        assert len(inputs) == len(expected) == 3
        for level, reference in zip(inputs, expected, strict=True):
            torch.testing.assert_close(level, reference, atol=2e-3, rtol=2e-3)


@pytest.mark.slow
def test_errors_match_the_merged_network(
    teacher: BaseDetector, layers: list[ReplaceableConv], images_path: Path, tmp_path: Path
) -> None:
    layer = layers[2]
    result = train_block(make_task(teacher, layer, images_path, tmp_path / "block.pt"))
    network = assemble(teacher, {layer.name: read_block(tmp_path / "block.pt")[0]})
    holdout = torch.from_numpy(np.load(images_path)[::HOLDOUT_STEP])
    targets, outputs = (compute_level_outputs(model, layer, holdout) for model in (teacher, network))
    errors = [float((a - b).double().square().mean()) for a, b in zip(outputs, targets, strict=True)]
    variances = [float(t.double().transpose(0, 1).flatten(1).var(1, correction=0).mean()) for t in targets]
    assert result.error == pytest.approx(sum(errors) / 3, rel=0.02)
    assert result.variance == pytest.approx(sum(variances) / 3, rel=0.02)
    assert result.error < 0.6 * result.initial_error


@pytest.mark.slow
def test_merged_head_can_be_saved_loaded_and_trained(
    teacher: BaseDetector, layers: list[ReplaceableConv], images_path: Path, tmp_path: Path
) -> None:
    names = tuple(layer.name for layer in layers)
    for layer in layers:
        train_block(make_task(teacher, layer, images_path, tmp_path / f"{layer.name}.pt"))
    network = assemble(teacher, {name: read_block(tmp_path / f"{name}.pt")[0] for name in names})
    assert network.changes == ModelChanges(separable=names, separable_shared=names)
    assert not any(layer.conv in names for layer in network.prunable_layers())
    checkpoint = DetectorCheckpoint.from_detector(network, "tiny", {}, 1, 1.0)
    save_detector_checkpoint(tmp_path / "merged.pt", checkpoint)
    loaded = load_detector_checkpoint(tmp_path / "merged.pt").build().eval()
    images = torch.from_numpy(np.load(images_path)[:2])
    with torch.no_grad():
        for actual, expected in zip(loaded.predict(images), network.predict(images), strict=True):
            assert torch.equal(actual, expected)
    loaded.train().requires_grad_(True)
    loaded(images).one2many.logits.sum().backward()
    weights = [loaded.get_parameter(f"head.cls_tower.convs.0.{name}.weight") for name in ("depthwise1", "pointwise2")]
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in weights)
