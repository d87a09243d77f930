"""`HKDDetector`: shapes, branches and decoding; pretrained backbones."""

from pathlib import Path

import pytest
import torch
from torch import nn

from hkd_det.errors import DataError, UsageError
from hkd_det.models.detector import Backbone, HKDDetector, HKDDetectorSpec, freeze_batch_norm, load_backbone_weights
from hkd_det.models.zoo import MODELS, build_model
from hkd_det.ops.boxes import peak_nms, suppress_duplicates

TINY = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)


@pytest.fixture
def tiny() -> HKDDetector:
    torch.manual_seed(0)
    return HKDDetector(TINY).eval()


def test_forward_returns_every_anchor_point(tiny: HKDDetector) -> None:
    outputs = tiny(torch.zeros(2, 3, 64, 96, dtype=torch.uint8))
    count = 8 * 12 + 4 * 6 + 2 * 3
    assert outputs.one2many.logits.shape == outputs.one2one.logits.shape == (2, count)
    assert outputs.one2many.box_logits.shape == (2, count, 4, TINY.reg_max)
    assert outputs.one2many.boxes_xyxy.shape == (2, count, 4) and outputs.anchor_points.shape == (count, 2)


def test_predict_returns_peaks_without_duplicates(tiny: HKDDetector) -> None:
    torch.nn.init.zeros_(tiny.head.box_logits.bias)  # boxes of 15 x 15 cells, of which many overlap
    images = torch.randint(0, 255, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        outputs, (boxes, scores) = tiny(images), tiny.predict(images, max_det=7)
    peaks = peak_nms(outputs.one2one.logits, (64, 96), TINY.strides)
    best, index = peaks.sort(dim=1, descending=True, stable=True)
    chosen = outputs.one2many.boxes_xyxy.gather(1, index[:, :7, None].expand(-1, -1, 4))
    wanted_boxes, expected = suppress_duplicates(chosen, best[:, :7])
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(boxes[0, 0], wanted_boxes[0, 0], atol=1e-3, rtol=1e-4)
    assert not torch.equal(expected, best[:, :7].sigmoid())  # there are duplicates among them


def test_detections_on_several_levels_are_duplicates(tiny: HKDDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    """All points of all levels return the same box: only the best score remains, in `predict` and `postprocess`."""

    def decode_to_one_box(box_logits: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, 0, 40, 40]).expand(*box_logits.shape[:2], 4)

    monkeypatch.setattr("hkd_det.models.detector.dist2bbox", decode_to_one_box)
    torch.nn.init.normal_(tiny.head.one2one.weight)
    with torch.no_grad():
        images = torch.randint(0, 255, (1, 3, 64, 96), dtype=torch.uint8)
        _, scores = tiny.predict(images)
        detections = tiny.postprocess(tiny(images))
    assert scores[0, 0] > 0.003 and (scores[0] > 1e-6).sum() == 1
    torch.testing.assert_close(detections.scores[0], scores[0, :100])


def test_one2one_gradient_does_not_reach_the_neck(tiny: HKDDetector) -> None:
    tiny.train()
    tiny(torch.rand(1, 3, 64, 64) * 255).one2one.logits.sum().backward()
    assert all(parameter.grad is None for parameter in tiny.neck.parameters())
    assert all(parameter.grad is not None for parameter in tiny.head.one2one_tower.convs.parameters())


def test_initial_scores_are_the_prior(tiny: HKDDetector) -> None:
    with torch.no_grad():
        outputs = tiny(torch.zeros(1, 3, 64, 64))
    assert 0.003 < outputs.one2one.logits.sigmoid().mean() < 0.03


def test_frozen_batch_norm_does_not_change(tiny: HKDDetector) -> None:
    tiny.train()
    freeze_batch_norm(tiny)
    before = {name: value.clone() for name, value in tiny.state_dict().items() if "running" in name}
    tiny(torch.rand(2, 3, 64, 64) * 255).one2many.logits.sum().backward()
    after = tiny.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(m.weight.grad is None for m in tiny.modules() if isinstance(m, nn.BatchNorm2d))


def test_unknown_names_raise_with_choices() -> None:
    with pytest.raises(UsageError, match="mini-student"):
        build_model("huge")
    with pytest.raises(UsageError, match="resnet18"):
        Backbone("resnet1", (8, 16, 32))
    with pytest.raises(UsageError, match="strides"):
        Backbone("resnet18", (6,))


def test_load_backbone_weights_copies_all_tensors(tmp_path: Path) -> None:
    source, target = HKDDetector(TINY).backbone, HKDDetector(TINY).backbone
    torch.save(source.body.state_dict(), tmp_path / "weights.pth")
    load_backbone_weights(target, TINY.backbone, str(tmp_path / "weights.pth"))
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def test_load_backbone_weights_rejects_unfit_files(tmp_path: Path) -> None:
    target = HKDDetector(TINY).backbone
    torch.save(HKDDetector(MODELS["mini-student"]).backbone.body.state_dict(), tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name, message in (("other.pth", "fits"), ("text.pth", "not a weights file"), ("none.pth", "no such file")):
        with pytest.raises(DataError, match=message):
            load_backbone_weights(target, TINY.backbone, str(tmp_path / name))
