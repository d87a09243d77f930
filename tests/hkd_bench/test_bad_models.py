"""A model that can't be opened gets one line from both commands that open models, and no traceback."""

import re
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from hkd_bench.cli import main as bench
from hkd_deploy.demo.cli import main as demo
from hkd_deploy.export.openvino import export_openvino

BAR = re.compile(r"\s*$|.*run/s")  # the progress bar, as it comes and goes


@pytest.fixture(scope="module")
def bad(write_tiny_onnx: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of them."""
    root = tmp_path_factory.mktemp("bad")
    good = write_tiny_onnx(root / "good.onnx")
    (root / "short.onnx").write_bytes(good.read_bytes()[:-9])
    (root / "letter.onnx").write_text("Dear reader,\n" * 99)
    (root / "photo.jpg").write_bytes(b"\xff\xd8")
    write_tiny_onnx(root / "other_tool.onnx", changes={"hkd.format": None})
    model = onnx.load(good)
    model.opset_import[0].version = 99
    onnx.save(model, root / "opset99.onnx")
    (root / "empty_folder").mkdir()
    for spoiled in ("model.xml", "model.bin"):
        folder = export_openvino(write_tiny_onnx(root / f"short_{spoiled[-3:]}.onnx"))
        (folder / spoiled).write_bytes((folder / spoiled).read_bytes()[:-9])
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["short.onnx"], 1, "short.onnx: ONNX Runtime"),
        (["short.onnx", "--backend", "openvino"], 1, "short.onnx: OpenVINO"),
        (["letter.onnx"], 1, "cannot load it (truncated, not an ONNX file, or too new)"),
        (["letter.onnx", "--backend", "openvino"], 1, "letter.onnx: OpenVINO"),
        (["photo.jpg"], 1, "photo.jpg: expected an .onnx file, an .engine file or an OpenVINO folder"),
        (["other_tool.onnx"], 1, "not an hkd-det model"),
        (["opset99.onnx"], 1, "its opset is 99, this version supports up to"),
        (["opset99.onnx", "--backend", "openvino"], 1, "or too new)"),
        (["empty_folder"], 1, "not an OpenVINO folder: expected model.xml, model.bin, metadata.yaml"),
        (["short_xml_openvino"], 1, "model.xml: OpenVINO"),
        (["short_bin_openvino"], 1, "Incorrect weights in bin file!"),
        (["good.onnx", "--device", "cuda"], 1, "--device cuda: "),
        (["good.onnx", "--device", "cuda", "--backend", "ort-tensorrt"], 1, "has no TensorRT"),
        (["good.onnx", "--device", "cuda", "--backend", "ort-tensorrt-rtx"], 1, "TensorRT for RTX is not installed"),
        (["good.onnx", "--backend", "tensorrt"], 2, "--trt makes one here"),
        (["good.onnx", "--device", "cuda", "--backend", "openvino"], 2, "OpenVINO runs on cpu here"),
        (["good.onnx", "--backend", "tflite"], 2, "--backend tflite: expected onnxruntime, openvino"),
    ],
)
@pytest.mark.parametrize("command", ["hkd-bench", "hkd-demo"])
def test_one_line(
    bad: Path,
    half_right: Path,
    capfd: pytest.CaptureFixture[str],
    command: str,
    flags: list[str],
    code: int,
    words: str,
) -> None:
    model, *others = flags
    if command == "hkd-bench":
        found = bench([str(bad / model), *others, "--pictures", str(half_right.parent), "--runs", "3"])
    else:
        found = demo([str(bad / model), *others, "--source", str(half_right.parent), "--no-window"])
    printed = capfd.readouterr()
    said = [line for line in printed.err.splitlines() if not BAR.match(line)]
    assert found == code and printed.out == ""
    assert len(said) == 1 and said[0].startswith(f"{command}: ") and words in said[0]
