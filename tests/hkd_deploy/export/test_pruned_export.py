"""Export of a student that the CDD pruner reduced."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from hkd_deploy.export.exporter import export_onnx
from hkd_deploy.export.options import ExportOptions
from hkd_det.distill.cdd.compactor import find_prunable_layers, insert_compactors
from hkd_det.distill.cdd.fusion import fuse_compactors
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import DetectorCheckpoint, build_from_spec
from hkd_det.models.detector import HKDDetectorSpec
from hkd_det.models.zoo import count_params_and_flops

SPEC = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=12, head_depth=2)
HW = (64, 96)


def export(detector: BaseDetector, path: Path) -> onnx.ModelProto:
    config = {"data": "none"}
    export_onnx(
        DetectorCheckpoint("x", SPEC, detector.state_dict(), config, 1, 1.0, detector.changes), path, ExportOptions(HW)
    )
    return onnx.load(path)


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
    image = np.random.default_rng(0).integers(0, 255, (1, *HW, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "folded.onnx", providers=["CPUExecutionProvider"])
    boxes, scores, _ = session.run(None, {"images": image})
    with torch.no_grad():
        expected_boxes, expected_scores = masked.predict(torch.from_numpy(image).permute(0, 3, 1, 2))
    np.testing.assert_allclose(scores, expected_scores.numpy(), atol=1e-5)
    valid = scores[0] > 0
    np.testing.assert_allclose(boxes[0][valid][:5], expected_boxes.numpy()[0][valid][:5], atol=1e-2)
