"""Downloads of a file from a web server on this machine that behaves as badly as it is told."""

import hashlib
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hkd_det.datasets import download_file as fetch
from hkd_det.datasets.download_file import RemoteFile
from hkd_det.errors import DataError, HkdError, UnavailableError

CONTENT = random.Random(3).randbytes(300_000)  # what the server has, unless it is told
Serve = Callable[..., Any]


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_fetched_once(tmp_path: Path, serve: Serve, waited: list[float]) -> None:
    site = serve()
    for _ in range(2):
        fetch.download_file(site.file(), tmp_path / "new" / "set.zip")
    assert (tmp_path / "new" / "set.zip").read_bytes() == CONTENT and left(tmp_path / "new") == {"set.zip"}
    assert len(site.asked) == 1 and site.asked[0]["accept-encoding"] == "identity" and not waited
    (tmp_path / "new" / "set.zip").write_bytes(CONTENT[:-1] + b"!")  # damaged since
    fetch.download_file(site.file(), tmp_path / "new" / "set.zip")
    assert (tmp_path / "new" / "set.zip").read_bytes() == CONTENT


@pytest.mark.parametrize("headers", [{"ETag": '"one"'}, {"Last-Modified": "Thu, 01 Jan 2015 00:00:00 GMT"}, {}])
def test_a_broken_connection_goes_on_where_it_broke(
    tmp_path: Path, serve: Serve, waited: list[float], headers: dict[str, str]
) -> None:
    site = serve(breaks=[100_000, 0, 0, 50_000, 0, 0, 0, 1], headers=headers)
    fetch.download_file(site.file(), tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT and left(tmp_path) == {"set.zip"}
    begins = [int(one.get("range", "bytes=0-")[6:-1]) for one in site.asked]
    assert begins == [0, *[100_000] * 3, *[150_000] * 4, 150_001]  # not a byte is fetched twice
    assert {one.get("if-range") for one in site.asked[1:]} == {next(iter(headers.values()), None)}
    assert waited == [1, 2, 4, 1, 2, 4, 8, 1]  # from the start again after every new byte


def test_a_server_without_ranges_sends_all_of_it_again(tmp_path: Path, serve: Serve, waited: list[float]) -> None:
    site = serve(ranges=False, breaks=[200_000, 100_000])
    fetch.download_file(site.file(), tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT and len(site.asked) == 3 and waited == [1, 2]


def test_a_connection_that_stays_dead_is_given_up_and_what_came_is_kept(
    tmp_path: Path, serve: Serve, waited: list[float]
) -> None:
    site = serve(breaks=[70_000] + [0] * 9)
    with pytest.raises(UnavailableError, match=r"5 times in a row.*70,000 of 300,000 bytes.*goes on") as caught:
        fetch.download_file(site.file(), tmp_path / "set.zip")
    assert "\n" not in str(caught.value) and waited == [1, 2, 4, 8]
    assert (tmp_path / "set.zip.part").read_bytes() == CONTENT[:70_000] and not (tmp_path / "set.zip").exists()
    site.breaks.clear()
    fetch.download_file(site.file(), tmp_path / "set.zip")
    assert site.asked[-1]["range"] == "bytes=70000-" and left(tmp_path) == {"set.zip"}


def test_nobody_listens(tmp_path: Path, waited: list[float]) -> None:
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/set.zip"
        with pytest.raises(UnavailableError, match=r"set\.zip: Connection refused, 5 times in a row"):
            fetch.download_file(RemoteFile(url, "0" * 64, 5), tmp_path / "set.zip")
    assert len(waited) == 4


def test_a_busy_server_is_asked_again(tmp_path: Path, serve: Serve, waited: list[float]) -> None:
    site = serve(statuses=[503, 429, 500])
    fetch.download_file(site.file(), tmp_path / "set.zip")
    assert waited == [1, 2, 4] and (tmp_path / "set.zip").read_bytes() == CONTENT


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_told_at_once(tmp_path: Path, serve: Serve, waited: list[float], status: int) -> None:
    site = serve(statuses=[status])
    with pytest.raises(UnavailableError, match=rf"{site.address}/data/set\.zip: the server answers {status}"):
        fetch.download_file(site.file(), tmp_path / "set.zip")
    assert not waited and left(tmp_path) == set()


def test_another_file_is_removed_and_both_hashes_told(tmp_path: Path, serve: Serve) -> None:
    site = serve(content=b"x" * 1000)
    found = hashlib.sha256(b"x" * 1000).hexdigest()
    with pytest.raises(DataError, match=rf"set\.zip: not the file.*{found}, not {'0' * 64}; removed"):
        fetch.download_file(site.file(sha256="0" * 64), tmp_path / "set.zip")
    assert left(tmp_path) == set()


@pytest.mark.parametrize(("length", "size"), [(None, 299_999), (None, 300_001), (0, 299_999), (299_999, 300_000)])
def test_another_length_is_told_before_it_is_fetched(tmp_path: Path, serve: Serve, length: int, size: int) -> None:
    site = serve(length=length)
    with pytest.raises(DataError, match=rf"bytes there, {size:,} in the file|sends more than the {size:,} bytes"):
        fetch.download_file(site.file(size_bytes=size), tmp_path / "set.zip")
    assert left(tmp_path) == set()


def test_a_file_changed_between_two_halves_is_fetched_anew(tmp_path: Path, serve: Serve) -> None:
    site = serve(breaks=[100_000] + [0] * 4)
    with pytest.raises(UnavailableError):
        fetch.download_file(site.file(), tmp_path / "set.zip")
    site.content, site.headers = CONTENT[::-1], {"ETag": '"two"'}
    fetch.download_file(site.file(), tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT[::-1]


def test_a_server_that_heeds_no_if_range_joins_no_halves(tmp_path: Path, serve: Serve) -> None:
    site = serve(breaks=[100_000] + [0] * 4)
    with pytest.raises(UnavailableError):
        fetch.download_file(site.file(), tmp_path / "set.zip")
    # what was asked for counts as this version, too, and so the rest is sent
    site.content, site.headers = CONTENT[::-1], {"ETag": '"two"', "Last-Modified": '"one"'}
    fetch.download_file(site.file(), tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("part", [b"y" * 300_000, b"y" * 400_000, b""])
def test_a_useless_part_is_replaced(tmp_path: Path, serve: Serve, part: bytes) -> None:
    site = serve()
    (tmp_path / "set.zip.part").write_bytes(part)
    if len(part) == len(CONTENT):  # as long as the file, but another
        with pytest.raises(DataError, match="removed"):
            fetch.download_file(site.file(), tmp_path / "set.zip")
    fetch.download_file(site.file(), tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT and left(tmp_path) == {"set.zip"}


def test_a_part_that_the_server_cannot_go_on_with(tmp_path: Path, serve: Serve) -> None:
    site = serve(statuses=[416])
    (tmp_path / "set.zip.part").write_bytes(CONTENT[:1000])
    fetch.download_file(site.file(), tmp_path / "set.zip")
    assert "range" not in site.asked[-1] and (tmp_path / "set.zip").read_bytes() == CONTENT


def test_a_redirect_to_another_host_is_followed(tmp_path: Path, serve: Serve) -> None:
    there = serve(host="localhost", breaks=[1000])
    here = serve(redirect_to=f"{there.address}/elsewhere.zip")
    fetch.download_file(here.file(), tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT
    assert there.asked[1]["range"] == "bytes=1000-" and there.asked[1]["if-range"] == '"one"'


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/set.zip", "file:///etc/passwd", "http://[broken/", "SELF"])
def test_a_redirect_that_leads_nowhere(tmp_path: Path, serve: Serve, waited: list[float], target: str) -> None:
    site = serve(redirect_to=target)
    if target == "SELF":
        site.redirect_to = f"{site.address}/data/set.zip"
    with pytest.raises(UnavailableError, match=r"set\.zip") as caught:
        fetch.download_file(site.file(), tmp_path / "set.zip")
    assert "\n" not in str(caught.value) and not waited and left(tmp_path) == set()


def test_a_file_that_the_server_calls_compressed_stays_as_it_is(tmp_path: Path, serve: Serve) -> None:
    site = serve(headers={"Content-Encoding": "gzip", "ETag": '"one"'})  # as old servers do with every .gz
    fetch.download_file(site.file(), tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT


def test_ctrl_c_keeps_what_has_come(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    site = serve()

    def pour(answer: Any, write: Callable[[bytes], int], *_: Any) -> None:
        write(answer.raw.read(90_000))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fetch, "_pour", pour)
        fetch.download_file(site.file(), tmp_path / "set.zip")
    fetch.download_file(site.file(), tmp_path / "set.zip")
    assert (tmp_path / "set.zip").read_bytes() == CONTENT
    assert site.asked[1]["range"] == "bytes=90000-" and site.asked[1]["if-range"] == '"one"'


def test_a_full_disk_is_one_line(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    site = serve()
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_pour", lambda *_: os.open(tmp_path / "no" / "such", 0))
        with pytest.raises(DataError, match=r"set\.zip\.part: No such file.*what has come is kept"):
            fetch.download_file(site.file(), tmp_path / "set.zip")
    if Path("/dev/full").exists():
        (tmp_path / "set.zip.part").unlink()
        (tmp_path / "set.zip.part").symlink_to("/dev/full")
        with pytest.raises(DataError, match=r"set\.zip\.part: No space left on device; what has come is kept"):
            fetch.download_file(site.file(), tmp_path / "set.zip")


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
def test_the_names_of_files(url: str, name: str) -> None:
    assert RemoteFile(url, "", 1).name == name


def test_nothing_but_our_errors(tmp_path: Path, serve: Serve) -> None:
    """A server that answers any nonsense."""
    chance = random.Random(5)
    for number in range(40):
        junk = {"Content-Range": chance.choice(["bytes 0-1/2", "bytes x", "bytes 5-/9", ""]), "ETag": "W/weak"}
        site = serve(
            content=chance.randbytes(2000),
            headers=junk if number % 2 else {},
            statuses=[chance.choice([200, 204, 206, 301, 304, 416, 502]) for _ in range(3)],
            breaks=[chance.randrange(2000) for _ in range(3)],
            length=chance.choice([None, 0, 1, 1999, 5000]),
        )
        try:
            fetch.download_file(site.file(), tmp_path / f"{number}.zip")
        except HkdError as error:
            assert "\n" not in str(error)
            assert not (tmp_path / f"{number}.zip").exists()
        else:
            assert (tmp_path / f"{number}.zip").read_bytes() == site.content
