"""Which taps are compared: chosen by name in the recipe, else paired by stride."""

from collections.abc import Sequence
from dataclasses import dataclass

from hkd_det.distill.adapter import pair_by_stride
from hkd_det.errors import UsageError
from hkd_det.models.family import BaseDetector
from hkd_det.models.tap import FeatureInfo
from hkd_det.models.tap_list import find_feature_layers


@dataclass(frozen=True)
class LayerPairs:
    """Layers by name, as `hkd-train --list-taps` shows them; the first of one is compared with the first of the other.

    Their strides may differ, the adapters make up for it. Empty: the ends of both pyramids' levels, paired by stride.
    """

    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()


def select_layers(
    student: BaseDetector, teacher: BaseDetector, layer_pairs: LayerPairs
) -> tuple[list[FeatureInfo], list[FeatureInfo]]:
    """The layers of both that are recorded: those named, in that order, or all that are tapped by default.

    Raises UsageError for lists of different lengths and for a name that is no layer with a map.
    """
    if len(layer_pairs.student) != len(layer_pairs.teacher):
        raise UsageError(
            f"distill.hkd.taps: {len(layer_pairs.student)} layers of the student and {len(layer_pairs.teacher)} of the teacher; "
            "they are compared in pairs, so name as many of each, or none"
        )
    if not layer_pairs.student:
        return student.feature_info(), teacher.feature_info()
    return (
        find_feature_layers(student, layer_pairs.student, "distill.hkd.taps.student"),
        find_feature_layers(teacher, layer_pairs.teacher, "distill.hkd.taps.teacher"),
    )


def pair_layers(
    student_layers: Sequence[FeatureInfo], teacher_layers: Sequence[FeatureInfo], layer_pairs: LayerPairs
) -> list[tuple[FeatureInfo, FeatureInfo]]:
    """What is compared with what, of the layers that `tapped` gives."""
    if layer_pairs.student:
        return list(zip(student_layers, teacher_layers, strict=True))
    return pair_by_stride(list(student_layers), list(teacher_layers))
