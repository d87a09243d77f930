"""Safe extraction of archives: nothing is written outside the directory, and the extracted size is limited.

Only regular files and directories are extracted. Links are refused because they can redirect writes.
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

from hkd_det.console import iterate_with_progress, log_stage
from hkd_det.errors import DataError, HkdError, UnavailableError

CHUNK_BYTES = 1 << 20
MAX_EXPANSION = 50  # extracted size / archive size: about 1 for images, 3 to 20 for annotations as text
MIN_LIMIT_BYTES = 1 << 28
MAX_MEMBERS = 2_000_000
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
DECOMPRESSORS: dict[bytes, Any] = {  # by the first bytes of the file
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
DAMAGED_ERRORS = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError,
    ValueError, OverflowError, IndexError, MemoryError,
)  # fmt: skip


@dataclass(frozen=True)
class ArchiveMember:
    """A file or directory in an archive.

    Attributes:
        name: Path in the archive.
        content: Content of a file; None for a directory.
    """

    name: str
    content: IO[bytes] | None


def extract_archive(archive: Path, folder: Path, max_bytes: int = 0) -> None:
    """Extract a .zip or .tar (also .gz, .bz2, .xz) into a directory; existing files are not overwritten.

    Args:
        archive: Archive file.
        folder: Output directory. After an error it can contain a part of the files.
        max_bytes: Limit of the extracted size. 0 selects 50 times the size of the archive, at least 256 MiB.

    Raises:
        DataError: The archive is damaged or too large, or a member is a link, a device or outside the directory.
        UnavailableError: The disk has too little space.
    """
    limit_bytes = max_bytes or max(MIN_LIMIT_BYTES, MAX_EXPANSION * archive.stat().st_size)
    written = 0
    try:
        members = (
            _iterate_zip_members(archive, folder, limit_bytes)
            if archive.suffix == ".zip"
            else _iterate_tar_members(archive, limit_bytes)
        )
        log_stage(f"extract {archive.name}")
        for count, member in enumerate(iterate_with_progress(members, 0, f"extract {archive.name}", "file"), 1):
            if count > MAX_MEMBERS:
                raise DataError(f"{archive}: more than {MAX_MEMBERS:,} files. Extract it manually.")
            target = _resolve_target(folder, member, archive)
            if member.content is None:
                target.mkdir(parents=True, exist_ok=True)
            else:
                written = _write_member(member.content, target, written, limit_bytes, archive)
    except HkdError:
        raise
    except DAMAGED_ERRORS as error:
        raise DataError(
            f"{archive}: damaged archive ({' '.join(str(error).split()) or type(error).__name__}). "
            "Remove it and download it again."
        ) from None
    except OSError as error:
        raise DataError(
            f"{archive}: cannot be extracted: {error.strerror or error}. Check the free disk space and the permissions."
        ) from None


def _resolve_target(folder: Path, member: ArchiveMember, archive: Path) -> Path:
    name, parts = member.name, PurePosixPath(member.name).parts
    is_outside = name.startswith("/") or ".." in parts or "\\" in name or re.match(r"[A-Za-z]:", name)
    if is_outside or not (parts or member.content is None):
        raise DataError(f"{archive}: member {name!r} is outside {folder}. Use another archive.")
    return folder.joinpath(*parts)


def _write_member(content: IO[bytes], target: Path, written: int, max_bytes: int, archive: Path) -> int:
    """Write a member and return the number of bytes written so far, including this member."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as out:
        while chunk := content.read(CHUNK_BYTES):
            written += len(chunk)
            if written > max_bytes:
                raise DataError(_format_size_error(archive, f"more than {max_bytes:,}"))
            out.write(chunk)
    return written


def _format_size_error(archive: Path, size_text: str) -> str:
    return (
        f"{archive}: {archive.stat().st_size:,} bytes that extract to {size_text} bytes, which is too large for a "
        "dataset. If the archive is correct, extract it manually."
    )


def _iterate_zip_members(archive: Path, folder: Path, max_bytes: int) -> Iterator[ArchiveMember]:
    with zipfile.ZipFile(archive) as source:
        infos = source.infolist()
        total = sum(info.file_size for info in infos)
        if total > max_bytes:
            raise DataError(_format_size_error(archive, f"{total:,}"))
        check_disk_space(folder, total)
        for info in infos:
            file_type = stat.S_IFMT(info.external_attr >> 16) if info.create_system == 3 else 0  # 3: Unix
            if file_type not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DataError(f"{archive}: member {info.filename!r} is a link or device. Use another archive.")
            if info.is_dir():
                yield ArchiveMember(info.filename, None)
            else:
                with source.open(info) as content:
                    yield ArchiveMember(info.filename, content)


def _iterate_tar_members(archive: Path, max_bytes: int) -> Iterator[ArchiveMember]:
    # r|: read as a stream. _BoundedReader limits headers too, which can claim a size of gigabytes.
    with (
        _open_decompressed(archive) as stream,
        tarfile.open(fileobj=_BoundedReader(stream, max_bytes, archive), mode="r|") as source,
    ):
        while info := source.next():
            if info.isdir():
                yield ArchiveMember(info.name, None)
            elif info.isreg() and not info.issparse():
                content = source.extractfile(info)
                assert content is not None  # never None for a regular file
                yield ArchiveMember(info.name, content)
            else:
                raise DataError(f"{archive}: member {info.name!r} is a link or device. Use another archive.")
            source.members = []  # type: ignore[attr-defined]  # tarfile keeps all members in memory otherwise


def _open_decompressed(archive: Path) -> IO[bytes]:
    """Open a .tar, decompressed if it is a .gz, .bz2 or .xz."""
    with archive.open("rb") as file:
        head = file.read(8)
    for magic, opener in DECOMPRESSORS.items():
        if head.startswith(magic):
            return cast("IO[bytes]", opener(archive, "rb"))
    return archive.open("rb")


class _BoundedReader(io.RawIOBase):
    """Stream that can be read up to twice a limit; the second half is for headers."""

    def __init__(self, stream: IO[bytes], max_bytes: int, archive: Path) -> None:
        self._stream, self._num_bytes_left, self._max_bytes, self._archive = stream, 2 * max_bytes, max_bytes, archive

    def read(self, size: int = -1) -> bytes:
        chunk = self._stream.read(size)
        self._num_bytes_left -= len(chunk)
        if self._num_bytes_left < 0:
            raise DataError(_format_size_error(self._archive, f"more than {self._max_bytes:,}"))
        return chunk


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """Check the free space on the disk of a directory, which need not exist.

    Args:
        folder: Directory.
        needed_bytes: Required space.

    Raises:
        UnavailableError: The disk has too little space.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UnavailableError(f"{folder}: {needed_bytes:,} bytes needed, {free:,} free on its disk. Free some space.")
