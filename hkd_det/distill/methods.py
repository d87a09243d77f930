"""Which methods teach, and each one's settings: the part of a recipe under `distill:`."""

from dataclasses import dataclass, fields, replace

from hkd_det.distill.arbitration import Arbitration
from hkd_det.distill.blockwise.settings import Blockwise
from hkd_det.distill.capacity.settings import CapacityDynamic
from hkd_det.distill.detections import DetectionTerms
from hkd_det.distill.hierarchical import Hierarchical
from hkd_det.distill.noise import Noise
from hkd_det.errors import UsageError
from hkd_det.settings import from_mapping


@dataclass(frozen=True)
class Methods:
    """The methods of a run; None is not used.

    hkd: hierarchical distillation. detections: the teacher's boxes and scores alone. noise: a noisy teacher. mokd: task
    and distillation as two objectives. blockwise: the student is made from its teacher, block by block; then the others
    teach it. cdd: a student that begins wide and sheds channels.
    """

    hkd: Hierarchical | None = None
    detections: DetectionTerms | None = None
    noise: Noise | None = None
    mokd: Arbitration | None = None
    blockwise: Blockwise | None = None
    cdd: CapacityDynamic | None = None

    def __post_init__(self) -> None:
        if self.noise and self.noise.form == "targets" and not (self.hkd or self.detections):
            raise UsageError("noise.form=targets perturbs what another method learns from: add one, such as hkd")
        if self.noise and self.noise.features and not self.hkd:
            raise UsageError("noise.features makes the maps noisy that hkd compares: add it, or leave features out")
        if self.mokd and not (self.hkd or self.detections or self.noise or self.cdd):
            raise UsageError("--distill mokd arbitrates between the task and a teacher's terms: add one, such as hkd")
        if self.mokd and self.hkd and self.hkd.truth < 1:
            raise UsageError("--distill mokd finds the task's weight itself: leave distill.hkd.truth at 1")
        if self.cdd and self.blockwise:
            raise UsageError("--distill cdd,blockwise: both change the same layers; use one, then the other by --init")

    @property
    def names(self) -> list[str]:
        """Those that are used, in order."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    @property
    def in_training(self) -> "Methods":
        """Those that teach while the student trains: all but blockwise, which is over by then."""
        return replace(self, blockwise=None)

    @classmethod
    def of(cls, names: str) -> "Methods":
        """Methods by name with their defaults, as `--distill hkd,noise` gives them."""
        return from_mapping(cls, {name.strip(): {} for name in names.split(",") if name.strip()}, "distill")
