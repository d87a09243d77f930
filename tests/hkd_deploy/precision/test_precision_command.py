"""`hkd-export net.onnx --precision ...`: files, verdicts, and one line for what goes wrong."""

import json
import platform
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

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
from hkd_deploy.precision.report import eval_backend, list_onnx_backends, predict_samples
from hkd_det.errors import DataError
from hkd_det.structures import Detections, Sample

Outliers = dict[str, NDArray[np.float32]]


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_int8_leaves_the_layer_out_that_would_blind_it(
    box_net: Callable[..., Path], street: Path, outlier: Outliers, capsys: pytest.CaptureFixture[str]
) -> None:
    source = box_net("student.onnx", **outlier)
    assert main([str(source), "--precision", "int8", "--data", str(street)]) == 0
    path = source.with_name("student.int8.onnx")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{path}: "))
    assert line.startswith(f"{path}: 0.0 MiB; int8 against fp32 on this device: ")
    assert "miss rate +0.00 points (0.00 %), recall at 0.3 +0.00 points (100.00 %): " in line
    written, before = metadata(path), metadata(source)
    assert written.items() > before.items()
    assert written["hkd.source_sha256"] == sha256(source.read_bytes()).hexdigest()
    assert written["hkd.precision"] == "int8"
    quantised, verdict = json.loads(written["hkd.quantization"]), json.loads(written["hkd.precision_report"])
    assert len(quantised["left_out"]) == 1 and quantised["layers"] == 2 and quantised["pictures"] == 6
    assert verdict["after"] == {"miss_rate": 0.0, "recall": 1.0}
    assert {race["backend"] for race in verdict["races"]} >= {"onnxruntime"}
    pairs = [node for node in onnx.load(path).graph.node if node.op_type == "QuantizeLinear"]
    assert [node.input[0] for node in pairs] == ["normal"]
    with open_detector(path) as detector:
        assert len(detector(np.full((96, 96, 3), 230, np.uint8))) == 1


def test_int8_says_the_same_without_the_runtimes_integer_operators(box_net: Callable[..., Path], street: Path) -> None:
    """On x86 our backend leaves Q/DQ nodes as they are: what the file itself says, to rounding, optimised or not."""
    source = box_net()
    assert main([str(source), "--precision", "int8", "--data", str(street), "--force"]) == 0
    path = source.with_name(f"{source.stem}.int8.onnx")
    literal = onnxruntime.SessionOptions()
    literal.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, literal, providers=["CPUExecutionProvider"])
    pictures = np.random.default_rng(0).integers(0, 256, (1, 96, 96, 3)).astype(np.uint8)
    with open_onnx_runtime(path) as runtime:
        found = runtime.run(pictures)
        settings = runtime._session.get_session_options()  # type: ignore[union-attr]
    left_alone = settings.get_session_config_entry("session.disable_quant_qdq") == "1"
    assert left_alone == (platform.machine() in ("x86_64", "AMD64"))
    for value, wanted in zip(found, session.run(list(OUTPUT_DTYPES), {"images": pictures}), strict=True):
        np.testing.assert_allclose(value, wanted, atol=1e-5)


def test_what_precision_has_measured_is_not_measured_again(
    box_net: Callable[..., Path], street: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A miss rate a file and runtime; with --verify-images on other pictures than the verdict, so all anew."""
    source = box_net()
    measured = []

    def noted(path: Path, device: str, backend: str, samples: list[Sample], what: str) -> list[Detections]:
        measured.append((path.name, backend))
        return predict_samples(path, device, backend, samples, what)

    monkeypatch.setattr(verify, "detect_all", noted)
    judged_on = eval_backend("cpu")
    for flags, again in (([], False), (["--verify-images", "3"], True)):
        measured.clear()
        assert main([str(source), "--precision", "fp16", "--data", str(street), *flags]) == 0
        others = [("net.fp16.onnx", backend) for backend in list_onnx_backends("cpu") if again or backend != judged_on]
        assert measured == others
        lines = [line for line in capsys.readouterr().out.splitlines() if "net.fp16.onnx  " in line]
        assert len(lines) == len(list_onnx_backends("cpu"))
        assert all("0.00 %" in line and line.endswith("+0.00 points") for line in lines)


def test_where_int8_stays_blind_nothing_is_written_unless_forced(
    box_net: Callable[..., Path], street: Path, two_outliers: Outliers, capsys: pytest.CaptureFixture[str]
) -> None:
    source = box_net(**two_outliers)
    command = [str(source), "--precision", "int8", "--data", str(street)]
    there = set(source.parent.iterdir())
    assert main(command) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "net.int8.onnx: not written: the miss rate rises by 100.00 points" in said
    assert "of 2 layers left out, more than --max-mr-rise 0.5" in said and "--force" in said
    assert set(source.parent.iterdir()) == there
    assert main([*command, "--force"]) == 0
    assert "not worth it: the miss rate rises by more than 0.5 points" in capsys.readouterr().out
    assert source.with_name("net.int8.onnx").exists()


def test_fp16_is_judged_and_bf16_says_that_it_is_not(
    box_net: Callable[..., Path], street: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = box_net()
    half, brain = source.with_name("half.onnx"), source.with_name("net.bf16.onnx")
    assert main([str(source), "--precision", "fp16", "--data", str(street), "--output", str(half)]) == 0
    assert "fp16 against fp32 on this device: " in capsys.readouterr().out
    assert metadata(half)["hkd.precision"] == "fp16"
    assert json.loads(metadata(half)["hkd.precision_report"])["miss_rate_rise"] == 0
    assert main([str(source), "--precision", "bf16"]) == 0
    assert "bf16: not measured" in capsys.readouterr().out
    assert "unmeasured" in json.loads(metadata(brain)["hkd.precision_report"])
    with pytest.raises(DataError, match=r"net\.bf16\.onnx: .*: it has no Conv for .*is for TensorRT$"):
        open_detector(brain).__enter__()
    with pytest.raises(DataError, match=r"net\.bf16\.onnx: .* is for TensorRT, .* with the FP32 file"):
        open_detector(brain, backend="openvino").__enter__()


def test_mistakes_are_one_line(
    box_net: Callable[..., Path], street: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = box_net()
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "text.onnx").write_text("no graph at all")
    (tmp_path / "half.onnx").write_bytes(source.read_bytes()[:-300])
    (tmp_path / "byte.onnx").write_bytes(source.read_bytes().replace(b"0f0f0f", b"0f\xfff0f", 1))
    assert main([str(source), "--precision", "int8", "--data", str(street), "--output", str(tmp_path / "q.onnx")]) == 0
    capsys.readouterr()
    there = set(tmp_path.iterdir())
    for name, flags, code, words in (
        ("empty.onnx", [], 1, "not an ONNX file, or a truncated one"),
        ("text.onnx", [], 1, "not an ONNX file, or a truncated one"),
        ("half.onnx", [], 1, "not an ONNX file, or a truncated one"),
        ("byte.onnx", [], 1, "not an ONNX file, or a truncated one"),
        ("absent.onnx", [], 1, "no such model file"),
        ("q.onnx", [], 1, "is int8 already; start from the FP32 file"),
        ("net.onnx", ["--calib", "none.yaml"], 1, "no pictures to calibrate on: none.yaml: no such data yaml"),
        ("net.onnx", ["--data", "none.yaml"], 1, "no pictures to judge by: none.yaml: no such data yaml"),
        ("net.onnx", ["--output", "net.trt"], 2, "must end in .onnx"),
        ("net.onnx", ["--output", str(source)], 2, "is the FP32 file itself"),
        ("net.onnx", ["--max-mr-rise", "-1"], 2, "--max-mr-rise -1"),
        ("net.onnx", ["--conf", "30"], 2, "--conf 30"),
        ("net.onnx", ["--precision", "fp16", "--calib", "x.yaml"], 2, "only --precision int8 is calibrated"),
        ("net.onnx", ["--measure-on", "gpu"], 2, "expected cpu, cuda or cuda:0"),
    ):
        command = [str(tmp_path / name), "--precision", "int8", "--data", str(street), *flags]
        assert main(command) == code, (name, flags)
        said = [line for line in capsys.readouterr().err.splitlines() if "fewer than 300" not in line]
        assert len(said) == 1 and words in said[0], said
    assert set(tmp_path.iterdir()) == there


@pytest.mark.parametrize("flag", ["--raw", "--no-preprocess"])
def test_a_graph_that_nothing_here_runs_is_refused_at_once(
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
    assert f"exported with {flag}: nothing here can run and judge it" in capsys.readouterr().err


def test_an_opset_too_new_says_what_will_do(
    box_net: Callable[..., Path], street: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = box_net(opset=21)
    assert main([str(source), "--precision", "int8", "--data", str(street)]) == 1
    assert "opset 21, and --precision takes 13 to 20; export it again" in capsys.readouterr().err
