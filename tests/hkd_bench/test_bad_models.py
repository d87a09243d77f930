"""Tests that a model that cannot be opened gives one line of error in both commands that open models."""

import re
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from hkd_bench.cli import main as bench
from hkd_deploy.backends.openvino import export_openvino
from hkd_deploy.demo.cli import main as demo

PROGRESS = re.compile(r"\s*$|\d{4}-\d\d-\d\d ")  # empty lines and time-stamped lines


@pytest.fixture(scope="module")
def bad_dir(write_tiny_onnx: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of models that cannot be opened."""
    root = tmp_path_factory.mktemp("bad")
    good = write_tiny_onnx(root / "good.onnx")
    (root / "short.onnx").write_bytes(good.read_bytes()[:-9])
    (root / "letter.onnx").write_text("not a model\n" * 99)
    (root / "photo.jpg").write_bytes(b"\xff\xd8")
    write_tiny_onnx(root / "other_tool.onnx", changes={"hkd.format": None})
    model = onnx.load(good)
    model.opset_import[0].version = 99
    onnx.save(model, root / "opset99.onnx")
    (root / "empty_folder").mkdir()
    for file_name in ("model.xml", "model.bin"):
        folder = export_openvino(write_tiny_onnx(root / f"short_{file_name[-3:]}.onnx"))
        (folder / file_name).write_bytes((folder / file_name).read_bytes()[:-9])
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["short.onnx"], 1, "short.onnx: ONNX Runtime"),
        (["short.onnx", "--backend", "openvino"], 1, "short.onnx: OpenVINO"),
        (["letter.onnx"], 1, "cannot load it (truncated, not an ONNX file, or too new)"),
        (["letter.onnx", "--backend", "openvino"], 1, "letter.onnx: OpenVINO"),
        (["photo.jpg"], 1, "photo.jpg: expected an .onnx file, an .engine file or an OpenVINO directory"),
        (["other_tool.onnx"], 1, "not exported by hkd-export, and no model configuration found"),
        (["other_tool.onnx", "--model-config", "gone.yaml"], 1, "gone.yaml: no such file"),
        (["opset99.onnx"], 1, "its opset is 99, this version supports up to"),
        (["opset99.onnx", "--backend", "openvino"], 1, "or too new)"),
        (["empty_folder"], 1, "not an OpenVINO directory: expected model.xml, model.bin, metadata.yaml"),
        (["short_xml_openvino"], 1, "model.xml: OpenVINO"),
        (["short_bin_openvino"], 1, "Incorrect weights in bin file!"),
        (["good.onnx", "--device", "cuda"], 1, "--device cuda: "),
        (["good.onnx", "--device", "cuda", "--backend", "ort-tensorrt"], 1, "has no TensorRT"),
        (["good.onnx", "--device", "cuda", "--backend", "ort-tensorrt-rtx"], 1, "TensorRT for RTX is not installed"),
        (["good.onnx", "--backend", "tensorrt"], 2, "--backend tensorrt: expected an .engine file"),
        (["good.onnx", "--device", "cuda", "--backend", "openvino"], 2, "the openvino backend supports cpu only"),
        (["good.onnx", "--backend", "tflite"], 2, "--backend: expected one of onnxruntime, openvino"),
    ],
)
@pytest.mark.parametrize("command", ["hkd-bench", "hkd-demo"])
def test_bad_model_gives_one_line(
    bad_dir: Path,
    half_right: Path,
    capfd: pytest.CaptureFixture[str],
    command: str,
    flags: list[str],
    code: int,
    words: str,
) -> None:
    model, *other_flags = flags
    if command == "hkd-bench":
        exit_code = bench([str(bad_dir / model), *other_flags, "--images", str(half_right.parent), "--runs", "3"])
    else:
        exit_code = demo([str(bad_dir / model), *other_flags, "--source", str(half_right.parent), "--no-show"])
    output = capfd.readouterr()
    lines = [line for line in output.err.splitlines() if not PROGRESS.match(line)]
    expected = 2 if command == "hkd-bench" and model == "other_tool.onnx" else code  # checked before any measurement
    assert exit_code == expected and all(PROGRESS.match(line) for line in output.out.splitlines())
    assert len(lines) == 1 and lines[0].startswith(f"{command}: ") and words in lines[0]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "other_tool.onnx: not exported by hkd-export, and no model configuration found"),
        ("gone.yaml", "gone.yaml: no such file"),
        ("wrong.yaml", "wrong.yaml: output_format: expected one of"),
    ],
)
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_configurations_are_checked_before_the_first_model(
    bad_dir: Path, half_right: Path, capfd: pytest.CaptureFixture[str], config: str | None, words: str, backend: str
) -> None:
    (bad_dir / "wrong.yaml").write_text("output_format: pixels\n")
    flags = ["--images", str(half_right.parent), "--backend", backend]
    flags += ["--model-config", str(bad_dir / config)] if config else []
    assert bench([str(bad_dir / "good.onnx"), str(bad_dir / "other_tool.onnx"), *flags]) == 2
    output = capfd.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and words in output.err
