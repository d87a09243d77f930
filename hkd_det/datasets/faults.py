"""What a reader does with a faulty record: stop at it (the default), or report it and go on without it."""

from collections.abc import Callable

from hkd_det.errors import DataError

ErrorHandler = Callable[[DataError], None]


def raise_error(error: DataError) -> None:
    """For training and measuring: nothing is left out in silence."""
    raise error
