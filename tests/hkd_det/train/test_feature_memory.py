"""What a step has recorded and compared is gone when the next one begins, whatever the method."""

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
BATCH = 7  # no layer has as many channels, so that a map is known by it
IMAGES = torch.randint(0, 255, (BATCH, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
TARGETS = Targets(
    torch.tensor([[[10.0, 10, 40, 60]]]).expand(BATCH, -1, -1),
    torch.ones(BATCH, 1, dtype=torch.bool),
    torch.zeros(BATCH, 1, dtype=torch.bool),
)


def maps_alive() -> int:
    """Maps of a batch that somebody in Python holds, of what was made since `gc.freeze`."""
    return sum(type(thing) is torch.Tensor and thing.ndim == 4 and len(thing) == BATCH for thing in gc.get_objects())


@pytest.mark.parametrize("names", ["hkd,noisy_teacher", "soft_labels", "hkd,mokd", "cdd", "hkd,cdd"])
def test_no_method_keeps_features_after_its_step(names: str) -> None:
    torch.manual_seed(0)
    student, teacher = HKDDetector(STUDENT), HKDDetector(TEACHER)
    configs = parse_methods({name: {"keep_flops": 0.9} if name == "cdd" else {} for name in names.split(",")})
    methods = build_methods(configs, student, teacher)
    for method in methods:
        method.setup(RunContext(imgsz_hw=(64, 64)))
    learner = Distiller(student, teacher, methods).train()
    balancer = learner.build_balancer(lambda _: None)
    held: list[int] = []
    student.neck.register_forward_hook(lambda *_: held.append(maps_alive()))

    def step(strength: float) -> None:
        task, taught = learner(IMAGES, TARGETS, strength)
        balancer.backward(sum_losses(task), sum_losses(taught) if taught else None, strength)
        learner.zero_grad(set_to_none=True)

    gc.collect()
    gc.freeze()
    gc.disable()  # what only the collector frees is held for too long
    try:
        for strength in (1.0, 1.0, 0.0):
            step(strength)
            assert held.pop() > 0 and maps_alive() == 0
    finally:
        gc.enable()
        gc.unfreeze()
