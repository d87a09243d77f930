"""Which taps are compared: chosen by name in the recipe, else paired by stride."""

from collections.abc import Sequence
from dataclasses import dataclass

from hkd_det.distill.adapter import pair_by_stride
from hkd_det.errors import UsageError
from hkd_det.models.family import PersonDetector
from hkd_det.models.tap import Tap
from hkd_det.models.tap_list import find_taps


@dataclass(frozen=True)
class TapNames:
    """Layers by name, as `hkd-train --list-taps` shows them; the first of one is compared with the first of the other.

    Their strides may differ, the adapters make up for it. Empty: the ends of both pyramids' levels, paired by stride.
    """

    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()


def tapped(student: PersonDetector, teacher: PersonDetector, names: TapNames) -> tuple[list[Tap], list[Tap]]:
    """The layers of both that are recorded: those named, in that order, or all that are tapped by default.

    Raises UsageError for lists of different lengths and for a name that is no layer with a map.
    """
    if len(names.student) != len(names.teacher):
        raise UsageError(
            f"distill.hkd.taps: {len(names.student)} layers of the student and {len(names.teacher)} of the teacher; "
            "they are compared in pairs, so name as many of each, or none"
        )
    if not names.student:
        return student.taps(), teacher.taps()
    return (
        find_taps(student, names.student, "distill.hkd.taps.student"),
        find_taps(teacher, names.teacher, "distill.hkd.taps.teacher"),
    )


def paired(student: Sequence[Tap], teacher: Sequence[Tap], names: TapNames) -> list[tuple[Tap, Tap]]:
    """What is compared with what, of the layers that `tapped` gives."""
    if names.student:
        return list(zip(student, teacher, strict=True))
    return pair_by_stride(list(student), list(teacher))
