"""Every form of the graph says what the detector says of pictures that were prepared on the host, in each runtime."""

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

from hkd_deploy.backends.openvino import create_core
from hkd_deploy.export.exporter import export_detector, export_onnx, get_output_names
from hkd_deploy.export.graph import MIN_SCORE
from hkd_deploy.export.options import ExportOptions
from hkd_deploy.export.parity import compute_box_difference
from hkd_deploy.model_metadata import ModelMetadata
from hkd_det.letterbox import Letterbox
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import DetectorCheckpoint, build_from_spec
from hkd_det.models.detector import HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
from hkd_det.models.ultralytics import UltralyticsSpec, make_ultralytics_spec
from hkd_det.ops.nms import peak_nms, suppress_duplicates

HW = (256, 320)
OURS = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=12, head_depth=1)
RCNN = FasterRCNNSpec("resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=(16, 32, 64, 128, 256))
FREE = ExportOptions(HW, None, dynamic_size=True)
LETTERBOX = ExportOptions(HW, None, letterbox_hw=(720, 1280))


def checkpoint(spec: Any) -> DetectorCheckpoint:
    """A detector that is not trained, but that says something else of every point."""
    torch.manual_seed(0)
    detector: BaseDetector = build_from_spec(spec).train()
    with torch.no_grad():
        if isinstance(detector, FasterRCNN):
            for part in (detector.rpn.head, detector.roi_heads.box_predictor):
                for parameter in part.parameters():
                    torch.nn.init.normal_(parameter, std=0.3)
        else:
            for name, module in detector.named_modules():
                if re.search(r"cv[23]\.\d\.2$|head\.(many|one)$", name):
                    std = 10.0 if ".cv3." in name else 0.5  # a deep narrow network's features differ little
                    torch.nn.init.normal_(module.weight, std=std)  # type: ignore[arg-type]
            for seed in range(3):  # normalisation has seen pictures
                detector(torch.from_numpy(np.stack([picture(96, 96, seed)] * 2)).permute(0, 3, 1, 2))
        if isinstance(spec, UltralyticsSpec):  # and has noise of its own, or it would fade on the way
            for module in detector.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
                    torch.nn.init.uniform_(module.running_var, 0.2, 1.0)  # type: ignore[arg-type]
                    torch.nn.init.uniform_(module.weight, 0.8, 1.6)
    config = {"data": "street.yaml", "imgsz_hw": list(HW), "setup": "Reasonable"}
    return DetectorCheckpoint("tiny", spec, detector.eval().state_dict(), config, 7, 0.25)


def narrow_yolo(name: str) -> UltralyticsSpec:
    layout = deepcopy(make_ultralytics_spec(name).model_yaml)
    layout["scales"][layout["scale"]][1] = 0.0625
    return UltralyticsSpec(name, layout)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise on several scales."""
    chance = np.random.default_rng(seed)
    layers = [chance.integers(0, 256, (height // step + 2, width // step + 2, 3)) for step in (1, 5, 17)]
    return np.mean([cv2.resize(one.astype(np.uint8), (width, height)) for one in layers], axis=0).astype(np.uint8)


def runtimes(path: Path) -> list[Any]:
    """The file in ONNX Runtime and in OpenVINO: callables from pictures to outputs, in order."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    compiled = create_core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [
        lambda images: session.run(None, {"images": images}),
        lambda images: [compiled({"images": images})[index] for index in range(len(compiled.outputs))],
    ]


def detected(detector: BaseDetector, inputs_rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the detector itself says of one input (H, W, 3): its boxes and scores from the floor up."""
    with torch.no_grad():
        boxes, scores = detector.predict(torch.from_numpy(inputs_rgb).permute(2, 0, 1)[None])
    valid = scores[0] >= MIN_SCORE
    return boxes[0][valid].numpy(), scores[0][valid].numpy()


def grey_padded(picture_rgb: np.ndarray) -> np.ndarray:
    """As a graph of free size pads: to multiples of 32, at least 224."""
    height, width = (max(224, -(-side // 32) * 32) for side in picture_rgb.shape[:2])
    canvas = np.full((height, width, 3), 114, np.uint8)
    canvas[: picture_rgb.shape[0], : picture_rgb.shape[1]] = picture_rgb
    return canvas


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(OURS, id="ours"),
        pytest.param(narrow_yolo("yolo11n"), id="yolo11n"),
        pytest.param(narrow_yolo("yolo26n"), id="yolo26n"),
        pytest.param(RCNN, id="rcnn", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_any_size_for_every_family(spec: Any, tmp_path: Path) -> None:
    source = checkpoint(spec)
    export_onnx(source, tmp_path / "free.onnx", FREE)
    detector = source.build()
    # Over much flat grey scores tie, and each runtime suppresses another of two.
    sizes = [(HW, 2), ((193, 290), 1), ((40, 50) if spec is OURS else (224, 256), 1)]
    for run in runtimes(tmp_path / "free.onnx"):
        for size_hw, batch in sizes:
            pictures = np.stack([picture(*size_hw, seed=seed) for seed in range(batch)])
            boxes, scores, count = run(pictures)
            assert boxes.shape == (batch, 300, 4) and scores.shape == (batch, 300) and count.dtype == np.int64
            for index in range(batch):
                wanted = detected(detector, grey_padded(pictures[index]))
                assert abs(len(wanted[1]) - count[index]) <= 0.05 * count[index] and count[index] > 10
                surest = [part[:50] for part in wanted]
                np.testing.assert_allclose(scores[index, : len(surest[1])], surest[1], atol=1e-3)
                assert compute_box_difference(*surest, boxes[index], scores[index]) < 0.05


@pytest.fixture(scope="module")
def ours() -> DetectorCheckpoint:
    return checkpoint(OURS)


def test_the_letterbox_inside_is_the_hosts(ours: DetectorCheckpoint, tmp_path: Path) -> None:
    """Boxes in pixels of the picture, cut at its borders. Levels one apart by rounding move scores a little."""
    export_onnx(ours, tmp_path / "letterbox.onnx", LETTERBOX)
    detector = ours.build()
    for run in runtimes(tmp_path / "letterbox.onnx"):
        for size_hw in ((333, 517), (720, 1280), (100, 77)):
            one, letterbox = picture(*size_hw), Letterbox(size_hw, HW)
            wanted_boxes, wanted_scores = detected(detector, letterbox.apply(one))
            boxes, scores, count = run(one[None])
            assert (boxes >= 0).all() and (boxes.max((0, 1)) <= [size_hw[1], size_hw[0]] * 2).all()
            assert abs(len(wanted_scores) - count[0]) <= 0.1 * count[0] and count[0] > 10
            np.testing.assert_allclose(scores[0, :20], wanted_scores[:20], atol=0.01)
            near = np.abs(letterbox.boxes_to_source(wanted_boxes)[:20, None] - boxes[0]).max(-1).min(1)
            assert (near < 1.5 / letterbox.scale).all()


def test_unprepared_and_raw_for_those_who_have_their_own(ours: DetectorCheckpoint, tmp_path: Path) -> None:
    options = ExportOptions(HW, None, dynamic_size=True, preprocess=False, raw=True)
    export_onnx(ours, tmp_path / "raw.onnx", options)
    detector = ours.build()
    one = picture(224, 256)
    inputs = (one.transpose(2, 0, 1)[None] / 255).astype(np.float32)
    for run in runtimes(tmp_path / "raw.onnx"):
        boxes, logits = run(inputs)
        assert boxes.shape == (1, 28 * 32 + 14 * 16 + 7 * 8, 4) and logits.shape == boxes.shape[:2]
        peaks = peak_nms(torch.from_numpy(logits), (224, 256), OURS.strides)
        best, index = peaks.topk(300)
        found_boxes, found_scores = suppress_duplicates(torch.from_numpy(boxes)[0, index], best)
        wanted_boxes, wanted_scores = detected(detector, one)
        np.testing.assert_allclose(found_scores[0, :50], wanted_scores[:50], atol=1e-4)
        assert (
            compute_box_difference(
                wanted_boxes[:40], wanted_scores[:40], found_boxes[0].numpy(), found_scores[0].numpy()
            )
            < 0.05
        )


@pytest.mark.parametrize(
    ("options", "preprocess"),
    [
        (ExportOptions(HW), "uint8"),
        (ExportOptions(HW, None), "uint8"),
        (FREE, "uint8"),
        (LETTERBOX, "uint8"),
        (ExportOptions(HW, preprocess=False), "float01"),
        (ExportOptions(HW, raw=True), "uint8"),
    ],
)
def test_the_file_says_which_graph_it_is(
    ours: DetectorCheckpoint, tmp_path: Path, options: ExportOptions, preprocess: str
) -> None:
    """And has shown that it says what torch says."""
    cv2.imwrite(str(tmp_path / "picture.png"), picture(300, 500))
    path = tmp_path / "model.onnx"
    parity = export_detector(ours, path, options, [tmp_path / "picture.png"])
    assert parity.box_error_px < 0.01 and parity.score_error < 1e-4
    model = onnx.load(path)
    told = {entry.key: entry.value for entry in model.metadata_props}
    manifest = ModelMetadata.from_metadata(told, path)
    assert told["hkd.format"] == "1" and manifest.preprocess == preprocess
    assert (manifest.imgsz_hw, manifest.batch, manifest.max_imgsz_hw) == (HW, options.batch, options.max_hw)
    assert (manifest.dynamic, manifest.letterbox, manifest.raw) == (
        options.dynamic_size, options.letterbox_hw is not None, options.raw
    )  # fmt: skip
    assert (told["hkd.miss_rate"], told["hkd.epoch"]) == ("0.250000", "7")
    assert "street.yaml" in told["hkd.miss_rate_dataset"] and "Reasonable" in told["hkd.miss_rate_dataset"]
    assert [output.name for output in model.graph.output] == get_output_names(options)
    assert model.opset_import[0].version == 17 and model.ir_version == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (OURS, FREE),
        (OURS, LETTERBOX),
        (OURS, ExportOptions(HW, None, dynamic_size=True, preprocess=False, raw=True)),
        (narrow_yolo("yolo11n"), FREE),
        (narrow_yolo("yolo26n"), FREE),
        (RCNN, FREE),
    ],
    ids=["free", "letterbox", "unprepared-raw", "yolo11n", "yolo26n", "rcnn"],
)
def test_tensorrt_parses_and_builds_every_form(
    spec: Any, options: ExportOptions, tmp_path: Path, tensorrt_builds: Callable[..., dict[str, Any]]
) -> None:
    export_onnx(checkpoint(spec), tmp_path / "model.onnx", options)
    smallest, largest = (
        (batch, height, width, 3) if options.preprocess else (batch, 3, height, width)
        for batch, height, width in ((1, 40, 50), (4, *options.max_hw))
    )
    assert list(tensorrt_builds(tmp_path / "model.onnx", smallest, largest)["outputs"]) == get_output_names(options)
