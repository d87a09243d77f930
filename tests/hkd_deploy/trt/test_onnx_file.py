"""Tests of the ONNX reader: the result is compared with the onnx package, and damaged files are rejected."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from hkd_deploy.trt.onnx_file import count_parameters, read_onnx_file, read_onnx_metadata
from hkd_det.errors import DataError


def test_read_onnx_file_agrees_with_onnx(tiny_onnx: Callable[..., Path]) -> None:
    path = tiny_onnx(changes={"description": "Fußgänger, " + 200 * "long ", "author": ""})
    model, onnx_file = onnx.load(path), read_onnx_file(path)
    assert onnx_file.metadata == {prop.key: prop.value for prop in model.metadata_props}
    assert onnx_file.opset == model.opset_import[0].version == 17
    assert onnx_file.precision == "fp32" and onnx_file.content == path.read_bytes()


@pytest.mark.parametrize("is_packed", [False, True])
def test_parameters_are_elements_of_float_and_8_bit_tensors(tmp_path: Path, is_packed: bool) -> None:
    """Dimensions are one field each, or all in one field: protocol buffers allow both."""
    helper, proto = onnx.helper, onnx.TensorProto
    weight = helper.make_tensor("weight", proto.FLOAT, [300, 2], [0.0] * 600)
    constants = [
        helper.make_node("Constant", [], ["half"], value=helper.make_tensor("half", proto.FLOAT16, [3, 5], [1.0] * 15)),
        helper.make_node("Constant", [], ["text"], value_string="x"),
    ]
    others = [
        helper.make_tensor("int8", proto.INT8, [7], [1] * 7),
        helper.make_tensor("axes", proto.INT64, [9], [1] * 9),
    ]
    graph = helper.make_graph(constants, "graph", [], [], [weight, *others])
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()
    fields, packed = b"\x08\xac\x02\x08\x02", b"\x0a\x03\xac\x02\x02"  # 300, 2
    assert content.count(fields) == 1 and len(fields) == len(packed)
    (tmp_path / "model.onnx").write_bytes(content.replace(fields, packed) if is_packed else content)
    assert count_parameters(tmp_path / "model.onnx") == 600 + 15 + 7


def test_metadata_of_another_tool_is_read(tiny_onnx: Callable[..., Path]) -> None:
    path = tiny_onnx(changes={"hkd.format": None, "hkd.precision": "fp4"})
    assert read_onnx_metadata(path)["hkd.precision"] == "fp4"


def test_opset_of_another_domain_is_ignored(tiny_onnx: Callable[..., Path]) -> None:
    path = tiny_onnx()
    model = onnx.load(path)
    model.opset_import.insert(0, onnx.helper.make_opsetid("com.microsoft", 1))
    path.write_bytes(model.SerializeToString())
    assert read_onnx_file(path).opset == 17


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_precision_is_read_from_the_metadata(graph: Callable[..., Path], precision: str) -> None:
    assert read_onnx_file(graph(precision=precision)).precision == precision


def test_unknown_precision_raises(graph: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"metadata hkd\.precision: expected fp32, fp16, bf16, int8, got 'fp4'"):
        read_onnx_file(graph(metadata_precision="fp4"))


def test_truncated_file_raises(tiny_onnx: Callable[..., Path]) -> None:
    path = tiny_onnx()
    content = path.read_bytes()
    for size in range(0, content.index(b"description") - 10, 7):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match="not an ONNX file, or truncated"):
            read_onnx_file(path)


@pytest.mark.slow
def test_changed_byte_raises_only_data_errors(tiny_onnx: Callable[..., Path]) -> None:
    path = tiny_onnx()
    content = path.read_bytes()
    num_rejected = 0
    for offset in [*range(20), *range(content.index(b"description") - 10, len(content))]:
        for byte in (0, 0x12, 0xFF):
            path.write_bytes(content[:offset] + bytes([byte]) + content[offset + 1 :])
            try:
                read_onnx_file(path)  # a changed letter is a valid file
            except DataError:
                num_rejected += 1
    assert num_rejected > 100


@pytest.mark.parametrize("content", [b"hello\n", b"\x00" * 99, b"\xff" * 99, b"PK\x03\x04 a zip", b"\x08\x08"])
def test_other_file_raises(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.onnx").write_bytes(content)
    with pytest.raises(DataError, match=r"other\.onnx: not an ONNX file"):
        read_onnx_file(tmp_path / "other.onnx")


def test_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such model file"):
        read_onnx_file(tmp_path / "absent.onnx")
