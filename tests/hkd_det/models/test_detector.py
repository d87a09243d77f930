"""The detector's shapes, its named sizes, and what the exported branch says."""

import pytest
import torch
from torch import nn

from hkd_det.errors import DataError, UsageError
from hkd_det.models.backbone import Backbone, load_backbone_weights
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec, freeze_batch_norm
from hkd_det.models.zoo import DEFAULT_TEACHER, MODELS, build_model, count_params_and_flops
from hkd_det.ops.nms import SUPPRESSED_LOGIT, peak_nms, suppress_duplicates

TINY = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)


@pytest.fixture
def tiny() -> HKDDetector:
    torch.manual_seed(0)
    return HKDDetector(TINY).eval()


def test_raw_maps_have_a_row_for_every_point(tiny: HKDDetector) -> None:
    prediction = tiny(torch.zeros(2, 3, 64, 96, dtype=torch.uint8))
    count = 8 * 12 + 4 * 6 + 2 * 3
    assert prediction.one2many.logits.shape == prediction.one2one.logits.shape == (2, count)
    assert prediction.one2many.box_logits.shape == (2, count, 4, TINY.reg_max)
    assert prediction.one2many.boxes_xyxy.shape == (2, count, 4) and prediction.anchor_points.shape == (count, 2)


def test_detect_gives_the_best_peaks_of_the_one_branch_less_doubles(tiny: HKDDetector) -> None:
    pictures = torch.randint(0, 255, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        prediction, (boxes, scores) = tiny(pictures), tiny.predict(pictures, max_det=7)
    peaks = peak_nms(prediction.one2one.logits, (64, 96), TINY.strides)
    best, index = peaks.sort(dim=1, descending=True, stable=True)
    chosen = prediction.one2many.boxes_xyxy.gather(1, index[:, :7, None].expand(-1, -1, 4))
    wanted_boxes, wanted = suppress_duplicates(chosen, best[:, :7])
    torch.testing.assert_close(scores, wanted)
    torch.testing.assert_close(boxes[0, 0], wanted_boxes[0, 0], atol=1e-3, rtol=1e-4)
    assert not torch.equal(wanted, best[:, :7].sigmoid())  # there are doubles among them


def test_whoever_is_found_on_two_levels_is_one(tiny: HKDDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every point of every level gives the same box: the best alone is heard, from `detect` and `found` alike."""

    def decoded(sides: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, 0, 40, 40]).expand(*sides.shape[:2], 4)

    monkeypatch.setattr("hkd_det.models.detector.dist2bbox", decoded)
    torch.nn.init.normal_(tiny.head.one2one.weight)
    with torch.no_grad():
        pictures = torch.randint(0, 255, (1, 3, 64, 96), dtype=torch.uint8)
        _, scores = tiny.predict(pictures)
        found = tiny.postprocess(tiny(pictures))
    assert scores[0, 0] > 0.003 and (scores[0] > 1e-6).sum() == 1
    torch.testing.assert_close(found.scores[0], scores[0, :100])


def test_the_one_branch_leaves_the_pyramid_to_the_many_branch(tiny: HKDDetector) -> None:
    tiny.train()
    tiny(torch.rand(1, 3, 64, 64) * 255).one2one.logits.sum().backward()
    assert all(parameter.grad is None for parameter in tiny.neck.parameters())
    assert all(parameter.grad is not None for parameter in tiny.head.one2one_tower.convs.parameters())


def test_scores_start_at_the_prior(tiny: HKDDetector) -> None:
    with torch.no_grad():
        prediction = tiny(torch.zeros(1, 3, 64, 64))
    assert 0.003 < prediction.one2one.logits.sigmoid().mean() < 0.03


@pytest.mark.parametrize("student", DEFAULT_TEACHER)
def test_a_student_has_at_most_a_sixth_of_its_teacher(student: str) -> None:
    small = count_params_and_flops(build_model(student), (64, 64))
    large = count_params_and_flops(build_model(DEFAULT_TEACHER[student]), (64, 64))
    assert small.num_params * 6 <= large.num_params
    assert small.flops < large.flops


def test_the_heavy_teacher_is_of_the_resnet50_class() -> None:
    backbone = build_model("teacher-r50").backbone
    # torchvision's ResNet-50 has 25,557,032 parameters, 2,049,000 of them in the classifier.
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 25_557_032 - 2_049_000


def test_cost_counts_multiply_accumulates_twice(tiny: HKDDetector) -> None:
    """Against hooks that count by the layers' own shapes, on the exported part only."""
    macs = 0

    def count(module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        nonlocal macs
        assert isinstance(module, nn.Conv2d)
        macs += output[0].numel() * module.weight[0].numel()

    handles = [m.register_forward_hook(count) for m in tiny.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        tiny.predict(torch.zeros(1, 3, 64, 96))
    for handle in handles:
        handle.remove()
    assert count_params_and_flops(tiny, (64, 96)).flops == 2 * macs


def test_frozen_norms_do_not_move(tiny: HKDDetector) -> None:
    tiny.train()
    freeze_batch_norm(tiny)
    before = {name: value.clone() for name, value in tiny.state_dict().items() if "running" in name}
    tiny(torch.rand(2, 3, 64, 64) * 255).one2many.logits.sum().backward()
    after = tiny.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(m.weight.grad is None for m in tiny.modules() if isinstance(m, nn.BatchNorm2d))


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(UsageError, match="mini-student"):
        build_model("huge")
    with pytest.raises(UsageError, match="resnet18"):
        Backbone("resnet1", (8, 16, 32))
    with pytest.raises(UsageError, match="strides"):
        Backbone("resnet18", (6,))


def test_pretrained_weights_of_the_same_backbone_are_loaded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    donor, heir = HKDDetector(TINY).backbone, HKDDetector(TINY).backbone
    torch.save(donor.body.state_dict(), tmp_path / "weights.pth")
    load_backbone_weights(heir, TINY.backbone, str(tmp_path / "weights.pth"))
    assert all(torch.equal(a, b) for a, b in zip(donor.state_dict().values(), heir.state_dict().values(), strict=True))


def test_pretrained_weights_that_do_not_fit_are_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    heir = HKDDetector(TINY).backbone
    torch.save(HKDDetector(MODELS["mini-student"]).backbone.body.state_dict(), tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name, message in (("other.pth", "fits"), ("text.pth", "not a weights file"), ("none.pth", "no such file")):
        with pytest.raises(DataError, match=message):
            load_backbone_weights(heir, TINY.backbone, str(tmp_path / name))


def test_only_local_maxima_of_a_level_keep_their_score() -> None:
    """Against a plain loop over neighbours."""
    logits = torch.randn(2, 8 * 12 + 4 * 6, generator=torch.Generator().manual_seed(0))
    kept = peak_nms(logits, (64, 96), (8, 16))
    for picture in range(2):
        start = 0
        for height, width in ((8, 12), (4, 6)):
            level = logits[picture, start : start + height * width].view(height, width)
            for y in range(height):
                for x in range(width):
                    around = level[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
                    wanted = level[y, x] if level[y, x] >= around.max() - 1e-3 else torch.tensor(SUPPRESSED_LOGIT)
                    assert kept[picture, start + y * width + x] == wanted
            start += height * width
