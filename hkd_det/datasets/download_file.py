"""Download of one file with verification, retries and resumption.

The received bytes are in NAME.part, so that an interrupted download resumes. NAME.part.version contains the version of
the file (ETag or date of the server), so that parts of two versions are never joined.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import requests
from requests.exceptions import RequestException, SSLError
from urllib3.exceptions import HTTPError

from hkd_det.console import Progress, format_bytes, log_stage
from hkd_det.errors import DataError, UnavailableError
from hkd_det.files import file_sha256

CHUNK_BYTES = 1 << 20
TIMEOUT_S = (30.0, 60.0)  # to connect, and between two chunks
MAX_RETRIES = 4  # in a row without a new byte
RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)  # temporary HTTP errors

Sleep = Callable[[float], None]


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
