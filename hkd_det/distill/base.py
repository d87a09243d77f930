"""Interface of a distillation method, and the data that a method receives in each training step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from hkd_det.distill.gradients import AllReduceMean, GradientBalancer
from hkd_det.models.base import (
    BaseDetector,
    BranchOutputs,
    DenseOutputs,
    DetectionBatch,
    FeatureInfo,
    ModelOutputs,
    ProposalOutputs,
    RoIOutputs,
    Targets,
)
from hkd_det.models.feature_layers import LayerPairs
from hkd_det.ops.losses import SCORE_EPS, ReduceMean

MAX_ROIS = 64  # RoIs per image at which two detectors are compared
DUPLICATE_IOU = 0.5  # The score of a duplicate in an end-to-end teacher is near 0 and does not describe its content.

Perturbed = TypeVar("Perturbed", DenseOutputs, ProposalOutputs, DetectionBatch, RoIOutputs)


class TeacherModel(Protocol):
    """A frozen teacher: a detector of any family, or an ONNX model."""

    @property
    def capabilities(self) -> frozenset[str]:
        """What distillation can read: any of "features", "logits", "detections"."""

    def __call__(self, images: Tensor) -> ModelOutputs:
        """Predict from images [B, 3, H, W], RGB, 0 to 255.

        Args:
            images (Tensor[B, 3, H, W]): RGB, 0 to 255.

        Returns:
            Outputs of the model.
        """

    def postprocess(self, outputs: Any, max_det: int = 100) -> DetectionBatch:
        """Convert outputs of this model to at most `max_det` detections per image.

        Args:
            outputs: Return value of the call.
            max_det: Maximum number of detections per image.

        Returns:
            Detections in descending order of score.
        """

    def feature_info(self) -> list[FeatureInfo]:
        """Return the default feature layers, from the smallest stride to the largest."""


@dataclass(frozen=True, eq=False)
class DistillationBatch:
    """One training batch with the outputs of student and teacher.

    Attributes:
        images (Tensor[B, 3, H, W]): RGB, 0 to 255.
        targets: Ground truth.
        student: Detector in training.
        teacher: Frozen teacher.
        student_outputs: Outputs of the student for `images`.
        teacher_outputs: Outputs of the teacher for `images`, without gradients.
        student_features: Layer name -> feature map [B, C, H', W'], for the layers that the methods request.
        teacher_features: The same of the teacher, without gradients.
        reduce_mean: Converts a local normalization sum to the divisor that is correct for all processes together.
        perturb: Noise for teacher values that are computed later in the step: detections and RoI outputs.
    """

    images: Tensor
    targets: Targets
    student: BaseDetector
    teacher: Any
    student_outputs: ModelOutputs
    teacher_outputs: ModelOutputs
    student_features: Mapping[str, Tensor]
    teacher_features: Mapping[str, Tensor]
    reduce_mean: ReduceMean
    perturb: Callable[[Any], Any] | None = None

    @cached_property
    def teacher_detections(self) -> DetectionBatch:
        """At most 100 teacher detections per image, computed once for all methods."""
        detections: DetectionBatch = self.teacher.postprocess(self.teacher_outputs)
        return self.perturb(detections) if self.perturb else detections

    def forward_teacher_rois(self, rois: Sequence[Tensor]) -> RoIOutputs:
        """Run the second stage of a two-stage teacher, without gradients.

        Args:
            rois (list of Tensor[R_i, 4]): Boxes of each image, xyxy, input pixels.

        Returns:
            Outputs of the RoIs, with the noise of `perturb`.
        """
        with torch.no_grad():
            outputs: RoIOutputs = self.teacher.forward_rois(self.teacher_outputs, rois)
            return self.perturb(outputs) if self.perturb else outputs


@dataclass(frozen=True)
class RunContext:
    """The part of a training run that methods use. Callables replace imports of `hkd_det.train`.

    Attributes:
        model: Name of the student, for messages and checkpoints.
        teacher: File of the teacher.
        save_dir: Directory of the run.
        imgsz_hw: Input height and width, pixels.
        total_steps: Optimizer steps of the whole run.
        distill_ratio: Ratio of the steps in which the teacher is used, 0 to 1.
        seed: Random seed of the run.
        device: Value of `--device`: "auto", "cpu", "cuda" or "cuda:N".
        torch_device: Device of this process.
        world_size: Number of processes.
        resume: Whether the run continues an earlier one.
        setup: Evaluation setup of `evaluate`.
        settings: Resolved configuration of the run as plain values.
        fingerprint: Plain values that identify the training images: data, size, augmentation, seed.
        all_gather: Returns the values of all processes, in the order of ranks.
        iterate_images: Yields at least the given number of augmented images, [B, 3, H, W] uint8 RGB per batch.
        evaluate: Returns the miss rate (MR^-2, fraction) of a detector on the validation split.
    """

    model: str = ""
    teacher: Path = Path()
    save_dir: Path = Path()
    imgsz_hw: tuple[int, int] = (512, 640)
    total_steps: int = 1
    distill_ratio: float = 1.0
    seed: int = 0
    device: str = "cpu"
    torch_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    world_size: int = 1
    resume: bool = False
    setup: str = "Reasonable"
    settings: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    all_gather: Callable[[Any], list[Any]] = lambda value: [value]
    iterate_images: Callable[[int], Iterator[Tensor]] = lambda _num_images: iter(())
    evaluate: Callable[[BaseDetector], float] = lambda _detector: float("nan")


class DistillMethod(nn.Module):
    """A distillation method. Its parameters are trained with the student and dropped after training.

    A subclass defines `Config` and `forward`; every other method has a default that does nothing. The student and the
    teacher must not become submodules: store them in a tuple if the method needs them later.

    Attributes:
        Config: Frozen dataclass with the settings of the method, `distill.NAME` in a recipe.
        requires: What the teacher must provide: any of "features", "logits", "detections", "same_architecture".
        capability_hint: Sentence that the message about a missing capability adds.
        conflicts: Names of methods that cannot be combined with this one.
        has_losses: Whether `forward` returns losses.
        supports_unlabeled: Whether the losses are defined for images without annotations.
        student_source: Origin of the student. "config": `--model` or `--weights`. "teacher": the same, and without
            `--model` a copy of the teacher. "prepared": `prepare_student` builds it from the teacher, and the method
            has no part in training.
        clone_student_features: Whether recorded student layers are copied, because a later layer may work in place.
        det_loss_weight: Factor for the detection losses while the teacher is used.
    """

    Config: ClassVar[type[Any]]
    requires: ClassVar[frozenset[str]] = frozenset()
    capability_hint: ClassVar[str] = ""
    conflicts: ClassVar[frozenset[str]] = frozenset()
    has_losses: ClassVar[bool] = True
    supports_unlabeled: ClassVar[bool] = False
    student_source: ClassVar[Literal["config", "teacher", "prepared"]] = "config"
    clone_student_features: ClassVar[bool] = True
    det_loss_weight: float = 1.0

    def __init__(self, config: Any, student: BaseDetector, teacher: TeacherModel) -> None:  # noqa: ARG002 - interface
        """Build the method for a pair of networks.

        Args:
            config: Instance of `Config`.
            student: Detector to train, on the CPU.
            teacher: Frozen teacher with the capabilities in `requires`.
        """
        super().__init__()
        self.config = config

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """Compute the weighted losses, scalars; the method name prefixes each key.

        Args:
            batch: Batch with the outputs of both networks.

        Returns:
            Loss name -> weighted scalar.
        """
        raise NotImplementedError

    def feature_layers(self) -> LayerPairs:
        """Return the names of the layers whose outputs `forward` reads from the batch."""
        return LayerPairs()

    def setup(self, context: RunContext) -> None:
        """Prepare method and student for the run, before the moving average copies the student.

        Args:
            context: The run.
        """

    def perturb_teacher(self, outputs: Perturbed) -> Perturbed:
        """Change teacher outputs before any method reads them; return them unchanged by default.

        Args:
            outputs: Outputs of the teacher, its detections, or its RoI outputs.

        Returns:
            Changed outputs of the same type.
        """
        return outputs

    def perturb_features(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Change teacher features [B, C, H, W] before any method reads them.

        Args:
            features: Layer name -> feature map.

        Returns:
            Changed feature maps.
        """
        return features

    def before_step(self, step: int) -> None:
        """Prepare the step, counted from 0 over the whole run.

        Args:
            step: Index of the step, from 0 over the whole run.
        """

    def after_backward(self, step: int) -> dict[str, float]:  # noqa: ARG002 - interface
        """Change gradients before clipping; return values to log.

        Args:
            step: Index of the step, from 0 over the whole run.

        Returns:
            Value name -> value to log.
        """
        return {}

    def after_step(self) -> None:
        """Change parameters after the optimizer step."""

    def clear(self) -> None:
        """Release tensors of a step without distillation."""

    def deployable_model(self, model: BaseDetector) -> BaseDetector:
        """Return the detector without training-only layers, as it is evaluated and saved.

        Args:
            model: The student, or its moving average.

        Returns:
            The plain detector.
        """
        return model

    @property
    def target_reached(self) -> bool:
        """Whether the student may become `best.pt`."""
        return True

    def summary(self) -> str:
        """Return text for the last line of the run, or an empty string."""
        return ""

    def balancer(
        self,
        parameters: Sequence[Tensor],  # noqa: ARG002 - interface
        all_reduce_mean: AllReduceMean,  # noqa: ARG002 - interface
    ) -> GradientBalancer | None:
        """Return an object that combines the gradients of both losses, or None for their sum.

        Args:
            parameters: Parameters of the student and of all methods.
            all_reduce_mean: Averages tensors over processes, in place.

        Returns:
            The balancer, or None.
        """
        return None

    @classmethod
    def prepare_student(cls, config: Any, context: RunContext) -> Path | None:  # noqa: ARG003 - interface
        """Build the student before training; return its checkpoint, or None to use the configured student.

        Args:
            config: Configuration of this method.
            context: The run.

        Returns:
            The checkpoint, or None.
        """
        return None

    @classmethod
    def required_capabilities(cls, config: Any) -> frozenset[str]:  # noqa: ARG003 - interface
        """Return `requires` for a configuration.

        Args:
            config: Configuration of this method.

        Returns:
            Required capabilities.
        """
        return cls.requires

    @classmethod
    def resolve_config(cls, config: Any, methods: Mapping[str, Any]) -> Any:  # noqa: ARG003 - interface
        """Check the configuration against those of all methods in the run; return the one to use.

        Args:
            config: Configuration of this method.
            methods: Method name -> configuration of every method in the run, this one included.

        Returns:
            The configuration to use.

        Raises:
            UsageError: If the combination is invalid.
        """
        return config


class LogitPair(NamedTuple):
    """Logits of student and teacher for the same boxes.

    Attributes:
        student (Tensor[...]): Score logits.
        teacher (Tensor[...]): Score logits, without gradients.
        avg_factor (Tensor): Scalar divisor for a sum over the pair: the sum of the teacher scores for anchor points,
            the number of RoIs for a second stage.
    """

    student: Tensor
    teacher: Tensor
    avg_factor: Tensor


def comparable_logits(batch: DistillationBatch) -> list[LogitPair]:
    """Pair the logits of student and teacher that refer to the same boxes, for every combination of families.

    Two dense detectors are compared at their anchor points, branch by branch. Two two-stage detectors are compared on
    the ground truth and the teacher's best proposals. A two-stage student is compared with a dense teacher on the
    teacher's detections after NMS. A dense student is compared with a two-stage teacher on the student's best boxes.
    The one-to-one branch of that student is left out, because its scores of duplicates must be 0 and those of the
    teacher are not.

    Args:
        batch: Batch with the outputs of both networks.

    Returns:
        One pair per branch, or one pair of RoIs.
    """
    student, teacher = batch.student_outputs, batch.teacher_outputs
    if isinstance(student, DenseOutputs) and isinstance(teacher, DenseOutputs):
        branches = ((student.one2many, teacher.one2many), (student.one2one, teacher.one2one))
        return [
            LogitPair(s.logits, t.logits, t.logits.sigmoid().sum())
            for s, t in branches
            if s is not None and t is not None
        ]
    if isinstance(student, ProposalOutputs) and isinstance(teacher, ProposalOutputs):
        rois = sample_rois(batch, MAX_ROIS)
        student_logits = batch.student.forward_rois(student, rois).logits
        with torch.no_grad():
            return [_pair_rois(student_logits, batch.teacher.forward_rois(teacher, rois).logits)]
    if isinstance(student, ProposalOutputs):
        detections = batch.teacher_detections.suppress(DUPLICATE_IOU)
        teacher_logits = torch.cat(detections.scores).logit(eps=SCORE_EPS).detach()
        return [_pair_rois(batch.student.forward_rois(student, detections.boxes_xyxy).logits, teacher_logits)]
    assert isinstance(student, DenseOutputs)
    top = student.one2many.logits.topk(min(MAX_ROIS, student.one2many.logits.shape[1])).indices  # [B, K]
    boxes = student.one2many.boxes_xyxy.detach().gather(1, top[..., None].expand(-1, -1, 4))
    with torch.no_grad():
        teacher_logits = batch.teacher.forward_rois(teacher, boxes.unbind()).logits
    return [_pair_rois(student.one2many.logits.gather(1, top).flatten(), teacher_logits)]


def _pair_rois(student_logits: Tensor, teacher_logits: Tensor) -> LogitPair:
    count = torch.tensor(float(len(student_logits)), device=student_logits.device)
    return LogitPair(student_logits, teacher_logits, count)


def match_branches(batch: DistillationBatch) -> list[tuple[BranchOutputs, BranchOutputs]]:
    """Pair the branches of two dense detectors with the same anchor points.

    Args:
        batch: Batch with the outputs of both networks.

    Returns:
        Student and teacher branches: one-to-many first, then one-to-one if both have it. Empty for other families and
        for detectors with different anchor points.
    """
    student, teacher = batch.student_outputs, batch.teacher_outputs
    if not (isinstance(student, DenseOutputs) and isinstance(teacher, DenseOutputs)):
        return []
    if not student.has_same_anchor_points(teacher):
        return []
    pairs = [(student.one2many, teacher.one2many)]
    if student.one2one is not None and teacher.one2one is not None:
        pairs.append((student.one2one, teacher.one2one))
    return pairs


def sample_rois(batch: DistillationBatch, num_proposals: int) -> list[Tensor]:
    """Return the ground-truth boxes and the teacher's best proposals of each image.

    Args:
        batch: Batch with a two-stage teacher.
        num_proposals: Maximum number of proposals per image.

    Returns:
        list of Tensor[R_i, 4]: xyxy, input pixels.
    """
    outputs = batch.teacher_outputs
    assert isinstance(outputs, ProposalOutputs)
    gt_boxes, _ = batch.targets.split_ignored()
    return [
        torch.cat([boxes, proposals[:num_proposals]])
        for boxes, proposals in zip(gt_boxes, outputs.proposals, strict=True)
    ]
