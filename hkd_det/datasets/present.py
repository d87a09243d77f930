"""Are the pictures of a data set on disk?"""

from collections.abc import Sequence

from hkd_det.datasets.faults import ErrorHandler, raise_error
from hkd_det.datasets.sample import Sample
from hkd_det.errors import DataError


def filter_missing_images(
    samples: Sequence[Sample], skip_missing: bool, where: str, on_error: ErrorHandler = raise_error
) -> list[Sample]:
    """The samples whose pictures are there.

    Raises DataError that begins with `where` if one is missing, or, with present_only, if all are: better now
    than hours into a training.
    """
    there = [sample for sample in samples if sample.path.is_file()]
    lost = len(samples) - len(there)
    if lost and (not there or not skip_missing):
        first = next(sample.path for sample in samples if not sample.path.is_file())
        remedy = "put them there" if skip_missing else "put them there, or say `present_only: true` to go without them"
        on_error(DataError(f"{where}: {lost} of {len(samples)} pictures are missing, the first {first}; {remedy}"))
        for sample in samples:
            if sample.path != first and not sample.path.is_file():
                on_error(DataError(f"{sample.path}: the picture is missing"))
    return there
