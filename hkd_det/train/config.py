"""Learning rate and distillation strength over a run.

One run's settings: what `hkd-train` was asked, saved with the weights.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hkd_det.config import dataclass_from_dict
from hkd_det.distill.methods import DistillConfig
from hkd_det.errors import UsageError
from hkd_det.letterbox import STRIDE
from hkd_det.metrics.citypersons import SETUPS
from hkd_det.models.onnx_teacher import is_onnx_file


def compute_lr_factor(step: int, total_steps: int, warmup_ratio: float, min_factor: float = 0.02) -> float:
    """Factor on the rate at a step of 0 .. steps - 1: linear rise, then half a cosine down to `floor`."""
    rising = max(1, round(total_steps * warmup_ratio))
    if step < rising:
        return (step + 1) / rising
    progress = (step - rising) / max(1, total_steps - rising)
    return min_factor + (1 - min_factor) * 0.5 * (1 + math.cos(math.pi * progress))


def distill_weight_at(epoch: int, epochs: int, no_aug_ratio: float) -> float:
    """Factor on the distillation terms in epoch 0 .. epochs - 1: half a cosine from 1, 0 in the finale."""
    taught = no_aug_start_epoch(epochs, no_aug_ratio)
    if epoch >= taught:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * epoch / max(1, taught)))


def no_aug_start_epoch(epochs: int, no_aug_ratio: float) -> int:
    """The first epoch of the finale, in which views are plain and nobody teaches."""
    return epochs - round(epochs * no_aug_ratio)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the weights that come out, and where they go.

    data: a name in datasets.yaml or a path to a data yaml. imgsz_hw: (height, width) in pixels, multiples of 32.
    backbone: a timm model in the place of the model's own, or "". pretrained: "imagenet", a weights file, or "" for
    none. init: a checkpoint whose shape and weights are the start, or "". teacher: a checkpoint to distil from, an ONNX
    file as a black box, or "". teacher_description: the YAML that says how to feed and read such a file, or "" for what
    lies in or beside it. distill: how.
    unlabelled: folders of pictures for the teacher alone to speak of. unlabelled_share: how many of them a step takes
    on top of `batch`, as a share of it.
    batch: pictures a step over all processes. warmup: share of the steps with rising rate. multi_scale: how far
    the input size varies, 0..0.5. mosaic: share of training views made of four pictures. finale: share of the
    epochs at the end without mosaic, multi-scale and distillation. precision: "bf16" or "fp32".
    cache_mib: room in the temporary folder (TMPDIR) for pictures that had to be packed anew, over all loader workers.
    setup: whose miss rate chooses the best epoch.
    """

    data: str
    model: str
    save_dir: str
    imgsz_hw: tuple[int, int] = (512, 640)
    epochs: int = 100
    batch: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_ratio: float = 0.05
    clip_grad_norm: float = 10.0
    ema_decay: float = 0.998
    multi_scale: float = 0.25
    mosaic: float = 0.5
    no_aug_ratio: float = 0.1
    backbone: str = ""
    pretrained: str = ""
    weights: str = ""
    teacher: str = ""
    teacher_config: str = ""
    distill: DistillConfig = field(default_factory=DistillConfig)
    unlabeled: tuple[str, ...] = ()
    unlabeled_ratio: float = 0.5
    freeze_bn: bool = False
    precision: Literal["bf16", "fp32"] = "bf16"
    device: str = "auto"
    workers: int = 2
    cache_mib: int = 1024
    seed: int = 0
    setup: str = "Reasonable"

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_teacher()
        self._check_onnx_teacher()
        self._check_weights()

    def _check_ranges(self) -> None:
        low = {"epochs": 1, "batch": 1, "workers": 0, "cache_mib": 0, "lr": 0, "weight_decay": 0, "seed": 0}
        for name, least in low.items():
            if getattr(self, name) < least:
                raise UsageError(f"{name} = {getattr(self, name)}: must be at least {least}")
        for name, most in {
            "warmup_ratio": 1,
            "mosaic": 1,
            "no_aug_ratio": 1,
            "multi_scale": 0.5,
            "ema_decay": 1,
        }.items():
            if not 0 <= getattr(self, name) <= most:
                raise UsageError(f"{name} = {getattr(self, name)}: must be from 0 to {most}")
        if self.setup not in SETUPS:
            raise UsageError(f"setup = {self.setup}: there are {', '.join(SETUPS)}")
        if len(self.imgsz_hw) != 2 or any(side < STRIDE or side % STRIDE for side in self.imgsz_hw):
            raise UsageError(f"imgsz_hw = {list(self.imgsz_hw)}: height and width, multiples of {STRIDE} pixels")
        for name in ("unlabeled_ratio", "clip_grad_norm"):  # clipped to less than nothing, gradients would climb
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} = {getattr(self, name)}: must be above 0")

    def _check_teacher(self) -> None:
        if bool(self.teacher) != bool(self.distill.names):
            raise UsageError("--teacher and --distill go together: who teaches, and how (in a recipe: hkd: {})")
        if self.distill.online_methods.names and not no_aug_start_epoch(self.epochs, self.no_aug_ratio):
            raise UsageError(
                f"no_aug_ratio = {self.no_aug_ratio}: of {self.epochs} epochs it leaves none in which anybody teaches"
            )
        if self.unlabeled and not {"hkd", "soft_labels", "noisy_teacher"} & set(self.distill.names):
            raise UsageError(
                "--unlabeled needs somebody to speak of such pictures: --teacher, and --distill soft_labels or hkd"
            )

    def _check_onnx_teacher(self) -> None:
        black_box = is_onnx_file(Path(self.teacher))
        deaf = [name for name in self.distill.names if name not in ("soft_labels", "noisy_teacher", "mokd")]
        if black_box and (deaf or not self.distill.soft_labels):
            raise UsageError(
                f"--distill {','.join(self.distill.names)}: {self.teacher} is a black box, it shows no features or "
                "weights; --distill soft_labels learns from its boxes and scores"
            )
        if black_box and self.distill.noisy_teacher and self.distill.noisy_teacher.mode == "l2":
            raise UsageError(
                f"--distill noisy_teacher: {self.teacher} is a black box, it shows no logits to regress; "
                "--set distill.noisy_teacher.mode=targets makes the scores noisy that soft_labels learns from"
            )
        if self.teacher_config and not black_box:
            raise UsageError("--teacher-config says how to read a teacher's .onnx file: give it with --teacher")

    def _check_weights(self) -> None:
        for flag, file in {"teacher": self.teacher, "weights": self.weights}.items():
            if file and Path(file).resolve() == (self.save_path / "best.pt").resolve():
                raise UsageError(f"--{flag} {file}: this run would write over it; --name another")
        if self.weights and self.distill.blockwise:
            raise UsageError("--distill blockwise starts from its teacher, not from --weights: leave one out")
        if (self.weights or self.distill.blockwise) and (self.backbone or self.pretrained):
            raise UsageError("--backbone and --pretrained are for a fresh student; this one starts from a checkpoint")

    @property
    def unlabeled_batch(self) -> int:
        """Unlabelled pictures that a step takes beside its `batch` labelled ones, over all processes."""
        return max(1, round(self.unlabeled_ratio * self.batch)) if self.unlabeled else 0

    @property
    def save_path(self) -> Path:
        """The folder that holds all the run leaves behind."""
        return Path(self.save_dir)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for YAML and checkpoints."""
        return {**asdict(self), "imgsz_hw": list(self.imgsz_hw), "unlabeled": list(self.unlabeled)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "") -> "TrainConfig":
        """The inverse of `as_dict`, read strictly; whatever is wrong is a UsageError."""
        return dataclass_from_dict(cls, values, where)
