"""Adapters: output shapes and the properties of each projection."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hkd_det.distill import parse_methods
from hkd_det.distill.batch import DILATIONS, Adapter, MultiScaleProjection, OrthogonalProjection, Projection
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
@pytest.mark.parametrize(("student", "teacher"), [((8, 5), (16, 7)), ((16, 7), (8, 5)), ((8, 6), (8, 6))])
def test_adapter_output_has_teacher_shape(
    projection: Projection, student: tuple[int, int], teacher: tuple[int, int]
) -> None:
    adapter = Adapter(FeatureInfo("s", *student), FeatureInfo("t", *teacher), projection)
    out = adapter(torch.randn(2, student[1], 64 // student[0], 96 // student[0]))
    assert out.shape == (2, teacher[1], 64 // teacher[0], 96 // teacher[0])


def compute_orthonormality_error(weight: Tensor) -> float:
    rows = weight if weight.shape[0] <= weight.shape[1] else weight.T
    return (rows @ rows.T - torch.eye(len(rows))).abs().max().item()


@pytest.mark.parametrize(("in_channels", "out_channels"), [(5, 9), (9, 5), (6, 6)])
def test_orthogonal_projection_stays_orthonormal_in_training(in_channels: int, out_channels: int) -> None:
    torch.manual_seed(0)
    projection = OrthogonalProjection(in_channels, out_channels)
    features, target = torch.randn(2, in_channels, 6, 6), torch.randn(2, out_channels, 6, 6)
    optimizer = torch.optim.AdamW(projection.parameters(), lr=0.05, weight_decay=0.05)
    before, history = projection.linear.weight.detach().clone(), []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = pkd_loss(projection(features), target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert compute_orthonormality_error(projection.linear.weight.detach()) < 1e-5
    assert (projection.linear.weight - before).abs().max() > 0.1 and history[-1] < history[0]


def test_orthogonal_projection_preserves_lengths_and_angles() -> None:
    a, b = torch.randn(2, 1, 5, 3, 3)
    projection = OrthogonalProjection(5, 9)
    torch.testing.assert_close((projection(a) * projection(b)).sum(1), (a * b).sum(1))


def test_multi_scale_projection_starts_as_plain_convolution() -> None:
    projection = MultiScaleProjection(4, 6)
    features = torch.zeros(1, 4, 15, 15)
    features[..., 7, 7] = 1.0
    torch.testing.assert_close(projection(features), projection.pointwise(features))
    for conv in projection.dilated_convs:
        torch.nn.init.ones_(conv.weight)
    is_affected = (projection(features) - projection.pointwise(torch.zeros_like(features))).abs().sum(1)[0] > 1e-6
    rows, columns = is_affected.nonzero().T.tolist()
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
