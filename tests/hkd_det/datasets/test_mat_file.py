"""MATLAB files: every value as scipy reads it, and one line for whatever is wrong with a file."""

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

SHARED = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set"))
REAL = [
    path
    for folder in ("citypersons", "caltech")
    for kind in ("mat", "vbb")
    for path in (SHARED / folder).rglob(f"*.{kind}")
]
HEADER = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"


def assert_same(ours: Any, scipys: Any) -> None:
    """scipy has texts as arrays of str, and struct arrays as numpy's record arrays."""
    if isinstance(ours, str):
        assert "".join(scipys.ravel().tolist()) == ours
    elif isinstance(ours, list):
        assert scipys.tolist() == ours
    elif ours.dtype != object:
        assert ours.dtype == scipys.dtype
        np.testing.assert_array_equal(ours, scipys, strict=True)
    else:
        assert ours.shape == scipys.shape
        for one, other in zip(ours.ravel(), scipys.ravel(), strict=True):
            if isinstance(one, dict):
                assert tuple(one) == (scipys.dtype.names or ())
                for name, value in one.items():
                    assert_same(value, other[name])
            else:
                assert_same(one, other)


@pytest.mark.skipif(not REAL, reason="HKD_TEST_DATA is not set")
@pytest.mark.parametrize("path", REAL, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_value_of_the_official_files_is_as_scipy_reads_it(path: Path) -> None:
    ours = read_mat(path)
    scipys = {name: value for name, value in scipy.io.loadmat(path).items() if not name.startswith("__")}
    assert list(ours) == list(scipys)
    for name, value in ours.items():
        assert_same(value, scipys[name])


def cell(*values: Any) -> Any:
    """A (1, N) cell array."""
    array = np.empty((1, len(values)), object)
    for index, value in enumerate(values):
        array[0, index] = value
    return array


@pytest.mark.parametrize("packed", [False, True])
def test_all_kinds_of_values(tmp_path: Path, packed: bool) -> None:
    content = {
        **{kind: np.arange(6).reshape(2, 3).astype(kind) for kind in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")},
        **{"f4": np.float32([[0.1, -np.inf]]), "f8": np.array([[np.pi], [np.nan]]), "cube": np.ones((2, 3, 4))},
        **{"empty": np.zeros((0, 5)), "truth": np.array([[True, False]]), "name": "Zürich 東京 😀", "nothing": ""},
        **{"rows": np.array(["abc", "def"]), "cells": cell(np.zeros((1, 1)), "a", cell(np.ones((2, 2)), cell()))},
        "structs": np.array([[(1.0, "x")], [(2.0, "y")]], [("number", "O"), ("name", "O")]),
    }
    path = tmp_path / "all.mat"
    scipy.io.savemat(path, content, do_compression=packed)
    ours = read_mat(path)
    assert list(ours) == list(content)
    assert ours["name"] == content["name"] and ours["nothing"] == "" and ours["rows"] == ["abc", "def"]
    assert [row["name"] for row in ours["structs"].ravel()] == ["x", "y"]
    for name, value in scipy.io.loadmat(path).items():
        if name in ours and name not in ("name", "nothing"):
            assert_same(ours[name], value)


def test_a_file_of_the_other_byte_order_reads_the_same(tmp_path: Path) -> None:
    words = [6, 8, 6, 0, 5, 8, 1, 2]  # flags: double; shape (1, 2)
    body = struct.pack(">8I", *words) + struct.pack(">HH4s", 1, 1, b"x") + struct.pack(">IIdd", 9, 16, 0.5, -3.0)
    raw = HEADER[:124] + b"\x01\x00MI" + struct.pack(">II", 14, len(body)) + body
    (tmp_path / "big.mat").write_bytes(raw)
    found = read_mat(tmp_path / "big.mat")["x"]
    assert found.tolist() == [[0.5, -3.0]] and found.dtype == np.dtype("=f8")
    assert scipy.io.loadmat(tmp_path / "big.mat")["x"].tolist() == [[0.5, -3.0]]


def matrix(flags: int, shape: tuple[int, ...], *rest: bytes) -> bytes:
    body = struct.pack("<4I", 6, 8, flags, 0) + struct.pack(f"<II{len(shape)}i", 5, 4 * len(shape), *shape)
    body = b"".join([body.ljust(-len(body) % 8 + len(body), b"\0"), struct.pack("<HH4s", 1, 1, b"x"), *rest])
    return struct.pack("<II", 14, len(body)) + body


def packed(raw: bytes) -> bytes:
    squeezed = zlib.compress(raw)
    return struct.pack("<II", 15, len(squeezed)) + squeezed


def nested(depth: int) -> bytes:
    inner = matrix(6, (1, 1), struct.pack("<IId", 9, 8, 1.0))
    for _ in range(depth):
        inner = matrix(1, (1, 1), inner)
    return inner


ONE = struct.pack("<IId", 9, 8, 1.0)
FIELDS = struct.pack("<HHi", 5, 4, 8) + struct.pack("<II", 1, 0)  # names of 8 letters, none of them


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "header"),
        (b"no MATLAB file", "header"),
        (HEADER[:124] + b"\x00\x02IM", "7.3"),
        (HEADER + b"\x0e\0\0\0", "ends too early"),
        (HEADER + struct.pack("<II", 14, 2**31), "ends too early"),
        (HEADER + struct.pack("<II", 9, 8) + bytes(8), "type 9 where a variable"),
        (HEADER + matrix(6, (1, 1)), "ends too early"),
        (HEADER + matrix(6, (1, 2), ONE), r"8 bytes of numbers for the shape \(1, 2\)"),
        (HEADER + matrix(6, (2**31 - 1,) * 20, ONE), "8 bytes of numbers for the shape"),
        (HEADER + matrix(6, (0, *(2**31 - 1,) * 20), struct.pack("<II", 9, 0)), "not a readable MATLAB file"),
        (HEADER + matrix(6, (1,) * 33, ONE), "no shape"),
        (HEADER + matrix(6, (-1, -1), ONE), "no shape"),
        (HEADER + matrix(6, (1,), ONE), "no shape"),
        (HEADER + matrix(6, (1, 1), struct.pack("<II", 16, 0)), "type 16 where numbers"),
        (HEADER + matrix(6 | 0x800, (1, 1), ONE, ONE), "complex"),
        (HEADER + matrix(5, (1, 1), ONE), "sparse"),
        (HEADER + matrix(4, (1, 1), ONE), "type 9 where text"),
        (HEADER + matrix(4, (3, 1), struct.pack("<HH4s", 2, 2, b"ab")), "2 letters for the shape"),
        (HEADER + matrix(4, (1, 1), struct.pack("<HH4s", 16, 1, b"\xff")), "utf-8"),
        (HEADER + matrix(1, (2**31 - 1,) * 2), "ends too early"),
        (HEADER + matrix(1, (1, 1), ONE), "type 9 where a matrix"),
        (HEADER + matrix(2, (2**31 - 1,) * 2, FIELDS), "without fields"),
        (HEADER + matrix(2, (1, 1), struct.pack("<HHi", 5, 4, 0), struct.pack("<II", 1, 0)), "no names"),
        (HEADER + matrix(2, (1, 1), ONE), "type 9 where one of 5"),
        (HEADER + nested(3000), "nested too deeply"),
        (HEADER + packed(ONE), "type 9 where a variable"),
        (HEADER + packed(bytes(2**26 + 1)), "unpacks to more than 64 MiB"),
        (HEADER + struct.pack("<II", 15, 9) + packed(ONE)[8:17], "ends too early"),
        (HEADER + struct.pack("<II", 15, 9) + bytes(9), "decompressing"),
        (bytes(2**26 + 1), "larger than 64 MiB"),
    ],
)
def test_what_is_no_matlab_file_is_one_line(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "wrong.mat"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        read_mat(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_struct_without_fields_and_an_empty_cell_are_values(tmp_path: Path) -> None:
    path = tmp_path / "empty.mat"
    path.write_bytes(HEADER + matrix(2, (1, 1), FIELDS) + matrix(1, (1, 1), struct.pack("<II", 14, 0)))
    assert read_mat(path)["x"][0, 0].shape == (0, 0)
    path.write_bytes(HEADER + matrix(2, (1, 1), FIELDS))
    assert read_mat(path)["x"][0, 0] == {}


def test_all_compressed_variables_together_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mat_file, "MAX_BYTES", 2**20)
    ones = matrix(9, (1, 2**19), struct.pack("<II", 2, 2**19) + bytes(2**19))
    path = tmp_path / "bomb.mat"
    path.write_bytes(HEADER + packed(ones))
    assert read_mat(path)["x"].shape == (1, 2**19)
    path.write_bytes(HEADER + packed(ones) * 2)
    with pytest.raises(DataError, match="unpacks to more than 1 MiB"):
        read_mat(path)


def test_the_values_of_a_file_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mat_file, "MAX_VALUES", 10)
    nothing = struct.pack("<II", 14, 0)
    path = tmp_path / "bomb.mat"
    path.write_bytes(HEADER + matrix(1, (1, 10), nothing * 10))
    assert read_mat(path)["x"].shape == (1, 10)
    path.write_bytes(HEADER + matrix(1, (1, 6), nothing * 6) + packed(matrix(1, (1, 5), nothing * 5)))
    with pytest.raises(DataError, match="more than 10 values"):
        read_mat(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.mat: no such annotation file"):
        read_mat(tmp_path / "gone.mat")
    with pytest.raises(DataError, match="a folder"):
        read_mat(tmp_path)


def test_values_of_the_wrong_kind() -> None:
    assert to_float_array(np.uint8([[250]])).tolist() == [[250.0]] and to_text("ulm") == "ulm"
    for value in ("1", cell("1"), [1.0], None):
        with pytest.raises(ValueError, match="numbers should be"):
            to_float_array(value)
    for value in (np.zeros(1), ["a", "b"], "two\nlines", None):
        with pytest.raises(ValueError, match="text should be"):
            to_text(value)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_mutated_file_raises_nothing_but_our_errors(tmp_path: Path, data: st.DataObject) -> None:
    structs = np.array([[(1.0, "x")], [(2.0, "y")]], [("number", "O"), ("name", "O")])
    source, spoiled = tmp_path / "whole.mat", tmp_path / "spoiled.mat"
    if not source.exists():
        scipy.io.savemat(source, {"a": cell(structs, np.arange(5), "text"), "b": np.eye(3, dtype=np.int16)})
    raw = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(0, 6))):
        raw[data.draw(st.integers(100, len(raw) - 1))] = data.draw(st.sampled_from([*range(20), 127, 128, 255]))
    spoiled.write_bytes(raw[: data.draw(st.integers(120, len(raw)))])
    try:
        read_mat(spoiled)
    except DataError as error:
        assert str(spoiled) in str(error) and "\n" not in str(error)
