"""Atomic file writing, SHA-256 digests, and reading of JSON and YAML."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from hkd_det.errors import DataError

CHUNK_BYTES = 2**20


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file atomically: write to a temporary file, then rename it.

    On any exception, Ctrl-C included, the temporary file is removed and `path` is unchanged.

    Args:
        path: File to create or replace. Missing parent directories are created.

    Yields:
        Path of the temporary file, in the same directory and with the same suffix as `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temp_path = Path(name)
    try:
        yield temp_path
        with temp_path.open("rb") as file:
            os.fsync(file.fileno())
        temp_path.chmod(0o666 & ~_get_umask())
        temp_path.replace(path)
    except BaseException:
        temp_path.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_write_dir(path: Path) -> Iterator[Path]:
    """Write a directory atomically: fill a temporary directory, then rename it.

    On any exception, Ctrl-C included, the temporary directory is removed and `path` is unchanged.

    Args:
        path: Directory to create or replace. Missing parent directories are created.

    Yields:
        Path of the empty temporary directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as name:
        temp_path, backup_path = Path(name) / "new", Path(name) / "old"
        temp_path.mkdir()
        yield temp_path
        if path.exists():
            path.rename(backup_path)  # a rename cannot replace a directory that is not empty
        try:
            temp_path.rename(path)
        except BaseException:
            backup_path.rename(path)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically.

    Args:
        path: File to create or replace. Missing parent directories are created.
        text: Content.
    """
    with atomic_write(path) as temp_path:
        temp_path.write_text(text, encoding="utf-8")


def file_sha256(path: Path, on_chunk: Callable[[int], object] | None = None) -> str:
    """Compute the SHA-256 digest of a file.

    Args:
        path: File to read.
        on_chunk: Called with the number of bytes of each chunk, for a progress bar.

    Returns:
        64 lower-case hexadecimal digits.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if on_chunk:
                on_chunk(len(chunk))
    return digest.hexdigest()


def bytes_sha256(content: bytes) -> str:
    """Compute the SHA-256 digest of a byte string.

    Args:
        content: The bytes.

    Returns:
        64 lower-case hexadecimal digits.
    """
    return hashlib.sha256(content).hexdigest()


def read_json(path: Path) -> Any:
    """Read a UTF-8 JSON file.

    Args:
        path: JSON file, with or without a byte order mark.

    Returns:
        The decoded value. The caller validates its structure.

    Raises:
        DataError: The file is missing or is not JSON. The message names the file and, if known, the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: expected a JSON file, got a directory") from None
    except RecursionError:
        raise DataError(f"{path}: not readable JSON: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, or a number with thousands of digits
        raise DataError(f"{path}: not JSON ({error})") from None


def read_yaml(path: Path) -> Any:
    """Read a UTF-8 YAML file.

    Args:
        path: YAML file, with or without a byte order mark.

    Returns:
        The decoded value. The caller validates its structure.

    Raises:
        DataError: The file is missing or is not YAML. The message names the file and, if known, the line.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: expected a YAML file, got a directory") from None
    except RecursionError:
        raise DataError(f"{path}: not readable YAML: nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DataError(f"{path}{line}: not YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an invalid date or number
        raise DataError(f"{path}: not YAML ({' '.join(str(error).split())})") from None


def _get_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
