"""Tests of the DeepStream files: keys of the nvinfer configuration and the converted model."""

import json
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from hkd_deploy.export.cli import main
from hkd_deploy.model_metadata import PREPROCESS_FLOAT01, PREPROCESS_IN_GRAPH

# Keys of [property] and [class-attrs-...] in the chapter "Gst-nvinfer" of the DeepStream developer guide.
PROPERTY = {
    "gpu-id", "gie-unique-id", "onnx-file", "model-engine-file", "network-mode", "network-type", "batch-size",
    "infer-dims", "interval", "process-mode", "net-scale-factor", "model-color-format", "maintain-aspect-ratio",
    "symmetric-padding", "cluster-mode", "num-detected-classes", "labelfile-path", "parse-bbox-func-name",
    "custom-lib-path",
}  # fmt: skip
CLASS_ATTRIBUTES = {"pre-cluster-threshold"}


def read_config(path: Path) -> ConfigParser:
    config = ConfigParser(comment_prefixes=("#",), delimiters=("=",), interpolation=None)
    config.read_string(path.read_text())
    return config


def test_write_deepstream_creates_all_files(float_onnx: Callable[..., Path]) -> None:
    model = float_onnx()
    assert main([str(model), "--serving", "deepstream", "--max-batch", "4"]) == 0
    folder = model.parent / "deepstream" / "student"
    config = read_config(folder / "config_infer_primary.txt")
    assert set(config.sections()) == {"property", "class-attrs-all"}
    properties = config["property"]
    assert set(properties) <= PROPERTY and set(config["class-attrs-all"]) <= CLASS_ATTRIBUTES
    # All named files exist, except those that are built on the device.
    assert (folder / properties["onnx-file"]).is_file() and (
        folder / properties["labelfile-path"]
    ).read_text() == "person\n"
    assert properties["model-engine-file"] == "student.onnx_b4_gpu0_fp32.engine"
    assert f"{properties['custom-lib-path']}:" in (folder / "Makefile").read_text()
    assert f"bool {properties['parse-bbox-func-name']}(" in (folder / "nvdsinfer_hkd.cpp").read_text()
    # Preprocessing as in training.
    assert float(properties["net-scale-factor"]) == pytest.approx(1 / 255, abs=1e-12)
    expected = {"model-color-format": 0, "maintain-aspect-ratio": 1, "symmetric-padding": 0, "cluster-mode": 4}
    assert {key: int(properties[key]) for key in expected} == expected
    assert (properties["infer-dims"], int(properties["batch-size"]), int(properties["num-detected-classes"])) == (
        "3;96;160",
        4,
        1,
    )
    assert float(config["class-attrs-all"]["pre-cluster-threshold"]) == 0.3


def test_write_deepstream_model_has_same_outputs(float_onnx: Callable[..., Path]) -> None:
    model = float_onnx(batch=2)
    assert main([str(model), "--serving", "deepstream"]) == 0
    written = model.parent / "deepstream" / "student" / "student.onnx"
    batch = np.random.default_rng(0).uniform(0, 1, (2, 3, 96, 160)).astype(np.float32)
    batch[0, :, 20:40, 30:60] = 1
    before = onnxruntime.InferenceSession(str(model)).run(["boxes", "scores"], {"images": batch})
    session = onnxruntime.InferenceSession(str(written))
    assert [output.name for output in session.get_outputs()] == ["boxes", "scores"]
    for expected, actual in zip(before, session.run(None, {"images": batch}), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert session.get_modelmeta().custom_metadata_map["hkd.model"] == "tiny"


@pytest.mark.slow
def test_tensorrt_builds_deepstream_model(
    float_onnx: Callable[..., Path], tensorrt_builds: Callable[..., dict[str, Any]]
) -> None:
    """nvinfer uses the same parser and profile. All outputs have a dimension after the batch."""
    model = float_onnx()
    assert main([str(model), "--serving", "deepstream", "--max-batch", "4"]) == 0
    written = model.parent / "deepstream" / "student" / "student.onnx"
    built = tensorrt_builds(written, (1, 3, 96, 160), (4, 3, 96, 160))
    assert built["outputs"] == {"boxes": ["FLOAT", 3], "scores": ["FLOAT", 2]}


@pytest.mark.parametrize(("precision", "mode"), [("fp16", "2"), ("int8", "1")])
@pytest.mark.parametrize(("batch", "profile"), [(None, " --trt-profile 1,8,8"), (2, "")])
def test_write_deepstream_reduced_precision_names_engine(
    float_onnx: Callable[..., Path], precision: str, mode: str, batch: int | None, profile: str
) -> None:
    model = float_onnx(batch=batch, changes={"hkd.precision": precision})
    assert main([str(model), "--serving", "deepstream"]) == 0
    folder = model.parent / "deepstream" / "student"
    text = (folder / "config_infer_primary.txt").read_text()
    properties = read_config(folder / "config_infer_primary.txt")["property"]
    assert "onnx-file" not in properties and properties["model-engine-file"] == "student.engine"
    assert properties["network-mode"] == mode
    assert (folder / "student.onnx").is_file()  # source of the engine, with this command
    assert f"#   hkd-export student.onnx --trt{profile}\n" in text


def test_write_deepstream_engine(engine: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    model = engine(count=False, free=False, preprocess=PREPROCESS_FLOAT01)
    assert main([str(model), "--serving", "deepstream"]) == 0
    folder = model.parent / "deepstream" / "student"
    properties = read_config(folder / "config_infer_primary.txt")["property"]
    assert (
        "onnx-file" not in properties and (folder / properties["model-engine-file"]).read_bytes() == model.read_bytes()
    )
    assert properties["batch-size"] == "1"
    capsys.readouterr()
    assert main([str(engine(preprocess=PREPROCESS_FLOAT01)), "--serving", "deepstream"]) == 2
    assert "Run hkd-export MODEL.onnx --serving deepstream" in capsys.readouterr().err
    assert main([str(engine(count=False)), "--serving", "deepstream"]) == 2
    assert "input images uint8 (?, 96, 160, 3): nvinfer passes float32" in capsys.readouterr().err


def test_write_deepstream_unsupported_graph_raises_one_line(
    tiny_onnx: Callable[..., Path], float_onnx: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    in_graph = {"hkd.preprocess": json.dumps(PREPROCESS_IN_GRAPH), "hkd.max_imgsz": "[720, 1280]"}
    for model, message in (
        (tiny_onnx("letterbox.onnx", changes=in_graph), "nvinfer does itself"),
        (float_onnx("preprocess.onnx", changes={"hkd.preprocess": "{}"}), "metadata hkd.preprocess: invalid value"),
        (float_onnx("raw.onnx", changes={"hkd.raw": "true"}), "--raw"),
        (float_onnx("dynamic.onnx", changes={"hkd.dynamic": "true"}), "the input size is free"),
        (float_onnx("names.onnx", changes={"names": "person"}), "metadata names: cannot be read"),
    ):
        capsys.readouterr()
        assert main([str(model), "--serving", "deepstream"]) in (1, 2)
        error = capsys.readouterr().err.strip()
        assert message in error and str(model) in error and len(error.splitlines()) == 1
        assert not (model.parent / "deepstream").exists()
