"""Every variant of the exported graph agrees with torch on ONNX Runtime and OpenVINO."""

import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from hkd_deploy.export.exporter import export_detector, export_onnx, get_output_names
from hkd_deploy.export.graph import MIN_SCORE
from hkd_deploy.export.parity import compute_box_difference
from hkd_deploy.model_metadata import ExportOptions, ModelMetadata
from hkd_det.letterbox import Letterbox
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import DetectorCheckpoint, build_from_spec
from hkd_det.models.detector import HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
from hkd_det.models.ultralytics import UltralyticsSpec, make_ultralytics_spec
from hkd_det.onnxrt.openvino import create_core
from hkd_det.ops.boxes import peak_nms, suppress_duplicates

HW = (256, 320)
HKD_SPEC = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=12, head_depth=1)
RCNN = FasterRCNNSpec("resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=(16, 32, 64, 128, 256))
DYNAMIC = ExportOptions(HW, None, dynamic_size=True)
LETTERBOX = ExportOptions(HW, None, letterbox_hw=(720, 1280))


def checkpoint(spec: Any) -> DetectorCheckpoint:
    """Build an untrained detector with different outputs at every anchor point."""
    torch.manual_seed(0)
    detector: BaseDetector = build_from_spec(spec).train()
    with torch.no_grad():
        if isinstance(detector, FasterRCNN):
            for part in (detector.rpn.head, detector.roi_heads.box_predictor):
                for parameter in part.parameters():
                    torch.nn.init.normal_(parameter, std=0.3)
        else:
            for name, module in detector.named_modules():
                if re.search(r"cv[23]\.\d\.2$|head\.(one2many|one2one)$", name):
                    std = 10.0 if ".cv3." in name else 0.5  # the features of a deep narrow network hardly differ
                    torch.nn.init.normal_(module.weight, std=std)  # type: ignore[arg-type]
            for seed in range(3):  # update the batch-norm statistics
                detector(torch.from_numpy(np.stack([make_image(96, 96, seed)] * 2)).permute(0, 3, 1, 2))
        if isinstance(spec, UltralyticsSpec):  # otherwise the activations fade in a deep network
            for module in detector.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
                    torch.nn.init.uniform_(module.running_var, 0.2, 1.0)  # type: ignore[arg-type]
                    torch.nn.init.uniform_(module.weight, 0.8, 1.6)
    config = {"data": "street.yaml", "imgsz_hw": list(HW), "setup": "Reasonable"}
    return DetectorCheckpoint("tiny", spec, detector.eval().state_dict(), config, 7, 0.25)


def narrow_yolo(name: str) -> UltralyticsSpec:
    model_yaml = deepcopy(make_ultralytics_spec(name).model_yaml)
    model_yaml["scales"][model_yaml["scale"]][1] = 0.0625
    return UltralyticsSpec(name, model_yaml)


def make_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise on several scales."""
    rng = np.random.default_rng(seed)
    layers = [rng.integers(0, 256, (height // step + 2, width // step + 2, 3)) for step in (1, 5, 17)]
    return np.mean([cv2.resize(layer.astype(np.uint8), (width, height)) for layer in layers], axis=0).astype(np.uint8)


def open_runtimes(path: Path) -> list[Any]:
    """Open a file in ONNX Runtime and OpenVINO; return functions from a batch to the list of outputs."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    compiled = create_core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [
        lambda images: session.run(None, {"images": images}),
        lambda images: [compiled({"images": images})[index] for index in range(len(compiled.outputs))],
    ]


def predict_one(detector: BaseDetector, inputs_rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes and scores of at least MIN_SCORE of one network input (H, W, 3)."""
    with torch.no_grad():
        boxes, scores = detector.predict(torch.from_numpy(inputs_rgb).permute(2, 0, 1)[None])
    valid = scores[0] >= MIN_SCORE
    return boxes[0][valid].numpy(), scores[0][valid].numpy()


def pad_image(image_rgb: np.ndarray) -> np.ndarray:
    """Pad as a graph with a dynamic size: to multiples of 32, at least 224."""
    height, width = (max(224, -(-side // 32) * 32) for side in image_rgb.shape[:2])
    canvas = np.full((height, width, 3), 114, np.uint8)
    canvas[: image_rgb.shape[0], : image_rgb.shape[1]] = image_rgb
    return canvas


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(HKD_SPEC, id="hkd"),
        pytest.param(narrow_yolo("yolo11n"), id="yolo11n", marks=pytest.mark.slow),
        pytest.param(narrow_yolo("yolo26n"), id="yolo26n", marks=pytest.mark.slow),
        pytest.param(RCNN, id="rcnn", marks=pytest.mark.slow),
    ],
)
def test_dynamic_graph_agrees_with_torch(spec: Any, tmp_path: Path) -> None:
    source = checkpoint(spec)
    export_onnx(source, tmp_path / "dynamic.onnx", DYNAMIC)
    detector = source.build()
    # Over large uniform areas scores tie, and each runtime suppresses another of two detections.
    sizes = [(HW, 2), ((193, 290), 1), ((40, 50) if spec is HKD_SPEC else (224, 256), 1)]
    for run in open_runtimes(tmp_path / "dynamic.onnx"):
        for size_hw, batch in sizes:
            images = np.stack([make_image(*size_hw, seed=seed) for seed in range(batch)])
            boxes, scores, count = run(images)
            assert boxes.shape == (batch, 300, 4) and scores.shape == (batch, 300) and count.dtype == np.int64
            for index in range(batch):
                expected = predict_one(detector, pad_image(images[index]))
                assert abs(len(expected[1]) - count[index]) <= 0.05 * count[index] and count[index] > 10
                top_boxes, top_scores = (value[:50] for value in expected)
                np.testing.assert_allclose(scores[index, : len(top_scores)], top_scores, atol=1e-3)
                assert compute_box_difference(top_boxes, top_scores, boxes[index], scores[index]) < 0.05


@pytest.fixture(scope="module")
def hkd_checkpoint() -> DetectorCheckpoint:
    return checkpoint(HKD_SPEC)


@pytest.mark.slow
def test_in_graph_letterbox_agrees_with_host_letterbox(hkd_checkpoint: DetectorCheckpoint, tmp_path: Path) -> None:
    """Boxes are in image pixels and clipped. Rounding of gray levels changes scores slightly."""
    export_onnx(hkd_checkpoint, tmp_path / "letterbox.onnx", LETTERBOX)
    detector = hkd_checkpoint.build()
    for run in open_runtimes(tmp_path / "letterbox.onnx"):
        for size_hw in ((333, 517), (720, 1280), (100, 77)):
            image, letterbox = make_image(*size_hw), Letterbox(size_hw, HW)
            expected_boxes, expected_scores = predict_one(detector, letterbox.apply(image))
            boxes, scores, count = run(image[None])
            assert (boxes >= 0).all() and (boxes.max((0, 1)) <= [size_hw[1], size_hw[0]] * 2).all()
            assert abs(len(expected_scores) - count[0]) <= 0.1 * count[0] and count[0] > 10
            np.testing.assert_allclose(scores[0, :20], expected_scores[:20], atol=0.01)
            distances = np.abs(letterbox.boxes_to_source(expected_boxes)[:20, None] - boxes[0]).max(-1).min(1)
            # The scores of a random network are nearly equal: rounding can exchange the last box.
            assert (distances < 0.05 / letterbox.scale).sum() >= 19


@pytest.mark.slow
def test_raw_float_graph_agrees_after_postprocessing(hkd_checkpoint: DetectorCheckpoint, tmp_path: Path) -> None:
    options = ExportOptions(HW, None, dynamic_size=True, preprocess=False, raw=True)
    export_onnx(hkd_checkpoint, tmp_path / "raw.onnx", options)
    detector = hkd_checkpoint.build()
    image = make_image(224, 256)
    inputs = (image.transpose(2, 0, 1)[None] / 255).astype(np.float32)
    for run in open_runtimes(tmp_path / "raw.onnx"):
        boxes, logits = run(inputs)
        assert boxes.shape == (1, 28 * 32 + 14 * 16 + 7 * 8, 4) and logits.shape == boxes.shape[:2]
        peaks = peak_nms(torch.from_numpy(logits), (224, 256), HKD_SPEC.strides)
        top_logits, index = peaks.topk(300)
        boxes_out, scores_out = suppress_duplicates(torch.from_numpy(boxes)[0, index], top_logits)
        expected_boxes, expected_scores = predict_one(detector, image)
        np.testing.assert_allclose(scores_out[0, :50], expected_scores[:50], atol=1e-4)
        assert (
            compute_box_difference(
                expected_boxes[:40], expected_scores[:40], boxes_out[0].numpy(), scores_out[0].numpy()
            )
            < 0.05
        )


@pytest.mark.parametrize(
    ("options", "preprocess"),
    [
        (ExportOptions(HW), "uint8"),
        pytest.param(ExportOptions(HW, None), "uint8", marks=pytest.mark.slow),
        (DYNAMIC, "uint8"),
        pytest.param(LETTERBOX, "uint8", marks=pytest.mark.slow),
        (ExportOptions(HW, preprocess=False), "float01"),
        pytest.param(ExportOptions(HW, raw=True), "uint8", marks=pytest.mark.slow),
    ],
)
def test_export_metadata_describes_graph(
    hkd_checkpoint: DetectorCheckpoint, tmp_path: Path, options: ExportOptions, preprocess: str
) -> None:
    cv2.imwrite(str(tmp_path / "image.png"), make_image(300, 500))
    path = tmp_path / "model.onnx"
    parity = export_detector(hkd_checkpoint, path, options, [tmp_path / "image.png"])
    assert parity.box_error_px < 0.01 and parity.score_error < 1e-4
    model = onnx.load(path)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    metadata = ModelMetadata.from_metadata(entries, path)
    assert entries["hkd.format"] == "1" and metadata.preprocess == preprocess
    assert (metadata.imgsz_hw, metadata.batch, metadata.max_imgsz_hw) == (HW, options.batch, options.max_hw)
    assert (metadata.dynamic, metadata.letterbox, metadata.raw) == (
        options.dynamic_size, options.letterbox_hw is not None, options.raw
    )  # fmt: skip
    assert (entries["hkd.miss_rate"], entries["hkd.epoch"]) == ("0.250000", "7")
    assert "street.yaml" in entries["hkd.miss_rate_dataset"] and "Reasonable" in entries["hkd.miss_rate_dataset"]
    assert [output.name for output in model.graph.output] == get_output_names(options)
    assert model.opset_import[0].version == 17 and model.ir_version == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (HKD_SPEC, DYNAMIC),
        (HKD_SPEC, LETTERBOX),
        (HKD_SPEC, ExportOptions(HW, None, dynamic_size=True, preprocess=False, raw=True)),
        (narrow_yolo("yolo11n"), DYNAMIC),
        (narrow_yolo("yolo26n"), DYNAMIC),
        (RCNN, DYNAMIC),
    ],
    ids=["dynamic", "letterbox", "float-raw", "yolo11n", "yolo26n", "rcnn"],
)
def test_every_variant_builds_on_tensorrt(
    spec: Any, options: ExportOptions, tmp_path: Path, tensorrt_builds: Callable[..., dict[str, Any]]
) -> None:
    export_onnx(checkpoint(spec), tmp_path / "model.onnx", options)
    min_shape, max_shape = (
        (batch, height, width, 3) if options.preprocess else (batch, 3, height, width)
        for batch, height, width in ((1, 40, 50), (4, *options.max_hw))
    )
    assert list(tensorrt_builds(tmp_path / "model.onnx", min_shape, max_shape)["outputs"]) == get_output_names(options)
