"""Files that are never half written: write aside, then rename.

A JSON file as Python values, or one line about what is wrong with it.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hkd_det.errors import DataError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it takes `path`'s place in one step.

    On any error, Ctrl-C included, the aside file is removed and `path` stays as it was.
    The aside file keeps the suffix of `path`, for writers that choose the format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        aside.chmod(0o666 & ~_get_umask())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_write_dir(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` to write into; on success it takes `path`'s place, with all it holds.

    On any error, Ctrl-C included, it is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as name:
        aside = Path(name) / "new"
        aside.mkdir()
        yield aside
        if path.exists():
            path.rename(Path(name) / "old")  # a folder that is not empty can't be renamed over
        try:
            aside.rename(path)
        except BaseException:
            (Path(name) / "old").rename(path)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file in one step."""
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    """64 hexadecimal digits of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _get_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: Path) -> Any:
    """The content of an annotation file; raises DataError, naming the file and, where it can, the line."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a folder, expected an annotation file") from None
    except RecursionError:
        raise DataError(f"{path}: not an annotation file: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and a number of thousands of digits
        raise DataError(f"{path}: not JSON ({error})") from None
