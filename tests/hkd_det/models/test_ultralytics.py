"""YOLO models compared with Ultralytics: inference, model files, and a missing package."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

from hkd_det.errors import DataError, UnavailableError, UsageError
from hkd_det.models.base import Targets
from hkd_det.models.checkpoint import build_from_spec, spec_from_dict, spec_to_dict
from hkd_det.models.criterion import DetectionCriterion
from hkd_det.models.head import make_anchors
from hkd_det.models.surgery import NO_CHANGES
from hkd_det.models.ultralytics import (
    UltralyticsDetector,
    UltralyticsSpec,
    import_tasks,
    is_ultralytics_file,
    load_ultralytics,
    make_ultralytics_spec,
)
from hkd_det.models.zoo import build_model, count_params_and_flops, get_spec
from hkd_det.ops.losses import sum_losses

NAMES = ("yolov8n", "yolo11n", "yolo26n", "yolov10n")
HW = (64, 96)


def make_thin_spec(name: str, classes: int = 1, person: int = 0) -> UltralyticsSpec:
    """Return the named model with an eighth of the channels of a nano model."""
    model_yaml = deepcopy(make_ultralytics_spec(name).model_yaml)
    model_yaml["scales"][model_yaml["scale"]][1] = 0.0625
    return UltralyticsSpec(name, {**model_yaml, "nc": classes}, person)


def make_random_detector(spec: UltralyticsSpec) -> UltralyticsDetector:
    """Return a detector with random weights and statistics, so that all points have different outputs."""
    torch.manual_seed(0)
    detector = UltralyticsDetector(spec)
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.2, 1.0)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.weight, 0.8, 1.6)
    return detector.eval()


def make_images(count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 3, *HW), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def make_targets() -> Targets:
    boxes = torch.tensor([[[20.0, 8, 44, 60], [60, 4, 90, 30]]]).repeat(2, 1, 1)
    return Targets(boxes, torch.tensor([[True, False]] * 2), torch.tensor([[False, True]] * 2))


def run_ultralytics(detector: UltralyticsDetector) -> tuple[Tensor, Tensor]:
    """Return boxes [B, A, 4] xyxy and scores [B, A] of the one-to-many head, computed by Ultralytics."""
    head: Any = detector.network.model[-1]
    head.xyxy, head.end2end = True, False
    with torch.no_grad():
        decoded = detector.network(make_images().float() / 255)[0]  # [B, 4 + classes, A]
    return decoded[:, :4].transpose(1, 2), decoded[:, 4 + detector.spec.person_class_id]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("classes", "person"), [(1, 0), (3, 2)])
def test_forward_equals_ultralytics(name: str, classes: int, person: int) -> None:
    detector = make_random_detector(make_thin_spec(name, classes, person))
    with torch.no_grad():
        outputs = detector(make_images())
    boxes, scores = run_ultralytics(detector)
    assert scores.std() > 1e-4 and boxes.std() > 1
    torch.testing.assert_close(outputs.one2many.boxes_xyxy, boxes, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(outputs.one2many.logits.sigmoid(), scores)
    points, strides = make_anchors(HW, detector.strides)
    assert torch.equal(outputs.anchor_points, points) and torch.equal(outputs.strides, strides)


@pytest.mark.parametrize("name", ["yolo26n", "yolov10n"])
def test_predict_end2end_model_equals_ultralytics(name: str) -> None:
    detector = make_random_detector(make_thin_spec(name))
    head: Any = detector.network.model[-1]
    head.end2end, head.max_det = True, 20
    with torch.no_grad():
        expected = detector.network(make_images().float() / 255)[0]  # [B, 20, 6]: box, score, class
        boxes, scores = detector.predict(make_images(), max_det=20)
        detections = detector.postprocess(detector(make_images()), max_det=20)
    torch.testing.assert_close(scores, expected[..., 4])
    for image in range(2):
        assert_same_detections(boxes[image], scores[image], expected[image, :, :4], expected[image, :, 4])
    torch.testing.assert_close(torch.stack(detections.boxes_xyxy), boxes)


def assert_same_detections(boxes: Tensor, scores: Tensor, expected_boxes: Tensor, expected_scores: Tensor) -> None:
    """Compare two lists of detections one to one. The order of scores that are equal up to rounding may differ."""
    same = torch.isclose(scores[:, None], expected_scores, rtol=1e-4, atol=1e-7)
    same &= torch.isclose(boxes[:, None], expected_boxes, atol=1e-3, rtol=1e-5).all(-1)
    assert (same.sum(0) == 1).all() and (same.sum(1) == 1).all()


def test_predict_with_nms_equals_torchvision() -> None:
    detector = make_random_detector(make_thin_spec("yolo11n"))
    with torch.no_grad():
        boxes, scores = detector.predict(make_images(), max_det=50)
        detections = detector.postprocess(detector(make_images()), max_det=50)
    all_boxes, all_scores = run_ultralytics(detector)
    for b in range(2):
        kept = nms(all_boxes[b], all_scores[b], 0.7)[:50]
        assert 0 < len(kept) < all_scores.shape[1]
        torch.testing.assert_close(boxes[b, : len(kept)], all_boxes[b, kept], atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(scores[b, : len(kept)], all_scores[b, kept])
        assert (scores[b, len(kept) :] == 0).all()
        torch.testing.assert_close(detections.scores[b], scores[b, : len(kept)])


@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_training_and_eval_mode_return_the_same_outputs(name: str) -> None:
    detector = make_random_detector(make_thin_spec(name))
    with torch.no_grad():
        eval_outputs = detector(make_images())
    detector.train()
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    train_outputs = detector(make_images())
    pairs = ((eval_outputs.one2many, train_outputs.one2many), (eval_outputs.one2one, train_outputs.one2one))
    for eval_branch, train_branch in pairs:
        if eval_branch is not None and train_branch is not None:
            assert torch.equal(eval_branch.logits, train_branch.logits)
            assert torch.equal(eval_branch.boxes_xyxy, train_branch.boxes_xyxy)
    losses = DetectionCriterion()(train_outputs, make_targets())
    assert ("box_one2one" in losses) == (name == "yolo26n") and ("dfl" in losses) == (name == "yolo11n")
    assert torch.isfinite(sum_losses(losses))
    branches = [branch for branch in (train_outputs.one2many, train_outputs.one2one) if branch is not None]
    torch.stack(
        [out.square().mean() for branch in branches for out in (branch.logits, branch.boxes_xyxy)]
    ).sum().backward()
    untrained = [n for n, p in detector.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not untrained


def test_one2one_gradient_does_not_reach_the_neck() -> None:
    detector = make_random_detector(make_thin_spec("yolo26n")).train()
    losses = DetectionCriterion()(detector(make_images()), make_targets())
    torch.stack([term for name, term in losses.items() if name.endswith("_one2one")]).sum().backward()
    head = f"network.model.{len(detector.network.model) - 1}.one2one_"
    trained = {name for name, parameter in detector.named_parameters() if parameter.grad is not None}
    assert trained and all(name.startswith(head) for name in trained)


def test_initial_scores_are_the_prior() -> None:
    detector = UltralyticsDetector(make_thin_spec("yolo26n"))
    head: Any = detector.network.model[-1]
    for branch in (*head.cv3, *head.one2one_cv3):
        assert branch[-1].bias.sigmoid().item() == pytest.approx(0.01)


@pytest.mark.parametrize("name", [*NAMES, "yolov8n-p2"])
def test_feature_info_describes_the_inputs_of_the_head(name: str) -> None:
    detector = UltralyticsDetector(make_thin_spec(name)).eval()
    modules, recorded = dict(detector.named_modules()), {}
    for info in detector.feature_info():
        modules[info.name].register_forward_hook(lambda _m, _i, out, name=info.name: recorded.update({name: out}))
    maps = detector.forward_features(make_images())
    for info, level in zip(detector.feature_info(), maps, strict=True):
        assert recorded[info.name] is level
        assert level.shape == (2, info.channels, HW[0] // info.stride, HW[1] // info.stride)
    assert [info.stride for info in detector.feature_info()] == ([4, 8, 16, 32] if "p2" in name else [8, 16, 32])


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo26n"])
def test_prunable_layers_are_read_by_their_consumer_only(name: str) -> None:
    """Shifting a channel has no effect if the weights of the consumer for it are 0."""
    detector = make_random_detector(make_thin_spec(name))
    layers = detector.prunable_layers()
    assert len(layers) > 5
    modules: dict[str, Any] = dict(detector.named_modules())
    with torch.no_grad():
        for layer in layers:
            assert modules[layer.conv].out_channels == modules[layer.norms[0]].num_features
            assert modules[layer.consumers[0]].in_channels == modules[layer.conv].out_channels
            modules[layer.consumers[0]].weight[:, 0] = 0
        before = detector(make_images()).one2many.logits
        for layer in layers:
            modules[layer.norms[0]].bias[0] += 3.0
        assert torch.equal(detector(make_images()).one2many.logits, before)
        modules[layers[0].norms[0]].bias[1] += 3.0
        assert not torch.equal(detector(make_images()).one2many.logits, before)


def test_spec_dict_round_trip_with_several_classes() -> None:
    spec = make_thin_spec("yolo26n", 3, 1)
    restored = spec_from_dict(spec_to_dict(spec))
    assert restored == spec
    detector = make_random_detector(spec)
    rebuilt = build_from_spec(restored, NO_CHANGES).eval()
    rebuilt.load_state_dict(detector.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(make_images()).one2many.logits, detector(make_images()).one2many.logits)


@pytest.mark.slow
def test_named_model_has_the_parameters_of_ultralytics() -> None:
    """Without the one-to-many head of end-to-end models and without the constant of DFL."""
    for name in ("yolo11n", "yolo26n"):
        published = import_tasks().DetectionModel(f"{name}.yaml", nc=1, verbose=False)
        if name == "yolo26n":
            published.end2end = True
            published.model[-1].fuse()
        expected = sum(parameter.numel() for parameter in published.parameters() if parameter.requires_grad)
        assert count_params_and_flops(build_model(name), HW).num_params == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("yolo11q", "yolo11n"), ("yolo11", "the size is missing"), ("yolo11n-seg", "no such detector"),
        ("yolov8n-worldv2", "no such detector"), ("yolo", "no such detector"),
    ],
)  # fmt: skip
def test_unknown_name_raises_with_suggestion(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"--model {name}: .*{message}"):
        get_spec(name)


def test_unsupported_models_raise() -> None:
    with pytest.raises(UsageError, match="stride 64"):
        build_model("yolov8n-p6")
    with pytest.raises(UsageError, match="--backbone resnet18: yolo11n has its own backbone"):
        build_model("yolo11n", "resnet18")
    with pytest.raises(UsageError, match="no such model"):
        get_spec("nolo11n")


def test_model_yaml_cannot_run_code(tmp_path: Path) -> None:
    """Ultralytics passes `activation` to `eval` and looks up layer names in the globals of its module."""
    spec, marker = make_thin_spec("yolov8n"), tmp_path / "marker"
    malicious = {**spec.model_yaml, "activation": f"open({str(marker)!r}, 'w') and nn.SiLU()"}
    with pytest.raises(UsageError, match="does not build"):
        UltralyticsDetector(UltralyticsSpec("malicious", malicious))
    backbone = [[-1, 1, "check_requirements", ["left-pad"]], *spec.model_yaml["backbone"][1:]]
    with pytest.raises(UsageError, match="does not build"):
        UltralyticsDetector(UltralyticsSpec("malicious", {**spec.model_yaml, "backbone": backbone}))
    assert not marker.exists()


def write_ultralytics_file(path: Path, spec: UltralyticsSpec, names: dict[int, str]) -> UltralyticsDetector:
    """Write a file as Ultralytics does: the pickled network in half precision."""
    detector = make_random_detector(spec)
    network = deepcopy(detector.network)
    network.names = names
    torch.save({"model": None, "ema": network.half(), "train_args": {"imgsz": 64}, "version": "8"}, path)
    return detector


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov8n", "yolo26n"])
def test_load_ultralytics_selects_the_person_class(name: str, tmp_path: Path) -> None:
    detector = write_ultralytics_file(
        tmp_path / "some.pt", make_thin_spec(name, 3, 1), {0: "dog", 1: "person", 2: "car"}
    )
    before = torch.serialization.get_safe_globals()
    assert is_ultralytics_file(tmp_path / "some.pt")
    loaded = load_ultralytics(tmp_path / "some.pt")
    assert loaded.spec.person_class_id == 1 and loaded.spec.name == "some" and not loaded.training
    detector.network.half().float()
    with torch.no_grad():
        assert torch.equal(loaded(make_images()).one2many.logits, detector(make_images()).one2many.logits)
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_load_ultralytics_rejects_unfit_files(tmp_path: Path) -> None:
    path = tmp_path / "some.pt"
    write_ultralytics_file(path, make_thin_spec("yolov8n", 2), {0: "dog", 1: "car"})
    with pytest.raises(DataError, match=r"some\.pt: none of its 2 classes is called person \(dog, car"):
        load_ultralytics(path)
    segments = import_tasks().SegmentationModel("yolov8n-seg.yaml", nc=1, verbose=False)
    torch.save({"model": segments}, path)
    with pytest.raises(DataError, match="expected a detection model, got SegmentationModel"):
        load_ultralytics(path)
    path.write_bytes(b"nothing")
    assert not is_ultralytics_file(path) and not is_ultralytics_file(tmp_path / "missing.pt")
    with pytest.raises(DataError, match=r"some\.pt: not a YOLO model"):
        load_ultralytics(path)


class CodeRunner:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_load_ultralytics_cannot_run_code(tmp_path: Path) -> None:
    path, marker = tmp_path / "some.pt", tmp_path / "marker"
    network = make_random_detector(make_thin_spec("yolov8n")).network
    network.names = CodeRunner(marker)
    torch.save({"model": network}, path)
    assert is_ultralytics_file(path)
    with pytest.raises(DataError, match="can be loaded safely"):
        load_ultralytics(path)
    assert not marker.exists()


IMPORTS = """
import os, sys, warnings
import cv2, numpy, torch, PIL.Image
cv2.setNumThreads(2)
def state():
    return (dict(os.environ), cv2.getNumThreads(), torch.get_num_threads(), numpy.get_printoptions(), torch.save,
            PIL.Image.open, list(warnings.filters), str(torch.ones(100) / 3))
from hkd_det.models.ultralytics import UltralyticsDetector, make_ultralytics_spec
before = state()
assert "ultralytics" not in sys.modules
import socket
socket.getaddrinfo = socket.socket.connect = lambda *_: print("network access")
UltralyticsDetector(make_ultralytics_spec("yolo11n"))
assert "ultralytics" in sys.modules
assert state() == before, "changed"
"""


@pytest.mark.slow
def test_import_of_ultralytics_has_no_side_effects(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin", "HOME": str(tmp_path), "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORTS], capture_output=True, text=True, check=False, env=environment
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_missing_ultralytics_raises_with_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "ultralytics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(UnavailableError, match=r"ultralytics: not installed\. .* pip install 'hkd-det\[yolo\]'"):
        get_spec("yolo11n")


def test_ultralytics_without_safe_loader_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(import_tasks(), "SAFE_LOAD")
    with pytest.raises(UnavailableError, match="too old"):
        get_spec("yolo11n")
