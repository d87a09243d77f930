"""Student, frozen teacher and distillation methods as one module, so that DDP finds every trained parameter."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hkd_det.distill import check_methods, check_teacher, load_method
from hkd_det.distill.base import DistillMethod, TeacherModel
from hkd_det.distill.batch import DistillationBatch
from hkd_det.distill.gradients import AllReduceMean, GradientBalancer, SumBalancer
from hkd_det.models.base import BaseDetector, ModelOutputs, Targets
from hkd_det.models.feature_layers import FeatureHooks
from hkd_det.ops.losses import ReduceMean, clamp_min_one

LossDict = dict[str, Tensor]


def build_methods(
    configs: Mapping[str, Any], student: BaseDetector, teacher: Any, teacher_path: Path = Path("the teacher")
) -> list[DistillMethod]:
    """Build the methods of a run for a pair of networks.

    Args:
        configs: Method name -> configuration, as `parse_methods` returns it.
        student: Detector to train.
        teacher: Frozen teacher.
        teacher_path: File of the teacher, for messages.

    Returns:
        The methods in the order of `METHODS`.

    Raises:
        UsageError: If methods exclude each other or the teacher does not provide what a method needs.
    """
    same = {"same_architecture"} if type(teacher) is type(student) else set()
    check_teacher(configs, frozenset(teacher.capabilities | same), teacher_path.name)
    return [load_method(name)(config, student, teacher) for name, config in check_methods(configs).items()]


class Distiller(nn.Module):
    """A student with its detection loss, its teacher and the distillation methods.

    Only the student and the methods are submodules. The teacher is not trained, averaged or saved.

    Args:
        student: Detector to train. Copies of it must be made before: the hooks of this class would be copied with it.
        teacher: Frozen teacher, or None without distillation.
        methods: Methods built for this pair.
        reduce_mean: Converts a sum over the images of this process to the divisor that is right over all processes.
    """

    def __init__(
        self,
        student: BaseDetector,
        teacher: TeacherModel | None = None,
        methods: Sequence[DistillMethod] = (),
        reduce_mean: ReduceMean = clamp_min_one,
    ) -> None:
        super().__init__()
        self.student = student
        self.methods = nn.ModuleList(methods)
        self.reduce_mean = reduce_mean
        # A tuple hides the teacher from the registration of submodules.
        self._teacher = (teacher.eval().requires_grad_(False) if isinstance(teacher, nn.Module) else teacher,)
        self._student_hooks: list[FeatureHooks] = []
        self._teacher_hooks: list[FeatureHooks] = []
        self._student_names: list[str] = []
        self._teacher_names: list[str] = []
        if teacher is not None:
            self._register_hooks(student, teacher)

    def forward(self, images: Tensor, targets: Targets, distill_weight: float) -> tuple[LossDict, LossDict]:
        """Compute the losses of a batch.

        Args:
            images (Tensor[B, 3, H, W]): RGB, 0 to 255.
            targets: Ground truth.
            distill_weight: Factor for the distillation losses, 0 to 1. At 0 the teacher does not run.

        Returns:
            det_losses: Detection losses by name, scalars. Empty if a method sets their weight to 0.
            distill_losses: Weighted distillation losses by name, scalars. Empty without distillation.
        """
        is_distilled = len(self.methods) > 0 and distill_weight > 0
        # The teacher runs before the student, so that its activations are free when the student allocates its own.
        teacher = self._forward_teacher(images) if is_distilled else None
        outputs = self.student(images)
        if teacher is None:
            self._clear()
            return self.student.loss(outputs, targets, self.reduce_mean), {}
        batch = self._make_batch(images, targets, outputs, *teacher)
        losses = {name: loss for method in self.methods for name, loss in method(batch).items()}
        det_weight = math.prod(method.det_loss_weight for method in self._iterate_methods())
        det_losses = self.student.loss(outputs, targets, self.reduce_mean) if det_weight else {}
        return (
            {name: det_weight * loss for name, loss in det_losses.items()},
            {name: distill_weight * loss for name, loss in losses.items()},
        )

    def before_step(self, step: int) -> None:
        """Prepare all methods for a step, counted from 0 over the whole run.

        Args:
            step: Index of the step.
        """
        for method in self._iterate_methods():
            method.before_step(step)

    def after_backward(self, step: int) -> dict[str, float]:
        """Let all methods change gradients; return their values to log.

        Args:
            step: Index of the step.

        Returns:
            Value name -> value.
        """
        return {name: value for m in self._iterate_methods() for name, value in m.after_backward(step).items()}

    def after_step(self) -> None:
        """Let all methods change parameters after the optimizer step."""
        for method in self._iterate_methods():
            method.after_step()

    def deployable_model(self, model: BaseDetector) -> BaseDetector:
        """Return the student, or a copy of it, without the layers that only training needs.

        Args:
            model: The student, or its moving average.

        Returns:
            The plain detector.
        """
        for method in self._iterate_methods():
            model = method.deployable_model(model)
        return model

    @property
    def target_reached(self) -> bool:
        """Whether every method allows the student to become `best.pt`."""
        return all(method.target_reached for method in self._iterate_methods())

    def summary(self) -> str:
        """Return the methods' text for the last line of the run."""
        return "".join(method.summary() for method in self._iterate_methods())

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that get no weight decay, as timm's models do."""
        excluded = {id(parameter) for method in self._iterate_methods() for parameter in method.undecayed_parameters()}
        return {name for name, parameter in self.named_parameters() if id(parameter) in excluded}

    def build_balancer(self, all_reduce_mean: AllReduceMean) -> GradientBalancer:
        """Return the gradient balancer of the methods, or the plain sum.

        Args:
            all_reduce_mean: Averages tensors over processes, in place.

        Returns:
            The first balancer that a method provides, or a `SumBalancer`.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        balancers = [method.balancer(parameters, all_reduce_mean) for method in self._iterate_methods()]
        return next((balancer for balancer in balancers if balancer is not None), SumBalancer())

    def close(self) -> None:
        """Remove the hooks from both networks."""
        for hooks in (*self._student_hooks, *self._teacher_hooks):
            hooks.close()

    def _iterate_methods(self) -> list[DistillMethod]:
        return list(self.methods)  # type: ignore[arg-type]  # ModuleList is not generic

    def _register_hooks(self, student: BaseDetector, teacher: Any) -> None:
        """Record each layer that a method requests once; copy it unless no layer works in place after it."""
        requests = [(method.feature_layers(), method.clone_student_features) for method in self._iterate_methods()]
        student_names = {name: clone for pairs, clone in requests for name in pairs.student}
        teacher_names = {name: True for pairs, _ in requests for name in pairs.teacher}
        self._student_hooks, self._student_names = _make_hooks(student, student_names)
        self._teacher_hooks, self._teacher_names = _make_hooks(teacher, teacher_names)

    def _forward_teacher(self, images: Tensor) -> tuple[ModelOutputs, dict[str, Tensor]]:
        (teacher,) = self._teacher
        assert teacher is not None
        with torch.no_grad():
            outputs = teacher(images)
        return outputs, _pop_features(self._teacher_hooks, self._teacher_names)

    def _make_batch(
        self,
        images: Tensor,
        targets: Targets,
        student_outputs: ModelOutputs,
        teacher_outputs: Any,
        teacher_features: dict[str, Tensor],
    ) -> DistillationBatch:
        noisy_outputs = self._perturb(teacher_outputs)
        for method in self._iterate_methods():
            teacher_features = method.perturb_features(teacher_features)
        return DistillationBatch(
            images,
            targets,
            self.student,
            self._teacher[0],
            student_outputs,
            noisy_outputs,
            _pop_features(self._student_hooks, self._student_names),
            teacher_features,
            self.reduce_mean,
            # Detections of perturbed outputs are perturbed already.
            self._perturb if noisy_outputs is teacher_outputs else None,
        )

    def _perturb(self, outputs: Any) -> Any:
        for method in self._iterate_methods():
            outputs = method.perturb_teacher(outputs)
        return outputs

    def _clear(self) -> None:
        _pop_features(self._student_hooks, self._student_names)
        for method in self._iterate_methods():
            method.clear()


def _make_hooks(model: Any, names: Mapping[str, bool]) -> tuple[list[FeatureHooks], list[str]]:
    """Register hooks on layers of a model.

    Args:
        model: Detector, or an ONNX teacher without layers.
        names: Layer name -> whether to copy its output. The default feature layers are never copied.
    """
    default = {info.name for info in model.feature_info()}
    hooks, ordered = [], []
    for clone in (False, True):
        group = [name for name, should_copy in names.items() if (should_copy and name not in default) == clone]
        if group:
            hooks.append(FeatureHooks(model, group, clone))
            ordered += group
    return hooks, ordered


def _pop_features(hooks: Sequence[FeatureHooks], names: Sequence[str]) -> dict[str, Tensor]:
    return dict(zip(names, [feature for group in hooks for feature in group.pop()], strict=True))
