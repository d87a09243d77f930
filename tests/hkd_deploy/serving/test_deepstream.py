"""DeepStream's folder: nvinfer's configuration against its documentation, and the model it names."""

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

# Of the page "Gst-nvinfer", DeepStream developer guide: the keys of [property] and [class-attrs-...] used here.
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


def test_folder(float_onnx: Callable[..., Path]) -> None:
    model = float_onnx()
    assert main([str(model), "--serving", "deepstream", "--max-batch", "4"]) == 0
    folder = model.parent / "deepstream" / "student"
    config = read_config(folder / "config_infer_primary.txt")
    assert set(config.sections()) == {"property", "class-attrs-all"}
    found = config["property"]
    assert set(found) <= PROPERTY and set(config["class-attrs-all"]) <= CLASS_ATTRIBUTES
    # Each file it names lies beside it, but for what the device makes.
    assert (folder / found["onnx-file"]).is_file() and (folder / found["labelfile-path"]).read_text() == "person\n"
    assert found["model-engine-file"] == "student.onnx_b4_gpu0_fp32.engine"
    assert f"{found['custom-lib-path']}:" in (folder / "Makefile").read_text()
    assert f"bool {found['parse-bbox-func-name']}(" in (folder / "nvdsinfer_hkd.cpp").read_text()
    # The picture as the network was trained on it.
    assert float(found["net-scale-factor"]) == pytest.approx(1 / 255, abs=1e-12)
    wanted = {"model-color-format": 0, "maintain-aspect-ratio": 1, "symmetric-padding": 0, "cluster-mode": 4}
    assert {key: int(found[key]) for key in wanted} == wanted
    assert (found["infer-dims"], int(found["batch-size"]), int(found["num-detected-classes"])) == ("3;96;160", 4, 1)
    assert float(config["class-attrs-all"]["pre-cluster-threshold"]) == 0.3


def test_the_model_gives_what_it_gave_without_the_output_nvinfer_cannot_take(float_onnx: Callable[..., Path]) -> None:
    model = float_onnx(batch=2)
    assert main([str(model), "--serving", "deepstream"]) == 0
    written = model.parent / "deepstream" / "student" / "student.onnx"
    batch = np.random.default_rng(0).uniform(0, 1, (2, 3, 96, 160)).astype(np.float32)
    batch[0, :, 20:40, 30:60] = 1
    before = onnxruntime.InferenceSession(str(model)).run(["boxes", "scores"], {"images": batch})
    session = onnxruntime.InferenceSession(str(written))
    assert [output.name for output in session.get_outputs()] == ["boxes", "scores"]
    for wanted, found in zip(before, session.run(None, {"images": batch}), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert session.get_modelmeta().custom_metadata_map["hkd.model"] == "tiny"


@pytest.mark.slow
def test_tensorrt_builds_it(float_onnx: Callable[..., Path], tensorrt_builds: Callable[..., dict[str, Any]]) -> None:
    """nvinfer builds by the same parser, with the same profile; every output keeps a side behind the batch."""
    model = float_onnx()
    assert main([str(model), "--serving", "deepstream", "--max-batch", "4"]) == 0
    written = model.parent / "deepstream" / "student" / "student.onnx"
    built = tensorrt_builds(written, (1, 3, 96, 160), (4, 3, 96, 160))
    assert built["outputs"] == {"boxes": ["FLOAT", 3], "scores": ["FLOAT", 2]}


@pytest.mark.parametrize(("precision", "mode"), [("fp16", "2"), ("int8", "1")])
@pytest.mark.parametrize(("batch", "profile"), [(None, " --trt-profile 1,8,8"), (2, "")])
def test_what_nvinfer_would_build_in_another_precision_it_is_not_given_to_build(
    float_onnx: Callable[..., Path], precision: str, mode: str, batch: int | None, profile: str
) -> None:
    model = float_onnx(batch=batch, changes={"hkd.precision": precision})
    assert main([str(model), "--serving", "deepstream"]) == 0
    folder = model.parent / "deepstream" / "student"
    text = (folder / "config_infer_primary.txt").read_text()
    found = read_config(folder / "config_infer_primary.txt")["property"]
    assert "onnx-file" not in found and found["model-engine-file"] == "student.engine"
    assert found["network-mode"] == mode
    assert (folder / "student.onnx").is_file()  # to build it from, by this command
    assert f"#   hkd-export student.onnx --trt{profile}\n" in text


def test_engine(engine: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    model = engine(count=False, free=False, preprocess=PREPROCESS_FLOAT01)
    assert main([str(model), "--serving", "deepstream"]) == 0
    folder = model.parent / "deepstream" / "student"
    found = read_config(folder / "config_infer_primary.txt")["property"]
    assert "onnx-file" not in found and (folder / found["model-engine-file"]).read_bytes() == model.read_bytes()
    assert found["batch-size"] == "1"
    capsys.readouterr()
    assert main([str(engine(preprocess=PREPROCESS_FLOAT01)), "--serving", "deepstream"]) == 2
    assert "Run hkd-export MODEL.onnx --serving deepstream" in capsys.readouterr().err
    assert main([str(engine(count=False)), "--serving", "deepstream"]) == 2
    assert "input images uint8 (?, 96, 160, 3): nvinfer passes float32" in capsys.readouterr().err


def test_a_graph_that_nvinfer_cannot_feed_is_refused_in_one_line(
    tiny_onnx: Callable[..., Path], float_onnx: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    in_graph = {"hkd.preprocess": json.dumps(PREPROCESS_IN_GRAPH), "hkd.max_imgsz": "[720, 1280]"}
    for model, message in (
        (tiny_onnx("boxed.onnx", changes=in_graph), "nvinfer does itself"),
        (float_onnx("asked.onnx", changes={"hkd.preprocess": "{}"}), "metadata hkd.preprocess: invalid value"),
        (float_onnx("raw.onnx", changes={"hkd.raw": "true"}), "--raw"),
        (float_onnx("free.onnx", changes={"hkd.dynamic": "true"}), "the input size is free"),
        (float_onnx("names.onnx", changes={"names": "person"}), "metadata names: cannot be read"),
    ):
        capsys.readouterr()
        assert main([str(model), "--serving", "deepstream"]) in (1, 2)
        error = capsys.readouterr().err.strip()
        assert message in error and str(model) in error and len(error.splitlines()) == 1
        assert not (model.parent / "deepstream").exists()
