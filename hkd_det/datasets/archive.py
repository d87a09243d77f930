"""`unpack`: an archive into a folder; nothing beside the folder, and no more than its size makes likely.

Only plain files and folders are unpacked: data sets need no links, and links are how archives write elsewhere.
"""

import bz2
import gzip
import io
import lzma
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from tqdm import tqdm

from hkd_det.errors import DataError, HkdError, UnavailableError

CHUNK_BYTES = 1 << 20


MAX_EXPANSION = 50  # an archive's size, unpacked: pictures take 1 time, annotations as text 3 to 20 times


MIN_LIMIT_BYTES = 1 << 28


MAX_MEMBERS = 2_000_000


ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


DECOMPRESSORS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}  # by a file's first bytes


DAMAGED_ERRORS = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError,
    ValueError, OverflowError, IndexError, MemoryError,
)  # fmt: skip


@dataclass(frozen=True)
class ArchiveMember:
    """A file or, without content, a folder of an archive."""

    name: str
    content: IO[bytes] | None


def extract_archive(archive: Path, folder: Path, max_bytes: int = 0) -> None:
    """Write the files of a .zip or .tar (also .gz, .bz2, .xz) under `folder`, where none of them may be yet.

    most_bytes: the most it may take; by default 50 times the archive's size, at least 256 MiB. Raises DataError for a
    damaged archive, for a member that is a link or device or would lie outside the folder, and for one that takes too
    much; then the folder holds a part, and is the caller's to remove.
    """
    most = max_bytes or max(MIN_LIMIT_BYTES, MAX_EXPANSION * archive.stat().st_size)
    written = 0
    try:
        members = (
            _iterate_zip_members(archive, folder, most)
            if archive.suffix == ".zip"
            else _iterate_tar_members(archive, most)
        )
        for count, member in enumerate(tqdm(members, desc=f"unpack {archive.name}", unit=" files"), 1):
            if count > MAX_MEMBERS:
                raise DataError(f"{archive}: more than {MAX_MEMBERS:,} files")
            target = _resolve_target(folder, member, archive)
            if member.content is None:
                target.mkdir(parents=True, exist_ok=True)
            else:
                written = _write_member(member.content, target, written, most, archive)
    except HkdError:
        raise
    except DAMAGED_ERRORS as error:
        raise DataError(
            f"{archive}: a damaged archive ({' '.join(str(error).split()) or type(error).__name__})"
        ) from None
    except OSError as error:
        raise DataError(f"{archive}: cannot be unpacked: {error.strerror or error}") from None


def _resolve_target(folder: Path, member: ArchiveMember, archive: Path) -> Path:
    name, parts = member.name, PurePosixPath(member.name).parts
    outside = name.startswith("/") or ".." in parts or "\\" in name or re.match(r"[A-Za-z]:", name)
    if outside or not (parts or member.content is None):
        raise DataError(f"{archive}: member {name!r} would lie outside {folder}; nothing of it is used")
    return folder.joinpath(*parts)


def _write_member(content: IO[bytes], target: Path, written: int, max_bytes: int, archive: Path) -> int:
    """Copy a member; the bytes written so far, this one included."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as out:
        while piece := content.read(CHUNK_BYTES):
            written += len(piece)
            if written > max_bytes:
                raise DataError(_format_size_error(archive, f"more than {max_bytes:,}"))
            out.write(piece)
    return written


def _format_size_error(archive: Path, size_text: str) -> str:
    return (
        f"{archive}: {archive.stat().st_size:,} bytes that would unpack to {size_text}, as no data set does; "
        "if it is right, unpack it yourself"
    )


def _iterate_zip_members(archive: Path, folder: Path, max_bytes: int) -> Iterator[ArchiveMember]:
    with zipfile.ZipFile(archive) as source:
        infos = source.infolist()
        total = sum(info.file_size for info in infos)
        if total > max_bytes:
            raise DataError(_format_size_error(archive, f"{total:,}"))
        check_disk_space(folder, total)
        for info in infos:
            kind = stat.S_IFMT(info.external_attr >> 16) if info.create_system == 3 else 0  # 3: made on Unix
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DataError(f"{archive}: member {info.filename!r} is a link or device; nothing of it is used")
            if info.is_dir():
                yield ArchiveMember(info.filename, None)
            else:
                with source.open(info) as content:
                    yield ArchiveMember(info.filename, content)


def _iterate_tar_members(archive: Path, max_bytes: int) -> Iterator[ArchiveMember]:
    # r|: as a stream, front to back; Bounded, as a header, too, may claim to be gigabytes long
    with (
        _open_decompressed(archive) as plain,
        tarfile.open(fileobj=_BoundedReader(plain, max_bytes, archive), mode="r|") as source,
    ):
        while info := source.next():
            if info.isdir():
                yield ArchiveMember(info.name, None)
            elif info.isreg() and not info.issparse():
                content = source.extractfile(info)
                assert content is not None  # of a regular file there is always one
                yield ArchiveMember(info.name, content)
            else:
                raise DataError(f"{archive}: member {info.name!r} is a link or device; nothing of it is used")
            source.members = []  # type: ignore[attr-defined]  # else it keeps them all


def _open_decompressed(archive: Path) -> IO[bytes]:
    """The .tar in a .tar.gz, .bz2 or .xz; or the file as it is."""
    with archive.open("rb") as file:
        head = file.read(8)
    for start, opener in DECOMPRESSORS.items():
        if head.startswith(start):
            return cast("IO[bytes]", opener(archive, "rb"))
    return archive.open("rb")


class _BoundedReader(io.RawIOBase):
    """A stream that is read no further than twice a limit: as much again for headers."""

    def __init__(self, stream: IO[bytes], max_bytes: int, archive: Path) -> None:
        self._stream, self._num_bytes_left, self._max_bytes, self._archive = stream, 2 * max_bytes, max_bytes, archive

    def read(self, size: int = -1) -> bytes:
        piece = self._stream.read(size)
        self._num_bytes_left -= len(piece)
        if self._num_bytes_left < 0:
            raise DataError(_format_size_error(self._archive, f"more than {self._max_bytes:,}"))
        return piece


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """Raise UnavailableError where the disk that holds `folder`, or will hold it, has less room than that."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise UnavailableError(f"{folder}: {needed_bytes:,} bytes needed, {free:,} free on its disk")
