"""The contract of `BaseDetector`, for every family. A new family adds one entry to `SPECS`."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hkd_det.errors import DataError, UsageError
from hkd_det.models.base import BaseDetector, DetectionBatch, ModelSpec, Targets
from hkd_det.models.checkpoint import (
    FAMILIES,
    DetectorCheckpoint,
    build_from_spec,
    get_family,
    load_detector_checkpoint,
    save_detector_checkpoint,
    spec_from_dict,
    spec_to_dict,
)
from hkd_det.models.detector import HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNNSpec
from hkd_det.models.feature_layers import FeatureHooks, list_feature_layers
from hkd_det.models.surgery import ModelChanges
from hkd_det.models.ultralytics import UltralyticsSpec, make_ultralytics_spec
from hkd_det.models.yolox import YOLOXSpec
from hkd_det.models.zoo import count_params_and_flops
from hkd_det.ops.losses import sum_losses


def make_thin_yolo_spec(name: str) -> UltralyticsSpec:
    """Return the named model with an eighth of the channels of a nano model."""
    model_yaml = deepcopy(make_ultralytics_spec(name).model_yaml)
    model_yaml["scales"][model_yaml["scale"]][1] = 0.0625
    return UltralyticsSpec(name, model_yaml)


SPECS: dict[str, Callable[[], ModelSpec]] = {
    "hkd": lambda: HKDDetectorSpec(
        "resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1
    ),
    "yolo": lambda: make_thin_yolo_spec("yolo11n"),
    "faster-rcnn": lambda: FasterRCNNSpec(
        "resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=(16, 32, 64, 128, 256)
    ),
    "yolox": lambda: YOLOXSpec(width=0.125),
}
HW = (64, 96)
IMAGES = torch.randint(0, 256, (2, 3, *HW), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
GT_BOXES = torch.tensor([[[10.0, 5, 34, 60], [50, 2, 90, 40]], [[30, 5, 50, 55], [0, 0, 0, 0]]])
TARGETS = Targets(GT_BOXES, torch.tensor([[True, False], [True, False]]), torch.tensor([[False, True], [False, False]]))
NO_TARGETS = Targets(torch.zeros(2, 0, 4), *torch.zeros(2, 2, 0, dtype=torch.bool))
DETECTIONS = DetectionBatch(
    (torch.tensor([[12.0, 5, 34, 60], [13, 6, 34, 60]]), torch.zeros(0, 4)), (torch.tensor([0.9, 0.4]), torch.zeros(0))
)


@pytest.fixture(params=SPECS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def detector(family: str) -> BaseDetector:
    """A detector with random weights, so that scores and boxes differ between points."""
    torch.manual_seed(0)
    detector = build_from_spec(SPECS[family]())
    for parameter in detector.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.08)
    return detector.eval()


def test_specs_has_every_family() -> None:
    assert SPECS.keys() == FAMILIES.keys()


def test_spec_dict_round_trip_builds_same_model(family: str, detector: BaseDetector) -> None:
    values = spec_to_dict(detector.spec)
    assert values["family"] == family
    spec = spec_from_dict(values)
    assert spec == detector.spec and get_family(spec) is type(detector) is FAMILIES[family]
    build_from_spec(spec).load_state_dict(detector.state_dict())


def test_checkpoint_round_trip_keeps_predictions(detector: BaseDetector, tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    save_detector_checkpoint(path, DetectorCheckpoint.from_detector(detector, "tiny", {"seed": 0}, 3, 0.5))
    checkpoint = load_detector_checkpoint(path)
    assert (checkpoint.model, checkpoint.config, checkpoint.epoch, checkpoint.miss_rate) == (
        "tiny",
        {"seed": 0},
        3,
        0.5,
    )
    with torch.no_grad():
        loaded, original = checkpoint.build().predict(IMAGES), detector.predict(IMAGES)
    assert all(torch.equal(a, b) for a, b in zip(loaded, original, strict=True))


def test_capabilities_and_license_are_declared(detector: BaseDetector) -> None:
    assert {"features", "logits", "detections"} <= detector.capabilities
    assert detector.license in {"Apache-2.0", "AGPL-3.0"}


def test_predict_returns_descending_scores(detector: BaseDetector) -> None:
    with torch.no_grad():
        boxes, scores = detector.predict(IMAGES, max_det=20)
    assert boxes.shape == (2, scores.shape[1], 4) and 0 < scores.shape[1] <= 20
    assert (scores.diff() <= 0).all() and (scores >= 0).all() and (scores <= 1).all() and scores[:, 0].all()


def test_predict_accepts_float_images(detector: BaseDetector) -> None:
    with torch.no_grad():
        for a, b in zip(detector.predict(IMAGES), detector.predict(IMAGES.float()), strict=True):
            assert torch.equal(a, b)


def test_postprocess_equals_predict(detector: BaseDetector) -> None:
    with torch.no_grad():
        boxes, scores = detector.predict(IMAGES, max_det=20)
        detections = detector.postprocess(detector(IMAGES), max_det=20)
    for image in range(2):
        count = len(detections.scores[image])
        torch.testing.assert_close(detections.scores[image], scores[image, :count])
        torch.testing.assert_close(detections.boxes_xyxy[image], boxes[image, :count], atol=1e-3, rtol=1e-4)
        assert not scores[image, count:].any()


def test_predict_traceable_equals_predict(detector: BaseDetector) -> None:
    with torch.no_grad():
        boxes, scores = detector.predict(IMAGES, max_det=20)
        traceable_boxes, traceable_scores = detector.predict_traceable(IMAGES.float(), max_det=20)
    torch.testing.assert_close(traceable_scores, scores, atol=1e-5, rtol=1e-4)
    valid = scores > 0
    torch.testing.assert_close(traceable_boxes[valid], boxes[valid], atol=1e-2, rtol=1e-4)


def test_raw_outputs_contain_the_predictions(detector: BaseDetector) -> None:
    with torch.no_grad():
        candidates, logits = detector.raw_outputs(IMAGES.float())
        boxes, _ = detector.predict(IMAGES, max_det=1)
    assert candidates.shape == (2, logits.shape[1], 4)
    for image in range(2):
        assert (candidates[image] - boxes[image, 0]).abs().amax(1).min() < 1e-2


@pytest.mark.parametrize("targets", [TARGETS, NO_TARGETS], ids=["persons", "empty"])
def test_loss_is_finite_with_gradients(detector: BaseDetector, targets: Targets) -> None:
    detector.train()
    losses = detector.loss(detector(IMAGES), targets)
    assert all(loss.ndim == 0 for loss in losses.values())
    sum_losses(losses).backward()
    gradients = [parameter.grad for parameter in detector.parameters() if parameter.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("targets", [TARGETS, NO_TARGETS], ids=["persons", "empty"])
def test_soft_label_loss_is_finite_with_gradients(detector: BaseDetector, targets: Targets) -> None:
    detector.train()
    cls_loss, box_loss = detector.soft_label_loss(detector(IMAGES), DETECTIONS, targets)
    assert cls_loss > 0 and box_loss > 0
    (cls_loss + box_loss).backward()
    gradients = [parameter.grad for parameter in detector.parameters() if parameter.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)


def test_forward_rois_follows_capabilities(detector: BaseDetector) -> None:
    rois = [torch.tensor([[3.0, 4, 40, 60]]), torch.zeros(0, 4)]
    if "rois" in detector.capabilities:
        assert detector.forward_rois(detector(IMAGES), rois).logits.shape == (1,)
    else:
        with pytest.raises(NotImplementedError, match="no second stage"):
            detector.forward_rois(detector(IMAGES), rois)


@pytest.mark.parametrize("num_convs", [1, 2])
def test_forward_towers_completes_the_forward_pass(detector: BaseDetector, num_convs: int) -> None:
    if "towers" not in detector.capabilities:
        with pytest.raises(NotImplementedError, match="no head towers"):
            detector.tower_layers()
        with pytest.raises(NotImplementedError, match="no head towers"):
            detector.forward_towers([], num_convs, IMAGES)
        return
    levels = detector.tower_layers()
    depth = len(levels[0].cls)
    layers = [tower[min(num_convs, depth) - 1] for level in levels for tower in (level.cls, level.box)]
    hooks = FeatureHooks(detector, [layer.name for layer in layers], clone=True)
    with torch.no_grad():
        expected = detector(IMAGES).one2many
        features = hooks.pop()
        hooks.close()
        for layer, maps in zip(layers, features, strict=True):
            assert maps.shape == (2, layer.channels, HW[0] // layer.stride, HW[1] // layer.stride)
        pairs = list(zip(features[::2], features[1::2], strict=True))
        branch = detector.forward_towers(pairs, min(num_convs, depth), IMAGES)
    torch.testing.assert_close(branch.logits, expected.logits)
    torch.testing.assert_close(branch.boxes_xyxy, expected.boxes_xyxy)
    assert (branch.box_logits is None) == (expected.box_logits is None)


def test_feature_info_matches_recorded_features(detector: BaseDetector) -> None:
    layers = detector.feature_info()
    hooks = FeatureHooks(detector, [layer.name for layer in layers])
    detector(IMAGES)
    for layer, features in zip(layers, hooks.pop(), strict=True):
        assert features.shape == (2, layer.channels, HW[0] // layer.stride, HW[1] // layer.stride)
        assert detector.part_of(layer.name) == "neck"
    hooks.close()


def test_part_of_finds_all_parts(detector: BaseDetector) -> None:
    with_weights = [name.rpartition(".")[0] for name, _ in detector.named_parameters()]
    assert {detector.part_of(name) for name in with_weights} == {"backbone", "neck", "head"}


def test_list_feature_layers_marks_defaults(detector: BaseDetector) -> None:
    listed = list_feature_layers(detector)
    assert [layer.info for layer in listed if layer.is_default] == detector.feature_info()
    assert len(listed) <= 25


def test_prunable_layers_are_closed(detector: BaseDetector) -> None:
    modules: dict[str, Any] = dict(detector.named_modules())
    layers = detector.prunable_layers()
    assert layers
    for layer in layers:
        channels = modules[layer.conv].out_channels
        assert all(modules[name].num_features == channels for name in layer.norms)
        assert all(modules[name].in_channels >= channels * layer.num_copies for name in layer.consumers)
        assert all(modules[between.conv].groups == channels for between in layer.depthwise)
        assert all(modules[between.norm].num_features == channels for between in layer.depthwise)


@pytest.mark.slow
def test_pruned_model_keeps_output_shapes(family: str, detector: BaseDetector) -> None:
    widths = {layer.conv: 1 for layer in detector.prunable_layers()}
    pruned = build_from_spec(SPECS[family](), ModelChanges(widths=widths)).eval()
    with torch.no_grad():
        shapes = [[output.shape for output in model.predict(IMAGES)] for model in (detector, pruned)]
    assert shapes[0] == shapes[1]
    assert count_params_and_flops(pruned, HW).num_params < count_params_and_flops(detector, HW).num_params


def test_load_pretrained_reports_a_missing_file(detector: BaseDetector) -> None:
    with pytest.raises((DataError, UsageError), match=r"--pretrained none\.pth: .*\."):
        detector.load_pretrained("none.pth")


def test_batch_order_does_not_change_predictions(detector: BaseDetector) -> None:
    with torch.no_grad():
        boxes, scores = detector.predict(IMAGES, max_det=5)
        flipped: tuple[Tensor, Tensor] = detector.predict(IMAGES.flip(0), max_det=5)
    torch.testing.assert_close(flipped[1].flip(0), scores)
    torch.testing.assert_close(flipped[0].flip(0)[:, 0], boxes[:, 0], atol=1e-3, rtol=1e-4)


def test_checkpoint_with_other_weights_is_an_error(tmp_path: Path) -> None:
    spec = SPECS["hkd"]()
    detector = build_from_spec(spec)
    weights, path = detector.state_dict(), tmp_path / "best.pt"
    name = next(iter(weights))
    for other in (
        {f"body.{key}": value for key, value in weights.items()},
        {**weights, name: torch.zeros(3, 3)},
        {**weights, name: "text"},
        {},
    ):
        save_detector_checkpoint(path, DetectorCheckpoint("tiny", spec, other, {}, 1, 0.5))
        with pytest.raises(DataError, match=r"best\.pt: its weights do not fit its architecture") as caught:
            load_detector_checkpoint(path).build()
        assert "\n" not in str(caught.value)
    for changes in ({"weights": [1]}, {"config": "x"}, {"model": 5}):
        content = torch.load(path, weights_only=True)
        torch.save({**content, **changes}, path)
        with pytest.raises(DataError, match=r"best\.pt: written by another version"):
            load_detector_checkpoint(path)
