"""Tests of the extraction of valid, malicious and damaged archives."""

import bz2
import gzip
import io
import lzma
import random
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkd_det.datasets import archive as module
from hkd_det.datasets.archive import extract_archive
from hkd_det.errors import DataError, HkdError, UnavailableError

FILES = {"set/images/a.png": random.Random(1).randbytes(1_500_000), "set/labels/a.txt": b"", "readme": b"hello"}
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "tar.gz": gzip.compress,
    "tgz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
}


def make_zip(files: dict[str, bytes], **changes: Any) -> bytes:
    """Build a zip; `changes` are set on the ZipInfo of every member."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for key, value in changes.items():
                setattr(info, key, value)
            archive.writestr(info, content)
    return buffer.getvalue()


def make_tar(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT, **changes: Any) -> bytes:
    """Build a tar; `changes` are set on the TarInfo of every member."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in changes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_bytes(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("suffix", ["zip", *COMPRESSORS])
def test_extract_all_files(tmp_path: Path, suffix: str) -> None:
    content = make_zip(FILES) if suffix == "zip" else COMPRESSORS[suffix](make_tar(FILES, mode=0o4777))
    extract_archive(write_bytes(tmp_path, f"a.{suffix}", content), tmp_path / "out")
    assert read_all(tmp_path / "out") == FILES
    for path in (tmp_path / "out").rglob("*"):
        assert not path.stat().st_mode & (stat.S_ISUID | stat.S_IWOTH)  # permissions of the archive are ignored


def test_extract_directories(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "empty").mkdir(parents=True)
    (source / "a.txt").write_text("a")
    for form, name in (("gztar", "t.tar.gz"), ("zip", "z.zip")):  # shutil writes "./" and the directories too
        archive = shutil.make_archive(str(tmp_path / name.partition(".")[0]), form, source)
        extract_archive(Path(archive), tmp_path / form)
        assert read_all(tmp_path / form) == {"a.txt": b"a"} and (tmp_path / form / "empty").is_dir()


OUTSIDE_NAMES = [
    "../evil",
    "a/../../evil",
    "ROOT/evil",
    "/ROOT/evil",
    "..",
    "a/..",
    "C:/evil",
    "c:evil",
    "a\\..\\..\\evil",
    ".",
]


@pytest.mark.parametrize("name", OUTSIDE_NAMES)
@pytest.mark.parametrize("pack", [make_zip, make_tar])
def test_member_outside_is_refused(tmp_path: Path, name: str, pack: Callable[..., bytes]) -> None:
    suffix, name = "zip" if pack is make_zip else "tar", name.replace("ROOT", str(tmp_path))
    archive = write_bytes(tmp_path, f"a.{suffix}", pack({"good": b"1", name: b"evil"}))
    with pytest.raises(DataError, match=rf"a\.{suffix}: member '.*' is outside"):
        extract_archive(archive, tmp_path / "deep" / "out")
    assert read_all(tmp_path / "deep") == {"out/good": b"1"}
    assert {path.name for path in tmp_path.iterdir()} == {f"a.{suffix}", "deep"}


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE", "CONTTYPE"])
@pytest.mark.parametrize("target", ["../..", "/etc", "inside"])
def test_tar_links_and_devices_are_refused(tmp_path: Path, kind: str, target: str) -> None:
    evil = make_tar({"way": b""}, type=getattr(tarfile, kind), linkname=target)
    archive = write_bytes(tmp_path, "a.tar", evil)
    if kind == "CONTTYPE":  # treated as a regular file
        extract_archive(archive, tmp_path / "out")
        assert read_all(tmp_path / "out") == {"way": b""}
        return
    with pytest.raises(DataError, match="'way' is a link or device"):
        extract_archive(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_zip_links_and_devices_are_refused(tmp_path: Path, kind: int) -> None:
    archive = write_bytes(
        tmp_path, "a.zip", make_zip({"way": b"../.."}, external_attr=(kind | 0o777) << 16, create_system=3)
    )
    with pytest.raises(DataError, match="'way' is a link or device"):
        extract_archive(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pack", [make_zip, make_tar])
@pytest.mark.parametrize("names", [("a", "./a"), ("a", "a/b"), ("a/b", "a"), ("a", "x/" * 3000 + "y")])
def test_conflicting_members_are_an_error(tmp_path: Path, pack: Callable[..., bytes], names: tuple[str, str]) -> None:
    archive = write_bytes(tmp_path, "a.zip" if pack is make_zip else "a.tar", pack(dict.fromkeys(names, b"1")))
    with pytest.raises(DataError, match=r"be extracted: (File exists|Not a directory|File name too long)"):
        extract_archive(archive, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["zip", "tar.gz", "tar.xz"])
def test_zip_bomb_is_refused(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_LIMIT_BYTES", 1 << 20)
    zeros = {f"{number}": bytes(1 << 21) for number in range(8)}
    content = make_zip(zeros) if suffix == "zip" else COMPRESSORS[suffix](make_tar(zeros))
    archive = write_bytes(tmp_path, f"a.{suffix}", content)
    limit = max(1 << 20, 50 * len(content))
    size = "16,777,216" if suffix == "zip" else f"more than {limit:,}"
    with pytest.raises(DataError, match=rf"{len(content):,} bytes that extract to {size} bytes, which is too large"):
        extract_archive(archive, tmp_path / "out")
    assert sum(map(len, read_all(tmp_path / "out").values())) <= limit
    extract_archive(archive, tmp_path / "allowed", max_bytes=1 << 25)
    assert read_all(tmp_path / "allowed") == zeros


def test_bomb_in_header_is_refused(tmp_path: Path) -> None:
    """A member name of 100 MiB is not read into memory."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 100 << 20
    content = gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(100 << 20), 1)
    with pytest.raises(DataError, match="extract to more than 4,194,304"):
        extract_archive(write_bytes(tmp_path, "a.tar.gz", content), tmp_path / "out", max_bytes=1 << 22)


def test_zip_with_wrong_size_is_refused(tmp_path: Path) -> None:
    content = bytearray(make_zip({"a": bytes(5 << 20)}))
    offset = content.rindex((5 << 20).to_bytes(4, "little"))
    content[offset : offset + 4] = (10).to_bytes(4, "little")
    with pytest.raises(DataError, match="damaged"):
        extract_archive(write_bytes(tmp_path, "a.zip", bytes(content)), tmp_path / "out")
    assert sum(map(len, read_all(tmp_path / "out").values())) <= 10


def test_too_many_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MEMBERS", 5)
    archive = write_bytes(tmp_path, "a.tar", make_tar({str(number): b"" for number in range(6)}))
    with pytest.raises(DataError, match="more than 5 files"):
        extract_archive(archive, tmp_path / "out")


def test_extract_without_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 5, 4))  # type: ignore[attr-defined]
    with pytest.raises(UnavailableError, match="5 bytes needed, 4 free"):
        extract_archive(write_bytes(tmp_path, "a.zip", make_zip({"readme": b"hello"})), tmp_path / "out")


def test_sparse_and_encrypted_files_are_refused(tmp_path: Path) -> None:
    sparse = make_tar({"s": b""}, tarfile.GNU_FORMAT, type=tarfile.GNUTYPE_SPARSE)
    with pytest.raises(DataError, match="link or device"):
        extract_archive(write_bytes(tmp_path, "a.tar", sparse), tmp_path / "out")
    encrypted = bytearray(make_zip({"a": b"secret"}))
    for mark in (b"PK\x03\x04", b"PK\x01\x02"):
        encrypted[encrypted.index(mark) + (6 if mark[2] == 3 else 8)] |= 1
    with pytest.raises(DataError, match=r"damaged archive.*encrypted"):
        extract_archive(write_bytes(tmp_path, "a.zip", bytes(encrypted)), tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"PK", b"<html>Please log in</html>", b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\x00"])
@pytest.mark.parametrize("suffix", ["zip", "tar.gz"])
def test_invalid_archive_is_damaged(tmp_path: Path, content: bytes, suffix: str) -> None:
    with pytest.raises(DataError, match=rf"a\.{suffix}: damaged archive"):
        extract_archive(write_bytes(tmp_path, f"a.{suffix}", content), tmp_path / "out")


SMALL = {"set/a.png": random.Random(2).randbytes(300), "set/b.txt": b"text" * 50}
VALID = {
    "zip": make_zip(SMALL),
    "tar": make_tar(SMALL, pax_headers={"comment": "c"}),
    "gnu.tar": make_tar({"n" * 120: b"1", **SMALL}, tarfile.GNU_FORMAT),
    **{suffix: pack(make_tar(SMALL)) for suffix, pack in COMPRESSORS.items() if suffix != "tar"},
}


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(
    suffix=st.sampled_from(sorted(VALID)),
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=6),
    cut=st.none() | st.integers(0, 1 << 16),
)
def test_damaged_archive_raises_only_hkd_errors(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, changes: list[tuple[int, int]], cut: int | None
) -> None:
    content = bytearray(VALID[suffix])
    for offset, value in changes:
        content[offset % len(content)] = value
    tmp_path = tmp_path_factory.mktemp("damage")
    archive = write_bytes(tmp_path, f"a.{suffix}", bytes(content[: None if cut is None else cut % len(content)]))
    try:
        extract_archive(archive, tmp_path / "out", max_bytes=1 << 20)
    except HkdError as error:
        assert "\n" not in str(error)
    assert {path.name for path in tmp_path.iterdir()} <= {archive.name, "out"}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    shutil.rmtree(tmp_path)
