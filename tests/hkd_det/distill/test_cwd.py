"""Channel-wise distillation: the divergence against closed forms, and training steps with other channel numbers."""

import math

import pytest
import torch

from hkd_det.distill.cwd import CWDConfig, channel_wise_divergence
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.errors import UsageError
from hkd_det.models.base import Targets
from hkd_det.models.yolox import YOLOX, YOLOXSpec

IMAGES = torch.randint(0, 256, (2, 3, 64, 96), generator=torch.Generator().manual_seed(0)).float()
NO_TARGETS = Targets(torch.zeros(2, 0, 4), *torch.zeros(2, 2, 0, dtype=torch.bool))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_of_two_positions(temperature: float) -> None:
    """With two positions, a channel is a Bernoulli distribution: sigmoid of the difference."""
    student = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]]])
    teacher = torch.tensor([[[[2.0, -1.0]], [[5.0, 5.0]]]])  # the second channels are equal up to a constant
    q, p = (1 / (1 + math.exp(difference / temperature)) for difference in (-2.0, 3.0))
    expected = temperature**2 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / 2
    assert float(channel_wise_divergence(student, teacher, temperature, False)) == pytest.approx(expected, rel=1e-5)


def test_normalization_removes_scale_and_offset_of_each_channel() -> None:
    teacher = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(1))
    scale, offset = torch.tensor([0.5, 1, 2, 4, 8]).view(1, 5, 1, 1), torch.arange(5.0).view(1, 5, 1, 1)
    student = scale * teacher + offset
    assert float(channel_wise_divergence(student, teacher, 1.0, True)) == pytest.approx(0, abs=1e-4)
    assert float(channel_wise_divergence(student, teacher, 1.0, False)) > 0.1


def test_a_step_trains_student_and_adapters() -> None:
    torch.manual_seed(0)
    student, teacher = YOLOX(YOLOXSpec(width=0.125)), YOLOX(YOLOXSpec(width=0.25)).eval()
    methods = build_methods({"cwd": CWDConfig(weight=2.0)}, student, teacher)
    distiller = Distiller(student, teacher, methods)
    _, losses = distiller(IMAGES, NO_TARGETS, 1.0)
    losses["cwd"].backward()
    distiller.close()
    assert losses.keys() == {"cwd"} and float(losses["cwd"].detach()) > 0
    trained = [student.neck.C3_p3.conv3.conv, *(adapter.projection for adapter in methods[0].adapters)]
    for module in trained:
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        assert gradients and all(gradient.abs().sum() > 0 for gradient in gradients)


def test_temperature_must_be_positive() -> None:
    with pytest.raises(UsageError, match=r"distill\.cwd\.temperature"):
        CWDConfig(temperature=0)
