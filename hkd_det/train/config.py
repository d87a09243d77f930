"""Configuration of a training run, and its schedules. Torch is imported only to check a teacher and methods."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hkd_det.config import check_range, dataclass_from_dict
from hkd_det.distill import METHODS, check_methods, check_teacher, load_method, parse_methods
from hkd_det.errors import UsageError
from hkd_det.letterbox import STRIDE
from hkd_det.metrics.citypersons import SETUPS

FINETUNE_LR = 2.5e-4  # default of hkd-train for a student that starts from a checkpoint: a quarter of `TrainConfig.lr`


def compute_lr_factor(step: int, total_steps: int, warmup_ratio: float, min_factor: float = 0.02) -> float:
    """Compute the factor of the learning rate: linear warm-up, then half a cosine.

    Args:
        step: Step, 0 to total_steps - 1.
        total_steps: Steps of the run.
        warmup_ratio: Ratio of the steps in which the rate rises, 0 to 1.
        min_factor: Factor at the end.

    Returns:
        Factor, above 0 to 1.
    """
    warmup_steps = max(1, round(total_steps * warmup_ratio))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_factor + (1 - min_factor) * 0.5 * (1 + math.cos(math.pi * progress))


DistillSchedule = Literal["cosine", "constant"]


def compute_distill_weight(
    epoch: int,
    epochs: int,
    no_distill_ratio: float,
    schedule: DistillSchedule = "cosine",
    min_weight: float = 0.0,
) -> float:
    """Compute the factor of the distillation losses: half a cosine from 1, or 1; then 0 in the last epochs.

    Args:
        epoch: Epoch, 0 to epochs - 1.
        epochs: Epochs of the run.
        no_distill_ratio: Ratio of the epochs at the end without distillation.
        schedule: Form of the factor before.
        min_weight: End of the cosine, 0 to 1.

    Returns:
        Factor, 0 to 1.
    """
    end = get_last_phase_start(epochs, no_distill_ratio)
    if epoch >= end:
        return 0.0
    if schedule == "constant":
        return 1.0
    return min_weight + (1 - min_weight) * 0.5 * (1 + math.cos(math.pi * epoch / max(1, end)))


def get_last_phase_start(epochs: int, ratio: float) -> int:
    """Return the first of the last epochs of a run.

    Args:
        epochs: Epochs of the run.
        ratio: Ratio of the last epochs, 0 to 1.
    """
    return epochs - round(epochs * ratio)


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of a run. It decides the weights and is saved with them.

    Attributes:
        data: Name in datasets.yaml, or path of a data YAML file.
        model: Model name, as in `hkd-train --model`.
        save_dir: Directory of the run.
        imgsz_hw: Input height and width, pixels, multiples of 32.
        epochs: Number of epochs.
        patience: Epochs without a lower miss rate after which the run ends; 0 for never.
        batch: Images per step, over all processes.
        lr: Peak learning rate. `hkd-train` sets `FINETUNE_LR` if the student starts from a checkpoint.
        weight_decay: Weight decay of AdamW, not applied to biases, normalization and the compactors of CDD.
        warmup_ratio: Ratio of the steps in which the learning rate rises, 0 to 1.
        clip_grad_norm: Maximum gradient norm.
        ema_decay: Maximum decay of the moving average of the weights, 0 to 1.
        multi_scale: Random change of the input size, 0 to 0.5.
        mosaic: Probability of a mosaic of four images, 0 to 1.
        no_aug_ratio: Ratio of the epochs at the end without mosaic and multi-scale, 0 to 1.
        distill_schedule: Factor of the distillation losses over the epochs: "cosine" falls from 1.
        min_distill_weight: Value to which "cosine" falls, 0 to 1.
        no_distill_ratio: Ratio of the epochs at the end without distillation and unlabeled images, 0 to 1.
        backbone: timm model that replaces the default backbone, or "".
        pretrained: Backbone weights: "imagenet", a file, or "" for none.
        weights: Checkpoint that gives the initial architecture and weights, or "".
        teacher: Checkpoint or ONNX file of the teacher, or "".
        teacher_config: YAML file that describes an ONNX teacher, or "" to look next to or inside the file.
        distill: Method name -> settings: a mapping or the method's configuration.
        unlabeled: Directories of images without annotations, for distillation.
        unlabeled_ratio: Unlabeled images per step as a ratio of `batch`; they are added to it.
        freeze_bn: Whether the statistics of batch normalization stay fixed.
        precision: "bf16" (mixed precision), "fp32", or "auto": bf16 where the device has fast instructions for it.
        device: "auto", "cpu", "cuda" or "cuda:N".
        workers: Processes that load images.
        cache_mib: Space for recompressed images in the temporary directory (TMPDIR), MiB, over all workers.
        seed: Random seed.
        setup: Evaluation setup whose miss rate selects the best epoch.
        tensorboard: Whether to write the values of `results.csv` for TensorBoard.
    """

    data: str
    model: str
    save_dir: str
    imgsz_hw: tuple[int, int] = (512, 640)
    epochs: int = 100
    patience: int = 0
    batch: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_ratio: float = 0.05
    clip_grad_norm: float = 10.0
    ema_decay: float = 0.998
    multi_scale: float = 0.25
    mosaic: float = 0.5
    no_aug_ratio: float = 0.1
    distill_schedule: DistillSchedule = "cosine"
    min_distill_weight: float = 0.0
    no_distill_ratio: float = 0.1
    backbone: str = ""
    pretrained: str = ""
    weights: str = ""
    teacher: str = ""
    teacher_config: str = ""
    distill: dict[str, Any] = field(default_factory=dict)
    unlabeled: tuple[str, ...] = ()
    unlabeled_ratio: float = 0.5
    freeze_bn: bool = False
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: str = "auto"
    workers: int = 2
    cache_mib: int = 1024
    seed: int = 0
    setup: str = "Reasonable"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        self._check_ranges()
        object.__setattr__(self, "distill", parse_methods(self.distill))  # the class is frozen
        self._check_distillation()
        self._check_onnx_teacher()
        self._check_weights()

    def _check_ranges(self) -> None:
        for name in ("epochs", "batch"):
            check_range(name, getattr(self, name), 1)
        for name in ("patience", "workers", "cache_mib", "lr", "weight_decay", "seed"):
            check_range(name, getattr(self, name), 0)
        for name in ("unlabeled_ratio", "clip_grad_norm"):
            check_range(name, getattr(self, name), 0, is_open=True)
        for name in ("warmup_ratio", "mosaic", "no_aug_ratio", "min_distill_weight", "no_distill_ratio", "ema_decay"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("multi_scale", self.multi_scale, 0, 0.5)
        if self.setup not in SETUPS:
            raise UsageError(f"setup: expected one of {', '.join(SETUPS)}, got {self.setup}.")
        if len(self.imgsz_hw) != 2 or any(side < STRIDE or side % STRIDE for side in self.imgsz_hw):
            raise UsageError(
                f"imgsz_hw: expected height and width in pixels, multiples of {STRIDE}, got {list(self.imgsz_hw)}."
            )

    def _check_distillation(self) -> None:
        if bool(self.teacher) != bool(self.distill):
            raise UsageError(
                "--teacher, --distill: one requires the other. In a recipe, set `teacher:` and `distill: {METHOD: {}}`."
            )
        check_methods(self.distill)
        methods = [load_method(name) for name in self.distill]
        has_losses = any(method.has_losses for method in methods)
        if has_losses and not get_last_phase_start(self.epochs, self.no_distill_ratio):
            raise UsageError(
                f"no_distill_ratio: {self.no_distill_ratio} of {self.epochs} epochs leaves no epoch with distillation. "
                "Reduce it."
            )
        if self.unlabeled and not any(method.supports_unlabeled for method in methods):
            suitable = [name for name in METHODS if load_method(name).supports_unlabeled]
            raise UsageError(f"--unlabeled: requires --teacher and one of --distill {', '.join(suitable)}.")

    def _check_onnx_teacher(self) -> None:
        if not (self.teacher or self.teacher_config):
            return
        from hkd_det.models.zoo import OnnxTeacher, is_onnx_teacher  # noqa: PLC0415 - imports torch

        description = Path(self.teacher_config) if self.teacher_config else None
        is_onnx = is_onnx_teacher(Path(self.teacher), description)
        if is_onnx:
            check_teacher(self.distill, OnnxTeacher.capabilities, self.teacher)
        if self.teacher_config and not is_onnx:
            raise UsageError(
                "--teacher-config: requires an ONNX or OpenVINO teacher. Set --teacher to an .onnx or .xml file."
            )

    def _check_weights(self) -> None:
        for flag, file in {"teacher": self.teacher, "weights": self.weights}.items():
            if file and Path(file).resolve() == (self.save_path / "best.pt").resolve():
                raise UsageError(f"--{flag} {file}: this run would overwrite it. Choose another --name.")
        prepared = [name for name in self.distill if load_method(name).student_source == "prepared"]
        if self.weights and prepared:
            raise UsageError(f"--distill {prepared[0]}: starts from the teacher, not from --weights. Omit one.")
        if (self.weights or prepared) and (self.backbone or self.pretrained):
            raise UsageError(
                "--backbone, --pretrained: apply to a new student, and this one starts from a checkpoint. Omit them."
            )

    @property
    def online_methods(self) -> dict[str, Any]:
        """Configurations of the methods that take part in training."""
        return {name: c for name, c in self.distill.items() if load_method(name).student_source != "prepared"}

    @property
    def unlabeled_batch(self) -> int:
        """Unlabeled images per step, over all processes."""
        return max(1, round(self.unlabeled_ratio * self.batch)) if self.unlabeled else 0

    @property
    def save_path(self) -> Path:
        """Directory of the run."""
        return Path(self.save_dir)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for YAML and checkpoints."""
        return {**asdict(self), "imgsz_hw": list(self.imgsz_hw), "unlabeled": list(self.unlabeled)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "") -> "TrainConfig":
        """Build a configuration from plain values, strictly.

        Args:
            values: Field name -> value, as `as_dict` returns it.
            where: File of the values, for error messages; "" for none.

        Returns:
            The configuration.

        Raises:
            UsageError: For an unknown key or an invalid value.
        """
        return dataclass_from_dict(cls, values, f"{where}:" if where else "")
