"""Tests of the download of one file from a local web server with configurable failures."""

import hashlib
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hkd_det.datasets import download as module
from hkd_det.datasets.download import RemoteFile, download_file
from hkd_det.errors import DataError, HkdError, UnavailableError

CONTENT = random.Random(3).randbytes(300_000)  # default content of the server
Serve = Callable[..., Any]


def list_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_download_file_once(tmp_path: Path, serve: Serve, sleeps: list[float]) -> None:
    site = serve()
    for _ in range(2):
        download_file(site.file(), tmp_path / "new" / "set.zip")
    assert (tmp_path / "new" / "set.zip").read_bytes() == CONTENT and list_names(tmp_path / "new") == {"set.zip"}
    assert len(site.requests) == 1 and site.requests[0]["accept-encoding"] == "identity" and not sleeps
    (tmp_path / "new" / "set.zip").write_bytes(CONTENT[:-1] + b"!")  # damaged since
    download_file(site.file(), tmp_path / "new" / "set.zip")
    assert (tmp_path / "new" / "set.zip").read_bytes() == CONTENT


@pytest.mark.parametrize("headers", [{"ETag": '"one"'}, {"Last-Modified": "Thu, 01 Jan 2015 00:00:00 GMT"}, {}])
def test_interrupted_connection_resumes(
    tmp_path: Path, serve: Serve, sleeps: list[float], headers: dict[str, str]
) -> None:
    site = serve(breaks=[100_000, 0, 0, 50_000, 0, 0, 0, 1], headers=headers)
    download_file(site.file(), tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT and list_names(tmp_path) == {"set.zip"}
    starts = [int(request.get("range", "bytes=0-")[6:-1]) for request in site.requests]
    assert starts == [0, *[100_000] * 3, *[150_000] * 4, 150_001]  # no byte is requested twice
    assert {request.get("if-range") for request in site.requests[1:]} == {next(iter(headers.values()), None)}
    assert sleeps == [1, 2, 4, 1, 2, 4, 8, 1]  # the count starts again after every new byte


def test_server_without_ranges_sends_everything_again(tmp_path: Path, serve: Serve, sleeps: list[float]) -> None:
    site = serve(ranges=False, breaks=[200_000, 100_000])
    download_file(site.file(), tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT and len(site.requests) == 3 and sleeps == [1, 2]


def test_dead_connection_keeps_received_bytes(tmp_path: Path, serve: Serve, sleeps: list[float]) -> None:
    site = serve(breaks=[70_000] + [0] * 9)
    with pytest.raises(UnavailableError, match=r"5 times in a row.*70,000 of 300,000 bytes.*resume") as error_info:
        download_file(site.file(), tmp_path / "set.zip")
    assert "\n" not in str(error_info.value) and sleeps == [1, 2, 4, 8]
    assert (tmp_path / "set.zip.part").read_bytes() == CONTENT[:70_000] and not (tmp_path / "set.zip").exists()
    site.breaks.clear()
    download_file(site.file(), tmp_path / "set.zip")
    assert site.requests[-1]["range"] == "bytes=70000-" and list_names(tmp_path) == {"set.zip"}


def test_connection_refused(tmp_path: Path, sleeps: list[float]) -> None:
    with socket.socket() as unused_socket:  # bound, but not listening
        unused_socket.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused_socket.getsockname()[1]}/set.zip"
        with pytest.raises(UnavailableError, match=r"set\.zip: Connection refused, 5 times in a row"):
            download_file(RemoteFile(url, "0" * 64, 5), tmp_path / "set.zip")
    assert len(sleeps) == 4


def test_busy_server_is_retried(tmp_path: Path, serve: Serve, sleeps: list[float]) -> None:
    site = serve(statuses=[503, 429, 500])
    download_file(site.file(), tmp_path / "set.zip")
    assert sleeps == [1, 2, 4] and (tmp_path / "set.zip").read_bytes() == CONTENT


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_refusal_is_not_retried(tmp_path: Path, serve: Serve, sleeps: list[float], status: int) -> None:
    site = serve(statuses=[status])
    with pytest.raises(UnavailableError, match=rf"{site.address}/data/set\.zip: HTTP status {status}"):
        download_file(site.file(), tmp_path / "set.zip")
    assert not sleeps and list_names(tmp_path) == set()


def test_wrong_file_is_removed(tmp_path: Path, serve: Serve) -> None:
    site = serve(content=b"x" * 1000)
    sha256 = hashlib.sha256(b"x" * 1000).hexdigest()
    with pytest.raises(DataError, match=rf"set\.zip: expected SHA-256 {'0' * 64}, got {sha256}"):
        download_file(site.file(sha256="0" * 64), tmp_path / "set.zip")
    assert list_names(tmp_path) == set()


@pytest.mark.parametrize(("length", "size"), [(None, 299_999), (None, 300_001), (0, 299_999), (299_999, 300_000)])
def test_wrong_length_is_an_error(tmp_path: Path, serve: Serve, length: int, size: int) -> None:
    site = serve(length=length)
    with pytest.raises(DataError, match=rf"expected {size:,} bytes, got"):
        download_file(site.file(size_bytes=size), tmp_path / "set.zip")
    assert list_names(tmp_path) == set()


def test_changed_file_is_downloaded_again(tmp_path: Path, serve: Serve) -> None:
    site = serve(breaks=[100_000] + [0] * 4)
    with pytest.raises(UnavailableError):
        download_file(site.file(), tmp_path / "set.zip")
    site.content, site.headers = CONTENT[::-1], {"ETag": '"two"'}
    download_file(site.file(), tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT[::-1]


def test_server_without_if_range_joins_no_parts(tmp_path: Path, serve: Serve) -> None:
    site = serve(breaks=[100_000] + [0] * 4)
    with pytest.raises(UnavailableError):
        download_file(site.file(), tmp_path / "set.zip")
    # The server accepts the old version in If-Range too, and sends the rest.
    site.content, site.headers = CONTENT[::-1], {"ETag": '"two"', "Last-Modified": '"one"'}
    download_file(site.file(), tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("part", [b"y" * 300_000, b"y" * 400_000, b""])
def test_wrong_partial_file_is_replaced(tmp_path: Path, serve: Serve, part: bytes) -> None:
    site = serve()
    (tmp_path / "set.zip.part").write_bytes(part)
    if len(part) == len(CONTENT):  # same length, other content
        with pytest.raises(DataError, match="removed"):
            download_file(site.file(), tmp_path / "set.zip")
    download_file(site.file(), tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT and list_names(tmp_path) == {"set.zip"}


def test_partial_file_with_status_416_is_replaced(tmp_path: Path, serve: Serve) -> None:
    site = serve(statuses=[416])
    (tmp_path / "set.zip.part").write_bytes(CONTENT[:1000])
    download_file(site.file(), tmp_path / "set.zip")
    assert "range" not in site.requests[-1] and (tmp_path / "set.zip").read_bytes() == CONTENT


def test_redirect_to_another_host_is_followed(tmp_path: Path, serve: Serve) -> None:
    there = serve(host="localhost", breaks=[1000])
    here = serve(redirect_to=f"{there.address}/elsewhere.zip")
    download_file(here.file(), tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT
    assert there.requests[1]["range"] == "bytes=1000-" and there.requests[1]["if-range"] == '"one"'


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/set.zip", "file:///etc/passwd", "http://[broken/", "SELF"])
def test_invalid_redirect_is_an_error(tmp_path: Path, serve: Serve, sleeps: list[float], target: str) -> None:
    site = serve(redirect_to=target)
    if target == "SELF":
        site.redirect_to = f"{site.address}/data/set.zip"
    with pytest.raises(UnavailableError, match=r"set\.zip") as error_info:
        download_file(site.file(), tmp_path / "set.zip")
    assert "\n" not in str(error_info.value) and not sleeps and list_names(tmp_path) == set()


def test_content_encoding_is_not_decoded(tmp_path: Path, serve: Serve) -> None:
    site = serve(headers={"Content-Encoding": "gzip", "ETag": '"one"'})  # old servers send it with every .gz
    download_file(site.file(), tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT


def test_ctrl_c_keeps_received_bytes(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    site = serve()

    def interrupt(response: Any, write: Callable[[bytes], int], *_: Any) -> None:
        write(response.raw.read(90_000))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_stream_to_file", interrupt)
        download_file(site.file(), tmp_path / "set.zip")
    download_file(site.file(), tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT
    assert site.requests[1]["range"] == "bytes=90000-" and site.requests[1]["if-range"] == '"one"'


def test_full_disk_gives_one_line(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    site = serve()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_stream_to_file", lambda *_: os.open(tmp_path / "no" / "such", 0))
        with pytest.raises(DataError, match=r"set\.zip\.part: No such file.*The received bytes are kept"):
            download_file(site.file(), tmp_path / "set.zip")
    if Path("/dev/full").exists():
        (tmp_path / "set.zip.part").unlink()
        (tmp_path / "set.zip.part").symlink_to("/dev/full")
        with pytest.raises(DataError, match=r"set\.zip\.part: No space left on device. The received bytes are kept"):
            download_file(site.file(), tmp_path / "set.zip")


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://a.b/c/d.zip?x=/e", "d.zip"),
        ("http://a.b/c%20d.zip", ""),
        ("http://a.b/", ""),
        ("http://a.b/..", ""),
        ("http://a.b/x%2f..%2f..", ""),
        ("http://a.b/.profile", ""),
    ],
)
def test_remote_file_name(url: str, name: str) -> None:
    assert RemoteFile(url, "", 1).name == name


def test_random_responses_raise_only_hkd_errors(tmp_path: Path, serve: Serve) -> None:
    rng = random.Random(5)
    for number in range(40):
        junk = {"Content-Range": rng.choice(["bytes 0-1/2", "bytes x", "bytes 5-/9", ""]), "ETag": "W/weak"}
        site = serve(
            content=rng.randbytes(2000),
            headers=junk if number % 2 else {},
            statuses=[rng.choice([200, 204, 206, 301, 304, 416, 502]) for _ in range(3)],
            breaks=[rng.randrange(2000) for _ in range(3)],
            length=rng.choice([None, 0, 1, 1999, 5000]),
        )
        try:
            download_file(site.file(), tmp_path / f"{number}.zip")
        except HkdError as error:
            assert "\n" not in str(error)
            assert not (tmp_path / f"{number}.zip").exists()
        else:
            assert (tmp_path / f"{number}.zip").read_bytes() == site.content
