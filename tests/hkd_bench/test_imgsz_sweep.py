"""Tests of `hkd-bench --imgsz-sweep` on a model whose scores depend on its input size by a formula."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from hkd_bench.bench import BenchOptions, bench
from hkd_bench.cli import main
from hkd_bench.result import BenchResult, read_result, write_result
from hkd_bench.sweep import list_sweep_sizes, parse_imgsz_sweep
from hkd_bench.sweep_plot import plot_sweep
from hkd_bench.table import format_text_table
from hkd_deploy import open_detector
from hkd_deploy.backends.openvino import write_openvino_directory
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import DataError, UsageError
from hkd_det.image import read_image

SCHEMA = Path(__file__).parents[2] / "docs/reference/bench-result.schema.json"


@pytest.fixture(scope="module")
def dynamic(write_tiny_onnx: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a dynamic size up to 160x96."""
    path = tmp_path_factory.mktemp("dynamic") / "tiny.onnx"
    return write_tiny_onnx(path, free_size=True, changes={"hkd.dynamic": "true"})


def test_parse_imgsz_sweep_includes_the_stop() -> None:
    assert parse_imgsz_sweep("192:640:64") == (192, 256, 320, 384, 448, 512, 576, 640)
    assert parse_imgsz_sweep("320:320:32") == (320,)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("192:640", "expected START:STOP:STEP"),
        ("a:640:64", "expected START:STOP:STEP"),
        ("192:640:-64", "expected START:STOP:STEP"),
        ("200:640:64", "must be positive multiples of 32. Try"),
        ("192:640:48", "must be positive multiples of 32"),
        ("192:640:0", "must be positive multiples of 32"),
        ("640:192:64", "START exceeds STOP"),
        ("192:640:96", "The last size below it is 576"),
        ("32:9600:32", "300 sizes, at most 64"),
    ],
)
def test_wrong_sweep_gives_one_line_before_any_work(
    text: str, problem: str, dynamic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(dynamic), "--data", "missing.yaml", "--imgsz-sweep", text]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"hkd-bench: --imgsz-sweep {text}: ") and problem in captured.err


def test_fixed_size_and_limit_of_the_export_give_one_line(
    dynamic: Path, write_tiny_onnx: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = write_tiny_onnx(tmp_path / "fixed.onnx")
    other = write_tiny_onnx(tmp_path / "other.onnx", changes={"hkd.format": None})
    for model in (fixed, other):
        assert main([str(model), "--data", "missing.yaml", "--imgsz-sweep", "96:160:32"]) == 2
        error = capsys.readouterr().err
        assert f"{model} has a fixed input size. Export it with hkd-export --dynamic size, or give one file" in error
    assert main([str(dynamic), "--data", "missing.yaml", "--imgsz-sweep", "96:192:32"]) == 2
    assert "input of 192x128: its export allows up to 160x96. Export it with hkd-export" in capsys.readouterr().err
    with pytest.raises(DataError, match="no such model file"):
        list_sweep_sizes(tmp_path / "none.onnx", (96,))


def test_heights_have_the_aspect_ratio_of_the_export(dynamic: Path, tmp_path: Path) -> None:
    """At width 96, the height is 57.6, and 64 is the nearest multiple of 32."""
    sizes = [(32, 32), (32, 64), (64, 96), (64, 128), (96, 160)]
    assert list_sweep_sizes(dynamic, (32, 64, 96, 128, 160)) == sizes
    write_openvino_directory(dynamic, tmp_path / "tiny_openvino")
    assert list_sweep_sizes(tmp_path / "tiny_openvino", (32, 64, 96, 128, 160)) == sizes
    assert list_sweep_sizes(tmp_path / "tiny_openvino" / "model.xml", (160,)) == [(96, 160)]


def test_detector_at_a_size_equals_a_file_of_that_size(
    dynamic: Path, half_right: Path, write_tiny_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    image = read_image(half_right.parent / "1.png")
    fixed = write_tiny_onnx(tmp_path / "fixed.onnx", imgsz_hw=(64, 96))
    with open_detector(dynamic, imgsz_hw=(64, 96)) as free, open_detector(fixed) as reference:
        assert (free.metadata.imgsz_hw, free.metadata.flops) == ((64, 96), None)
        expected, found = reference(image), free(image)
    assert found.boxes_xyxy.tolist() == expected.boxes_xyxy.tolist() and len(found) == 1
    assert found.scores.tolist() == expected.scores.tolist()
    with open_detector(dynamic, imgsz_hw=(96, 160)) as largest:
        assert largest.metadata.flops == 3456
    for path, size, message in (
        (dynamic, (96, 192), "its export allows up to 160x96"),
        (dynamic, (40, 96), "must be multiples of 32"),
        (fixed, (32, 32), "its input size is fixed. Export the model with hkd-export --dynamic size"),
    ):
        with pytest.raises(UsageError, match=message):
            open_detector(path, imgsz_hw=size)


@pytest.fixture(scope="module")
def swept(dynamic: Path, half_right: Path) -> BenchResult:
    options = BenchOptions(
        runs=3, rounds=1, warmup=1, warmup_s=0, stage_runs=1, data=str(half_right), split="val", imgsz_sweep=(96, 160)
    )
    return bench([dynamic], load_dataset(str(half_right), "val"), options)


def test_sweep_has_one_row_per_size(swept: BenchResult, tmp_path: Path) -> None:
    """The score of the model is the mean of red. At width 96, 6 of 64 rows are padding of 114."""
    small, large = swept.models
    assert [(one.name, one.imgsz_hw) for one in swept.models] == [("tiny@96x64", (64, 96)), ("tiny@160x96", (96, 160))]
    assert [one.miss_rates["Reasonable"] for one in swept.models] == pytest.approx([0.5, 0.5])
    assert [one.accuracy[0].recall for one in swept.models] == [0.5, 0.5]
    score = 32 * 70 / (160 * 96)
    assert large.accuracy[0].threshold == pytest.approx(score, abs=1e-4)
    assert small.accuracy[0].threshold == pytest.approx(score * 58 / 64 + 114 / 255 * 6 / 64, rel=0.02)
    write_result(tmp_path / "r.json", swept)
    assert read_result(tmp_path / "r.json") == swept and swept.imgsz_sweep == (96, 160)
    jsonschema.validate(json.loads((tmp_path / "r.json").read_text()), json.loads(SCHEMA.read_text()))
    printed = format_text_table(swept)
    assert "\ntiny@96x64 " in printed and "\ntiny@160x96 " in printed
    assert "pads shorter sides to 224 pixels, or to the side of the export if that is smaller" in printed


def test_plot_has_miss_rate_against_latency_of_each_size(swept: BenchResult) -> None:
    """Points from left to right in the order of their latency, with their sizes."""
    times = {"tiny@96x64": (2.0, 2.0, 3.0), "tiny@160x96": (8.0, 8.0, 9.0)}
    result = replace(swept, models=tuple(replace(one, e2e_ms=times[one.name]) for one in swept.models))
    svg = plot_sweep(result)
    assert "tiny@96x64 50.00 % at 2.0 ms; tiny@160x96 50.00 % at 8.0 ms" in svg
    assert ">96x64</text>" in svg and ">160x96</text>" in svg and ">tiny</text>" in svg
    assert plot_sweep(replace(swept, imgsz_sweep=())) == ""


@pytest.mark.slow
@pytest.mark.usefixtures("one_round")
def test_command_sweeps_and_shows_examples_at_the_last_size(
    dynamic: Path, half_right: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "r.html"
    flags = ["--data", str(half_right), "--runs", "3", "--names", "a", "--html", str(page)]
    assert main([str(dynamic), "--imgsz-sweep", "96:160:64", *flags]) == 0
    assert "\na@96x64 " in capsys.readouterr().out
    text = page.read_text()
    assert "Miss rate against latency at each input size: a@96x64 50.00 % at" in text
    assert "Detections of a@160x96" in text
