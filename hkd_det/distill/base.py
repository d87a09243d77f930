"""Lesson: a batch as student and teacher see it, and what a method makes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hkd_det.models.base import BaseDetector, DetectionBatch, FeatureInfo, ModelOutputs, ProposalOutputs, Targets
from hkd_det.ops.losses import ReduceMean


@dataclass(frozen=True, eq=False)
class DistillationBatch:
    """All that a method may use of one step.

    pictures: [B, 3, H, W] RGB, 0..255. mine, other: what student and teacher say, the teacher's without gradients.
    my_maps, other_maps: their tapped maps, fine to coarse; none of a black box. noise: what a noisy teacher does to its
    detections, if what it says had none yet.
    norm_of: makes a sum over this process's pictures the divisor that is right over all processes.
    """

    images: Tensor
    targets: Targets
    student: BaseDetector
    teacher: "TeacherModel"
    student_outputs: ModelOutputs
    teacher_outputs: ModelOutputs
    student_features: Sequence[Tensor]
    teacher_features: Sequence[Tensor]
    reduce_mean: ReduceMean
    perturb_detections: Callable[[DetectionBatch], DetectionBatch] | None = None

    @cached_property
    def teacher_detections(self) -> DetectionBatch:
        """The teacher's finished detections, at most 100 a picture; worked out once, for all methods."""
        found = self.teacher.postprocess(self.teacher_outputs)
        return self.perturb_detections(found) if self.perturb_detections else found


class DistillMethod(Protocol):
    """A way to teach: an nn.Module whose parameters, if any, are trained with the student and dropped afterwards."""

    def __call__(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """The lesson's weighted terms, scalars under the method's own names."""


class TeacherModel(Protocol):
    """A detector of any family, or an ONNX teacher."""

    capabilities: ClassVar[frozenset[str]]

    def __call__(self, images: Tensor) -> ModelOutputs:
        """What it says of [B, 3, H, W] RGB pictures, 0..255."""

    def postprocess(self, outputs: Any, max_det: int = 100) -> DetectionBatch:
        """Finished detections, at most `top` a picture, from an output that it gave."""

    def feature_info(self) -> list[FeatureInfo]:
        """The ends of its pyramid's levels, fine to coarse; none of a black box."""


def sample_rois(batch: DistillationBatch, teacher_outputs: ProposalOutputs, num_proposals: int) -> list[Tensor]:
    """For each picture [R, 4] xyxy: its people, and the teacher's best `proposals`."""
    people, _ = batch.targets.split_ignored()
    return [
        torch.cat([mine, best[:num_proposals]]) for mine, best in zip(people, teacher_outputs.proposals, strict=True)
    ]
