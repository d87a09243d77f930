"""Taps chosen by name: what is compared with what, across families and strides, and what is refused."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from hkd_det.distill.distiller import Distiller
from hkd_det.distill.hierarchical import Hierarchical
from hkd_det.distill.methods import Methods
from hkd_det.distill.regions import region_errors
from hkd_det.distill.tap_choice import TapNames
from hkd_det.errors import UsageError
from hkd_det.losses.detection import norm_alone
from hkd_det.losses.imitation import imitation_error
from hkd_det.models.assignment import TruthBatch
from hkd_det.models.detector import Detector, DetectorSpec
from hkd_det.models.family import PersonDetector
from hkd_det.models.faster_rcnn import FasterRcnn, FasterRcnnSpec
from hkd_det.models.yolo import YoloDetector, YoloSpec, yolo_spec
from hkd_det.settings import from_mapping, with_setting

OURS = DetectorSpec("resnet10t", {"channels": (8, 12, 16, 20), "stem_width": 8}, channels=24, head_depth=1)
TWO_STAGE = FasterRcnnSpec("resnet18", width=0.125, channels=8, head_width=16, anchor_px=(16, 32, 64, 128, 256))
PICTURES = torch.randint(0, 255, (2, 3, 64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
PEOPLE = TruthBatch(
    torch.tensor([[[10.0, 10.0, 40.0, 60.0]], [[30.0, 5.0, 50.0, 55.0]]]),
    torch.ones(2, 1, dtype=torch.bool),
    torch.zeros(2, 1, dtype=torch.bool),
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def yolo() -> YoloDetector:
    layout = deepcopy(yolo_spec("yolo11n").layout)
    layout["scales"][layout["scale"]][1] = 0.0625
    return YoloDetector(YoloSpec("yolo11n", layout))


def terms_of(student: PersonDetector, teacher: PersonDetector, mine: list[str], other: list[str]) -> dict[str, Tensor]:
    taught = Hierarchical(taps=TapNames(tuple(mine), tuple(other)))
    distiller = Distiller(student, teacher, Methods(hkd=taught))
    return distiller(PICTURES, student(PICTURES), PEOPLE, 1.0, norm_alone)


def test_named_layers_are_compared_in_their_order() -> None:
    """A student that is its teacher: each pair's own correlation, worked out from the named layers' outputs."""
    twin, seen = Detector(OURS).eval(), {}
    # Behind bn2 a shortcut is added and an activation taken, both in place.
    names = ["backbone.body.layer3", "neck.outputs.2", "neck.laterals.1", "backbone.body.layer3.0.bn2"]
    other = ["neck.outputs.1", "neck.downs.1", "backbone.body.layer4", "backbone.body.layer2.0.bn2"]
    for name in (*names, *other):
        twin.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out.clone()}))
    taught = Hierarchical(pyramid=1.0, foreground=0.5, taps=TapNames(tuple(names), tuple(other)))
    distiller = Distiller(twin, twin, Methods(hkd=taught))
    nobody = TruthBatch(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool), torch.zeros(2, 0, dtype=torch.bool))
    with torch.no_grad():
        term = distiller(PICTURES, twin(PICTURES), nobody, 1.0, norm_alone)["hkd_pyramid"]
        adapters = distiller.methods[0].adapters
        errors = [
            imitation_error(adapter(seen[a]), seen[b]).mean()
            for adapter, a, b in zip(adapters, names, other, strict=True)
        ]
    torch.testing.assert_close(term, torch.stack(errors).mean())


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        (["neck.outputs.0", "neck.outputs.1"], ["network.model.19", "network.model.22"]),  # 8 and 16 to 16 and 32
        (["backbone.body.layer4", "neck.outputs.0"], ["network.model.2", "network.model.22"]),  # 32 to 4, 8 to 32
        (["neck.outputs.1", "backbone.body.layer3"], ["network.model.19", "network.model.6"]),  # two at stride 16
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_a_yolo_teacher_and_our_student_and_the_reverse_at_any_strides(
    mine: list[str], other: list[str], turned: bool
) -> None:
    student, teacher = Detector(OURS).train(), yolo()
    terms = terms_of(teacher.train(), student, other, mine) if turned else terms_of(student, teacher, mine, other)
    learner = [p for p in (teacher if turned else student).parameters() if p.requires_grad]
    for name in ("hkd_pyramid", "hkd_region"):
        assert torch.isfinite(terms[name]) and terms[name] > 0
        gradients = torch.autograd.grad(terms[name], learner, retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in gradients), name


def test_two_faster_rcnns_compare_the_named_maps() -> None:
    student, teacher = FasterRcnn(TWO_STAGE).eval(), FasterRcnn(TWO_STAGE)
    one, four = ["backbone.body.layer2"], [f"backbone.fpn.layer_blocks.{level}" for level in range(4)]
    assert terms_of(student, teacher, one, ["backbone.fpn.layer_blocks.3"])["hkd_pyramid"] > 0
    torch.manual_seed(5)
    named = terms_of(student, teacher, four, four)["hkd_pyramid"]
    torch.manual_seed(5)
    assert terms_of(student, teacher, [], [])["hkd_pyramid"] == named


def test_naming_the_defaults_changes_nothing() -> None:
    student, teacher = Detector(OURS).eval(), Detector(OURS)
    names = [tap.name for tap in student.taps()]
    torch.manual_seed(5)
    automatic = terms_of(student, teacher, [], [])
    torch.manual_seed(5)
    assert terms_of(student, teacher, names, names) == automatic


def test_regions_are_read_from_the_nearest_stride_that_is_there() -> None:
    """Strides 8 and 32: what the rule reads at 16 goes to 8."""
    chance = torch.Generator().manual_seed(1)
    mine, other = ([torch.randn(1, 3, 512 // s, 512 // s, generator=chance) for s in (8, 32)] for _ in range(2))
    boxes = torch.tensor([[10.0, 10, 60, 120], [50, 50, 270, 270], [0, 0, 500, 500]])  # the rule: 8, 16, 32
    regions = boxes, torch.zeros(3, dtype=torch.int64)
    told = region_errors(mine, other, (8, 32), *regions)
    fine = region_errors(mine[:1], other[:1], (8,), *regions)
    coarse = region_errors(mine[1:], other[1:], (32,), *regions)
    torch.testing.assert_close(told, torch.stack([fine[0], fine[1], coarse[2]]))


def test_names_that_do_not_fit_are_refused_at_the_start() -> None:
    student, teacher = Detector(OURS), yolo()
    with pytest.raises(UsageError, match="1 layers of the student and 0 of the teacher"):
        terms_of(student, teacher, ["neck.outputs.0"], [])
    with pytest.raises(UsageError, match=r"taps\.teacher: neck\.outputs\.0: no such layer; did you mean network\."):
        terms_of(student, teacher, ["neck.outputs.0"], ["neck.outputs.0"])


def test_they_are_named_in_a_recipe_and_by_a_flag() -> None:
    recipe = {"hkd": {"taps": {"student": ["neck.outputs.0"], "teacher": ["network.model.16"]}}}
    methods = from_mapping(Methods, recipe)
    assert methods.hkd and methods.hkd.taps == TapNames(("neck.outputs.0",), ("network.model.16",))
    given = with_setting(Methods, recipe, "hkd.taps.student=neck.outputs.1,neck.outputs.2")
    changed = from_mapping(Methods, given)
    assert changed.hkd and changed.hkd.taps.student == ("neck.outputs.1", "neck.outputs.2")
