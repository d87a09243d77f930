"""YOLOX compared with Megvii's file in ONNX Runtime, its checkpoint names, and batch normalization statistics."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from hkd_det.errors import DataError, UsageError
from hkd_det.models import yolox_narrow
from hkd_det.models.surgery import ModelChanges
from hkd_det.models.yolox import YOLOX, YOLOXSpec, decode_boxes
from hkd_det.models.yolox_narrow import narrow_yolox, select_columns
from hkd_det.models.yolox_weights import is_yolox_file, load_yolox, prepare_yolox, update_bn_stats, widen_yolox
from hkd_det.models.zoo import MODELS, build_student, read_model_name

NANO = Path(os.environ.get("HKD_TEST_DATA", ""), "models/yolox_nano.onnx")
needs_nano = pytest.mark.skipif(not NANO.is_file(), reason="HKD_TEST_DATA has no models/yolox_nano.onnx")
IMAGES = torch.randint(0, 256, (4, 3, 96, 128), generator=torch.Generator().manual_seed(0)).float()


def iterate_images(num_images: int) -> Iterator[Tensor]:
    for _ in range(num_images):
        yield IMAGES


def make_tiny(seed: int = 0) -> YOLOX:
    torch.manual_seed(seed)
    detector = YOLOX(YOLOXSpec(width=0.125))
    update_bn_stats(detector, [IMAGES])
    return detector.eval()


def make_megvii_checkpoint(detector: YOLOX, num_classes: int = 80) -> dict[str, Tensor]:
    """Return the state dictionary under Megvii's names, with `num_classes` classes, a Focus stem and BGR input."""
    checkpoint = {}
    for name, value in detector.state_dict().items():
        if name == "backbone.stem.conv.weight":
            bgr = value.flip(1)
            cells = [bgr[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            checkpoint["backbone.backbone.stem.conv.conv.weight"] = torch.cat(cells, 1)
        elif name.startswith("backbone.stem."):
            checkpoint[name.replace("backbone.stem.", "backbone.backbone.stem.conv.")] = value
        elif name.startswith("backbone."):
            checkpoint[f"backbone.{name}"] = value
        elif name.startswith("neck."):
            checkpoint[name.replace("neck.", "backbone.", 1)] = value
        elif name.startswith("head.cls_preds."):
            checkpoint[name] = torch.cat([value, torch.randn(num_classes - 1, *value.shape[1:])])
        else:
            checkpoint[name] = value
    return checkpoint


@needs_nano
def test_scores_and_boxes_equal_those_of_the_onnx_file() -> None:
    options = onnxruntime.SessionOptions()
    # The fused operators of ONNX Runtime are less exact: they differ from a float64 reference by 6e-6.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(NANO), options)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 26, 26, generator=generator) * 255
    image = nn.functional.interpolate(coarse, (416, 416), mode="bicubic").clamp(0, 255)  # RGB
    (raw,) = session.run(None, {session.get_inputs()[0].name: image.flip(1).numpy()})
    detector = load_yolox(NANO)
    with torch.no_grad():
        outputs = detector(image)
    scores = raw[0, :, 4] * raw[0, :, 5]
    assert np.abs(outputs.one2many.logits[0].sigmoid().numpy() - scores).max() < 1e-6
    corners = outputs.anchor_points.numpy() / outputs.strides.numpy()[:, None] - 0.5
    centers = (raw[0, :, :2] + corners) * outputs.strides.numpy()[:, None]
    sides = np.exp(raw[0, :, 2:4]) * outputs.strides.numpy()[:, None]
    boxes = np.concatenate([centers - sides / 2, centers + sides / 2], 1)
    assert np.abs(outputs.one2many.boxes_xyxy[0].numpy() - boxes).max() < 1e-2
    assert sum(parameter.numel() for parameter in detector.parameters()) == 896_754


@needs_nano
@pytest.mark.slow
def test_name_and_activation_of_an_onnx_file() -> None:
    assert is_yolox_file(NANO)
    assert read_model_name(NANO) == "yolox-nano"
    assert read_model_name(NANO, "yolox-nano-hswish") == "yolox-nano-hswish"
    assert read_model_name(NANO, "yolox-s") == "yolox-nano"
    student = build_student("yolox-nano-relu", "", "", NANO, iterate_images)
    assert student.spec == MODELS["yolox-nano-relu"]


def test_checkpoint_of_megvii_is_converted(tmp_path: Path) -> None:
    detector = make_tiny()
    path = tmp_path / "yolox_tiny.pth"
    torch.save({"model": make_megvii_checkpoint(detector), "start_epoch": 300}, path)
    loaded = load_yolox(path)
    assert loaded.spec == detector.spec
    with torch.no_grad():
        expected, actual = detector(IMAGES).one2many, loaded(IMAGES).one2many
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.boxes_xyxy, expected.boxes_xyxy)


@pytest.mark.parametrize("content", [b"not a checkpoint", b""])
def test_broken_checkpoint_is_reported(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "yolox.pth"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"yolox\.pth: not a YOLOX file .*Provide"):
        load_yolox(path)


def test_other_onnx_files_are_no_yolox_files(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"onnx")
    assert not is_yolox_file(tmp_path / "broken.onnx") and not is_yolox_file(tmp_path / "missing.onnx")


def test_stem_equals_focus_and_convolution() -> None:
    detector = make_tiny()
    weight = detector.backbone.stem.conv.weight
    cells = [weight[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)]
    focus = torch.cat([IMAGES[..., row::2, column::2] for row in (0, 1) for column in (0, 1)], 1)
    expected = nn.functional.conv2d(focus, torch.cat(cells, 1), padding=1)
    torch.testing.assert_close(detector.backbone.stem.conv(IMAGES), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
def test_prepare_yolox_keeps_the_outputs_and_sets_true_statistics() -> None:
    detector = make_tiny()
    for module in detector.modules():  # as in a file whose normalizations were fused into the convolutions
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean, module.running_var = torch.zeros_like(module.bias), torch.full_like(module.bias, 0.9)
    with torch.no_grad():
        before = detector(IMAGES).one2many.logits
        prepare_yolox(detector, detector.spec, iterate_images)
        after = detector.eval()(IMAGES).one2many.logits
        trained = detector.train()(IMAGES).one2many.logits  # statistics of the batch, the same images
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(trained, before, atol=2e-2, rtol=2e-2)


@pytest.mark.slow
def test_a_step_of_adam_on_the_stem_of_a_file_changes_features_little() -> None:
    torch.manual_seed(0)
    detector = YOLOX(YOLOXSpec(width=0.125)).eval()
    with torch.no_grad():
        detector.backbone.stem.conv.weight.mul_(0.05)  # small weights for images of 0 to 255, as in public files
    prepared = prepare_yolox(detector, detector.spec, iterate_images)
    weight = prepared.backbone.stem.conv.weight
    with torch.no_grad():
        before = prepared.forward_features(IMAGES)[0]
        weight.sub_(1e-3 * weight.sign())
        after = prepared.forward_features(IMAGES)[0]
    assert float((after - before).square().mean()) < 1e-3 * float(before.var())


@pytest.mark.slow
def test_other_activation_gets_statistics_of_its_own() -> None:
    torch.manual_seed(0)
    spec = YOLOXSpec(width=0.125, act="hardswish")
    hardswish = prepare_yolox(YOLOX(YOLOXSpec(width=0.125)).eval(), spec, iterate_images)
    assert hardswish.spec.act == "hardswish"
    with torch.no_grad():
        evaluated, trained = (hardswish.train(mode)(IMAGES).one2many.logits for mode in (False, True))
    torch.testing.assert_close(evaluated, trained, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("depthwise", [True, False])
def test_wide_network_computes_the_same_function(depthwise: bool) -> None:
    torch.manual_seed(0)
    source = YOLOX(YOLOXSpec(width=0.125, depthwise=depthwise))
    update_bn_stats(source, [IMAGES])
    wide = widen_yolox(source.eval(), 3, noise=0.0)
    with torch.no_grad():
        expected, actual = source(IMAGES).one2many, wide(IMAGES).one2many
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(actual.boxes_xyxy, expected.boxes_xyxy, atol=0.1, rtol=1e-4)
    counts = [sum(parameter.numel() for parameter in detector.parameters()) for detector in (source, wide)]
    assert counts[1] > 6 * counts[0]


@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.slow
def test_narrow_network_without_the_copies_of_a_wide_one_computes_the_same_function(depthwise: bool) -> None:
    torch.manual_seed(0)
    source = YOLOX(YOLOXSpec(width=0.125, depthwise=depthwise))
    update_bn_stats(source, [IMAGES])
    wide = widen_yolox(source.eval(), 2, noise=0.0)
    narrow = narrow_yolox(wide, source.spec, IMAGES)
    with torch.no_grad():
        expected, actual = source(IMAGES).one2many, narrow(IMAGES).one2many
    torch.testing.assert_close(actual.logits, expected.logits, atol=2e-2, rtol=1e-3)
    torch.testing.assert_close(actual.boxes_xyxy, expected.boxes_xyxy, atol=1.0, rtol=1e-2)


def test_fitted_weights_are_better_than_selected_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_tiny()
    spec = replace(source.spec, stage_channels=(8, 12, 24, 48, 96, 24))

    def compute_error() -> float:
        torch.manual_seed(0)
        narrow = narrow_yolox(source, spec, IMAGES)
        with torch.no_grad():
            return float((narrow(IMAGES).one2many.logits - source(IMAGES).one2many.logits).square().mean())

    fitted = compute_error()
    monkeypatch.setattr(yolox_narrow, "_fit_weights", lambda *_: None)
    assert fitted < 0.5 * compute_error()


def test_pruned_network_keeps_its_channels() -> None:
    pruned = YOLOX(YOLOXSpec(width=0.25), ModelChanges({"neck.lateral_conv0.conv": 60})).eval()
    with pytest.raises(UsageError, match=r"--weights: a pruned network can only keep its channels\. Omit --model"):
        prepare_yolox(pruned, YOLOXSpec(width=0.125), iterate_images)


def test_selected_columns_predict_the_others() -> None:
    lengths = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0], dtype=torch.float64)
    orthogonal = lengths.diag()
    copied = torch.cat([orthogonal, 2 * orthogonal[:, 1:2], orthogonal[:, 3:4] + orthogonal[:, 4:]], 1)
    gram = copied.T @ copied
    same_weight = torch.eye(7, dtype=torch.float64)
    assert select_columns(gram, same_weight, 1).tolist() == [5]  # the longest column; column 1 is half of it
    first, *others = select_columns(gram, same_weight, 3).tolist()
    assert others == [5, 6] and first in {3, 4}  # 6 is the sum of 3 and 4: one of them predicts the other
    only_third = torch.zeros(7, 7, dtype=torch.float64)
    only_third[2, 2] = 1.0
    assert select_columns(gram, only_third, 1).tolist() == [2]  # the only column that matters for the outputs


def test_copies_of_a_channel_differ_after_training_noise() -> None:
    torch.manual_seed(0)
    wide = widen_yolox(make_tiny(), 2)
    weight = wide.neck.lateral_conv0.conv.weight
    assert not torch.allclose(weight[0], weight[1])


def test_specs_that_can_start_from_each_other() -> None:
    nano = MODELS["yolox-nano"]
    assert isinstance(nano, YOLOXSpec)
    for name, expected in (
        ("yolox-nano-relu", True),
        ("yolox-nano-x3", True),
        ("yolox-pico-hswish", True),
        ("yolox-s", False),
        ("yolox-tiny", False),
    ):
        spec = MODELS[name]
        assert isinstance(spec, YOLOXSpec) and spec.can_start_from(nano) == expected
    assert nano.can_start_from(YOLOXSpec(width=0.5))
    assert not nano.can_start_from(YOLOXSpec(width=0.1875)), "4 / 3 of the channels are no copies"
    assert not nano.can_start_from(YOLOXSpec(width=0.5, depth=0.67))


def test_decode_boxes_of_known_values() -> None:
    outputs = torch.tensor([[[0.5, 0.25, 0.0, float(np.log(2))]]])
    boxes = decode_boxes(outputs, torch.tensor([[12.0, 20.0]]), torch.tensor([8.0]))  # cell corner (8, 16)
    torch.testing.assert_close(boxes, torch.tensor([[[8.0, 10.0, 16.0, 26.0]]]))


def test_pruned_channels_are_read_by_their_consumers_only() -> None:
    detector = make_tiny()
    modules = dict(detector.named_modules())
    with torch.no_grad():
        for layer in detector.prunable_layers():
            keep = torch.arange(modules[layer.conv].out_channels) > 0
            for name in layer.consumers:
                weight = modules[name].weight
                weight[:, ~layer.select_inputs(name, weight.shape[1], keep)] = 0
        before = detector(IMAGES).one2many
        for layer in detector.prunable_layers():
            modules[layer.norms[0]].bias[0] += 3.0
        after = detector(IMAGES).one2many
    assert torch.equal(before.logits, after.logits) and torch.equal(before.boxes_xyxy, after.boxes_xyxy)


def test_pruned_detector_has_narrow_depthwise_convolutions() -> None:
    layers = YOLOX(YOLOXSpec(width=0.125)).prunable_layers()
    pruned = YOLOX(YOLOXSpec(width=0.125), ModelChanges(widths={layer.conv: 3 for layer in layers}))
    modules = dict(pruned.named_modules())
    narrow = [modules[between.conv] for layer in layers for between in layer.depthwise]
    assert narrow and all((conv.groups, conv.in_channels, conv.out_channels) == (3, 3, 3) for conv in narrow)
    assert pruned(IMAGES).one2many.logits.shape == YOLOX(YOLOXSpec(width=0.125))(IMAGES).one2many.logits.shape
