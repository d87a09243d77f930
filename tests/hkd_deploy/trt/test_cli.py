"""Tests of --dry-run with the real parser and builder, on every kind of graph that hkd-export writes."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from hkd_deploy.export.cli import main
from hkd_deploy.trt import cli
from hkd_deploy.trt.builder import BuildOptions
from hkd_deploy.trt.cli import check_build
from hkd_deploy.trt.engine import count_precisions
from hkd_deploy.trt.engine_info import parse_profile
from hkd_det.errors import DataError, UnavailableError


@pytest.fixture
def python_with_tensorrt(tensorrt_python: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide a Python with a real TensorRT in the place where --dry-run searches it."""
    monkeypatch.setattr(cli, "REPO_DIR", tensorrt_python.parents[1])
    return tensorrt_python


@pytest.mark.slow
@pytest.mark.usefixtures("python_with_tensorrt")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_dry_run_builds_each_precision(graph: Callable[..., Path], precision: str) -> None:
    path = graph(precision=precision)
    result = check_build(path, BuildOptions())
    assert count_precisions(result.layers) == {precision: 3}
    convolutions = [layer for layer in result.layers if layer.is_compute]
    assert {layer.shape for layer in convolutions} == {(1, 32, 32, 64)}
    assert result.layer_counts["CONVOLUTION"] == 3 and result.plan_bytes > 10_000
    assert list(path.parent.iterdir()) == [path]  # nothing was written


@pytest.mark.slow
@pytest.mark.usefixtures("python_with_tensorrt")
def test_dry_run_fp32_file_labeled_fp16_fails(graph: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(graph(metadata_precision="fp16")), "--trt", "--dry-run"]) == 1
    assert "requested fp16, but TensorRT built 3 fp32 layers" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("python_with_tensorrt")
@pytest.mark.parametrize(
    ("export_options", "first_shape"),  # output of the first convolution, which halves 96x160
    [
        ({}, "1x12x48x80"),
        ({"batch": None}, "-1x12x48x80"),
        ({"batch": None, "dynamic_size": True}, "-1x12x48x80"),
        ({"letterbox_hw": (120, 320)}, "1x12x48x80"),
        ({"batch": 2, "preprocess": False, "raw": True}, "2x12x48x80"),
    ],
)
def test_dry_run_builds_every_form_of_export(
    tmp_path: Path, export_options: dict[str, Any], first_shape: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from hkd_deploy.export.exporter import export_onnx
    from hkd_deploy.model_metadata import ExportOptions
    from hkd_det.models.checkpoint import DetectorCheckpoint
    from hkd_det.models.zoo import build_model

    detector = build_model("mini-student").eval()
    config = {"data": "street.yaml", "imgsz_hw": [96, 160]}
    checkpoint = DetectorCheckpoint("mini-student", detector.spec, detector.state_dict(), config, 1, 0.5)
    path = tmp_path / "student.onnx"
    export_onnx(checkpoint, path, ExportOptions((96, 160), **export_options))
    assert main([str(path), "--trt", "--dry-run", "--print-layers"]) == 0
    output = capfd.readouterr().out
    assert "TensorRT 11" in output and " fp32 (requested: fp32). Nothing was written." in output
    first_layer = next(line for line in output.splitlines() if "/conv1/conv1.0/Conv" in line)
    assert first_layer.split()[1] == first_shape, output
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.usefixtures("python_with_tensorrt")
def test_dry_run_uses_the_profile(graph: Callable[..., Path]) -> None:
    result = check_build(graph(batch=None), BuildOptions(profile=parse_profile("1,2,3")))
    assert count_precisions(result.layers) == {"fp32": 3}


@pytest.mark.slow
@pytest.mark.usefixtures("python_with_tensorrt")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda node: setattr(node, "op_type", "Frobnicate"), r"node 4 /1/Conv \(Frobnicate\): "),
        (lambda node: node.input.__setitem__(1, "w0"), r"node 4 /1/Conv \(Conv\): .*Kernel weight dimension"),
    ],
)
def test_parser_error_names_the_node(
    graph: Callable[..., Path], damage: Callable[[onnx.NodeProto], None], message: str
) -> None:
    path = graph()
    model = onnx.load(path)
    damage(next(node for node in model.graph.node if node.name == "/1/Conv"))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match=f"cannot parse it: {message}") as caught:
        check_build(path, BuildOptions())
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.usefixtures("python_with_tensorrt")
def test_builder_error_is_reported(graph: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"TensorRT 11.* cannot build it: .*workspace"):
        check_build(graph(batch=None), BuildOptions(workspace_mib=1))


@pytest.mark.slow
@pytest.mark.usefixtures("python_with_tensorrt")
def test_opset_beyond_the_parser_raises(graph: Callable[..., Path]) -> None:
    path = graph()
    model = onnx.load(path)
    model.opset_import[0].version = 99
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="opset 99 is too new for TensorRT 11"):
        check_build(path, BuildOptions())


CANCEL = """
import os, signal, sys
from pathlib import Path
from hkd_deploy.trt import builder
from hkd_deploy.trt.bindings import TrtLog, import_tensorrt
from hkd_deploy.trt.onnx_file import read_onnx_file

class CtrlC(builder.BuildProgress):
    num_steps = 0
    def step(self, phase):
        CtrlC.num_steps += 1
        if CtrlC.num_steps == 5:
            os.kill(os.getpid(), signal.SIGINT)
            self.cancelled.wait(20)
        return super().step(phase)

builder.BuildProgress = CtrlC
signal.signal(signal.SIGINT, signal.default_int_handler)
log = TrtLog()
try:
    builder.build_plan(import_tensorrt(), read_onnx_file(Path(sys.argv[1])), builder.BuildOptions(), log)
except KeyboardInterrupt:
    assert CtrlC.num_steps == 5 and "cancel" in log.first_error.lower(), (CtrlC.num_steps, log)
    sys.exit(7)
"""


@pytest.mark.slow
def test_ctrl_c_stops_the_builder(graph: Callable[..., Path], python_with_tensorrt: Path) -> None:
    command = [str(python_with_tensorrt), "-c", CANCEL, str(graph())]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 7, process.stderr


def test_dry_run_without_tensorrt_raises(
    graph: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "REPO_DIR", tmp_path)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("HKD_TENSORRT", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match=r"--dry-run: TensorRT is not installed\. Run make tensorrt-cpu"):
        check_build(graph(), BuildOptions())


@pytest.fixture
def write_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that puts a shell script in the place of the Python with TensorRT."""

    def write(script: str) -> None:
        monkeypatch.delenv("HKD_TENSORRT", raising=False)
        path = tmp_path / "cwd" / ".tensorrt" / "python"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.chdir(tmp_path / "cwd")

    return write


def test_tensorrt_is_found_by_variable_then_directories(
    write_launcher: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "REPO_DIR", tmp_path / "repository")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    cache = tmp_path / "home" / ".cache" / "hkd-det" / "tensorrt" / "python"
    selected = tmp_path / "selected" / "python"
    for path in (cache, selected):
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    assert cli._find_interpreter() == [str(cache)]
    write_launcher("exit 3")
    assert cli._find_interpreter() == [str(tmp_path / "cwd" / ".tensorrt" / "python")]
    monkeypatch.setenv("HKD_TENSORRT", str(selected.parent))
    assert cli._find_interpreter() == [str(selected)]
    monkeypatch.setenv("HKD_TENSORRT", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"HKD_TENSORRT .*: expected the \.tensorrt of make tensorrt-cpu"):
        cli._find_interpreter()


@pytest.mark.parametrize(("script", "code"), [("kill -9 $$", -9), ("exit 3", 3)])
def test_dry_run_that_crashes_raises(
    graph: Callable[..., Path], write_launcher: Callable[[str], None], script: str, code: int
) -> None:
    write_launcher(script)
    with pytest.raises(DataError, match=f"the TensorRT process ended with code {code} without a result"):
        check_build(graph(), BuildOptions())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trt", "--workspace", "0"], "--workspace: expected at least 1, got 0."),
        (["--trt", "--dla", "-1"], "--dla -1: expected the number of a core"),
        (["--trt", "--trt-profile", "8"], "--trt-profile 8: expected MIN,OPT,MAX"),
        (["--dry-run"], "--dry-run: "),
        (["--openvino", "--print-layers"], "--print-layers: "),
        (["--precision", "int8", "--device", "cuda"], "--device: "),
        (["--precision", "int8", "--version-compatible"], "--version-compatible: "),
        (["--trt", "--dynamic", "batch"], "--dynamic: "),
        (["--openvino", "--imgsz", "320x256"], "--imgsz: "),
        (["--openvino", "--max-batch", "4"], "--max-batch: "),
        (["--openvino", "--conf", "0.5"], "--conf: "),
        (["--openvino", "--output", "x.onnx"], "--output x.onnx: "),
        (["--trt", "--output", "x.plan"], "--output x.plan: "),
        (["--trt", "--dry-run", "--output", "x.engine"], "--output x.engine: "),
        ([], "small.onnx: "),
    ],
)
def test_flags_without_effect_raise(
    graph: Callable[..., Path], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(graph()), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
