"""Interface of a distillation method: the method, its teacher, and the part of a training run that it can use."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from hkd_det.distill.batch import DistillationBatch
from hkd_det.distill.gradients import AllReduceMean, GradientBalancer
from hkd_det.models.base import (
    BaseDetector,
    DenseOutputs,
    DetectionBatch,
    FeatureInfo,
    ModelOutputs,
    ProposalOutputs,
    RoIOutputs,
)
from hkd_det.models.feature_layers import LayerPairs

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

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Return parameters of method or student without weight decay, in addition to biases and normalization."""
        return []

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
    def candidate_configs(cls, config: Any) -> list[Any]:  # noqa: ARG003 - interface
        """Return configurations of which short runs choose one before training, or none if `config` is complete.

        Args:
            config: Configuration of this method.

        Returns:
            Complete configurations. The first of equally good ones is chosen.
        """
        return []

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
