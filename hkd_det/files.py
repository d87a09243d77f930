"""Atomic file writing, SHA-256 digests, and reading of JSON and YAML."""

import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from hkd_det.errors import DataError

CHUNK_BYTES = 2**20
DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
MAX_YAML_BYTES, MAX_YAML_NODES = 2**24, 2**20


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file atomically: write to a temporary file, then rename it.

    On any exception, Ctrl-C included, the temporary file and empty new parent directories are removed, and `path` is
    unchanged.

    Args:
        path: File to create or replace. Missing parent directories are created.

    Yields:
        Path of the temporary file, which does not exist yet. It has the name of `path` and is in another directory.

    Raises:
        OSError: The file cannot be written. Its `filename` is `path`.
    """
    with _write_next_to(path) as temp_path:
        yield temp_path
        with temp_path.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def atomic_write_dir(path: Path) -> Iterator[Path]:
    """Write a directory atomically: fill a temporary directory, then rename it.

    On any exception, Ctrl-C included, the temporary directory and empty new parent directories are removed, and `path`
    is unchanged.

    Args:
        path: Directory to create or replace. Missing parent directories are created.

    Yields:
        Path of the empty temporary directory.

    Raises:
        OSError: The directory cannot be written. Its `filename` is `path`.
    """
    with _write_next_to(path) as temp_path:
        temp_path.mkdir()
        yield temp_path


@contextmanager
def _write_next_to(path: Path) -> Iterator[Path]:
    """Yield a path in a temporary directory next to `path`, and rename it to `path` at the end."""
    prefix = f".{path.name}-"
    created = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as name:
            temp_path, backup_path = Path(name) / path.name, Path(name) / f"{path.name}.old"
            yield temp_path
            if temp_path.is_dir() and path.exists():
                path.rename(backup_path)  # a rename cannot replace a directory that is not empty
            try:
                temp_path.replace(path)
            except BaseException:
                if backup_path.exists():
                    backup_path.rename(path)
                raise
    except OSError as error:
        is_disk_full = error.filename is None and error.errno in DISK_FULL_ERRORS  # `write` does not state the file
        if is_disk_full or f"{os.sep}{prefix}" in str(error.filename):  # users know the final name only
            error.filename, error.filename2 = str(path), None
        _remove_empty_dirs(created)
        raise
    except BaseException:
        _remove_empty_dirs(created)
        raise


def _remove_empty_dirs(paths: list[Path]) -> None:
    for path in paths:
        with suppress(OSError):  # not empty, or not created
            path.rmdir()


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


def read_content(path: Path, expected: str, hint: str = "Check the path.", max_bytes: int = -1) -> bytes:
    """Read a file.

    Args:
        path: File to read.
        expected: Description of the file for the error message, such as "a JSON file".
        hint: Last sentence of the message about a missing file.
        max_bytes: Number of bytes to read at most; -1 reads the whole file.

    Returns:
        Content of the file.

    Raises:
        DataError: The file is missing, or a directory.
    """
    try:
        with path.open("rb") as file:
            return file.read(max_bytes)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: no such file. {hint}") from None
    except IsADirectoryError:
        raise DataError(f"{path}: expected {expected}, got a directory.") from None


def read_json(path: Path) -> Any:
    """Read a UTF-8 JSON file.

    Args:
        path: JSON file, with or without a byte order mark.

    Returns:
        The decoded value. The caller validates its structure.

    Raises:
        DataError: The file is missing or is not JSON. The message names the file and, if known, the line.
    """
    content = read_content(path, "a JSON file")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise DataError(f"{path}: not JSON: nested too deeply. Correct the file.") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, or a number with thousands of digits
        raise DataError(f"{path}: not JSON: {error}. Correct the file.") from None


def read_yaml(path: Path) -> Any:
    """Read a UTF-8 YAML file.

    Args:
        path: YAML file, with or without a byte order mark.

    Returns:
        The decoded value. The caller validates its structure.

    Raises:
        DataError: The file is missing, is not YAML, or expands to a huge value. The message names the file and, if
            known, the line.
    """
    content = read_content(path, "a YAML file", max_bytes=MAX_YAML_BYTES + 1)
    if len(content) > MAX_YAML_BYTES:
        raise DataError(f"{path}: expected a YAML file of at most {MAX_YAML_BYTES >> 20} MiB. Check the path.")
    try:
        loader = yaml.SafeLoader(content.decode("utf-8-sig"))
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_yaml_nodes(node, {}) > MAX_YAML_NODES:
            raise DataError(f"{path}: its aliases expand to more than {MAX_YAML_NODES:,} values. Remove the aliases.")
        return loader.construct_document(node)
    except RecursionError:
        raise DataError(f"{path}: not YAML: nested too deeply. Correct the file.") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DataError(f"{path}{line}: not YAML: {error.problem}. Correct the file.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an invalid date or number
        raise DataError(f"{path}: not YAML: {' '.join(str(error).split())}. Correct the file.") from None


def _count_yaml_nodes(node: yaml.Node, counts: dict[int, float]) -> float:
    """Return the number of values that a node expands to; aliases share nodes. A cycle counts as infinite."""
    key = id(node)
    if key not in counts:
        counts[key] = math.inf  # while the children are counted: they contain the node itself only in a cycle
        children = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else []
        children = node.value if isinstance(node, yaml.SequenceNode) else children
        counts[key] = 1 + sum(_count_yaml_nodes(child, counts) for child in children)
    return counts[key]
