"""--check: TensorRT's real parser and builder, without a GPU, on every kind of graph that hkd-export writes."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from hkd_deploy.export.cli import main
from hkd_deploy.trt import cli as checking
from hkd_deploy.trt.builder import BuildOptions
from hkd_deploy.trt.cli import check_build
from hkd_deploy.trt.engine import count_precisions
from hkd_deploy.trt.profile import parse_profile
from hkd_det.errors import DataError, UnavailableError


@pytest.fixture(autouse=True)
def builder(tensorrt_python: Path) -> Path:
    """The interpreter with a real TensorRT, where --check looks for it."""
    return tensorrt_python


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_each_precision_is_built_as_asked(graph: Callable[..., Path], precision: str) -> None:
    path = graph(precision=precision)
    checked = check_build(path, BuildOptions())
    assert count_precisions(checked.layers) == {precision: 3}
    convolutions = [layer for layer in checked.layers if layer.is_compute]
    assert {layer.shape for layer in convolutions} == {(1, 32, 32, 64)}
    assert checked.layer_counts["CONVOLUTION"] == 3 and checked.plan_bytes > 10_000
    assert list(path.parent.iterdir()) == [path]  # nothing is left behind


@pytest.mark.slow
def test_a_fp32_file_that_says_fp16(graph: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    """Others build FP32 in silence."""
    assert main([str(graph(said="fp16")), "--trt", "--check"]) == 1
    assert "asked for fp16, but TensorRT has built layers of 3 fp32" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wanted", "first"),  # what the first convolution writes: it halves 96x160
    [
        ({}, "1x12x48x80"),
        ({"batch": None}, "-1x12x48x80"),
        ({"batch": None, "dynamic_size": True}, "-1x12x48x80"),
        ({"letterbox_hw": (120, 320)}, "1x12x48x80"),
        ({"batch": 2, "preprocess": False, "raw": True}, "2x12x48x80"),
    ],
)
def test_every_form_of_the_students_graph(
    tmp_path: Path, wanted: dict[str, Any], first: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from hkd_deploy.export.exporter import export_onnx
    from hkd_deploy.export.options import ExportOptions
    from hkd_det.models.checkpoint import DetectorCheckpoint
    from hkd_det.models.zoo import build_model

    detector = build_model("mini-student").eval()
    config = {"data": "street.yaml", "imgsz_hw": [96, 160]}
    checkpoint = DetectorCheckpoint("mini-student", detector.spec, detector.state_dict(), config, 1, 0.5)
    path = tmp_path / "student.onnx"
    export_onnx(checkpoint, path, ExportOptions((96, 160), **wanted))
    assert main([str(path), "--trt", "--check", "--layers"]) == 0
    said = capfd.readouterr().out
    assert "TensorRT 11" in said and " fp32 (asked: fp32); nothing was written" in said
    assert any(line.split()[1] == first for line in said.splitlines() if "/conv1/conv1.0/Conv" in line), said
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_profile_is_part_of_what_is_checked(graph: Callable[..., Path]) -> None:
    checked = check_build(graph(batch=None), BuildOptions(profile=parse_profile("1,2,3")))
    assert count_precisions(checked.layers) == {"fp32": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda node: setattr(node, "op_type", "Frobnicate"), r"node 4 /1/Conv \(Frobnicate\): "),
        (lambda node: node.input.__setitem__(1, "w0"), r"node 4 /1/Conv \(Conv\): .*Kernel weight dimension"),
    ],
)
def test_what_tensorrt_cannot_parse_names_the_node(
    graph: Callable[..., Path], spoil: Callable[[onnx.NodeProto], None], words: str
) -> None:
    path = graph()
    model = onnx.load(path)
    spoil(next(node for node in model.graph.node if node.name == "/1/Conv"))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match=f"cannot parse it: {words}") as caught:
        check_build(path, BuildOptions())
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_what_tensorrt_cannot_build(graph: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"TensorRT 11.* cannot build it: .*workspace"):
        check_build(graph(batch=None), BuildOptions(workspace_mib=1))


@pytest.mark.slow
def test_an_opset_that_tensorrt_would_take_in_silence(graph: Callable[..., Path]) -> None:
    path = graph()
    model = onnx.load(path)
    model.opset_import[0].version = 99
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="opset 99 is too new for TensorRT 11"):
        check_build(path, BuildOptions())


CANCEL = """
import os, signal, sys, time
from pathlib import Path
from hkd_deploy.trt import builder
from hkd_deploy.trt.cuda import import_tensorrt
from hkd_deploy.trt.onnx_file import read_source

class Pressed(builder.Progress):
    steps = 0
    def step(self, phase):
        Pressed.steps += 1
        if Pressed.steps == 5:
            os.kill(os.getpid(), signal.SIGINT)
            self.cancelled.wait(20)
        return super().step(phase)

builder.Progress = Pressed
signal.signal(signal.SIGINT, signal.default_int_handler)
log = builder.Log()
try:
    builder.build(import_tensorrt(), read_source(Path(sys.argv[1])), builder.BuildOptions(), log)
except KeyboardInterrupt:
    assert Pressed.steps == 5 and "cancel" in log.reason.lower(), (Pressed.steps, log)
    sys.exit(7)
"""


@pytest.mark.slow
def test_control_c_stops_the_builder_at_its_next_step(graph: Callable[..., Path], builder: Path) -> None:
    done = subprocess.run([str(builder), "-c", CANCEL, str(graph())], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr


def test_without_any_tensorrt(graph: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "CHECKOUT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checking.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match="--check needs TensorRT: make tensorrt-cpu"):
        check_build(graph(), BuildOptions())


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`launcher(script)` puts a shell script in place of the Python with TensorRT."""

    def write(script: str) -> None:
        path = tmp_path / "elsewhere" / ".tensorrt" / "python"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.chdir(tmp_path / "elsewhere")

    return write


@pytest.mark.parametrize(
    ("script", "words"), [("kill -9 $$", "code -9 and said nothing"), ("exit 3", "code 3 and said")]
)
def test_a_builder_that_crashes(
    graph: Callable[..., Path], launcher: Callable[[str], None], script: str, words: str
) -> None:
    launcher(script)
    with pytest.raises(DataError, match=f"TensorRT's process ended with {words}"):
        check_build(graph(), BuildOptions())
