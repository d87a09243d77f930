"""Tests of `benchmarks/studies/devices.py`: checks of a submitted result, page and plot of all devices."""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from hkd_bench.energy import EnergyResult
from hkd_bench.host import HostField
from hkd_bench.plots import find_pareto_front, plot_pareto
from hkd_bench.result import (
    SCHEMA_VERSION,
    AccuracyResult,
    BenchResult,
    ModelResult,
    StageSamples,
    StoredCurve,
    read_result,
    write_result,
)

STUDY = Path(__file__).parents[2] / "benchmarks" / "studies" / "devices.py"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("devices_study", STUDY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_result(rate: float = 0.2, joules: float | None = None) -> BenchResult:
    """Return a result that can be published, with one model in a directory of its machine."""
    curve = StoredCurve((0.1,), (rate,))
    accuracy = AccuracyResult(
        "/home/me/street.yaml", {"Reasonable": rate, "All": rate}, {}, {}, {"Reasonable": 200, "All": 300},
        0.4, 0.8, 0.7, 0.3, "model", curve, curve,
    )  # fmt: skip
    energy = EnergyResult(joules_per_frame=joules, above_idle=joules, reason="") if joules else EnergyResult()
    model = ModelResult(
        "m", "/home/me/m.onnx", "0f" * 32, "onnxruntime", "mini", "Apache-2.0", 1000, None, (96, 160), 1.5,
        (accuracy,), (10.0,) * 700, StageSamples((1.0,), (8.0,), (1.0,)), (20.0,), 100.0, 50.0, energy,
    )  # fmt: skip
    host = HostField("CPU", "Cortex-A78AE"), HostField("git commit", "0123456789abcdef")
    return BenchResult(
        SCHEMA_VERSION, "hkd-bench m.onnx --data street.yaml --runs 700", "2026-01-02T03:04:05+00:00", host, "cpu", 1,
        "/home/me/street.yaml", "val", 100, 32, 700, 1, 10, 0.5, (model,),
    )  # fmt: skip


def add(study: ModuleType, folder: Path, result: BenchResult, *flags: str) -> int:
    write_result(folder / "source.json", result)
    code: int = study.main(["add", str(folder / "source.json"), "--devices", str(folder / "devices"), *flags])
    return code


def test_added_result_has_no_directories_of_its_machine(study: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "devices").mkdir()
    assert add(study, tmp_path, make_result(), "--name", "orin-nano") == 0
    stored = tmp_path / "devices" / "orin-nano.json"
    assert "/home/me" not in stored.read_text()
    assert read_result(stored).models[0].path == "m.onnx" and read_result(stored).data == "street"
    page = (tmp_path / "devices" / "README.md").read_text()
    for text in ("| orin-nano", "Cortex-A78AE", "Commit 0123456789abcdef", "hkd-bench m.onnx --data street.yaml"):
        assert text in page
    assert (tmp_path / "devices" / "devices.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"command": ""}, "the command is unknown"),
        ({"command": "hkd-bench /home/me/m.onnx --data a.yaml"}, "contains absolute paths"),
        ({"command": "hkd-bench m.onnx --data=/home/a.yaml"}, "contains absolute paths"),
        ({"host": (HostField("CPU", "x"),)}, "neither the git commit nor the version"),
        ({"host": (HostField("git commit", "01 with uncommitted changes"),)}, "had uncommitted changes"),
        ({"num_images": 0}, "no miss rate was measured"),
        ({"runs": 661}, "expected --runs 662 or more, got 661"),
        ({"schema": SCHEMA_VERSION - 1}, f"expected schema {SCHEMA_VERSION}"),
    ],
)
def test_result_that_cannot_be_repeated_is_refused(
    study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], problem: str
) -> None:
    (tmp_path / "devices").mkdir()
    assert add(study, tmp_path, replace(make_result(), **changes), "--name", "x") == 1  # type: ignore[arg-type]
    assert problem in capsys.readouterr().err and not list((tmp_path / "devices").iterdir())


def test_names_are_checked(study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "devices").mkdir()
    assert add(study, tmp_path, make_result(), "--name", "Orin Nano") == 2
    assert add(study, tmp_path, make_result(), "--name", "a") == 0
    assert add(study, tmp_path, make_result(0.1), "--name", "a") == 2
    assert "exists. Choose another name" in capsys.readouterr().err
    assert add(study, tmp_path, make_result(0.1), "--name", "a", "--replace") == 0
    assert read_result(tmp_path / "devices" / "a.json").models[0].miss_rates["Reasonable"] == 0.1


def test_page_lists_all_devices_and_energy_where_measured(study: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "devices").mkdir()
    add(study, tmp_path, make_result(), "--name", "b")
    assert "energy per frame" not in (tmp_path / "devices" / "README.md").read_text()
    add(study, tmp_path, make_result(0.1, 0.25), "--name", "a")
    page = (tmp_path / "devices" / "README.md").read_text()
    assert page.index("### a") < page.index("### b") and "peak memory, energy per frame](devices.png)" in page
    (tmp_path / "empty").mkdir()
    assert study.main(["page", "--devices", str(tmp_path / "empty")]) == 1


def test_pareto_plot_has_a_panel_per_measured_cost() -> None:
    plain, metered = make_result().models[0], make_result(0.3, 0.25).models[0]
    assert "energy per frame" not in plot_pareto({"a": [plain]})
    svg = plot_pareto({"a": [plain], "b": [metered]})
    assert "energy per frame, mJ" in svg and "GPU memory" not in svg
    assert find_pareto_front([plain, metered], lambda model: model.energy.joules_per_frame) == [metered]


def test_page_of_the_repository_belongs_to_its_files(study: ModuleType, tmp_path: Path) -> None:
    shutil.copytree(study.DEVICES, tmp_path / "devices")
    page = (study.DEVICES / "README.md").read_text()
    assert study.write_page(tmp_path / "devices").read_text() == page
