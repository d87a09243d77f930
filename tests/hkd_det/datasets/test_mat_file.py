"""MATLAB files against scipy, and invalid files."""

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkd_det.datasets import mat_file
from hkd_det.datasets.mat_file import read_mat, to_float_array, to_text
from hkd_det.errors import DataError

TEST_DATA = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set"))
OFFICIAL_FILES = [
    path
    for folder in ("citypersons", "caltech")
    for suffix in ("mat", "vbb")
    for path in sorted((TEST_DATA / folder).rglob(f"*.{suffix}"))
]
HEADER = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"


def assert_same(value: Any, expected: Any) -> None:
    """scipy returns text as arrays of str, and struct arrays as record arrays."""
    if isinstance(value, str):
        assert "".join(expected.ravel().tolist()) == value
    elif isinstance(value, list):
        assert expected.tolist() == value
    elif value.dtype != object:
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(value, expected, strict=True)
    else:
        assert value.shape == expected.shape
        for item, expected_item in zip(value.ravel(), expected.ravel(), strict=True):
            if isinstance(item, dict):
                assert tuple(item) == (expected.dtype.names or ())
                for name, field in item.items():
                    assert_same(field, expected_item[name])
            else:
                assert_same(item, expected_item)


@pytest.mark.skipif(not OFFICIAL_FILES, reason="HKD_TEST_DATA is not set")
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow) if path.suffix == ".vbb" else path for path in OFFICIAL_FILES],
    ids=lambda path: f"{path.parent.name}-{path.name}",
)
def test_official_files_equal_scipy(path: Path) -> None:
    content = read_mat(path)
    expected = {name: value for name, value in scipy.io.loadmat(path).items() if not name.startswith("__")}
    assert list(content) == list(expected)
    for name, value in content.items():
        assert_same(value, expected[name])


def cell(*values: Any) -> Any:
    """Return a (1, N) cell array."""
    array = np.empty((1, len(values)), object)
    for index, value in enumerate(values):
        array[0, index] = value
    return array


@pytest.mark.parametrize("compressed", [False, True])
def test_all_types_equal_scipy(tmp_path: Path, compressed: bool) -> None:
    content = {
        **{
            dtype: np.arange(6).reshape(2, 3).astype(dtype)
            for dtype in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")
        },
        **{"f4": np.float32([[0.1, -np.inf]]), "f8": np.array([[np.pi], [np.nan]]), "cube": np.ones((2, 3, 4))},
        **{"empty": np.zeros((0, 5)), "flags": np.array([[True, False]]), "name": "Zürich 東京 😀", "no_text": ""},
        **{"rows": np.array(["abc", "def"]), "cells": cell(np.zeros((1, 1)), "a", cell(np.ones((2, 2)), cell()))},
        "structs": np.array([[(1.0, "x")], [(2.0, "y")]], [("number", "O"), ("name", "O")]),
    }
    path = tmp_path / "all.mat"
    scipy.io.savemat(path, content, do_compression=compressed)
    values = read_mat(path)
    assert list(values) == list(content)
    assert values["name"] == content["name"] and values["no_text"] == "" and values["rows"] == ["abc", "def"]
    assert [row["name"] for row in values["structs"].ravel()] == ["x", "y"]
    for name, value in scipy.io.loadmat(path).items():
        if name in values and name not in ("name", "no_text"):
            assert_same(values[name], value)


def test_big_endian_file_is_read(tmp_path: Path) -> None:
    words = [6, 8, 6, 0, 5, 8, 1, 2]  # flags: double; shape (1, 2)
    body = struct.pack(">8I", *words) + struct.pack(">HH4s", 1, 1, b"x") + struct.pack(">IIdd", 9, 16, 0.5, -3.0)
    raw = HEADER[:124] + b"\x01\x00MI" + struct.pack(">II", 14, len(body)) + body
    (tmp_path / "big.mat").write_bytes(raw)
    array = read_mat(tmp_path / "big.mat")["x"]
    assert array.tolist() == [[0.5, -3.0]] and array.dtype == np.dtype("=f8")
    assert scipy.io.loadmat(tmp_path / "big.mat")["x"].tolist() == [[0.5, -3.0]]


def make_matrix(flags: int, shape: tuple[int, ...], *rest: bytes) -> bytes:
    body = struct.pack("<4I", 6, 8, flags, 0) + struct.pack(f"<II{len(shape)}i", 5, 4 * len(shape), *shape)
    body = b"".join([body.ljust(-len(body) % 8 + len(body), b"\0"), struct.pack("<HH4s", 1, 1, b"x"), *rest])
    return struct.pack("<II", 14, len(body)) + body


def compress(raw: bytes) -> bytes:
    compressed = zlib.compress(raw)
    return struct.pack("<II", 15, len(compressed)) + compressed


def make_nested(depth: int) -> bytes:
    inner = make_matrix(6, (1, 1), struct.pack("<IId", 9, 8, 1.0))
    for _ in range(depth):
        inner = make_matrix(1, (1, 1), inner)
    return inner


ONE = struct.pack("<IId", 9, 8, 1.0)
FIELDS = struct.pack("<HHi", 5, 4, 8) + struct.pack("<II", 1, 0)  # names of 8 characters, without any name


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "header"),
        (b"not a MATLAB file", "header"),
        (HEADER[:124] + b"\x00\x02IM", "7.3"),
        (HEADER + b"\x0e\0\0\0", "truncated"),
        (HEADER + struct.pack("<II", 14, 2**31), "truncated"),
        (HEADER + struct.pack("<II", 9, 8) + bytes(8), "expected a variable, got an element of type 9"),
        (HEADER + make_matrix(6, (1, 1)), "truncated"),
        (HEADER + make_matrix(6, (1, 2), ONE), r"8 bytes of numbers do not match the shape \(1, 2\)"),
        (HEADER + make_matrix(6, (2**31 - 1,) * 20, ONE), "8 bytes of numbers do not match the shape"),
        (HEADER + make_matrix(6, (0, *(2**31 - 1,) * 20), struct.pack("<II", 9, 0)), "expected a readable MATLAB file"),
        (HEADER + make_matrix(6, (1,) * 33, ONE), "invalid shape"),
        (HEADER + make_matrix(6, (-1, -1), ONE), "invalid shape"),
        (HEADER + make_matrix(6, (1,), ONE), "invalid shape"),
        (HEADER + make_matrix(6, (1, 1), struct.pack("<II", 16, 0)), "expected numbers, got an element of type 16"),
        (HEADER + make_matrix(6 | 0x800, (1, 1), ONE, ONE), "complex"),
        (HEADER + make_matrix(5, (1, 1), ONE), "sparse"),
        (HEADER + make_matrix(4, (1, 1), ONE), "expected text, got an element of type 9"),
        (HEADER + make_matrix(4, (3, 1), struct.pack("<HH4s", 2, 2, b"ab")), "2 characters do not match the shape"),
        (HEADER + make_matrix(4, (1, 1), struct.pack("<HH4s", 16, 1, b"\xff")), "utf-8"),
        (HEADER + make_matrix(1, (2**31 - 1,) * 2), "truncated"),
        (HEADER + make_matrix(1, (1, 1), ONE), "expected a matrix, got an element of type 9"),
        (HEADER + make_matrix(2, (2**31 - 1,) * 2, FIELDS), "without fields"),
        (HEADER + make_matrix(2, (1, 1), struct.pack("<HHi", 5, 4, 0), struct.pack("<II", 1, 0)), "have no names"),
        (HEADER + make_matrix(2, (1, 1), ONE), "expected an element of type 5, got 9"),
        (HEADER + make_nested(3000), "nested too deeply"),
        (HEADER + compress(ONE), "expected a variable, got an element of type 9"),
        (HEADER + compress(bytes(2**26 + 1)), "decompressed size is above 64 MiB"),
        (HEADER + struct.pack("<II", 15, 9) + compress(ONE)[8:17], "truncated"),
        (HEADER + struct.pack("<II", 15, 9) + bytes(9), "decompressing"),
        (bytes(2**26 + 1), "larger than 64 MiB"),
    ],
)
def test_invalid_file_is_one_line(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "wrong.mat"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        read_mat(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_struct_without_fields_and_empty_cell_are_valid(tmp_path: Path) -> None:
    path = tmp_path / "empty.mat"
    path.write_bytes(HEADER + make_matrix(2, (1, 1), FIELDS) + make_matrix(1, (1, 1), struct.pack("<II", 14, 0)))
    assert read_mat(path)["x"][0, 0].shape == (0, 0)
    path.write_bytes(HEADER + make_matrix(2, (1, 1), FIELDS))
    assert read_mat(path)["x"][0, 0] == {}


def test_total_decompressed_size_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mat_file, "MAX_BYTES", 2**20)
    ones = make_matrix(9, (1, 2**19), struct.pack("<II", 2, 2**19) + bytes(2**19))
    path = tmp_path / "bomb.mat"
    path.write_bytes(HEADER + compress(ones))
    assert read_mat(path)["x"].shape == (1, 2**19)
    path.write_bytes(HEADER + compress(ones) * 2)
    with pytest.raises(DataError, match="decompressed size is above 1 MiB"):
        read_mat(path)


def test_number_of_values_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mat_file, "MAX_VALUES", 10)
    empty = struct.pack("<II", 14, 0)
    path = tmp_path / "bomb.mat"
    path.write_bytes(HEADER + make_matrix(1, (1, 10), empty * 10))
    assert read_mat(path)["x"].shape == (1, 10)
    path.write_bytes(HEADER + make_matrix(1, (1, 6), empty * 6) + compress(make_matrix(1, (1, 5), empty * 5)))
    with pytest.raises(DataError, match="more than 10 values"):
        read_mat(path)


def test_missing_file_and_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.mat: no such file"):
        read_mat(tmp_path / "gone.mat")
    with pytest.raises(DataError, match="got a directory"):
        read_mat(tmp_path)


def test_values_of_the_wrong_type_are_rejected() -> None:
    assert to_float_array(np.uint8([[250]])).tolist() == [[250.0]] and to_text("ulm") == "ulm"
    for value in ("1", cell("1"), [1.0], None):
        with pytest.raises(ValueError, match="expected numbers"):
            to_float_array(value)
    for value in (np.zeros(1), ["a", "b"], "two\nlines", None):
        with pytest.raises(ValueError, match="expected a line of text"):
            to_text(value)


@pytest.mark.slow
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_file_raises_only_data_errors(tmp_path: Path, data: st.DataObject) -> None:
    structs = np.array([[(1.0, "x")], [(2.0, "y")]], [("number", "O"), ("name", "O")])
    source, damaged = tmp_path / "complete.mat", tmp_path / "damaged.mat"
    if not source.exists():
        scipy.io.savemat(source, {"a": cell(structs, np.arange(5), "text"), "b": np.eye(3, dtype=np.int16)})
    raw = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(0, 6))):
        raw[data.draw(st.integers(100, len(raw) - 1))] = data.draw(st.sampled_from([*range(20), 127, 128, 255]))
    damaged.write_bytes(raw[: data.draw(st.integers(120, len(raw)))])
    try:
        read_mat(damaged)
    except DataError as error:
        assert str(damaged) in str(error) and "\n" not in str(error)
