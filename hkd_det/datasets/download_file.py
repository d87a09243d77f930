"""`fetch`: a file from the web, whole and the one that is meant, or not at all.

What has come so far lies in NAME.part, so that a download that was stopped goes on; NAME.part.version says which
version of the file it is (the server's ETag or date), so that halves of two versions are never joined.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
from requests.exceptions import RequestException, SSLError
from tqdm import tqdm
from urllib3.exceptions import HTTPError

from hkd_det.errors import DataError, UnavailableError
from hkd_det.files import file_sha256

CHUNK_BYTES = 1 << 20


TIMEOUT_S = (30.0, 60.0)  # to connect, and between two pieces


MAX_RETRIES = 4  # in a row, without a new byte


RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)  # HTTP: come again later


Sleep = Callable[[float], None]


class _RetryableError(Exception):
    """It may go well the next time."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the web, and how to know it again.

    url: http or https; sha256: 64 lower-case hexadecimal digits; size_bytes: exact, 1 or more.
    """

    url: str
    sha256: str
    size_bytes: int

    @property
    def name(self) -> str:
        """The last part of the URL's path, a plain file name; "" where there is none."""
        name = PurePosixPath(unquote(urlsplit(self.url).path)).name
        return name if re.fullmatch(r"\w[\w.+-]*", name, re.ASCII) else ""


def download_file(remote: RemoteFile, path: Path, sleep: Sleep = time.sleep) -> None:
    """Bring the file to `path`, unless it is there already; go on with what an earlier try has left.

    A broken connection is tried again after 1, 2, 4, 8 seconds (`wait`), as long as it takes while bytes come.
    Raises UnavailableError for what the network or the server refuses, DataError for a full disk or another file than
    the one that is meant; such a file is removed.
    """
    if path.exists() and _hash_file(path) == remote.sha256:
        return
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    if _get_size_bytes(part) > remote.size_bytes:
        _remove_partial(part)
    with (
        requests.Session() as session,
        tqdm(desc=remote.name, total=remote.size_bytes, unit="B", unit_scale=True, unit_divisor=1024) as bar,
    ):
        _download_with_retries(session, remote, part, bar, sleep)
    found = _hash_file(part)
    if found != remote.sha256:
        _remove_partial(part)
        raise DataError(
            f"{remote.url}: not the file that is meant: its SHA-256 is {found}, not {remote.sha256}; removed. "
            "If a second try says the same, the file was changed at its source"
        )
    part.replace(path)
    _remove_partial(part)


def _download_with_retries(
    session: requests.Session, remote: RemoteFile, partial_path: Path, bar: "tqdm[Any]", sleep: Sleep
) -> None:
    """Receive until the part has the file's size."""
    furthest, failures = _get_size_bytes(partial_path), 0
    while _get_size_bytes(partial_path) < remote.size_bytes:
        try:
            _download_once(session, remote, partial_path, bar)
        except SSLError as error:
            raise UnavailableError(
                f"{remote.url}: the server's certificate is not accepted ({_format_root_cause(error)}); behind a company's "
                "proxy set REQUESTS_CA_BUNDLE to its certificates"
            ) from None
        except (_RetryableError, requests.ConnectionError, requests.Timeout, HTTPError) as error:
            if _get_size_bytes(partial_path) > furthest:
                furthest, failures = _get_size_bytes(partial_path), 0
            if failures == MAX_RETRIES:
                raise UnavailableError(
                    f"{remote.url}: {_format_root_cause(error)}, {failures + 1} times in a row; what has come is kept "
                    f"({_get_size_bytes(partial_path):,} of {remote.size_bytes:,} bytes): the same command goes on with it"
                ) from None
            bar.set_postfix_str(f"broken off, again in {2**failures} s")
            sleep(2.0**failures)
            failures += 1
        except (RequestException, ValueError) as error:  # ValueError: a redirect to what is no address
            raise UnavailableError(f"{remote.url}: {_format_root_cause(error)}") from None


def _download_once(session: requests.Session, remote: RemoteFile, partial_path: Path, bar: "tqdm[Any]") -> None:
    """One request: add what comes to the part, or write it anew where the server does not go on."""
    # identity: bytes are counted and hashed as they lie on the server
    headers = {"Accept-Encoding": "identity", "User-Agent": "hkd-det", **_make_range_headers(partial_path)}
    with session.get(remote.url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
        start = _get_start_byte(answer, remote, partial_path)
        try:
            with partial_path.open("r+b" if start else "wb", buffering=0) as out:
                _get_version_path(partial_path).write_text(_get_version(answer), encoding="utf-8")
                out.seek(start)
                bar.n = start
                bar.set_postfix_str("")
                _stream_to_file(answer, out.write, remote, bar)
        except DataError:
            _remove_partial(partial_path)
            raise
        except OSError as error:
            raise DataError(
                f"{partial_path}: {error.strerror or error}; what has come is kept: the same command goes on with it"
            ) from None
    if _get_size_bytes(partial_path) < remote.size_bytes:
        raise _RetryableError("the connection ended early")


def _stream_to_file(
    response: requests.Response, write: Callable[[memoryview], int | None], remote: RemoteFile, bar: "tqdm[Any]"
) -> None:
    # The raw stream: requests would unpack a .gz file that the server declares as "Content-Encoding: gzip".
    for piece in response.raw.stream(CHUNK_BYTES, decode_content=False):
        if bar.n + len(piece) > remote.size_bytes:
            raise DataError(f"{remote.url}: sends more than the {remote.size_bytes:,} bytes of the file that is meant")
        left = memoryview(piece)
        while left:  # an unbuffered write may take less than all
            left = left[write(left) :]
        bar.update(len(piece))


def _get_start_byte(response: requests.Response, remote: RemoteFile, partial_path: Path) -> int:
    """From which byte the answer's content goes on."""
    status = response.status_code
    if status in RETRY_STATUS:
        raise _RetryableError(f"the server answers {status} {response.reason}")
    if status == 416:  # nothing there to go on with: the part is of another file
        _remove_partial(partial_path)
        raise _RetryableError("the server has no more of the file")
    if status not in (200, 206):
        raise UnavailableError(f"{remote.url}: the server answers {status} {response.reason}")
    start, size = 0, response.headers.get("Content-Length", "")
    if status == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""), re.ASCII)
        known = _read_version(partial_path)
        if (
            not span
            or int(span[1]) != _get_size_bytes(partial_path)
            or (known and _get_version(response) not in (known, ""))
        ):
            _remove_partial(partial_path)
            raise _RetryableError("the server went on from another place")
        start, size = _get_size_bytes(partial_path), span[2]
    if size.isdecimal() and int(size) != remote.size_bytes:
        raise DataError(
            f"{remote.url}: {int(size):,} bytes there, {remote.size_bytes:,} in the file that is meant: "
            "it was changed, or something between here and the server answers in its place"
        )
    return start


def _make_range_headers(partial_path: Path) -> dict[str, str]:
    """The headers that ask for the rest of the version whose beginning is there."""
    have = _get_size_bytes(partial_path)
    if not have:
        return {}
    version = _read_version(partial_path)
    return {"Range": f"bytes={have}-", **({"If-Range": version} if version else {})}


def _get_version(response: requests.Response) -> str:
    """What If-Range may name: a strong ETag, or the date; "" where the server says neither."""
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
    with tqdm(desc=f"verify {path.name}", total=size, unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:
        return file_sha256(path, bar.update)


def _format_root_cause(error: BaseException) -> str:
    """The reason at the end of a chain of exceptions, as short as it can be said."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    if isinstance(error, TimeoutError):
        return "no answer in time"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split()) or type(error).__name__
