"""Download of the datasets in datasets.yaml into ./datasets/.

An entry lists its files: `download: [{url, sha256, bytes, unpack_to}]`. They are downloaded to
datasets/.downloads/NAME, verified and extracted there. The result is renamed at the end, so a directory under the final
name is always complete.
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
from hkd_det.datasets.catalog import load_catalog_entry
from hkd_det.datasets.data_yaml import DATASETS_DIR, find_catalog_file
from hkd_det.datasets.download_file import RemoteFile, download_file
from hkd_det.errors import DataError, UnavailableError, UsageError

TEMP_DIR = ".downloads"
RECORD_FILE = ".downloaded.json"  # in the directory of the dataset: URL and SHA-256 of each downloaded file
FILE_KEYS = {"url", "sha256", "bytes", "unpack_to"}


@dataclass(frozen=True)
class DownloadItem:
    """One file of a dataset.

    Attributes:
        remote: URL, digest and size of the file.
        unpack_to: Directory inside the dataset into which it is extracted.
    """

    remote: RemoteFile
    unpack_to: str


def download(data: str) -> Path:
    """Download, verify and extract a dataset of datasets.yaml. An existing directory is not changed.

    Args:
        data: Name in datasets.yaml.

    Returns:
        Directory of the dataset.

    Raises:
        UsageError: The name is not in datasets.yaml.
        UnavailableError: The dataset requires a manual download, or the download failed.
        DataError: A file is not the expected one, or an archive is invalid.
    """
    if data.endswith((".yaml", ".yml")):
        raise UsageError(f"--data {data}: --download requires a name in {find_catalog_file()}, got a file.")
    entry = load_catalog_entry(data)
    folder = DATASETS_DIR / PurePosixPath(entry.get("path", data)).parts[0]
    items = _parse_items(entry.get("download"), data)
    if not items and not _is_nonempty_dir(folder):
        raise UnavailableError(
            f"--data {data}: requires a manual download. Get it from {entry.get('homepage')}. License: "
            f"{entry.get('license')}. Extract it into {folder.absolute()} as {entry.get('directory_layout')}."
        )
    with _lock_temp_dir(DATASETS_DIR / TEMP_DIR / data) as temp_dir:
        if _is_downloaded(folder, items):
            print(f"{data}: {folder} exists already; nothing is downloaded")
        else:
            print(f"{data}: {entry.get('homepage')}; by using it you accept the license: {entry.get('license')}")
            _download_and_extract(items, temp_dir, folder)
            print(f"{data}: downloaded, verified and extracted into {folder}")
        shutil.rmtree(temp_dir)
    return folder


def _download_and_extract(items: list[DownloadItem], temp_dir: Path, folder: Path) -> None:
    archives = [temp_dir / f"{index}-{item.remote.name}" for index, item in enumerate(items)]
    present_bytes = sum(path.stat().st_size for path in temp_dir.iterdir() if path.is_file())
    check_disk_space(temp_dir, sum(item.remote.size_bytes for item in items) - present_bytes)
    for item, archive in zip(items, archives, strict=True):
        download_file(item.remote, archive)
    extracted = temp_dir / "extracted"
    shutil.rmtree(extracted, ignore_errors=True)  # left by an interrupted run
    try:
        for item, archive in zip(items, archives, strict=True):
            target = extracted / item.unpack_to
            if archive.name.endswith(ARCHIVE_SUFFIXES):
                extract_archive(archive, target)
            else:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(archive, target / item.remote.name)
        (extracted / RECORD_FILE).write_text(json.dumps(_make_record(items)), encoding="utf-8")
        extracted.replace(folder)  # `folder` may exist as an empty directory
    finally:
        shutil.rmtree(extracted, ignore_errors=True)


def _is_downloaded(folder: Path, items: list[DownloadItem]) -> bool:
    """Return whether the directory exists: downloaded from the same files, or filled by the user."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return _is_nonempty_dir(folder)
    except ValueError:
        record = None
    if record != _make_record(items):
        raise DataError(
            f"{folder}: downloaded from other files than those in datasets.yaml. Remove it to download it again."
        )
    return True


def _is_nonempty_dir(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _make_record(items: list[DownloadItem]) -> dict[str, str]:
    return {item.remote.url: item.remote.sha256 for item in items}


@contextmanager
def _lock_temp_dir(temp_dir: Path) -> Iterator[Path]:
    """Create the temporary directory and lock it; other processes, as started by torchrun, wait."""
    temp_dir.mkdir(parents=True, exist_ok=True)
    with (temp_dir.parent / f"{temp_dir.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{temp_dir.name}: waiting for another process that downloads it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        temp_dir.mkdir(parents=True, exist_ok=True)  # removed by the other process
        yield temp_dir


def _parse_items(entries: Any, data: str) -> list[DownloadItem]:
    """Validate the key `download` of an entry."""
    name = f"{find_catalog_file()}: {data}: download"
    if entries is None:
        return []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{name}: expected a list of {{url, sha256, bytes, unpack_to}}.")
    return [_parse_item(entry, name) for entry in entries]


def _parse_item(entry: dict[str, Any], name: str) -> DownloadItem:
    url, sha256, size, unpack_to = (entry.get(key) for key in ("url", "sha256", "bytes", "unpack_to"))
    if unknown := set(map(str, entry)) - FILE_KEYS:
        raise DataError(f"{name}: expected the keys {', '.join(sorted(FILE_KEYS))}, got {min(unknown)!r}.")
    if not isinstance(url, str) or not re.match(r"https?://[^/]+/", url):
        raise DataError(f"{name}: url: expected https://... or http://..., got {url!r}.")
    if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise DataError(f"{name}: sha256: expected 64 lower-case hexadecimal digits in quotes, got {sha256!r}.")
    if type(size) is not int or size < 1:
        raise DataError(f"{name}: bytes: expected the size of the file, got {size!r}.")
    target = PurePosixPath(str(unpack_to or "."))
    if target.is_absolute() or ".." in target.parts:
        raise DataError(f"{name}: unpack_to: expected a path inside the dataset, got {unpack_to!r}.")
    remote = RemoteFile(url, sha256, size)
    if not remote.name:
        raise DataError(f"{name}: url: expected a file name at the end, got {url!r}.")
    return DownloadItem(remote, str(target))
