"""Tests of the DeepStream graph: same outputs as its source in all precisions, and TensorRT builds it."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from hkd_deploy.export.cli import main
from hkd_deploy.export.exporter import export_onnx
from hkd_deploy.model_metadata import ExportOptions, ModelMetadata
from hkd_deploy.precision.graph import convert_to_half, find_graph_regions, fold_norms
from hkd_deploy.precision.int8 import convert_to_int8
from hkd_deploy.precision.model import Fp32Model, read_fp32_model, save_model
from hkd_deploy.serving import model_file
from hkd_deploy.serving.model_file import read_model_file
from hkd_det.models.checkpoint import DetectorCheckpoint
from hkd_det.models.zoo import build_model

HW = (128, 160)
MAX_ACTIVATION = 4.0


@pytest.fixture(scope="module")
def checkpoint() -> DetectorCheckpoint:
    """An untrained detector with updated batch statistics and varying scores."""
    torch.manual_seed(0)
    detector = build_model("mini-student")
    for branch in (detector.head.one2many, detector.head.one2one):
        torch.nn.init.normal_(branch.weight, std=0.5)
    detector.train()
    with torch.no_grad():
        for _ in range(3):
            detector(torch.rand(4, 3, 64, 64) * 255)
    config = {"data": "street.yaml", "imgsz_hw": list(HW)}
    return DetectorCheckpoint("mini-student", detector.spec, detector.eval().state_dict(), config, 1, 0.5)


def convert(source: Fp32Model, precision: str) -> onnx.ModelProto:
    match precision:
        case "fp32":
            return source.model
        case "int8":
            folded = replace(source, model=fold_norms(source.model)).model
            layers = find_graph_regions(folded).layers
            input_names = {node.input[0] for node in folded.graph.node if node.name in layers}
            return convert_to_int8(folded, layers, dict.fromkeys(input_names, MAX_ACTIVATION))
        case _:
            return convert_to_half(source.model, find_graph_regions(source.model), precision)


@pytest.fixture(scope="module")
def fp32_file(checkpoint: DetectorCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int | None], Path]:
    """Function `fp32_file(batch)` that exports the checkpoint once per batch size."""
    folder = tmp_path_factory.mktemp("fp32")

    @cache
    def export(batch: int | None) -> Path:
        path = folder / f"{batch}.onnx"
        export_onnx(checkpoint, path, ExportOptions(HW, batch))
        return path

    return export


@pytest.fixture
def exported(fp32_file: Callable[[int | None], Path], tmp_path: Path) -> Callable[..., Path]:
    """Function `exported(precision, batch)` that writes a file like hkd-export. Batch None is free."""

    def write(precision: str, batch: int | None) -> Path:
        path = tmp_path / "student.onnx"
        source = read_fp32_model(fp32_file(batch))
        save_model(source, convert(source, precision), path, precision, {}, {})
        return path

    return write


def make_images(count: int) -> np.ndarray:
    """Return uint8 RGB [count, H, W, 3] with coarse noise, so that all regions differ."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, HW[0] // 8, HW[1] // 8, 3), np.uint8)
    return np.stack([cv2.resize(image, (HW[1], HW[0])) for image in coarse])


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2, None])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_nvinfer_graph_equals_source(exported: Callable[..., Path], precision: str, batch: int | None) -> None:
    model = exported(precision, batch)
    assert main([str(model), "--serving", "deepstream"]) == 0
    written = model.parent / "deepstream" / "student" / "student.onnx"
    batch_nhwc = make_images(2)
    before = onnxruntime.InferenceSession(str(model)).run(["boxes", "scores"], {"images": batch_nhwc})
    session = onnxruntime.InferenceSession(str(written))
    (images,) = session.get_inputs()
    assert (images.name, images.type, images.shape[1:]) == ("images", "tensor(float)", [3, *HW])
    assert images.shape[0] == batch if batch else isinstance(images.shape[0], str)
    assert [output.name for output in session.get_outputs()] == ["boxes", "scores"]
    after = session.run(None, {"images": batch_nhwc.transpose(0, 3, 1, 2).astype(np.float32) / 255})
    # Scores are descending and differ, so a wrong axis order would change them.
    assert before[1][0, 0] > before[1][0, 9] > 0 and not np.array_equal(before[1][0], before[1][1])
    for expected, actual in zip(before, after, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_nvinfer_graph_changes_first_nodes_only(exported: Callable[..., Path], precision: str) -> None:
    path = exported(precision, 1)
    assert main([str(path), "--serving", "deepstream"]) == 0
    written = path.parent / "deepstream" / "student" / "student.onnx"
    before, after = onnx.load(path), onnx.load(written)
    old, new = ([node.SerializeToString() for node in model.graph.node] for model in (before, after))
    removed = [node.op_type for node in before.graph.node if node.SerializeToString() not in new]
    added = [node.op_type for node in after.graph.node if node.SerializeToString() not in old]
    assert (removed, added) == (["Cast", "Transpose"], ["Mul"])
    assert (after.opset_import, after.ir_version) == (before.opset_import, before.ir_version)
    old_metadata, new_metadata = (
        {entry.key: entry.value for entry in model.metadata_props} for model in (before, after)
    )
    assert {key for key in new_metadata if new_metadata[key] != old_metadata.get(key)} == {"hkd.preprocess"}
    metadata = ModelMetadata.from_metadata(new_metadata, written)
    assert metadata == replace(ModelMetadata.from_metadata(old_metadata, path), preprocess="float01")


def test_nvinfer_graph_other_first_node_raises(
    exported: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported("fp32", 1)
    model = onnx.load(path)
    (cast,) = (node for node in model.graph.node if "images" in node.input)
    cast.op_type = "Identity"
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    del cast.attribute[:]
    onnx.save(model, path)
    assert main([str(path), "--serving", "deepstream"]) == 1
    error = capsys.readouterr().err.strip()
    assert "expected a cast of images to float32 as the first operator" in error and len(error.splitlines()) == 1
    assert not (path.parent / "deepstream" / "student" / "student.onnx").exists()


@pytest.mark.slow
def test_nvinfer_graph_bf16_is_read_with_onnx(
    exported: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported("bf16", None)
    assert main([str(path), "--serving", "deepstream"]) == 0
    folder = path.parent / "deepstream" / "student"
    assert "network-mode=0\n" in (folder / "config_infer_primary.txt").read_text()
    images = onnx.load(folder / "student.onnx").graph.input[0].type.tensor_type
    assert images.elem_type == onnx.TensorProto.FLOAT
    assert [dim.dim_param or dim.dim_value for dim in images.shape.dim] == ["batch", 3, *HW]
    capsys.readouterr()
    assert main([str(path), "--serving", "triton"]) == 2  # Triton uses ONNX Runtime
    error = capsys.readouterr().err.strip()
    assert f"Run hkd-export {path} --trt, then" in error and len(error.splitlines()) == 1
    assert not (path.parent / "triton").exists()
    path.write_bytes(path.read_bytes()[:-3])
    assert main([str(path), "--serving", "deepstream"]) == 1
    assert "truncated" in capsys.readouterr().err


@pytest.mark.parametrize("batch", [2, None])
def test_read_model_file_equals_onnx_package(exported: Callable[..., Path], batch: int | None) -> None:
    """Output shapes can differ: ONNX Runtime infers more dimensions than the file declares."""
    path = exported("fp32", batch)
    first, second = read_model_file(path), model_file._read_with_onnx(path)
    assert (first.inputs, first.metadata, first.batch) == (second.inputs, second.metadata, second.batch)
    names = [[(output.name, output.dtype) for output in model.outputs] for model in (first, second)]
    assert names[0] == names[1]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, None])
@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", "FLOAT"), ("fp16", "HALF"), ("bf16", "BF16"), ("int8", "INT8")]
)
def test_tensorrt_builds_nvinfer_graph(
    exported: Callable[..., Path],
    tensorrt_builds: Callable[..., dict[str, Any]],
    precision: str,
    dtype: str,
    batch: int | None,
) -> None:
    model = exported(precision, batch)
    assert main([str(model), "--serving", "deepstream"]) == 0
    written = model.parent / "deepstream" / "student" / "student.onnx"
    built = tensorrt_builds(written, (1, 3, *HW), (4, 3, *HW))
    assert built["input"] == "FLOAT" and built["outputs"] == {"boxes": ["FLOAT", 3], "scores": ["FLOAT", 2]}
    assert dtype in built["layer_types"]
