"""Atomic writing, digests and JSON reading."""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from hkd_det.errors import DataError
from hkd_det.files import atomic_write, atomic_write_dir, bytes_sha256, file_sha256, read_json, write_text

INTERRUPTIONS = (OSError(28, "No space left on device"), KeyboardInterrupt())


def test_file_is_replaced_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "first")
    for error in INTERRUPTIONS:
        with pytest.raises(type(error)), atomic_write(path) as temp_path:
            temp_path.write_text("half")
            assert temp_path.suffix == ".txt"
            raise error
    assert path.read_text() == "first" and [p.name for p in path.parent.iterdir()] == ["file.txt"]
    write_text(path, "second")
    assert path.read_text() == "second" and path.stat().st_mode & 0o444


def test_directory_is_replaced_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "directory"
    for text in ("first", "second"):
        with atomic_write_dir(path) as temp_path:
            (temp_path / f"{text}.txt").write_text(text)
        assert [p.name for p in path.iterdir()] == [f"{text}.txt"] and path.stat().st_mode & 0o055
    for error in INTERRUPTIONS:
        with pytest.raises(type(error)), atomic_write_dir(path) as temp_path:
            (temp_path / "half.txt").touch()
            raise error
    assert [p.name for p in path.iterdir()] == ["second.txt"]
    assert [p.name for p in path.parent.iterdir()] == ["directory"]


@pytest.mark.parametrize("write", [atomic_write, atomic_write_dir])
def test_write_error_names_the_final_path(write: Callable[[Path], Any], tmp_path: Path) -> None:
    """No error names the temporary path: a missing permission, a failed rename, or an error while writing."""
    path = tmp_path / "out"
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught, write(tmp_path / "file" / "out"):
        pass
    assert caught.value.filename == str(tmp_path / "file")
    with pytest.raises(FileNotFoundError) as missing, write(path) as temp_path:
        (temp_path / "none" / "x").touch()
    assert missing.value.filename == str(path) and not path.exists()
    denied_error = PermissionError(13, "Permission denied", f"{tmp_path}/.out-1")
    with (
        patch("tempfile.mkdtemp", side_effect=denied_error),
        pytest.raises(PermissionError) as denied,
        write(path),
    ):
        pass
    assert denied.value.filename == str(path)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the file size with setrlimit")
def test_full_disk_error_names_the_file(tmp_path: Path) -> None:
    """A failed `write` has no file name in Python. A limit of the file size fails at the same place as a full disk."""
    code = f"""
import resource, signal
from pathlib import Path
from hkd_det.errors import run_command
from hkd_det.files import write_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
raise SystemExit(run_command("hkd", lambda _: write_text(Path({str(tmp_path / "out.txt")!r}), "x" * 100_000), []))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 1 and process.stderr.startswith(f"hkd: {tmp_path / 'out.txt'}: File too large.")
    assert not list(tmp_path.iterdir())


def test_file_does_not_replace_a_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "out", "text")
    assert caught.value.filename == str(tmp_path / "out") and list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_digest_of_a_file_equals_that_of_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000  # more than one chunk
    (tmp_path / "file").write_bytes(content)
    chunks: list[int] = []
    assert file_sha256(tmp_path / "file", chunks.append) == bytes_sha256(content) == hashlib.sha256(content).hexdigest()
    assert sum(chunks) == len(content) and len(chunks) == 2


def test_invalid_json_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\ufeff{"a": 1}', encoding="utf-8")
    assert read_json(path) == {"a": 1}
    for text, message in (
        ("{\n1", "not JSON: .*line 2"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=rf"a\.json: .*{message}"):
            read_json(path)
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not JSON"):
        read_json(path)
    with pytest.raises(DataError, match="got a directory"):
        read_json(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read_json(tmp_path / "none.json")
