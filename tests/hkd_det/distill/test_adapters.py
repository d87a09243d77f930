"""What brings the student's channels to the teacher's: its shapes, and what each kind promises."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hkd_det.distill import parse_methods
from hkd_det.distill.adapters import DILATIONS, Adapter, MultiScaleProjection, OrthogonalProjection, Projection
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.distill.hkd import HKDConfig
from hkd_det.models.base import BaseDetector, FeatureInfo
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
from hkd_det.ops.losses import pkd_loss

KINDS: list[Projection] = ["plain", "norm", "multi-scale", "orthogonal"]
ANCHORS = (16, 32, 64, 128, 256)


def make_distiller(student: BaseDetector, teacher: Any, methods: dict[str, Any]) -> Distiller:
    return Distiller(student, teacher, build_methods(parse_methods(methods), student, teacher))


@pytest.mark.parametrize("projection", KINDS)
@pytest.mark.parametrize(("mine", "other"), [((8, 5), (16, 7)), ((16, 7), (8, 5)), ((8, 6), (8, 6))])
def test_adapter_output_has_teacher_shape(
    projection: Projection, mine: tuple[int, int], other: tuple[int, int]
) -> None:
    adapter = Adapter(FeatureInfo("s", *mine), FeatureInfo("t", *other), projection)
    out = adapter(torch.randn(2, mine[1], 64 // mine[0], 96 // mine[0]))
    assert out.shape == (2, other[1], 64 // other[0], 96 // other[0])


def far_from_orthonormal(weight: Tensor) -> float:
    fewer = weight if weight.shape[0] <= weight.shape[1] else weight.T
    return (fewer @ fewer.T - torch.eye(len(fewer))).abs().max().item()


@pytest.mark.parametrize(("mine", "other"), [(5, 9), (9, 5), (6, 6)])
def test_orthogonal_projection_stays_orthonormal_in_training(mine: int, other: int) -> None:
    torch.manual_seed(0)
    turn = OrthogonalProjection(mine, other)
    maps, wanted = torch.randn(2, mine, 6, 6), torch.randn(2, other, 6, 6)
    optimizer = torch.optim.AdamW(turn.parameters(), lr=0.05, weight_decay=0.05)
    before, history = turn.linear.weight.detach().clone(), []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = pkd_loss(turn(maps), wanted).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert far_from_orthonormal(turn.linear.weight.detach()) < 1e-5
    assert (turn.linear.weight - before).abs().max() > 0.1 and history[-1] < history[0]


def test_orthogonal_projection_preserves_lengths_and_angles() -> None:
    a, b = torch.randn(2, 1, 5, 3, 3)
    turn = OrthogonalProjection(5, 9)
    torch.testing.assert_close((turn(a) * turn(b)).sum(1), (a * b).sum(1))


def test_multi_scale_projection_starts_as_plain_convolution() -> None:
    projection = MultiScaleProjection(4, 6)
    maps = torch.zeros(1, 4, 15, 15)
    maps[..., 7, 7] = 1.0
    torch.testing.assert_close(projection(maps), projection.pointwise(maps))
    for view in projection.dilated_convs:
        torch.nn.init.ones_(view.weight)
    seen = (projection(maps) - projection.pointwise(torch.zeros_like(maps))).abs().sum(1)[0] > 1e-6
    rows, columns = seen.nonzero().T.tolist()
    offsets = {(row - 7, column - 7) for row, column in zip(rows, columns, strict=True)}
    assert offsets == {(i * rate, j * rate) for rate in DILATIONS for i in (-1, 0, 1) for j in (-1, 0, 1)}
    assert sum(p.numel() for p in projection.parameters()) == 4 * 6 + 6 + 4 * 9 * len(DILATIONS)


@pytest.mark.parametrize("projection", KINDS)
def test_recipe_selects_adapter_for_both_student_kinds(projection: Projection) -> None:
    spec = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
    thin = FasterRCNNSpec("resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=ANCHORS)
    methods = {"hkd": HKDConfig(adapter=projection)}
    for student, teacher in ((HKDDetector(spec), HKDDetector(spec)), (FasterRCNN(thin), FasterRCNN(thin))):
        adapters = [m for m in make_distiller(student, teacher, methods).modules() if isinstance(m, Adapter)]
        assert adapters and all(type(a.projection) is type(adapters[0].projection) for a in adapters)
        kind = {
            "plain": torch.nn.Conv2d,
            "norm": torch.nn.Sequential,
            "multi-scale": MultiScaleProjection,
            "orthogonal": OrthogonalProjection,
        }
        assert isinstance(adapters[0].projection, kind[projection])
