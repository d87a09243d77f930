"""What an ONNX file says of itself, against the onnx package, and files that are none."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from hkd_deploy.trt.onnx_file import read_onnx_file
from hkd_det.errors import DataError


def test_it_says_what_the_onnx_package_says(tiny_onnx: Callable[..., Path]) -> None:
    path = tiny_onnx(changes={"description": "Fußgänger, " + 200 * "long ", "author": ""})
    model, source = onnx.load(path), read_onnx_file(path)
    assert source.metadata == {prop.key: prop.value for prop in model.metadata_props}
    assert source.opset == model.opset_import[0].version == 17
    assert source.precision == "fp32" and source.content == path.read_bytes()


def test_other_domains_have_opsets_of_their_own(tiny_onnx: Callable[..., Path]) -> None:
    path = tiny_onnx()
    model = onnx.load(path)
    model.opset_import.insert(0, onnx.helper.make_opsetid("com.microsoft", 1))
    path.write_bytes(model.SerializeToString())
    assert read_onnx_file(path).opset == 17


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_the_precision_it_was_made_in(graph: Callable[..., Path], precision: str) -> None:
    assert read_onnx_file(graph(precision=precision)).precision == precision


def test_a_precision_of_the_future(graph: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"hkd\.precision is 'fp4', known are fp32, fp16, bf16, int8"):
        read_onnx_file(graph(said="fp4"))


def test_truncated_anywhere_in_the_graph(tiny_onnx: Callable[..., Path]) -> None:
    path = tiny_onnx()
    whole = path.read_bytes()
    for keep in range(0, whole.index(b"description") - 10, 7):
        path.write_bytes(whole[:keep])
        with pytest.raises(DataError, match="not an ONNX file, or a truncated one"):
            read_onnx_file(path)


def test_a_byte_wrong_anywhere_around_the_graph(tiny_onnx: Callable[..., Path]) -> None:
    path = tiny_onnx()
    whole = path.read_bytes()
    refused = 0
    for place in [*range(20), *range(whole.index(b"description") - 10, len(whole))]:
        for byte in (0, 0x12, 0xFF):
            path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
            try:
                read_onnx_file(path)  # a letter changed is still a file
            except DataError:
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("content", [b"hello\n", b"\x00" * 99, b"\xff" * 99, b"PK\x03\x04 a zip", b"\x08\x08"])
def test_no_onnx_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "no.onnx").write_bytes(content)
    with pytest.raises(DataError, match=r"no\.onnx: not an ONNX file"):
        read_onnx_file(tmp_path / "no.onnx")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such model file"):
        read_onnx_file(tmp_path / "no.onnx")
