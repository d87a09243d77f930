"""Lesson: a batch as student and teacher see it, and what a method makes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from hkd_det.losses.detection import Norm
from hkd_det.models.assignment import TruthBatch
from hkd_det.models.family import PersonDetector
from hkd_det.models.output import Output
from hkd_det.models.prediction import Found
from hkd_det.models.tap import Tap


@dataclass(frozen=True, eq=False)
class Lesson:
    """All that a method may use of one step.

    pictures: [B, 3, H, W] RGB, 0..255. mine, other: what student and teacher say, the teacher's without gradients.
    my_maps, other_maps: their tapped maps, fine to coarse; none of a black box. noise: what a noisy teacher does to its
    detections, if what it says had none yet.
    norm_of: makes a sum over this process's pictures the divisor that is right over all processes.
    """

    pictures: Tensor
    truth: TruthBatch
    student: PersonDetector
    teacher: "Teacher"
    mine: Output
    other: Output
    my_maps: Sequence[Tensor]
    other_maps: Sequence[Tensor]
    norm_of: Norm
    noise: Callable[[Found], Found] | None = None

    @cached_property
    def found(self) -> Found:
        """The teacher's finished detections, at most 100 a picture; worked out once, for all methods."""
        found = self.teacher.found(self.other)
        return self.noise(found) if self.noise else found


class Method(Protocol):
    """A way to teach: an nn.Module whose parameters, if any, are trained with the student and dropped afterwards."""

    def __call__(self, lesson: Lesson) -> dict[str, Tensor]:
        """The lesson's weighted terms, scalars under the method's own names."""


class Teacher(Protocol):
    """Whoever knows better: any family's detector, or a black box."""

    def __call__(self, pictures: Tensor) -> Output:
        """What it says of [B, 3, H, W] RGB pictures, 0..255."""

    def found(self, output: Any, top: int = 100) -> Found:
        """Finished detections, at most `top` a picture, from an output that it gave."""

    def taps(self) -> list[Tap]:
        """The ends of its pyramid's levels, fine to coarse; none of a black box."""
