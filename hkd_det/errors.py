"""Errors that a user can resolve, and helpers that raise or report them.

The exception tree:

* HkdError
    - UsageError        a flag, a name or a configuration is invalid (exit code 2)
    - DataError         an image, annotation, model or checkpoint file is missing or invalid (exit code 1)
    - UnavailableError  a requested device, package or precision is not available on this machine (exit code 1)

A message has the form `<flag, file or key>: <problem>. <remedy>.` or `<flag, file or key>: expected X, got Y.` Commands
print it as one line.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BENCH_INSTALL_HINT = "Run pip install 'hkd-det[bench]'."


class HkdError(Exception):
    """Base class of all errors that a user can resolve.

    Attributes:
        exit_code: Exit code of the command that raises the error.
    """

    exit_code = 1


class UsageError(HkdError):
    """A flag, a name or a configuration is invalid."""

    exit_code = 2


class DataError(HkdError):
    """An image, annotation, model or checkpoint file is missing or invalid. The message names the file.

    Attributes:
        images: Images of a dataset that the error is about; empty if it is about other files, or not known.
    """

    images: Sequence[Path] = ()


class UnavailableError(HkdError):
    """A requested device, package or precision is not available on this machine."""


def print_error(message: str) -> None:
    """Print a line on stderr.

    Args:
        message: The line.
    """
    print(message, file=sys.stderr)


def run_command(
    name: str,
    func: Callable[[Sequence[str] | None], int],
    argv: Sequence[str] | None,
    report: Callable[[str], None] = print_error,
) -> int:
    """Run the body of a command and report expected errors as one line on stderr.

    Args:
        name: Name of the command; the prefix of the error line.
        func: Body of the command. It takes `argv` and returns the exit code.
        argv: Command-line arguments, or None for `sys.argv[1:]`.
        report: Called with the line.

    Returns:
        The exit code of `func` or of an `HkdError`. 1 for an operating system error, such as a full disk.
        130 for Ctrl-C. Other exceptions propagate.
    """
    try:
        return func(argv)
    except HkdError as error:
        report(f"{name}: {error}")
        return error.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        hint = "Check the path, its permissions and the free disk space."
        report(f"{name}: {where}{error.strerror or error}. {hint}")
        return 1
    except KeyboardInterrupt:
        report(f"{name}: interrupted")
        return 130


def import_package(module: str, title: str = "", hint: str = BENCH_INSTALL_HINT) -> Any:
    """Import an optional package.

    Args:
        module: Dotted module name.
        title: Name of the package in the error message (default: `module`).
        hint: How to install the package, as sentences; the end of the error message.

    Returns:
        The imported module.

    Raises:
        UnavailableError: The package is not installed, or does not load.
    """
    title = title or module
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise UnavailableError(f"{title}: not installed. {hint}") from None
        raise _make_import_error(title, error, hint) from None  # a dependency of the package is missing
    except (ImportError, OSError) as error:
        raise _make_import_error(title, error, hint) from None


@contextmanager
def require_extra(extra: str) -> Iterator[None]:
    """Report a package that is missing in the block, which contains imports only, as one line.

    Args:
        extra: Extra of hkd-det that installs the package.

    Raises:
        UnavailableError: A package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UnavailableError(f"{error.name}: not installed. Run pip install 'hkd-det[{extra}]'.") from None


def first_error_line(error: BaseException) -> str:
    """Return the first line of an error message without its final period, to quote it in another message.

    Args:
        error: Exception, for example of a native library whose messages have many lines.
    """
    return str(error).strip().split("\n", 1)[0].removesuffix(".")


def _make_import_error(title: str, error: BaseException, hint: str) -> UnavailableError:
    return UnavailableError(f"{title}: installed, but does not load: {first_error_line(error)}. {hint}")
