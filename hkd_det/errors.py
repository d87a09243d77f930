"""Every error a user can meet.

HkdError
├── UsageError        a flag, a name or a configuration is wrong: exit code 2
├── DataError         a picture, annotation, model or checkpoint file is wrong: exit code 1
└── UnavailableError  what was asked for is not on this machine: exit code 1

The message says what was asked, what was found, and what to do; the commands print it as one line.

Packages that a device may lack: imported when they are needed, or a line that says how to get them.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any


class HkdError(Exception):
    """Something the user can put right; `exit_code` is what a command ends with."""

    exit_code = 1


class UsageError(HkdError):
    """A flag, a name or a configuration is wrong."""

    exit_code = 2


class DataError(HkdError):
    """A picture, annotation, model or checkpoint file is missing or wrong; names the file."""


class UnavailableError(HkdError):
    """A device, a package or a precision that was asked for is not on this machine."""


def run_command(name: str, func: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """Run a command's body; turn the errors a user can mend into one line on stderr and an exit code.

    Returns the body's code, 1 or 2 for an `HkdError`, 1 for a full disk or a file-system error,
    130 for Ctrl-C.
    """
    try:
        return func(argv)
    except HkdError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{name}: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


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
