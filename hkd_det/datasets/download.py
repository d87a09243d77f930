"""Download of the datasets in datasets.yaml into ./datasets/, with verification, retries and resumption.

An entry lists its files: `download: [{url, sha256, bytes, unpack_to}]`. They are downloaded to
datasets/.downloads/NAME, verified and extracted there. The result is renamed at the end, so a directory under the final
name is always complete. The received bytes are in NAME.part, so that an interrupted download resumes. NAME.part.version
contains the version of the file (ETag or date of the server), so that parts of two versions are never joined.
"""

import fcntl
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
from requests.exceptions import RequestException, SSLError
from urllib3.exceptions import HTTPError

from hkd_det.console import Progress, format_bytes, log_stage
from hkd_det.datasets.archive import ARCHIVE_SUFFIXES, check_disk_space, extract_archive
from hkd_det.datasets.catalog import load_catalog_entry
from hkd_det.datasets.data_yaml import DATASETS_DIR, find_catalog_file
from hkd_det.errors import DataError, UnavailableError, UsageError
from hkd_det.files import file_sha256

CHUNK_BYTES = 1 << 20
TIMEOUT_S = (30.0, 60.0)  # to connect, and between two chunks
MAX_RETRIES = 4  # in a row without a new byte
RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)  # temporary HTTP errors

Sleep = Callable[[float], None]
TEMP_DIR = ".downloads"
RECORD_FILE = ".downloaded.json"  # in the directory of the dataset: URL and SHA-256 of each downloaded file
FILE_KEYS = {"url", "sha256", "bytes", "unpack_to"}


class _RetryableError(Exception):
    """A temporary failure: the request is repeated."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on a web server.

    Attributes:
        url: Address, http or https.
        sha256: 64 lower-case hexadecimal digits.
        size_bytes: Exact size, at least 1.
    """

    url: str
    sha256: str
    size_bytes: int

    @property
    def name(self) -> str:
        """File name at the end of the URL, or "" if there is none."""
        name = PurePosixPath(unquote(urlsplit(self.url).path)).name
        return name if re.fullmatch(r"\w[\w.+-]*", name, re.ASCII) else ""


def download_file(remote: RemoteFile, path: Path, sleep: Sleep = time.sleep) -> None:
    """Download a file unless it exists already; resume an earlier download.

    After a failure, the request is repeated after 1, 2, 4 and 8 seconds. The count starts again with every new byte.

    Args:
        remote: URL, digest and size.
        path: Output path.
        sleep: Function that waits for a number of seconds.

    Raises:
        UnavailableError: The network or the server refuses the request.
        DataError: The disk is full, or the file is not the expected one; such a file is removed.
    """
    if path.exists() and _hash_file(path) == remote.sha256:
        return
    partial_path = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    if _get_size_bytes(partial_path) > remote.size_bytes:
        _remove_partial(partial_path)
    with (
        requests.Session() as session,
        Progress(remote.size_bytes, f"download {remote.name}", "B", keep=True) as progress,
    ):
        log_stage(f"download {remote.name}, {format_bytes(remote.size_bytes)}")
        _download_with_retries(session, remote, partial_path, progress, sleep)
    sha256 = _hash_file(partial_path)
    if sha256 != remote.sha256:
        _remove_partial(partial_path)
        raise DataError(
            f"{remote.url}: expected SHA-256 {remote.sha256}, got {sha256}. The file was removed. If the error occurs "
            "again, the file was changed on the server."
        )
    partial_path.replace(path)
    _remove_partial(partial_path)


def _download_with_retries(
    session: requests.Session, remote: RemoteFile, partial_path: Path, progress: Progress, sleep: Sleep
) -> None:
    """Repeat requests until the partial file has the expected size."""
    max_bytes, failures = _get_size_bytes(partial_path), 0
    while _get_size_bytes(partial_path) < remote.size_bytes:
        try:
            _download_once(session, remote, partial_path, progress)
        except SSLError as error:
            raise UnavailableError(
                f"{remote.url}: invalid server certificate ({_format_root_cause(error)}). Behind a proxy, "
                "set REQUESTS_CA_BUNDLE to its certificates."
            ) from None
        except (_RetryableError, requests.ConnectionError, requests.Timeout, HTTPError) as error:
            if _get_size_bytes(partial_path) > max_bytes:
                max_bytes, failures = _get_size_bytes(partial_path), 0
            if failures == MAX_RETRIES:
                raise UnavailableError(
                    f"{remote.url}: {_format_root_cause(error)}, {failures + 1} times in a row. "
                    f"{_get_size_bytes(partial_path):,} of {remote.size_bytes:,} bytes are kept. "
                    "Repeat the command to resume."
                ) from None
            progress.set_status(f"interrupted, retry in {2**failures} s")
            log_stage(f"download {remote.name}: interrupted ({_format_root_cause(error)}), retry in {2**failures} s")
            sleep(2.0**failures)
            failures += 1
        except (RequestException, ValueError) as error:  # ValueError: a redirect to an invalid address
            raise UnavailableError(f"{remote.url}: {_format_root_cause(error)}. Check the URL.") from None


def _download_once(session: requests.Session, remote: RemoteFile, partial_path: Path, progress: Progress) -> None:
    """Send one request and append to the partial file; start again if the server does not resume."""
    # identity: size and digest are those of the file on the server
    headers = {"Accept-Encoding": "identity", "User-Agent": "hkd-det", **_make_range_headers(partial_path)}
    with session.get(remote.url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        start = _get_start_byte(response, remote, partial_path)
        try:
            with partial_path.open("r+b" if start else "wb", buffering=0) as out:
                _get_version_path(partial_path).write_text(_get_version(response), encoding="utf-8")
                out.seek(start)
                progress.restart(start)
                progress.set_status("")
                _stream_to_file(response, out.write, remote, progress)
        except DataError:
            _remove_partial(partial_path)
            raise
        except OSError as error:
            raise DataError(
                f"{partial_path}: {error.strerror or error}. The received bytes are kept. Repeat the command to resume."
            ) from None
    if _get_size_bytes(partial_path) < remote.size_bytes:
        raise _RetryableError("the connection ended early")


def _stream_to_file(
    response: requests.Response, write: Callable[[memoryview], int | None], remote: RemoteFile, progress: Progress
) -> None:
    # The raw stream: requests would decompress a .gz file that the server declares as "Content-Encoding: gzip".
    for chunk in response.raw.stream(CHUNK_BYTES, decode_content=False):
        if progress.done + len(chunk) > remote.size_bytes:
            raise DataError(f"{remote.url}: expected {remote.size_bytes:,} bytes, got more. The file was changed.")
        rest = memoryview(chunk)
        while rest:  # an unbuffered write may write only a part
            rest = rest[write(rest) :]
        progress.update(len(chunk))


def _get_start_byte(response: requests.Response, remote: RemoteFile, partial_path: Path) -> int:
    """Return the offset of the response in the file."""
    status = response.status_code
    if status in RETRY_STATUS:
        raise _RetryableError(f"HTTP status {status} {response.reason}")
    if status == 416:  # range not satisfiable: the partial file belongs to another version
        _remove_partial(partial_path)
        raise _RetryableError("the server cannot resume the download")
    if status not in (200, 206):
        raise UnavailableError(f"{remote.url}: HTTP status {status} {response.reason}. Check the URL.")
    start, size = 0, response.headers.get("Content-Length", "")
    if status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""), re.ASCII)
        version = _read_version(partial_path)
        if (
            not match
            or int(match[1]) != _get_size_bytes(partial_path)
            or (version and _get_version(response) not in (version, ""))
        ):
            _remove_partial(partial_path)
            raise _RetryableError("the server resumed at another offset or version")
        start, size = _get_size_bytes(partial_path), match[2]
    if size.isdecimal() and int(size) != remote.size_bytes:
        raise DataError(
            f"{remote.url}: expected {remote.size_bytes:,} bytes, got {int(size):,}. The file was changed, or a proxy "
            "returned another one."
        )
    return start


def _make_range_headers(partial_path: Path) -> dict[str, str]:
    """Return the headers that request the rest of the partial file, for the same version."""
    num_bytes = _get_size_bytes(partial_path)
    if not num_bytes:
        return {}
    version = _read_version(partial_path)
    return {"Range": f"bytes={num_bytes}-", **({"If-Range": version} if version else {})}


def _get_version(response: requests.Response) -> str:
    """Return a value for If-Range: a strong ETag or the date; "" if the server sends neither."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _get_version_path(partial_path: Path) -> Path:
    return partial_path.with_name(f"{partial_path.name}.version")


def _read_version(partial_path: Path) -> str:
    try:
        return _get_version_path(partial_path).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""


def _remove_partial(partial_path: Path) -> None:
    partial_path.unlink(missing_ok=True)
    _get_version_path(partial_path).unlink(missing_ok=True)


def _get_size_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _hash_file(path: Path) -> str:
    size = _get_size_bytes(path)
    log_stage(f"verify {path.name}")
    with Progress(size, f"verify {path.name}", "B") as progress:
        return file_sha256(path, progress.update)


def _format_root_cause(error: BaseException) -> str:
    """Return the message of the exception at the end of the chain, in one line."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    if isinstance(error, TimeoutError):
        return "timeout"
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(message.split()) or type(error).__name__


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
