"""`hkd-export net.onnx --precision ...`: written files, reports and one-line errors."""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from hkd_deploy import open_detector
from hkd_deploy.backends.base import OUTPUT_DTYPES
from hkd_deploy.backends.onnxruntime import open_onnx_runtime
from hkd_deploy.export import verify
from hkd_deploy.export.cli import main
from hkd_deploy.precision.model import (
    get_eval_backend,
    list_onnx_backends,
    predict_samples,
    read_fp32_model,
    run_model,
)
from hkd_det.errors import DataError
from hkd_det.structures import Detections, Sample

BoxNetWeights = dict[str, NDArray[np.float32]]


def read_metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.mark.slow
def test_int8_excludes_sensitive_layer(
    box_net: Callable[..., Path], street: Path, outlier: BoxNetWeights, capsys: pytest.CaptureFixture[str]
) -> None:
    source = box_net("student.onnx", **outlier)
    assert main([str(source), "--precision", "int8", "--data", str(street)]) == 0
    path = source.with_name("student.int8.onnx")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{path}: "))
    assert line.startswith(f"{path}: 0.0 MiB; int8 compared with fp32 on this device, with 95 % intervals: ")
    assert "6 images, 6 persons: miss rate +0.00 points (+0.00 to +0.00), now 0.00 %; recall at 0.3 +0.00 " in line
    assert "now 100.00 %; AP50 100.0 -> 100.0 %, AP 100.0 -> 100.0 %; " in line
    assert line.endswith("; no recommendation: fewer than 50 images or 50 persons")
    written, before = read_metadata(path), read_metadata(source)
    assert written.items() > before.items()
    assert written["hkd.source_sha256"] == sha256(source.read_bytes()).hexdigest()
    assert written["hkd.precision"] == "int8"
    quantization, report = json.loads(written["hkd.quantization"]), json.loads(written["hkd.precision_report"])
    assert len(quantization["excluded_nodes"]) == 1
    assert quantization["num_layers"] == 2 and quantization["num_images"] == 6
    assert report["after"] == {"miss_rate": 0.0, "recall": 1.0, "ap": 1.0, "ap50": 1.0}
    assert (report["num_images"], report["num_gt"], report["conclusion"]) == (6, 6, "no recommendation")
    assert {latency["backend"] for latency in report["latencies"]} >= {"onnxruntime"}
    quantize_nodes = [node for node in onnx.load(path).graph.node if node.op_type == "QuantizeLinear"]
    assert [node.input[0] for node in quantize_nodes] == ["normal"]
    with open_detector(path) as detector:
        assert len(detector(np.full((96, 96, 3), 230, np.uint8))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_model_that_detects_no_person_is_not_recommended(
    box_net: Callable[..., Path], street: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (street.parent / "street" / "images" / "val").iterdir():
        cv2.imwrite(str(path), np.full((96, 96, 3), 40, np.uint8))
    source = box_net("student.onnx")
    assert main([str(source), "--precision", precision, "--data", str(street)]) == 0
    output = capsys.readouterr().out
    assert "no recommendation: the fp32 file detects no person at a score of 0.3, so nothing is compared" in output
    assert f"neither it nor {source} has a detection with a score of at least 0.3" in output
    assert (
        re.search("no detection +-", output)
        and f"{source} detects no person of the setup Reasonable: increases are not" in output
    )
    report = json.loads(read_metadata(source.with_name(f"student.{precision}.onnx"))["hkd.precision_report"])
    assert report["recommended"] is False


@pytest.mark.slow
def test_int8_onnx_runtime_matches_unoptimized_graph(box_net: Callable[..., Path], street: Path) -> None:
    """On x86 the backend disables the fusion of Q/DQ nodes, so that optimized outputs match up to rounding."""
    source = box_net()
    assert main([str(source), "--precision", "int8", "--data", str(street), "--force"]) == 0
    path = source.with_name(f"{source.stem}.int8.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, (1, 96, 96, 3)).astype(np.uint8)
    with open_onnx_runtime(path) as runtime:
        outputs = runtime.run(images)
        settings = runtime._session.get_session_options()  # type: ignore[union-attr]
    qdq_disabled = settings.get_session_config_entry("session.disable_quant_qdq") == "1"
    assert qdq_disabled == (platform.machine() in ("x86_64", "AMD64"))
    for value, expected in zip(outputs, session.run(list(OUTPUT_DTYPES), {"images": images}), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5)


@pytest.mark.slow
def test_verification_reuses_miss_rates_of_the_report(
    box_net: Callable[..., Path], street: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --verify-images the images differ from those of the report, so all miss rates are measured."""
    source = box_net()
    measured = []

    def record_predict(path: Path, device: str, backend: str, samples: list[Sample], desc: str) -> list[Detections]:
        measured.append((path.name, backend))
        return predict_samples(path, device, backend, samples, desc)

    monkeypatch.setattr(verify, "predict_samples", record_predict)
    report_backend = get_eval_backend("cpu")
    for flags, is_repeated in (([], False), (["--verify-images", "3"], True)):
        measured.clear()
        assert main([str(source), "--precision", "fp16", "--data", str(street), *flags]) == 0
        backends = [backend for backend in list_onnx_backends("cpu") if is_repeated or backend != report_backend]
        assert measured == [("net.fp16.onnx", backend) for backend in backends]
        lines = [line for line in capsys.readouterr().out.splitlines() if "net.fp16.onnx  " in line]
        assert len(lines) == len(list_onnx_backends("cpu"))
        assert all("0.00 %" in line and line.endswith("+0.00 points") for line in lines)


@pytest.mark.slow
def test_int8_above_miss_rate_limit_requires_force(
    box_net: Callable[..., Path], street: Path, two_outliers: BoxNetWeights, capsys: pytest.CaptureFixture[str]
) -> None:
    source = box_net(**two_outliers)
    command = [str(source), "--precision", "int8", "--data", str(street)]
    files = set(source.parent.iterdir())
    assert main(command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "net.int8.onnx: not written: the miss rate increases by 100.00 points (95 % interval on 6 images: " in error
    assert "of 2 layers excluded, more than --max-mr-increase 0.5" in error and "--force" in error
    assert set(source.parent.iterdir()) == files
    assert main([*command, "--force"]) == 0
    assert "no recommendation: fewer than 50 images or 50 persons" in capsys.readouterr().out
    assert source.with_name("net.int8.onnx").exists()


def test_fp16_is_evaluated_and_bf16_is_not(
    box_net: Callable[..., Path], street: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = box_net()
    fp16, bf16 = source.with_name("half.onnx"), source.with_name("net.bf16.onnx")
    assert main([str(source), "--precision", "fp16", "--data", str(street), "--output", str(fp16)]) == 0
    assert "fp16 compared with fp32 on this device, with 95 % intervals: " in capsys.readouterr().out
    assert read_metadata(fp16)["hkd.precision"] == "fp16"
    assert json.loads(read_metadata(fp16)["hkd.precision_report"])["mr_increase"] == 0
    assert main([str(source), "--precision", "bf16"]) == 0
    assert "bf16 not measured: " in capsys.readouterr().out
    assert "not_measured" in json.loads(read_metadata(bf16)["hkd.precision_report"])
    with pytest.raises(DataError, match=r"net\.bf16\.onnx: .*no Conv for .*TensorRT"):
        open_detector(bf16).__enter__()
    with pytest.raises(DataError, match=r"net\.bf16\.onnx: .*TensorRT.*FP32"):
        open_detector(bf16, backend="openvino").__enter__()


@pytest.mark.slow
def test_model_of_another_tool_keeps_its_configuration(
    box_net: Callable[..., Path], street: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same network without the metadata of hkd-export. The written files need no YAML file."""
    source, native = box_net("other.onnx"), box_net("native.onnx")
    model = onnx.load(source)
    del model.metadata_props[:]
    onnx.save(model, source)
    config = tmp_path / "config.yaml"
    config.write_text("{output_format: boxes-scores, layout: NHWC, license: MIT, name: Box}")
    flags = ["--data", str(street), "--model-config", str(config), "--force", "--max-mr-increase", "100"]
    image = np.full((96, 96, 3), 230, np.uint8)
    with open_detector(native) as detector:
        expected = detector(image)
    assert main([str(source), "--precision", "fp16", *flags]) == 0
    assert "6 images, 6 persons: miss rate +0.00 points" in capsys.readouterr().out
    assert main([str(source), "--precision", "int8", *flags]) == 0
    for name in ("other.fp16.onnx", "other.int8.onnx"):
        assert read_metadata(tmp_path / name)["hkd.source_sha256"] == sha256(source.read_bytes()).hexdigest()
        for backend in list_onnx_backends("cpu"):
            with open_detector(tmp_path / name, backend=backend) as detector:
                assert (detector.metadata.license, detector.metadata.model) == ("MIT", "Box")
                np.testing.assert_allclose(detector(image).boxes_xyxy, expected.boxes_xyxy, atol=0.5)
    capsys.readouterr()
    for arguments, message in (
        ([], "other.onnx: .*no model configuration found"),
        (["--model-config", str(config)], "does not name its dataset. Set --data"),
        ([*flags, "--openvino"], "not available with --precision"),
    ):
        assert main([str(source), "--precision", "fp16", *arguments]) in (1, 2)
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_invalid_input_ends_in_one_line(
    box_net: Callable[..., Path], street: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = box_net()
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "text.onnx").write_text("no graph at all")
    (tmp_path / "half.onnx").write_bytes(source.read_bytes()[:-300])
    (tmp_path / "byte.onnx").write_bytes(source.read_bytes().replace(b"0f0f0f", b"0f\xfff0f", 1))
    assert main([str(source), "--precision", "int8", "--data", str(street), "--output", str(tmp_path / "q.onnx")]) == 0
    capsys.readouterr()
    files = set(tmp_path.iterdir())
    for name, flags, code, message in (
        ("empty.onnx", [], 1, "not an ONNX file, or truncated"),
        ("text.onnx", [], 1, "not an ONNX file, or truncated"),
        ("half.onnx", [], 1, "not an ONNX file, or truncated"),
        ("byte.onnx", [], 1, "not an ONNX file, or truncated"),
        ("absent.onnx", [], 1, "no such model file"),
        ("q.onnx", [], 1, "expected an FP32 file, got int8"),
        ("net.onnx", ["--calib-data", "none.yaml"], 1, "calibration images: none.yaml: "),
        ("net.onnx", ["--data", "none.yaml"], 1, "evaluation images: none.yaml: "),
        ("net.onnx", ["--output", "net.trt"], 2, "expected a name ending in .onnx"),
        ("net.onnx", ["--output", str(source)], 2, "this file is the FP32 input"),
        ("net.onnx", ["--max-mr-increase", "-1"], 2, "--max-mr-increase: expected at least 0, got -1"),
        ("net.onnx", ["--conf", "30"], 2, "--conf 30"),
        ("net.onnx", ["--precision", "fp16", "--calib-data", "x.yaml"], 2, "requires --precision int8"),
        ("net.onnx", ["--eval-device", "gpu"], 2, "expected cpu, cuda or cuda:N"),
    ):
        command = [str(tmp_path / name), "--precision", "int8", "--data", str(street), *flags]
        assert main(command) == code, (name, flags)
        errors = [line for line in capsys.readouterr().err.splitlines() if "300 are recommended" not in line]
        assert len(errors) == 1 and message in errors[0], errors
    assert set(tmp_path.iterdir()) == files


@pytest.mark.parametrize("flag", ["--raw", "--no-preprocess"])
def test_graph_for_custom_programs_is_rejected(
    flag: str, box_net: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    floats = {
        "layout": "NCHW",
        "color": "RGB",
        "dtype": "float32",
        "letterbox": "top-left",
        "pad": 114,
        "range": [0, 1],
    }
    changes = {"hkd.format": "1", "hkd.max_imgsz": "[96, 96]", "hkd.dynamic": "false", "hkd.raw": "false"}
    changes |= {"hkd.raw": "true"} if flag == "--raw" else {"hkd.preprocess": json.dumps(floats)}
    assert main([str(box_net(changes=changes)), "--precision", "bf16"]) == 2
    assert f"exported with {flag}; --precision cannot evaluate it" in capsys.readouterr().err


def test_unsupported_opset_lists_supported_range(
    box_net: Callable[..., Path], street: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = box_net(opset=21)
    assert main([str(source), "--precision", "int8", "--data", str(street)]) == 1
    assert "--precision supports opsets 13 to 20, got 21" in capsys.readouterr().err


@pytest.mark.slow
def test_quantize_is_alias_of_precision_and_needs_no_torch(box_net: Callable[..., Path], street: Path) -> None:
    command = "import sys; from hkd_deploy.export.cli import main; code = main(sys.argv[1:])"
    command += "; sys.exit(code or 'torch' in sys.modules)"
    source = box_net()
    subprocess.run(
        [sys.executable, "-c", command, str(source), "--quantize", "int8", "--data", str(street), "--force"], check=True
    )
    assert read_metadata(source.with_name("net.int8.onnx"))["hkd.precision"] == "int8"


@pytest.mark.skipif("HKD_TEST_DATA" not in os.environ, reason="HKD_TEST_DATA is not set")
@pytest.mark.parametrize(("file", "config"), [("yolox_nano", "yolox"), ("picodet_s_416", "picodet")])
def test_older_opset_is_converted_with_equal_outputs(file: str, config: str) -> None:
    """Both files have opset 11. After the conversion, only the image is an input."""
    path = Path(os.environ["HKD_TEST_DATA"]) / "models" / f"{file}.onnx"
    source = read_fp32_model(path, Path(config))
    (opset,) = [entry.version for entry in source.model.opset_import if not entry.domain]
    assert opset == 17 and len(source.model.graph.input) == 1
    feeds = source.make_inputs(np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    (outputs,) = run_model(source.model, names, [feeds])
    for name, expected in zip(names, session.run(names, feeds), strict=True):
        np.testing.assert_allclose(outputs[name], expected, atol=1e-3)
