"""Export of students that CDD pruned, or in which blockwise distillation replaced convolutions."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from hkd_deploy.export.exporter import export_onnx
from hkd_deploy.model_metadata import ExportOptions
from hkd_det.distill.blockwise.blocks import find_replaceable_convs
from hkd_det.distill.cdd.compactor import find_prunable_layers, fuse_compactors, insert_compactors
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import DetectorCheckpoint, build_from_spec
from hkd_det.models.detector import HKDDetectorSpec
from hkd_det.models.surgery import ModelChanges
from hkd_det.models.yolox import YOLOXSpec
from hkd_det.models.yolox_weights import is_yolox_file, load_yolox
from hkd_det.models.zoo import count_params_and_flops

YOLOX_SPEC = YOLOXSpec(width=0.125, act="hardswish")
SPEC = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=12, head_depth=2)
HW = (64, 96)


def export(detector: BaseDetector, path: Path) -> onnx.ModelProto:
    config = {"data": "none"}
    export_onnx(
        DetectorCheckpoint("x", detector.spec, detector.state_dict(), config, 1, 1.0, detector.changes),
        path,
        ExportOptions(HW),
    )
    return onnx.load(path)


def assert_file_agrees(path: Path, detector: BaseDetector) -> NDArray[np.float32]:
    """Compare the scores and the first five boxes of a random image with torch; return the scores."""
    image = np.random.default_rng(0).integers(0, 255, (1, *HW, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    boxes, scores, _ = session.run(None, {"images": image})
    with torch.no_grad():
        expected_boxes, expected_scores = detector.predict(torch.from_numpy(image).permute(0, 3, 1, 2))
    np.testing.assert_allclose(scores, expected_scores.numpy(), atol=1e-5)
    assert (scores[0] > 0).sum() >= 5
    np.testing.assert_allclose(boxes[0][:5], expected_boxes.numpy()[0][:5], atol=1e-2)
    return np.asarray(scores[0], np.float32)


@pytest.mark.slow
def test_pruned_student_exports_as_plain_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    masked = build_from_spec(SPEC).eval()
    torch.nn.init.normal_(masked.head.one2one.weight, std=0.5)  # type: ignore[union-attr,arg-type]
    with torch.no_grad():
        for site in insert_compactors(masked, find_prunable_layers(masked)):
            weight = site.compactor.weight
            weight.add_(0.2 * torch.randn_like(weight))
            site.compactor.masked[1::2] = True
            weight[1::2] = 0
    plain = fuse_compactors(masked)
    graph = export(plain, tmp_path / "folded.onnx")
    fresh = export(build_from_spec(SPEC, plain.changes), tmp_path / "fresh.onnx")
    assert [node.op_type for node in graph.graph.node] == [node.op_type for node in fresh.graph.node]
    assert [(i.name, list(i.dims)) for i in graph.graph.initializer] == [
        (i.name, list(i.dims)) for i in fresh.graph.initializer
    ]
    assert not any("compact" in name for node in graph.graph.node for name in (node.name, *node.input))
    metadata = {prop.key: prop.value for prop in graph.metadata_props}
    assert (
        int(metadata["hkd.flops"])
        == count_params_and_flops(plain, HW).flops
        < count_params_and_flops(build_from_spec(SPEC), HW).flops
    )
    assert_file_agrees(tmp_path / "folded.onnx", masked)


@pytest.mark.slow
def test_network_with_separable_head_exports_and_runs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = find_replaceable_convs(build_from_spec(SPEC), HW, ("backbone", "neck", "head"), 8)
    names = tuple(layer.name for layer in layers)
    shared = tuple(layer.name for layer in layers if layer.is_shared)
    assert shared == tuple(
        f"head.{tower}.convs.{i}" for tower in ("cls_tower", "one2one_tower", "reg_tower") for i in (0, 1)
    )
    detector = build_from_spec(SPEC, ModelChanges(separable=names, separable_shared=shared)).eval()
    torch.nn.init.normal_(detector.head.one2one.weight, std=0.5)  # type: ignore[union-attr,arg-type]
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():  # statistics of images, so that the scores of different points differ
        detector.train()(torch.randint(0, 255, (8, 3, *HW)))
    detector.eval()
    graph = export(detector, tmp_path / "merged.onnx")
    metadata = {prop.key: prop.value for prop in graph.metadata_props}
    assert int(metadata["hkd.flops"]) == count_params_and_flops(detector, HW).flops
    scores = assert_file_agrees(tmp_path / "merged.onnx", detector)
    assert np.diff(scores[:6]).max() < -1e-4  # the order of the compared boxes is certain


@pytest.mark.slow
def test_training_can_start_from_an_exported_and_pruned_yolox(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = build_from_spec(YOLOX_SPEC).prunable_layers()
    widths = {layer.conv: 2 + index % 3 for index, layer in enumerate(layers)}
    detector = build_from_spec(YOLOX_SPEC, ModelChanges(widths=widths)).eval()
    for name, buffer in detector.named_buffers():
        if "running" in name:
            torch.nn.init.uniform_(buffer, 0.5, 1.5)
    path = tmp_path / "pruned.onnx"
    export(detector, path)
    assert is_yolox_file(path)
    loaded = load_yolox(path)
    assert (loaded.spec, loaded.changes.widths) == (YOLOX_SPEC, widths)
    image = torch.randint(0, 255, (1, 3, *HW))
    with torch.no_grad():
        expected, actual = detector(image).one2many, loaded(image).one2many
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(actual.boxes_xyxy, expected.boxes_xyxy, atol=1e-3, rtol=1e-4)
