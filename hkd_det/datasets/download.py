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

from hkd_det.datasets.archive import ARCHIVE_SUFFIXES, check_disk_space, extract_archive
from hkd_det.datasets.catalog import DATASETS_DIR, find_catalog_file, load_catalog_entry
from hkd_det.datasets.download_file import RemoteFile, download_file
from hkd_det.errors import DataError, UnavailableError, UsageError

TEMP_DIR = ".downloads"
RECORD_FILE = ".downloaded.json"  # in the data set's folder: the SHA-256 of what it was unpacked from
FILE_KEYS = {"url", "sha256", "bytes", "unpack_to"}


@dataclass(frozen=True)
class DownloadItem:
    """A file of a data set, and the folder in it where it is unpacked."""

    remote: RemoteFile
    unpack_to: str


def download(data: str) -> Path:
    """Fetch, verify and unpack a data set of datasets.yaml; the folder it lies in. Says what it does.

    What is there already stays as it is. Raises UsageError for another name, UnavailableError for a data set that
    must be fetched by hand, and what `fetch` and `unpack` raise.
    """
    if data.endswith((".yaml", ".yml")):
        raise UsageError(
            f"--data {data}: --download fetches the data sets of {find_catalog_file()} only, by their names"
        )
    entry = load_catalog_entry(data)
    folder = DATASETS_DIR / PurePosixPath(entry.get("path", data)).parts[0]
    parts = _parse_items(entry.get("download"), data)
    if not parts and not _is_nonempty_dir(folder):
        raise UnavailableError(
            f"--data {data}: cannot be downloaded without you. Get it from {entry.get('homepage')}; accepted there: "
            f"{entry.get('license')}; unpack it into {folder.absolute()} as {entry.get('directory_layout')}"
        )
    with _lock_temp_dir(DATASETS_DIR / TEMP_DIR / data) as work:
        if _is_downloaded(folder, parts):
            print(f"{data}: {folder} is there already; nothing is fetched")
        else:
            print(f"{data}: {entry.get('homepage')}; by using it you accept: {entry.get('license')}")
            _download_and_extract(parts, work, folder)
            print(f"{data}: fetched, verified and unpacked into {folder}")
        shutil.rmtree(work)
    return folder


def _download_and_extract(items: list[DownloadItem], temp_dir: Path, folder: Path) -> None:
    archives = [temp_dir / f"{number}-{part.remote.name}" for number, part in enumerate(items)]
    there = sum(path.stat().st_size for path in temp_dir.iterdir() if path.is_file())
    check_disk_space(temp_dir, sum(part.remote.size_bytes for part in items) - there)
    for part, archive in zip(items, archives, strict=True):
        download_file(part.remote, archive)
    unpacked = temp_dir / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)  # of a try that was interrupted
    try:
        for part, archive in zip(items, archives, strict=True):
            target = unpacked / part.unpack_to
            if archive.name.endswith(ARCHIVE_SUFFIXES):
                extract_archive(archive, target)
            else:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(archive, target / part.remote.name)
        (unpacked / RECORD_FILE).write_text(json.dumps(_make_record(items)), encoding="utf-8")
        unpacked.replace(folder)  # an empty folder may lie there
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def _is_downloaded(folder: Path, items: list[DownloadItem]) -> bool:
    """Whether the data set lies there: as it is downloaded now, or as the user has put it there."""
    try:
        recorded = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return _is_nonempty_dir(folder)
    except ValueError:
        recorded = None
    if recorded != _make_record(items):
        raise DataError(f"{folder}: downloaded from other files than datasets.yaml names now; remove it to fetch those")
    return True


def _is_nonempty_dir(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _make_record(items: list[DownloadItem]) -> dict[str, str]:
    return {part.remote.url: part.remote.sha256 for part in items}


@contextmanager
def _lock_temp_dir(temp_dir: Path) -> Iterator[Path]:
    """The folder to work in, for one process at a time: others, as torchrun starts them, wait until it is done."""
    temp_dir.mkdir(parents=True, exist_ok=True)
    with (temp_dir.parent / f"{temp_dir.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{temp_dir.name}: another process is downloading it; waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        temp_dir.mkdir(parents=True, exist_ok=True)  # the other one has removed it
        yield temp_dir


def _parse_items(entries: Any, data: str) -> list[DownloadItem]:
    """What datasets.yaml says under `download`, checked."""
    name = f"{find_catalog_file()}: {data}: download"
    if entries is None:
        return []
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise DataError(f"{name}: expected a list of {{url, sha256, bytes, unpack_to}}")
    return [_parse_item(one, name) for one in entries]


def _parse_item(entry: dict[str, Any], name: str) -> DownloadItem:
    url, sha256, size, unpack_to = (entry.get(key) for key in ("url", "sha256", "bytes", "unpack_to"))
    if not set(entry) <= FILE_KEYS:
        raise DataError(f"{name}: unknown key {min(map(str, set(entry) - FILE_KEYS))!r}")
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
    return DownloadItem(remote, str(inside))
