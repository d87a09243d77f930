"""Packages that a device may lack: imported when they are needed, or a line that says how to get them."""

import importlib
from typing import Any

from hkd_det.errors import UnavailableError


def import_package(module: str, title: str, hint: str) -> Any:
    """The module. Raises UnavailableError, with the remedy, where it is missing or does not load.

    title: what it is called in the message.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise UnavailableError(f"{title} is not installed; {hint}") from None
        raise _make_import_error(title, error, hint) from None  # a package that it needs is missing
    except (ImportError, OSError) as error:
        raise _make_import_error(title, error, hint) from None


def first_error_line(error: BaseException) -> str:
    """What an error says first: native libraries go on for many lines."""
    return str(error).strip().split("\n", 1)[0]


def _make_import_error(title: str, error: BaseException, hint: str) -> UnavailableError:
    return UnavailableError(f"{title} is installed but does not load: {first_error_line(error)}; {hint}")
