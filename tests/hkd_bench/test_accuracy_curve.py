"""Tests of the study `benchmarks/studies/accuracy_curve.py`: comparison at equal miss rate, page and plots."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from hkd_bench.result import read_result

STUDY = Path(__file__).parents[2] / "benchmarks" / "studies" / "accuracy_curve.py"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accuracy_curve", STUDY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_equal_peer_is_the_fastest_that_is_at_least_as_accurate(study: ModuleType) -> None:
    def make_point(series: str, miss_rate: float, time_ms: float, is_peer: bool) -> object:
        result = SimpleNamespace(accuracy=[SimpleNamespace(miss_rates={"All": miss_rate})])
        return study.CurvePoint(series, is_peer, result, {"onnxruntime": time_ms})

    peers = [("slow", 0.04, 90.0), ("medium", 0.05, 50.0), ("fast", 0.20, 10.0), ("equal", 0.06, 60.0)]
    points = [make_point(*peer, is_peer=True) for peer in peers] + [make_point("own", 0.01, 1.0, is_peer=False)]
    for miss_rate, expected in ((0.06, "medium"), (0.05, "medium"), (0.045, "slow"), (0.3, "fast"), (0.02, None)):
        own = make_point("student", miss_rate, 20.0, is_peer=False)
        peer = study.find_equal_peer(own, points, 0, "All", "onnxruntime")
        assert (peer.series if peer else None) == expected


def test_wrong_flags_give_one_line(study: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["--data", "x.yaml", "--series", "student.onnx"]) == 2
    assert "--series, --peer student.onnx: expected NAME=FILE" in capsys.readouterr().err
    assert study.main(["--data", "x.yaml", "--setup", "all"]) == 2
    assert "--setup all: expected one of Reasonable" in capsys.readouterr().err
    assert study.main(["--data", "x.yaml"]) == 2
    assert "expected at least one model" in capsys.readouterr().err


@pytest.mark.slow
def test_study_writes_page_plots_and_json(
    study: ModuleType, write_tiny_onnx: Callable[..., Path], half_right: Path, tmp_path: Path
) -> None:
    sizes = [write_tiny_onnx(tmp_path / f"tiny_{hw[1]}.onnx", imgsz_hw=hw) for hw in ((96, 160), (192, 320))]
    peer = write_tiny_onnx(tmp_path / "peer.onnx", changes={"hkd.format": None})
    peer.with_suffix(".yaml").write_text("{output_format: boxes-scores, layout: NHWC, license: MIT}")
    page, measurements = tmp_path / "curve.md", tmp_path / "curve.json"
    flags = ["--data", str(half_right), "--split", "val", "--peer", f"peer={peer}", "--results", str(page)]
    flags += ["--series", f"tiny={sizes[0]},{sizes[1]}", "--backend", "onnxruntime,openvino"]
    assert study.main([*flags, "--runs", "2", "--rounds", "1", "--json", str(measurements)]) == 0
    text = page.read_text()
    assert [line.split()[1] for line in text.splitlines() if "160x96" in line or "320x192" in line][:3] == [
        "peer",
        "tiny",
        "tiny",
    ]
    assert "50.0 (0.0 to 100.0)" in text and "no conclusion: fewer than 50 images" in text and "(peer)" in text
    assert (tmp_path / "curve.svg").stat().st_size > 1000 and (tmp_path / "curve.png").stat().st_size > 1000
    models = read_result(measurements).models
    assert [model.backend for model in models] == ["onnxruntime", "openvino"] * 3
    page.unlink()
    assert study.main([*flags, "--from-json", str(measurements)]) == 0
    assert page.read_text().count("\n") == text.count("\n")
