"""The named models, their sizes, and the counting of parameters and operations."""

import pytest
import torch
from torch import nn

from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.zoo import DEFAULT_TEACHER, build_model, count_params_and_flops

TINY = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)


@pytest.mark.slow
@pytest.mark.parametrize("student", DEFAULT_TEACHER)
def test_student_has_at_most_a_sixth_of_its_teacher(student: str) -> None:
    small = count_params_and_flops(build_model(student), (64, 64))
    large = count_params_and_flops(build_model(DEFAULT_TEACHER[student]), (64, 64))
    assert small.num_params * 6 <= large.num_params
    assert small.flops < large.flops


def test_teacher_r50_has_the_parameters_of_resnet50() -> None:
    backbone = build_model("teacher-r50").backbone
    # torchvision's ResNet-50 has 25,557,032 parameters, 2,049,000 of them in the classifier.
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 25_557_032 - 2_049_000


def test_flops_are_twice_the_multiply_accumulates() -> None:
    """Against a count from the output shapes of all convolutions that run in inference."""
    tiny = HKDDetector(TINY).eval()
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
