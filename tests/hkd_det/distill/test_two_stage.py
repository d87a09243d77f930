"""The published HKD between two Faster R-CNNs, and a two-stage student under teachers of other kinds."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from hkd_det.distill.distiller import Distiller
from hkd_det.distill.hierarchical import Hierarchical, HierarchicalDistillation
from hkd_det.distill.lesson import Lesson
from hkd_det.distill.methods import Methods
from hkd_det.distill.noise import Noise, NoisyTeacher
from hkd_det.distill.soft_regions import soft_regions
from hkd_det.distill.two_stage import TwoStageDistillation, TwoStageLevels, shared_regions, squared_error
from hkd_det.errors import UsageError
from hkd_det.losses.detection import norm_alone
from hkd_det.models.assignment import TruthBatch
from hkd_det.models.detector import Detector, DetectorSpec
from hkd_det.models.faster_rcnn import FasterRcnn, FasterRcnnSpec
from hkd_det.models.prediction import Found, TwoStage

ANCHORS = (16, 32, 64, 128, 256)
STUDENT = FasterRcnnSpec("resnet18", width=0.125, channels=8, head_width=16, anchor_px=ANCHORS)
TEACHER = FasterRcnnSpec("resnet18", width=0.25, channels=12, head_width=24, anchor_px=ANCHORS)
DENSE = DetectorSpec("resnet10t", {"channels": (8, 16, 16, 32), "stem_width": 8}, channels=24, head_depth=1)
PICTURES = torch.randint(0, 255, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
PEOPLE = TruthBatch(
    torch.tensor([[[10.0, 10.0, 40.0, 60.0]], [[30.0, 5.0, 50.0, 55.0]]]),
    torch.ones(2, 1, dtype=torch.bool),
    torch.zeros(2, 1, dtype=torch.bool),
)
NOBODY = TruthBatch(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool), torch.zeros(2, 0, dtype=torch.bool))


@pytest.fixture
def pair() -> tuple[FasterRcnn, FasterRcnn]:
    torch.manual_seed(0)
    return FasterRcnn(STUDENT).train(), FasterRcnn(TEACHER).eval()


def lesson_of(student: FasterRcnn, teacher: FasterRcnn, truth: TruthBatch = PEOPLE) -> Lesson:
    mine = student(PICTURES)
    with torch.no_grad():
        other = teacher(PICTURES)
    return Lesson(PICTURES, truth, student, teacher, mine, other, mine.maps, other.maps, norm_alone)


def as_identity(method: TwoStageDistillation) -> None:
    for layer in [*(adapter.project for adapter in method.pyramid), method.region]:
        nn.init.dirac_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.eye_(method.logit.weight)
    nn.init.zeros_(method.logit.bias)


def test_every_level_gives_a_term_and_a_gradient(pair: tuple[FasterRcnn, FasterRcnn]) -> None:
    student, teacher = pair
    distiller = Distiller(student, teacher, Methods(hkd=Hierarchical()))
    terms = distiller(PICTURES, student(PICTURES), PEOPLE, 1.0, norm_alone)
    reached = {"hkd_pyramid": student.backbone, "hkd_region": student.backbone, "hkd_logit": student.roi_heads.box_head}
    assert terms.keys() == reached.keys()
    for name, part in reached.items():
        gradients = torch.autograd.grad(terms[name], list(part.parameters()), retain_graph=True, allow_unused=True)
        assert all(g is not None and torch.isfinite(g).all() for g in gradients), name
        assert any(g.abs().sum() > 0 for g in gradients), name
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in distiller.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(pair: tuple[FasterRcnn, FasterRcnn]) -> None:
    _, teacher = pair
    method = TwoStageDistillation(teacher, teacher, TwoStageLevels())
    as_identity(method)
    lesson = lesson_of(teacher, teacher)
    for term in method(lesson).values():
        torch.testing.assert_close(term, torch.zeros(()), atol=1e-6, rtol=0)


def test_the_terms_are_mean_squared_errors(pair: tuple[FasterRcnn, FasterRcnn]) -> None:
    """Worked out again from the two networks' own features, region by region, with adapters as plain matrices."""
    student, teacher = pair[0].eval(), pair[1]
    method = TwoStageDistillation(student, teacher, TwoStageLevels(pyramid=2.0, region=3.0, logit=5.0, proposals=4))
    lesson = lesson_of(student, teacher)
    terms = method(lesson)
    levels, regions, logits = [], [], []
    for adapter, mine, other in zip(method.pyramid, lesson.my_maps, lesson.other_maps, strict=True):
        weight, bias = adapter.project.weight[:, :, 0, 0], adapter.project.bias
        adapted = torch.einsum("oi,bihw->bohw", weight, mine) + bias[:, None, None]
        levels.append((adapted - other).pow(2).sum() / other.numel())
    for b in range(2):
        for box in [*PEOPLE.boxes_xyxy[b], *lesson.other.proposals[b][:4]]:
            alone = [torch.zeros(0, 4), torch.zeros(0, 4)]
            alone[b] = box[None]
            mine, other = student.regions(lesson.mine, alone), teacher.regions(lesson.other, alone)
            weight, bias = method.region.weight[:, :, 0, 0], method.region.bias
            pooled = torch.einsum("oi,rihw->rohw", weight, mine.pooled) + bias[:, None, None]
            regions.append((pooled - other.pooled).pow(2).mean())
            logits.append((mine.embedding @ method.logit.weight.T + method.logit.bias - other.embedding).pow(2).mean())
    assert len(regions) == 10
    torch.testing.assert_close(terms["hkd_pyramid"], 2 * torch.stack(levels).mean())
    torch.testing.assert_close(terms["hkd_region"], 3 * torch.stack(regions).mean())
    torch.testing.assert_close(terms["hkd_logit"], 5 * torch.stack(logits).mean())


def test_squared_error_by_hand() -> None:
    told = squared_error(torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]]), torch.tensor([[[1.0, 4.0]], [[3.0, -1.0]]]))
    assert told.tolist() == [2.0, 5.0]  # (0 + 4) / 2, (9 + 1) / 2


def test_both_see_people_and_the_teachers_best_proposals(pair: tuple[FasterRcnn, FasterRcnn]) -> None:
    lesson = lesson_of(*pair)
    assert isinstance(lesson.other, TwoStage)
    for b, regions in enumerate(shared_regions(lesson, lesson.other, 3)):
        assert torch.equal(regions, torch.cat([PEOPLE.boxes_xyxy[b], lesson.other.proposals[b][:3]]))
    ignored = replace(PEOPLE, real=torch.zeros(2, 1, dtype=torch.bool), ignore=torch.ones(2, 1, dtype=torch.bool))
    lesson = replace(lesson, truth=ignored)
    assert all(len(regions) == 3 for regions in shared_regions(lesson, lesson.other, 3))


def test_without_any_region_the_terms_are_finite(pair: tuple[FasterRcnn, FasterRcnn]) -> None:
    method = TwoStageDistillation(*pair, TwoStageLevels(proposals=0))
    terms = method(lesson_of(*pair, truth=NOBODY))
    torch.stack(list(terms.values())).sum().backward()
    assert terms["hkd_region"] == terms["hkd_logit"] == 0 and terms["hkd_pyramid"] > 0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in pair[0].parameters())


def test_descent_on_the_terms_alone_brings_the_student_to_its_teacher(pair: tuple[FasterRcnn, FasterRcnn]) -> None:
    student, teacher = pair
    distiller = Distiller(student, teacher, Methods(hkd=Hierarchical()))
    optimizer = torch.optim.Adam([*student.parameters(), *distiller.parameters()], lr=3e-3)
    course: dict[str, list[float]] = {}
    for _ in range(25):
        terms = distiller(PICTURES, student(PICTURES), PEOPLE, 1.0, norm_alone)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        for name, term in terms.items():
            course.setdefault(name, []).append(term.item())
    assert all(values[-1] < 0.7 * values[0] for values in course.values()), course


def test_noise_multiplies_the_teachers_embedding_region_by_region(pair: tuple[FasterRcnn, FasterRcnn]) -> None:
    lesson = lesson_of(*pair)
    assert isinstance(lesson.other, TwoStage)
    clean = pair[1].regions(lesson.other, shared_regions(lesson, lesson.other, 60))
    noisy = NoisyTeacher(Noise("targets", alpha=0.5, sigma=0.3, each="sample")).regions(clean)
    factor = (noisy.embedding / clean.embedding).nanmean(1)
    assert torch.equal(noisy.pooled, clean.pooled) and 0.2 < (factor == 1).float().mean() < 0.8
    torch.testing.assert_close(noisy.embedding, factor[:, None] * clean.embedding)
    method = TwoStageDistillation(*pair, TwoStageLevels())
    terms = [method(lesson)]
    method.noisy = NoisyTeacher(Noise("targets", alpha=1.0, sigma=3.0))
    terms.append(method(lesson))
    assert terms[0]["hkd_pyramid"] == terms[1]["hkd_pyramid"] and terms[0]["hkd_logit"] < terms[1]["hkd_logit"]


def test_a_dense_student_hears_a_two_stage_teachers_noise(pair: tuple[FasterRcnn, FasterRcnn]) -> None:
    """In the scores of its detections, which take the logits' place; features and boxes are as they were."""
    student = Detector(DENSE).eval()
    answers = []
    for noise in (None, Noise("targets", alpha=1.0, sigma=1.0), Noise("targets", alpha=0.0)):
        distiller = Distiller(student, pair[1], Methods(hkd=Hierarchical(), noise=noise))
        as_nothing(distiller)
        answers.append(distiller(PICTURES, student(PICTURES), PEOPLE, 1.0, norm_alone))
    clean, noisy, still = answers
    assert clean["hkd_score"] > 0 and (noisy["hkd_score"] - clean["hkd_score"]).abs() > 0.01 * clean["hkd_score"]
    torch.testing.assert_close(noisy["hkd_pyramid"], clean["hkd_pyramid"])
    for name in clean:
        torch.testing.assert_close(still[name], clean[name])


def as_nothing(distiller: Distiller) -> None:
    """Adapters that are the same for every distiller."""
    for parameter in distiller.parameters():
        nn.init.constant_(parameter, 0.01)


def test_a_dense_teacher_teaches_a_two_stage_student(pair: tuple[FasterRcnn, FasterRcnn]) -> None:
    student, teacher = pair[0], Detector(DENSE)
    distiller = Distiller(student, teacher, Methods(hkd=Hierarchical()))
    assert isinstance(distiller.methods[0], HierarchicalDistillation)
    terms = distiller(PICTURES, student(PICTURES), PEOPLE, 1.0, norm_alone)
    assert terms.keys() == {"hkd_pyramid", "hkd_region", "hkd_score", "hkd_box"}
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, list(student.parameters()), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in gradients), name
        assert all(g is None or torch.isfinite(g).all() for g in gradients), name


def found(boxes: list[list[float]], scores: list[float]) -> Found:
    """The same in both pictures."""
    return Found((torch.tensor(boxes).view(-1, 4),) * 2, (torch.tensor(scores),) * 2)


def test_a_student_that_says_what_its_teacher_found_has_no_soft_terms(pair: tuple[FasterRcnn, FasterRcnn]) -> None:
    """Told its own scores of two boxes, by a teacher whose boxes are where it leaves them."""
    student = pair[0].eval()
    with torch.no_grad():
        output = replace(student(PICTURES), proposals=(torch.zeros(0, 4),) * 2)
        nn.init.zeros_(student.roi_heads.box_predictor.bbox_pred.weight)  # regions are left where they are
        nn.init.zeros_(student.roi_heads.box_predictor.bbox_pred.bias)
        boxes = torch.tensor([[5.0, 5.0, 30.0, 60.0], [20.0, 3.0, 50.0, 40.0]])
        answer = student.regions(output, [boxes, boxes])
        told = Found((boxes, boxes), (answer.logits[:2].sigmoid(), answer.logits[2:].sigmoid()))
        score, box = soft_regions(student, output, told, norm_alone)
    assert score.abs() < 1e-6 and box.abs() < 1e-5


def test_soft_terms_by_hand(pair: tuple[FasterRcnn, FasterRcnn]) -> None:
    """Scores by Bernoulli's divergence at the found box; boxes there and from the one proposal near it."""
    student = pair[0].eval()
    with torch.no_grad():
        nn.init.zeros_(student.roi_heads.box_predictor.bbox_pred.weight)
        nn.init.zeros_(student.roi_heads.box_predictor.bbox_pred.bias)
        near, far = [10.0, 10.0, 30.0, 40.0], [40.0, 40.0, 60.0, 60.0]
        output = replace(student(PICTURES), proposals=(torch.tensor([near, far]),) * 2)
        box = [10.0, 10.0, 30.0, 50.0]
        told = found([box], [0.8])
        score_term, box_term = soft_regions(student, output, told, norm_alone)
        s = student.regions(output, list(told.boxes_xyxy)).logits.sigmoid()
    t = torch.tensor(0.8)
    divergence = t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()
    torch.testing.assert_close(score_term, divergence.mean(), atol=1e-5, rtol=1e-4)
    # The found box itself is at distance 0, the near proposal at 1 - 30/40, the far one is nobody's; each weighs 0.8.
    weight = max(4 * 0.8, 1.0)
    torch.testing.assert_close(box_term, torch.tensor(2 * 0.8 * 0.25 / weight))


def test_silence_about_a_double_is_no_word_against_the_person(pair: tuple[FasterRcnn, FasterRcnn]) -> None:
    """A teacher that answers once a person scores the box beside its best next to 0; both show the same person."""
    student = pair[0].eval()
    best, beside, elsewhere = [10.0, 10.0, 30.0, 50.0], [11.0, 10.0, 31.0, 50.0], [40.0, 5.0, 60.0, 45.0]
    with torch.no_grad():
        output = student(PICTURES)
        once = soft_regions(student, output, found([best, elsewhere], [0.9, 0.1]), norm_alone)
        doubled = soft_regions(student, output, found([beside, best, elsewhere], [1e-9, 0.9, 0.1]), norm_alone)
    torch.testing.assert_close(doubled, once)


def test_a_teacher_that_finds_nobody_gives_finite_soft_terms(pair: tuple[FasterRcnn, FasterRcnn]) -> None:
    student = pair[0]
    terms = soft_regions(student, student(PICTURES), found([], []), norm_alone)
    torch.stack(terms).sum().backward()
    assert all(term == 0 for term in terms)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in student.parameters())


def test_a_score_of_one_is_no_infinite_demand(pair: tuple[FasterRcnn, FasterRcnn]) -> None:
    student = pair[0]
    score, _ = soft_regions(student, student(PICTURES), found([[5.0, 5.0, 30.0, 60.0]], [1.0]), norm_alone)
    assert torch.isfinite(score) and score > 0


def test_settings_of_the_form_that_is_not_used_are_refused(pair: tuple[FasterRcnn, FasterRcnn]) -> None:
    with pytest.raises(UsageError, match=r"hkd\.pyramid is not heard"):
        Distiller(*pair, Methods(hkd=Hierarchical(pyramid=5.0)))
    with pytest.raises(UsageError, match=r"hkd\.two_stage is not heard"):
        Distiller(pair[0], Detector(DENSE), Methods(hkd=Hierarchical(two_stage=TwoStageLevels(logit=5.0))))
    Distiller(*pair, Methods(hkd=Hierarchical(two_stage=TwoStageLevels(logit=5.0), truth=0.5, adapter="norm")))


def test_the_arbiter_and_a_weight_of_the_truth_exclude_each_other() -> None:
    from hkd_det.distill.arbitration import Arbitration

    with pytest.raises(UsageError, match="truth"):
        Methods(hkd=Hierarchical(truth=0.0), mokd=Arbitration())
    with pytest.raises(UsageError, match=r"0\.\.1"):
        Hierarchical(truth=2.0)
    for wrong in ({"foreground": 1.5}, {"confident": -0.1}, {"region": -1.0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Hierarchical(**wrong)
    with pytest.raises(UsageError, match="proposals"):
        TwoStageLevels(proposals=-1)
