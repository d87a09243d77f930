"""No method keeps feature maps of a step in memory after the step."""

import gc

import pytest
import torch

from hkd_det.distill import parse_methods
from hkd_det.distill.base import RunContext
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.models.base import Targets
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.ops.losses import sum_losses

STUDENT = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
TEACHER = HKDDetectorSpec("resnet10t", {"channels": (8, 16, 16, 32), "stem_width": 8}, channels=24, head_depth=1)
BATCH = 7  # no layer has as many channels, so the first dimension identifies a feature map of a batch
IMAGES = torch.randint(0, 255, (BATCH, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
TARGETS = Targets(
    torch.tensor([[[10.0, 10, 40, 60]]]).expand(BATCH, -1, -1),
    torch.ones(BATCH, 1, dtype=torch.bool),
    torch.zeros(BATCH, 1, dtype=torch.bool),
)


def count_live_feature_maps() -> int:
    """Count the feature maps of a batch that were created since `gc.freeze` and are still referenced."""
    return sum(type(item) is torch.Tensor and item.ndim == 4 and len(item) == BATCH for item in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        "hkd,noisy_teacher",
        "soft_labels",
        "hkd,cdd",
        "hkd,mokd",
        "cdd",
    ],
)
def test_no_method_keeps_features_after_its_step(names: str) -> None:
    torch.manual_seed(0)
    student, teacher = HKDDetector(STUDENT), HKDDetector(TEACHER)
    configs = parse_methods({name: {"keep_flops": 0.9} if name == "cdd" else {} for name in names.split(",")})
    methods = build_methods(configs, student, teacher)
    for method in methods:
        method.setup(RunContext(imgsz_hw=(64, 64)))
    distiller = Distiller(student, teacher, methods).train()
    balancer = distiller.build_balancer(lambda _: None)
    counts: list[int] = []
    student.neck.register_forward_hook(lambda *_: counts.append(count_live_feature_maps()))

    def step(distill_weight: float) -> None:
        det_losses, distill_losses = distiller(IMAGES, TARGETS, distill_weight)
        distill_loss = sum_losses(distill_losses) if distill_losses else None
        balancer.backward(sum_losses(det_losses), distill_loss, distill_weight)
        distiller.zero_grad(set_to_none=True)

    gc.collect()
    gc.freeze()
    gc.disable()  # references must be released without the garbage collector
    try:
        for distill_weight in (1.0, 1.0, 0.0):
            step(distill_weight)
            assert counts.pop() > 0 and count_live_feature_maps() == 0
    finally:
        gc.enable()
        gc.unfreeze()
