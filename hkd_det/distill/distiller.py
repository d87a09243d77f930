"""Distiller: runs the frozen teacher on the student's batch and asks the methods for their terms.

Learner: what one step of training computes. One module, so that DDP sees every parameter that learns.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hkd_det.distill.base import DistillationBatch
from hkd_det.distill.cdd.method import CDD
from hkd_det.distill.hkd import HKD, HKDConfig, TwoStageHKD
from hkd_det.distill.methods import DistillConfig
from hkd_det.distill.noisy_teacher import NoisyLogitLoss, NoisyTeacher, check_same_strides
from hkd_det.distill.soft_labels import SoftLabelDistillation
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector, FeatureInfo, ModelOutputs, ProposalOutputs, Targets
from hkd_det.models.feature_layers import LayerPairs, pair_layers, select_layers
from hkd_det.models.onnx_teacher import OnnxTeacher
from hkd_det.ops.hooks import FeatureHooks
from hkd_det.ops.losses import ReduceMean


class DistillationLoss(nn.Module):
    """The methods that teach one detector by another. Its parameters are the methods' own, never the teacher's."""

    def __init__(self, student: BaseDetector, teacher: BaseDetector | OnnxTeacher, config: DistillConfig) -> None:
        super().__init__()
        # In tuples, so no submodules: the teacher is not trained, averaged or saved, and the student not twice.
        self._teacher = (teacher.eval().requires_grad_(False),)
        self._student = (student,)
        inside = white_box_teacher(teacher, config)
        names = config.hkd.feature_layers if config.hkd else LayerPairs()
        student_taps, teacher_taps = select_layers(student, inside, names) if inside else ([], [])
        # Nothing works in place behind the ends of a pyramid, but behind a layer that somebody names something may.
        copies = bool(names.student)
        self._student_hooks = FeatureHooks(student, [layer.name for layer in student_taps], copies)
        self._teacher_hooks = FeatureHooks(teacher, [layer.name for layer in teacher_taps], copies)
        noise = config.noisy_teacher
        self.noisy_teacher = NoisyTeacher(noise) if noise and noise.mode == "targets" else None
        self.det_loss_weight = config.hkd.det_loss_weight if config.hkd else 1.0
        self._teacher_cache: tuple[ModelOutputs, list[Tensor]] | None = None
        self.methods = nn.ModuleList()
        if config.hkd and inside:
            self.methods.append(
                _build_hkd(student, inside, (student_taps, teacher_taps), config.hkd, self.noisy_teacher)
            )
        if config.soft_labels:
            self.methods.append(SoftLabelDistillation(config.soft_labels))
        if noise and noise.mode == "l2" and inside:
            check_same_strides(student, inside)
            self.methods.append(NoisyLogitLoss(noise))
        self.cdd: CDD | None = None
        if config.cdd and inside:
            # Hierarchical distillation has a logit level of its own.
            settings = replace(config.cdd, cls=0.0) if config.hkd else config.cdd
            self.cdd = CDD(student, inside, settings)
            self.methods.append(self.cdd)

    def forward_teacher(self, images: Tensor) -> None:
        """Run the teacher on the batch that the student sees next: what it needed meanwhile is then the student's."""
        with torch.no_grad():
            output: ModelOutputs = self._teacher[0](images)
        self._teacher_cache = output, self._teacher_hooks.pop()

    def forward(
        self,
        images: Tensor,
        student_outputs: ModelOutputs,
        targets: Targets,
        distill_weight: float,
        reduce_mean: ReduceMean,
    ) -> dict[str, Tensor]:
        """The distillation terms for the batch the student has just seen, times `strength`, 0..1.

        Its teacher need not have been heard before; that only saves memory.
        """
        (teacher,), (student,) = self._teacher, self._student
        if self._teacher_cache is None:
            self.forward_teacher(images)
        assert self._teacher_cache is not None
        (other, other_maps), self._teacher_cache = self._teacher_cache, None
        if self.noisy_teacher:
            other, other_maps = (
                self.noisy_teacher.perturb_outputs(other),
                self.noisy_teacher.perturb_features(other_maps),
            )
        my_maps = self._student_hooks.pop()
        noise = (
            self.noisy_teacher.perturb_detections if self.noisy_teacher and isinstance(other, ProposalOutputs) else None
        )
        lesson = DistillationBatch(
            images, targets, student, teacher, student_outputs, other, my_maps, other_maps, reduce_mean, noise
        )
        terms: dict[str, Tensor] = {}
        for method in self.methods:
            terms |= method(lesson)
        return {name: distill_weight * term for name, term in terms.items()}

    def clear(self) -> None:
        """Let go of what was recorded in a step that is not distilled."""
        self._student_hooks.pop()
        if self.cdd:
            self.cdd.clear()

    def close(self) -> None:
        """Remove the taps from both networks."""
        self._student_hooks.close()
        self._teacher_hooks.close()
        if self.cdd:
            self.cdd.close()


def white_box_teacher(teacher: BaseDetector | OnnxTeacher, config: DistillConfig) -> BaseDetector | None:
    """The teacher, if its features and logits can be read; UsageError for a method that would need them of another."""
    if isinstance(teacher, BaseDetector):
        return teacher
    shows = f"{teacher.model.path} shows neither features nor logits"
    if config.noisy_teacher and config.noisy_teacher.mode == "l2":
        raise UsageError(
            f"--distill noisy_teacher: {shows}; next to soft_labels, distill.noisy_teacher.mode=targets is for it"
        )
    if config.hkd or config.cdd:
        asked = "hkd" if config.hkd else "cdd"
        raise UsageError(f"--distill {asked}: {shows}; --distill soft_labels learns from its boxes and scores")
    return None


def _build_hkd(
    student: BaseDetector,
    teacher: BaseDetector,
    layers: tuple[list[FeatureInfo], list[FeatureInfo]],
    config: HKDConfig,
    noisy_teacher: NoisyTeacher | None,
) -> nn.Module:
    """The published form between two-stage detectors, ours where either is dense; `taps` are both's."""
    if "rois" in student.capabilities & teacher.capabilities:
        _check_ignored_options(
            config, ("pyramid", "region", "cls", "box", "fg_ratio", "region_min_score", "max_regions")
        )
        pairs = pair_layers(*layers, config.feature_layers)
        return TwoStageHKD(student, teacher, config.two_stage, noisy_teacher, config.adapter, pairs)
    _check_ignored_options(config, ("two_stage",))
    return HKD(*layers, config)


def _check_ignored_options(config: HKDConfig, names: Sequence[str]) -> None:
    """UsageError for a setting of the other form, which nobody would hear."""
    for name in names:
        if getattr(config, name) != getattr(HKDConfig(), name):
            raise UsageError(
                f"distill.hkd.{name} is not heard here: between two Faster R-CNNs the levels' weights are those of "
                "two_stage, for all others those of hkd itself"
            )


LossDict = dict[str, Tensor]


class Distiller(nn.Module):
    """A detector with its loss and, if it has a teacher, its distiller."""

    def __init__(
        self, student: BaseDetector, distillation_loss: DistillationLoss | None, reduce_mean: ReduceMean
    ) -> None:
        super().__init__()
        self.student = student
        self.distillation_loss = distillation_loss
        self.reduce_mean = reduce_mean

    def forward(self, images: Tensor, targets: Targets, distill_weight: float) -> tuple[LossDict, LossDict]:
        """The batch's terms, the task's and the teacher's; `strength` 0..1 scales the latter, at 0 there are none."""
        if self.distillation_loss is not None and distill_weight > 0:
            self.distillation_loss.forward_teacher(images)
        output = self.student(images)
        task = self.student.loss(output, targets, self.reduce_mean)
        taught: LossDict = {}
        if self.distillation_loss is not None and distill_weight > 0:
            taught = self.distillation_loss(images, output, targets, distill_weight, self.reduce_mean)
            task = {name: self.distillation_loss.det_loss_weight * term for name, term in task.items()}
        elif self.distillation_loss is not None:
            self.distillation_loss.clear()
        return task, taught
