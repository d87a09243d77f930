"""`hkd-export --verify`: a line a form, miss rates, and what is written if a form differs."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch

from hkd_deploy.export import exporter as from_weights
from hkd_deploy.export.cli import main
from hkd_deploy.export.openvino import export_openvino
from hkd_deploy.export.options import ExportOptions
from hkd_deploy.export.parity import ParityError, onnx_reference
from hkd_deploy.export.verify import ExportedModel, Verification
from hkd_det.models.checkpoint import DetectorCheckpoint, save_detector_checkpoint
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec

HW = (96, 160)  # of `tiny_onnx`, which finds the box of all bright pixels
SPEC = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=12)


@pytest.fixture
def street(tmp_path: Path) -> Callable[..., Path]:
    """Writes six dark pictures, each with a bright person of 25x64 px, and the data set's yaml.

    confused: in how many of them something bright far from the person stands, too. people: whether they are annotated.
    """

    def write(confused: int = 0, people: bool = True) -> Path:
        for folder in ("images", "labels"):
            (tmp_path / "street" / folder / "val").mkdir(parents=True, exist_ok=True)
        for number in range(6):
            picture = np.full((*HW, 3), 20, np.uint8)
            picture[16:80, 10 + number : 35 + number] = 255
            picture[:8, 150:] = 255 if number < confused else 20
            cv2.imwrite(str(tmp_path / "street" / "images" / "val" / f"{number}.png"), picture)
            line = f"0 {(22.5 + number) / HW[1]:.6f} {48 / HW[0]:.6f} {25 / HW[1]:.6f} {64 / HW[0]:.6f}\n"
            (tmp_path / "street" / "labels" / "val" / f"{number}.txt").write_text(line if people else "")
        path = tmp_path / "street.yaml"
        path.write_text("path: street\ntrain: images/val\nval: images/val\nnames: {0: person}\n")
        return path

    return write


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A detector that is not trained, but whose scores differ."""
    torch.manual_seed(0)
    detector = HKDDetector(SPEC)
    torch.nn.init.normal_(detector.head.one2many.weight, std=0.5)
    torch.nn.init.normal_(detector.head.one2one.weight, std=0.5)
    config = {"data": "street.yaml", "imgsz_hw": [64, 96]}
    path = tmp_path / "best.pt"
    save_detector_checkpoint(path, DetectorCheckpoint("small", SPEC, detector.state_dict(), config, 1, 0.5))
    return path


def rows(said: str) -> list[list[str]]:
    """The cells of the table's lines, below its heads."""
    lines = said.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("form "))
    return [[cell for cell in line.split("  ") if cell] for line in lines[start + 1 : -1]]


def scaled(path: Path, factor: float) -> Path:
    """A file of `tiny_onnx` with its scores times a factor."""
    model = onnx.load(path)
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "to_score")
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(factor), "to_score"))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(("confused", "rate"), [(0, "0.00 %"), (6, "100.00 %")])
def test_miss_rates_of_an_onnx_file_and_its_openvino_form(
    tiny_onnx: Callable[..., Path],
    street: Callable[..., Path],
    confused: int,
    rate: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tiny_onnx()
    assert main([str(path), "--openvino", "--data", str(street(confused)), "--verify-images", "4"]) == 0
    said = capsys.readouterr().out
    reference, form = rows(said)
    assert [cell.strip() for cell in reference] == [str(path), "onnxruntime", "-", "-", rate, "-"]
    assert form[0].endswith("tiny_openvino") and form[1].strip() == "openvino"
    assert form[-2].strip() == rate and form[-1].strip() == "+0.00 points"
    assert "on 6 pictures" in said and "Reasonable on 4 of " in said


def test_an_engine_has_its_row(
    tiny_onnx: Callable[..., Path],
    street: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No engine is built here: what builds it says that it has, and the row says why it does not run."""
    path = tiny_onnx()
    monkeypatch.setattr("hkd_deploy.trt.cli.run_trt", lambda onnx, _flags, _output: onnx.with_suffix(".engine"))
    assert main([str(path), "--trt", "--device", "cuda:1", "--data", str(street())]) == 0
    _, engine = rows(capsys.readouterr().out)
    assert engine[0].strip() == str(path.with_suffix(".engine")) and engine[1].strip() == "tensorrt"
    assert engine[2].strip().startswith("not run here: ")


def test_without_people_parity_is_shown_all_the_same(
    tiny_onnx: Callable[..., Path], street: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_onnx()), "--openvino", "--data", str(street(people=False))]) == 0
    reference, form = rows(capsys.readouterr().out)
    assert reference[-2].strip() == form[-2].strip() == "no people" and form[2].strip() == "0 px"


def test_a_folder_that_differs_is_not_written(tiny_onnx: Callable[..., Path], street: Callable[..., Path]) -> None:
    path, other = tiny_onnx(), scaled(tiny_onnx("other.onnx"), 0.9)
    pictures = sorted((street().parent / "street" / "images" / "val").iterdir())
    verification = Verification(onnx_reference(other), pictures)
    there = sorted(path.parent.iterdir())
    with pytest.raises(ParityError, match=r"tiny_openvino: not written: .* scores by 0\.0.* from .*other\.onnx"):
        export_openvino(
            path, check=lambda name, aside: verification.add(ExportedModel(name, "openvino", is_exact=True), aside)
        )
    assert sorted(path.parent.iterdir()) == there


def test_a_form_of_smaller_numbers_may_differ_but_not_answer_nan(
    tiny_onnx: Callable[..., Path], street: Callable[..., Path]
) -> None:
    pictures = sorted((street().parent / "street" / "images" / "val").iterdir())
    sure, less, nan = (scaled(tiny_onnx(f"{factor}.onnx"), factor) for factor in (3, 2.7, float("nan")))
    verification = Verification(onnx_reference(sure), pictures)
    parity = verification.add(ExportedModel(less, "onnxruntime", is_exact=False))
    red = (25 * 64 * 255 + (96 * 160 - 25 * 64) * 20) / (96 * 160 * 255)  # the score of `tiny_onnx`
    assert parity is not None and parity.box_error_px == 0 and parity.score_error == pytest.approx(0.3 * red, rel=1e-3)
    with pytest.raises(ParityError, match=r"nan\.onnx: answers NaN on onnxruntime"):
        verification.add(ExportedModel(nan, "onnxruntime", is_exact=False))


def test_where_the_data_are_missing(
    tiny_onnx: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A device has seldom the data that a detector was trained on: a line says so, unless it was asked for."""
    path = tiny_onnx()
    for flags, code, words in (
        (["--openvino"], 0, "not verified: no pictures to verify on: "),
        (["--openvino", "--verify"], 2, "no pictures to verify on: "),
        (["--openvino", "--data", str(tmp_path / "none.yaml")], 1, "none.yaml"),
        (["--openvino", "--verify-images", "0"], 2, "--verify-images 0: at least 1"),
    ):
        assert main([str(path), *flags]) == code
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and words in said[0]
    assert main([str(path), "--openvino", "--no-verify"]) == 0
    assert capsys.readouterr().err == ""


def test_weights_and_all_their_forms(
    weights: Path, street: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(weights), "--data", str(street()), "--precision", "bf16"]) == 0
    torch_row, exact, half = rows(capsys.readouterr().out)
    assert torch_row[0].strip() == str(weights) and torch_row[1].strip() == "torch"
    assert exact[0].strip() == str(weights.with_suffix(".onnx")) and exact[-1].strip() == "+0.00 points"
    assert exact[-2] == torch_row[-2] and 0 <= float(exact[2].removesuffix("px")) < 0.5
    assert half[-1].startswith("not run here: ONNX Runtime has no bfloat16")


@pytest.mark.parametrize("flags", [["--raw"], ["--no-preprocess"]])
def test_graphs_for_other_programs_are_compared_but_not_judged(
    weights: Path, street: Callable[..., Path], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(weights), "--data", str(street()), *flags]) == 0
    _, form = rows(capsys.readouterr().out)
    assert form[-2].strip() == "not measured" and float(form[2].removesuffix("px")) < 0.5


def test_a_picture_too_large_for_the_graph(
    weights: Path, street: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(weights), "--data", str(street()), "--letterbox", "--max-size", "96x64"]) == 0
    said = capsys.readouterr().out
    assert "not measured" in said and "a frame of 160x96, the graph takes up to 96x64" in said.splitlines()[-1]


def test_the_layer_at_fault_is_named(
    weights: Path, street: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = from_weights.export_onnx

    def spoiled(source: DetectorCheckpoint, path: Path, options: ExportOptions) -> None:
        written(source, path, options)
        model = onnx.load(path)
        bias = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("head.many.bias"))
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 0.5, bias.name))
        onnx.save(model, path)

    data = street()
    there = sorted(weights.parent.iterdir())
    monkeypatch.setattr(from_weights, "write_onnx", spoiled)
    assert main([str(weights), "--data", str(data)]) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hkd-export: ")]
    assert "best.onnx: not written: boxes differ" in said and f"from {weights} on torch" in said
    assert "the first stage that differs is head" in said and "the worst layer is head.many (" in said
    assert sorted(weights.parent.iterdir()) == there
