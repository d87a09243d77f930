"""Archives as they should be, and as someone who means harm would write them."""

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

from hkd_det.datasets import archive as unpack_module
from hkd_det.datasets.archive import extract_archive
from hkd_det.errors import DataError, HkdError, UnavailableError

FILES = {"set/images/a.png": random.Random(1).randbytes(1_500_000), "set/labels/a.txt": b"", "readme": b"hello"}
PACK: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "tar.gz": gzip.compress,
    "tgz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
}


def zipped(files: dict[str, bytes], **changes: Any) -> bytes:
    """changes: what is set on every member's ZipInfo."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for key, value in changes.items():
                setattr(info, key, value)
            archive.writestr(info, content)
    return held.getvalue()


def tarred(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT, **changes: Any) -> bytes:
    """changes: what is set on every member's TarInfo."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w", format=form) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in changes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return held.getvalue()


def written(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("suffix", ["zip", *PACK])
def test_all_files_come_out(tmp_path: Path, suffix: str) -> None:
    content = zipped(FILES) if suffix == "zip" else PACK[suffix](tarred(FILES, mode=0o4777))
    extract_archive(written(tmp_path, f"a.{suffix}", content), tmp_path / "out")
    assert everything(tmp_path / "out") == FILES
    for path in (tmp_path / "out").rglob("*"):
        assert not path.stat().st_mode & (stat.S_ISUID | stat.S_IWOTH)  # rights are not taken from the archive


def test_folders_as_tar_writes_them(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "empty").mkdir(parents=True)
    (source / "a.txt").write_text("a")
    for form, name in (("gztar", "t.tar.gz"), ("zip", "z.zip")):  # shutil writes "./" and the folders, too
        made = shutil.make_archive(str(tmp_path / name.partition(".")[0]), form, source)
        extract_archive(Path(made), tmp_path / form)
        assert everything(tmp_path / form) == {"a.txt": b"a"} and (tmp_path / form / "empty").is_dir()


EVIL_NAMES = [
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


@pytest.mark.parametrize("name", EVIL_NAMES)
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_no_member_outside(tmp_path: Path, name: str, pack: Callable[..., bytes]) -> None:
    suffix, name = "zip" if pack is zipped else "tar", name.replace("ROOT", str(tmp_path))
    archive = written(tmp_path, f"a.{suffix}", pack({"good": b"1", name: b"evil"}))
    with pytest.raises(DataError, match=rf"a\.{suffix}: member '.*' would lie outside"):
        extract_archive(archive, tmp_path / "deep" / "out")
    assert everything(tmp_path / "deep") == {"out/good": b"1"}
    assert {path.name for path in tmp_path.iterdir()} == {f"a.{suffix}", "deep"}


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE", "CONTTYPE"])
@pytest.mark.parametrize("target", ["../..", "/etc", "inside"])
def test_no_links_and_devices_in_tar(tmp_path: Path, kind: str, target: str) -> None:
    evil = tarred({"way": b""}, type=getattr(tarfile, kind), linkname=target)
    archive = written(tmp_path, "a.tar", evil)
    if kind == "CONTTYPE":  # an old word for a plain file
        extract_archive(archive, tmp_path / "out")
        assert everything(tmp_path / "out") == {"way": b""}
        return
    with pytest.raises(DataError, match="'way' is a link or device"):
        extract_archive(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_no_links_and_devices_in_zip(tmp_path: Path, kind: int) -> None:
    archive = written(tmp_path, "a.zip", zipped({"way": b"../.."}, external_attr=(kind | 0o777) << 16, create_system=3))
    with pytest.raises(DataError, match="'way' is a link or device"):
        extract_archive(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("names", [("a", "./a"), ("a", "a/b"), ("a/b", "a"), ("a", "x/" * 3000 + "y")])
def test_members_that_are_in_each_others_way(
    tmp_path: Path, pack: Callable[..., bytes], names: tuple[str, str]
) -> None:
    archive = written(tmp_path, "a.zip" if pack is zipped else "a.tar", pack(dict.fromkeys(names, b"1")))
    with pytest.raises(DataError, match=r"be unpacked: (File exists|Not a directory|File name too long)"):
        extract_archive(archive, tmp_path / "out")


@pytest.mark.parametrize("suffix", ["zip", "tar.gz", "tar.xz"])
def test_a_bomb_says_what_it_would_take(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack_module, "MOST_LEAST_BYTES", 1 << 20)
    zeros = {f"{number}": bytes(1 << 21) for number in range(8)}
    content = zipped(zeros) if suffix == "zip" else PACK[suffix](tarred(zeros))
    archive = written(tmp_path, f"a.{suffix}", content)
    most = max(1 << 20, 50 * len(content))
    told = "16,777,216" if suffix == "zip" else f"more than {most:,}"
    with pytest.raises(DataError, match=rf"{len(content):,} bytes that would unpack to {told}, as no data set does"):
        extract_archive(archive, tmp_path / "out")
    assert sum(map(len, everything(tmp_path / "out").values())) <= most
    extract_archive(archive, tmp_path / "told", max_bytes=1 << 25)
    assert everything(tmp_path / "told") == zeros


def test_a_bomb_in_a_header(tmp_path: Path) -> None:
    """A name of a hundred megabytes is not read into memory."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 100 << 20
    content = gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(100 << 20), 1)
    with pytest.raises(DataError, match="would unpack to more than 4,194,304"):
        extract_archive(written(tmp_path, "a.tar.gz", content), tmp_path / "out", max_bytes=1 << 22)


def test_a_zip_that_understates_its_size_gives_no_more(tmp_path: Path) -> None:
    content = bytearray(zipped({"a": bytes(5 << 20)}))
    place = content.rindex((5 << 20).to_bytes(4, "little"))
    content[place : place + 4] = (10).to_bytes(4, "little")
    with pytest.raises(DataError, match="damaged"):
        extract_archive(written(tmp_path, "a.zip", bytes(content)), tmp_path / "out")
    assert sum(map(len, everything(tmp_path / "out").values())) <= 10


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack_module, "MOST_MEMBERS", 5)
    archive = written(tmp_path, "a.tar", tarred({str(number): b"" for number in range(6)}))
    with pytest.raises(DataError, match="more than 5 files"):
        extract_archive(archive, tmp_path / "out")


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 5, 4))  # type: ignore[attr-defined]
    with pytest.raises(UnavailableError, match="5 bytes needed, 4 free"):
        extract_archive(written(tmp_path, "a.zip", zipped({"readme": b"hello"})), tmp_path / "out")


def test_a_sparse_file_and_a_locked_one(tmp_path: Path) -> None:
    sparse = tarred({"s": b""}, tarfile.GNU_FORMAT, type=tarfile.GNUTYPE_SPARSE)
    with pytest.raises(DataError, match="link or device"):
        extract_archive(written(tmp_path, "a.tar", sparse), tmp_path / "out")
    locked = bytearray(zipped({"a": b"secret"}))
    for mark in (b"PK\x03\x04", b"PK\x01\x02"):
        locked[locked.index(mark) + (6 if mark[2] == 3 else 8)] |= 1
    with pytest.raises(DataError, match=r"damaged archive.*encrypted"):
        extract_archive(written(tmp_path, "a.zip", bytes(locked)), tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"PK", b"<html>Please log in</html>", b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\x00"])
@pytest.mark.parametrize("suffix", ["zip", "tar.gz"])
def test_what_is_no_archive(tmp_path: Path, content: bytes, suffix: str) -> None:
    with pytest.raises(DataError, match=rf"a\.{suffix}: a damaged archive"):
        extract_archive(written(tmp_path, f"a.{suffix}", content), tmp_path / "out")


SMALL = {"set/a.png": random.Random(2).randbytes(300), "set/b.txt": b"text" * 50}
SOUND = {
    "zip": zipped(SMALL),
    "tar": tarred(SMALL, pax_headers={"comment": "c"}),
    "gnu.tar": tarred({"n" * 120: b"1", **SMALL}, tarfile.GNU_FORMAT),
    **{suffix: pack(tarred(SMALL)) for suffix, pack in PACK.items() if suffix != "tar"},
}


@settings(deadline=None, max_examples=300)
@given(
    suffix=st.sampled_from(sorted(SOUND)),
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=6),
    cut=st.none() | st.integers(0, 1 << 16),
)
def test_damage_gives_our_errors_only(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, changes: list[tuple[int, int]], cut: int | None
) -> None:
    content = bytearray(SOUND[suffix])
    for place, value in changes:
        content[place % len(content)] = value
    tmp_path = tmp_path_factory.mktemp("damage")
    archive = written(tmp_path, f"a.{suffix}", bytes(content[: None if cut is None else cut % len(content)]))
    try:
        extract_archive(archive, tmp_path / "out", max_bytes=1 << 20)
    except HkdError as error:
        assert "\n" not in str(error)
    assert {path.name for path in tmp_path.iterdir()} <= {archive.name, "out"}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    shutil.rmtree(tmp_path)
