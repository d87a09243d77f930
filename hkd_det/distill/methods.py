"""Which methods teach, and each one's settings: the part of a recipe under `distill:`."""

from dataclasses import dataclass, fields, replace

from hkd_det.config import dataclass_from_dict
from hkd_det.distill.blockwise.config import BlockwiseConfig
from hkd_det.distill.cdd.config import CDDConfig
from hkd_det.distill.hkd import HKDConfig
from hkd_det.distill.mokd import MoKDConfig
from hkd_det.distill.noisy_teacher import NoisyTeacherConfig
from hkd_det.distill.soft_labels import SoftLabelConfig
from hkd_det.errors import UsageError


@dataclass(frozen=True)
class DistillConfig:
    """The methods of a run; None is not used.

    hkd: hierarchical distillation. detections: the teacher's boxes and scores alone. noise: a noisy teacher. mokd: task
    and distillation as two objectives. blockwise: the student is made from its teacher, block by block; then the others
    teach it. cdd: a student that begins wide and sheds channels.
    """

    hkd: HKDConfig | None = None
    soft_labels: SoftLabelConfig | None = None
    noisy_teacher: NoisyTeacherConfig | None = None
    mokd: MoKDConfig | None = None
    blockwise: BlockwiseConfig | None = None
    cdd: CDDConfig | None = None

    def __post_init__(self) -> None:
        if self.noisy_teacher and self.noisy_teacher.mode == "targets" and not (self.hkd or self.soft_labels):
            raise UsageError(
                "noisy_teacher.mode=targets perturbs what another method learns from: add one, such as hkd"
            )
        if self.noisy_teacher and self.noisy_teacher.feature_sigma and not self.hkd:
            raise UsageError(
                "noisy_teacher.feature_sigma makes the maps noisy that hkd compares: add it, or leave features out"
            )
        if self.mokd and not (self.hkd or self.soft_labels or self.noisy_teacher or self.cdd):
            raise UsageError("--distill mokd arbitrates between the task and a teacher's terms: add one, such as hkd")
        if self.mokd and self.hkd and self.hkd.det_loss_weight < 1:
            raise UsageError("--distill mokd finds the task's weight itself: leave distill.hkd.det_loss_weight at 1")
        if self.cdd and self.blockwise:
            raise UsageError(
                "--distill cdd,blockwise: both change the same layers; use one, then the other by --weights"
            )

    @property
    def names(self) -> list[str]:
        """Those that are used, in order."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    @property
    def online_methods(self) -> "DistillConfig":
        """Those that teach while the student trains: all but blockwise, which is over by then."""
        return replace(self, blockwise=None)

    @classmethod
    def from_names(cls, names: str) -> "DistillConfig":
        """Methods by name with their defaults, as `--distill hkd,noise` gives them."""
        return dataclass_from_dict(cls, {name.strip(): {} for name in names.split(",") if name.strip()}, "distill")
