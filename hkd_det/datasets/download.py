"""`download`: a named data set from the web into ./datasets/, where its licence allows that.

datasets.yaml says which files: `download: [{url, sha256, bytes, unpack_to}]`. They are fetched into
datasets/.downloads/NAME, verified, unpacked there, and take their name in one step: what lies under the name is whole.
"""

import fcntl
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hkd_det.datasets.catalogue import HOME, catalogue_entry, catalogue_file
from hkd_det.datasets.fetch import RemoteFile, fetch
from hkd_det.datasets.unpack import SUFFIXES, check_room, unpack
from hkd_det.errors import DataError, UnavailableError, UsageError

WORK = ".downloads"
RECORD = ".downloaded.json"  # in the data set's folder: the SHA-256 of what it was unpacked from
FILE_KEYS = {"url", "sha256", "bytes", "unpack_to"}


@dataclass(frozen=True)
class Part:
    """A file of a data set, and the folder in it where it is unpacked."""

    remote: RemoteFile
    unpack_to: str


def download(data: str) -> Path:
    """Fetch, verify and unpack a data set of datasets.yaml; the folder it lies in. Says what it does.

    What is there already stays as it is. Raises UsageError for another name, UnavailableError for a data set that
    must be fetched by hand, and what `fetch` and `unpack` raise.
    """
    if data.endswith((".yaml", ".yml")):
        raise UsageError(f"--data {data}: --download fetches the data sets of {catalogue_file()} only, by their names")
    entry = catalogue_entry(data)
    folder = HOME / PurePosixPath(entry.get("path", data)).parts[0]
    parts = _parts(entry.get("download"), data)
    if not parts and not _holds_something(folder):
        raise UnavailableError(
            f"--data {data}: cannot be downloaded without you. Get it from {entry.get('page')}; accepted there: "
            f"{entry.get('terms')}; unpack it into {folder.absolute()} as {entry.get('layout')}"
        )
    with _alone(HOME / WORK / data) as work:
        if _is_there(folder, parts):
            print(f"{data}: {folder} is there already; nothing is fetched")
        else:
            print(f"{data}: {entry.get('page')}; by using it you accept: {entry.get('terms')}")
            _bring(parts, work, folder)
            print(f"{data}: fetched, verified and unpacked into {folder}")
        shutil.rmtree(work)
    return folder


def _bring(parts: list[Part], work: Path, folder: Path) -> None:
    archives = [work / f"{number}-{part.remote.name}" for number, part in enumerate(parts)]
    there = sum(path.stat().st_size for path in work.iterdir() if path.is_file())
    check_room(work, sum(part.remote.size_bytes for part in parts) - there)
    for part, archive in zip(parts, archives, strict=True):
        fetch(part.remote, archive)
    unpacked = work / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)  # of a try that was interrupted
    try:
        for part, archive in zip(parts, archives, strict=True):
            target = unpacked / part.unpack_to
            if archive.name.endswith(SUFFIXES):
                unpack(archive, target)
            else:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(archive, target / part.remote.name)
        (unpacked / RECORD).write_text(json.dumps(_record(parts)), encoding="utf-8")
        unpacked.replace(folder)  # an empty folder may lie there
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def _is_there(folder: Path, parts: list[Part]) -> bool:
    """Whether the data set lies there: as it is downloaded now, or as the user has put it there."""
    try:
        recorded = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return _holds_something(folder)
    except ValueError:
        recorded = None
    if recorded != _record(parts):
        raise DataError(f"{folder}: downloaded from other files than datasets.yaml names now; remove it to fetch those")
    return True


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _record(parts: list[Part]) -> dict[str, str]:
    return {part.remote.url: part.remote.sha256 for part in parts}


@contextmanager
def _alone(work: Path) -> Iterator[Path]:
    """The folder to work in, for one process at a time: others, as torchrun starts them, wait until it is done."""
    work.mkdir(parents=True, exist_ok=True)
    with (work.parent / f"{work.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{work.name}: another process is downloading it; waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        work.mkdir(parents=True, exist_ok=True)  # the other one has removed it
        yield work


def _parts(said: Any, data: str) -> list[Part]:
    """What datasets.yaml says under `download`, checked."""
    name = f"{catalogue_file()}: {data}: download"
    if said is None:
        return []
    if not isinstance(said, list) or not all(isinstance(one, dict) for one in said):
        raise DataError(f"{name}: expected a list of {{url, sha256, bytes, unpack_to}}")
    return [_part(one, name) for one in said]


def _part(said: dict[str, Any], name: str) -> Part:
    url, sha256, size, unpack_to = (said.get(key) for key in ("url", "sha256", "bytes", "unpack_to"))
    if not set(said) <= FILE_KEYS:
        raise DataError(f"{name}: unknown key {min(map(str, set(said) - FILE_KEYS))!r}")
    if not isinstance(url, str) or not re.match(r"https?://[^/]+/", url):
        raise DataError(f"{name}: url {url!r} must begin with https:// or http://")
    if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise DataError(f"{name}: sha256 {sha256!r} must be 64 hexadecimal digits in quotes: no file without one")
    if type(size) is not int or size < 1:
        raise DataError(f"{name}: bytes {size!r} must be the file's size")
    inside = PurePosixPath(str(unpack_to or "."))
    if inside.is_absolute() or ".." in inside.parts:
        raise DataError(f"{name}: unpack_to {unpack_to!r} must lie inside the data set")
    remote = RemoteFile(url, sha256, size)
    if not remote.name:
        raise DataError(f"{name}: url {url!r} must end in a file's name")
    return Part(remote, str(inside))
