"""Feature layers that are configured by name, across families and strides."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from hkd_det.distill import override_method, parse_methods
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.distill.hkd import HKDConfig
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector, Targets
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
from hkd_det.models.feature_layers import LayerPairs, select_layers
from hkd_det.models.ultralytics import UltralyticsDetector, UltralyticsSpec, make_ultralytics_spec
from hkd_det.ops.losses import pkd_loss

OURS = HKDDetectorSpec("resnet10t", {"channels": (8, 12, 16, 20), "stem_width": 8}, channels=24, head_depth=1)
TWO_STAGE = FasterRCNNSpec("resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=(16, 32, 64, 128, 256))
IMAGES = torch.randint(0, 255, (2, 3, 64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
TARGETS = Targets(
    torch.tensor([[[10.0, 10.0, 40.0, 60.0]], [[30.0, 5.0, 50.0, 55.0]]]),
    torch.ones(2, 1, dtype=torch.bool),
    torch.zeros(2, 1, dtype=torch.bool),
)


def make_distiller(student: BaseDetector, teacher: Any, methods: dict[str, Any]) -> Distiller:
    return Distiller(student, teacher, build_methods(parse_methods(methods), student, teacher))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def make_thin_yolo() -> UltralyticsDetector:
    model_yaml = deepcopy(make_ultralytics_spec("yolo11n").model_yaml)
    model_yaml["scales"][model_yaml["scale"]][1] = 0.0625
    return UltralyticsDetector(UltralyticsSpec("yolo11n", model_yaml))


def compute_losses(
    student: BaseDetector, teacher: BaseDetector, student_layers: list[str], teacher_layers: list[str]
) -> dict[str, Tensor]:
    config = HKDConfig(feature_layers=LayerPairs(tuple(student_layers), tuple(teacher_layers)))
    distiller = make_distiller(student, teacher, {"hkd": config})
    return distiller(IMAGES, TARGETS, 1.0)[1]


def test_configured_layers_are_compared_in_order() -> None:
    """Student and teacher are the same model, so the loss follows from the outputs of its layers."""
    detector, recorded = HKDDetector(OURS).eval(), {}
    # The shortcut and the activation after bn2 change its output in place.
    student_layers = ["backbone.body.layer3", "neck.outputs.2", "neck.laterals.1", "backbone.body.layer3.0.bn2"]
    teacher_layers = ["neck.outputs.1", "neck.downs.1", "backbone.body.layer4", "backbone.body.layer2.0.bn2"]
    for name in (*student_layers, *teacher_layers):
        detector.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: recorded.update({name: out.clone()})
        )
    config = HKDConfig(
        pyramid=1.0, fg_ratio=0.5, feature_layers=LayerPairs(tuple(student_layers), tuple(teacher_layers))
    )
    distiller = make_distiller(detector, detector, {"hkd": config})
    empty = Targets(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool), torch.zeros(2, 0, dtype=torch.bool))
    with torch.no_grad():
        loss = distiller(IMAGES, empty, 1.0)[1]["hkd_pyramid"]
        adapters = distiller.methods[0].levels.adapters
        errors = [
            pkd_loss(adapter(recorded[s]), recorded[t]).mean()
            for adapter, s, t in zip(adapters, student_layers, teacher_layers, strict=True)
        ]
    torch.testing.assert_close(loss, torch.stack(errors).mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student_layers", "teacher_layers"),
    [
        (["neck.outputs.0", "neck.outputs.1"], ["network.model.19", "network.model.22"]),  # 8 and 16 to 16 and 32
        (["backbone.body.layer4", "neck.outputs.0"], ["network.model.2", "network.model.22"]),  # 32 to 4, 8 to 32
        (["neck.outputs.1", "backbone.body.layer3"], ["network.model.19", "network.model.6"]),  # two at stride 16
    ],
)
@pytest.mark.parametrize("is_swapped", [False, True])
def test_layers_of_different_strides_and_families_are_compared(
    student_layers: list[str], teacher_layers: list[str], is_swapped: bool
) -> None:
    student, teacher = HKDDetector(OURS).train(), make_thin_yolo()
    losses = (
        compute_losses(teacher.train(), student, teacher_layers, student_layers)
        if is_swapped
        else compute_losses(student, teacher, student_layers, teacher_layers)
    )
    trainable = [p for p in (teacher if is_swapped else student).parameters() if p.requires_grad]
    for name in ("hkd_pyramid", "hkd_region"):
        assert torch.isfinite(losses[name]) and losses[name] > 0
        gradients = torch.autograd.grad(losses[name], trainable, retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in gradients), name


def test_two_stage_models_compare_the_configured_layers() -> None:
    student, teacher = FasterRCNN(TWO_STAGE).eval(), FasterRCNN(TWO_STAGE)
    layer, pyramid = ["backbone.body.layer2"], [f"backbone.fpn.layer_blocks.{level}" for level in range(4)]
    assert compute_losses(student, teacher, layer, ["backbone.fpn.layer_blocks.3"])["hkd_pyramid"] > 0
    torch.manual_seed(5)
    named = compute_losses(student, teacher, pyramid, pyramid)["hkd_pyramid"]
    torch.manual_seed(5)
    assert compute_losses(student, teacher, [], [])["hkd_pyramid"] == named


def test_configuring_the_defaults_changes_nothing() -> None:
    student, teacher = HKDDetector(OURS).eval(), HKDDetector(OURS)
    names = [info.name for info in student.feature_info()]
    torch.manual_seed(5)
    automatic = compute_losses(student, teacher, [], [])
    torch.manual_seed(5)
    assert compute_losses(student, teacher, names, names) == automatic


def test_invalid_layer_pairs_raise_at_the_start() -> None:
    student, teacher = HKDDetector(OURS), make_thin_yolo()
    with pytest.raises(UsageError, match="got 1 and 0"):
        compute_losses(student, teacher, ["neck.outputs.0"], [])
    with pytest.raises(
        UsageError, match=r"feature_layers\.teacher: neck\.outputs\.0: no such layer\. Did you mean network\."
    ):
        compute_losses(student, teacher, ["neck.outputs.0"], ["neck.outputs.0"])


@pytest.mark.parametrize(
    ("layer_pairs", "message"),
    [
        (LayerPairs(("neck",)), r"^distill\.method\.feature_layers: expected as many layers"),
        (
            LayerPairs(("missing",), ("neck.outputs.0",)),
            r"^distill\.method\.feature_layers\.student: missing: no such layer",
        ),
        (
            LayerPairs(("neck.outputs.0",), ("missing",)),
            r"^distill\.method\.feature_layers\.teacher: missing: no such layer",
        ),
    ],
)
def test_invalid_layer_pairs_name_the_setting(layer_pairs: LayerPairs, message: str) -> None:
    student, teacher = HKDDetector(OURS), HKDDetector(OURS)
    with pytest.raises(UsageError, match=message):
        select_layers(student, teacher, layer_pairs, "distill.method.feature_layers")


def test_layer_pairs_are_read_from_recipe_and_override() -> None:
    recipe = {"hkd": {"feature_layers": {"student": ["neck.outputs.0"], "teacher": ["network.model.16"]}}}
    methods = parse_methods(recipe)
    assert methods["hkd"].feature_layers == LayerPairs(("neck.outputs.0",), ("network.model.16",))
    overridden = override_method(recipe, "distill.hkd.feature_layers.student=neck.outputs.1,neck.outputs.2")
    changed = parse_methods(overridden)
    assert changed["hkd"].feature_layers.student == ("neck.outputs.1", "neck.outputs.2")
