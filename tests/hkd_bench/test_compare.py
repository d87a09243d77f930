"""`hkd-bench compare`: conditions, exit codes, table and plot on results with known values; JSON schema."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import jsonschema
import pytest

from hkd_bench.cameras import CameraResult
from hkd_bench.cli import main
from hkd_bench.compare_cli import parse_condition
from hkd_bench.device_state import DeviceState, RunConditions
from hkd_bench.energy import EnergyResult, PowerSource
from hkd_bench.plots import find_pareto_front
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
from hkd_bench.sustained import SustainedPart, SustainedResult
from hkd_bench.table import format_text_table
from hkd_det.errors import UsageError
from hkd_det.metrics.bootstrap import MissRateInterval

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "docs/reference/bench-result.schema.json"


def make_model(name: str, rate: float = 0.2, p50_ms: float = 10.0, memory_mib: float = 100.0) -> ModelResult:
    """Return a model with a miss rate, constant latency, and one slow run that is its p99."""
    curve = StoredCurve((0.1,), (rate,))
    interval = MissRateInterval(rate, rate - 0.02, rate + 0.02)
    accuracy = AccuracyResult(
        "/data/street.yaml", {"Reasonable": rate, "All": rate + 0.1}, {"Reasonable": interval}, {},
        {"Reasonable": 200, "All": 300}, 0.4, 0.8, 0.7, 0.3, "model", curve, curve,
    )  # fmt: skip
    stages = StageSamples((1.0,), (8.0,), (1.0,))
    times = (*(p50_ms,) * 98, 2 * p50_ms, 2 * p50_ms)
    return ModelResult(
        name, f"{name}.onnx", "0f" * 32, "onnxruntime", "mini", "Apache-2.0", 1000, None, (96, 160), 1.5, (accuracy,),
        times, stages, (20.0,), memory_mib, 50.0,
    )  # fmt: skip


def make_result(*models: ModelResult, num_images: int = 100) -> BenchResult:
    return BenchResult(
        SCHEMA_VERSION, "hkd-bench x", "2026-01-02T03:04:05+00:00", (), "cpu", 1, "/data/street.yaml", "val",
        num_images, 32, 100, 1, 10, 0.5, models,
    )  # fmt: skip


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Function that writes results to a.json, b.json, ... and runs `hkd-bench compare`."""

    def run(results: list[BenchResult], *flags: str) -> tuple[int, str, str]:
        paths = [tmp_path / f"{letter}.json" for letter, _ in zip("abc", results, strict=False)]
        for path, result in zip(paths, results, strict=True):
            write_result(path, result)
        code = main(["compare", *map(str, paths), *flags])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ("mr>+0.5", 1),
        ("mr>+1.1", 0),
        ("mr>+4%", 1),
        ("mr>+6%", 0),
        ("mr>20.5", 1),
        ("mr>22", 0),
        ("mr_all>=+1", 1),
        ("ap50<-0.5", 0),
        ("recall<60", 0),
        ("p50_ms>+19%", 1),
        ("p50_ms>+21%", 0),
        ("p99_ms>+3", 1),
        ("p99_ms > +5", 0),
        ("memory_mib<=+50", 1),
        ("file_mib>1.4", 1),
    ],
)
def test_condition_decides_the_exit_code(
    condition: str, code: int, compare: Callable[..., tuple[int, str, str]]
) -> None:
    """Miss rate 20 to 21 %, p50 10 to 12 ms, p99 20 to 24 ms, memory 100 to 150 MiB."""
    before, after = make_model("m"), make_model("m", 0.21, 12, 150)
    exit_code, output, _ = compare([make_result(before), make_result(after)], "--fail-if", condition)
    assert exit_code == code and ("FAILED: " in output) == bool(code)
    lines = [line for line in output.splitlines() if line.startswith(("ok: ", "FAILED: "))]
    assert lines and all(line.partition(": ")[2].startswith(condition) for line in lines)


def test_condition_states_values_with_intervals(compare: Callable[..., tuple[int, str, str]]) -> None:
    after = make_model("renamed", 0.21)  # one model on both sides: the names may differ
    flags = ["--fail-if", "mr>+0.5", "--fail-if", "p50_ms>+10%", "--names", "main,branch"]
    code, output, _ = compare([make_result(make_model("m")), make_result(after)], *flags)
    assert code == 1
    expected = "renamed (branch): 20.00 % (18.0 to 22.0) in main, now 21.00 % (19.0 to 23.0): +1.00 points"
    assert f"FAILED: mr>+0.5: {expected}" in output
    assert "ok: p50_ms>+10%: renamed (branch): 10.00 ms in main, now 10.00 ms: +0.00 %" in output


def test_condition_that_cannot_be_checked_fails(compare: Callable[..., tuple[int, str, str]]) -> None:
    few = make_result(make_model("m"), num_images=49)
    code, output, _ = compare([few, few], "--fail-if", "mr>+0.5")
    assert code == 1 and "not checked: fewer than 50 images or 50 persons in b" in output
    assert "fewer than 50 images or 50 persons: miss rates are not compared" in output
    blind = make_result(make_model("m", 1.0))
    code, output, _ = compare([blind, blind], "--fail-if", "mr>+0.5")
    assert code == 1 and "not checked: the model detects no person in b" in output
    assert compare([few, few], "--fail-if", "p50_ms>+1%")[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fail-if", "mr"], "--fail-if mr: expected METRIC>+X"),
        (["--fail-if", "speed>+1"], "--fail-if speed>+1: expected METRIC>+X"),
        (["--fail-if", "mr>5%"], "--fail-if mr>5%: expected METRIC>+X"),
        (["--names", "x"], "--names: expected 2 different names"),
        (["--plot", "x.gif"], "--plot x.gif: expected a name ending in .svg, .png, .pdf"),
        (["--html", "/"], "--html /: expected a file, got a directory"),
        (["--fail-if", "p50_ms>+1%"], "a.json has no model other of"),
    ],
)
def test_wrong_flag_exits_with_code_2(
    flags: list[str], message: str, compare: Callable[..., tuple[int, str, str]]
) -> None:
    results = [make_result(make_model("m"), make_model("n")), make_result(make_model("other"), make_model("n"))]
    code, _, errors = compare(results, *flags)
    assert code == 2 and len(errors.splitlines()) == 1 and message in errors


def test_other_images_and_missing_reference_exit_with_code_2(compare: Callable[..., tuple[int, str, str]]) -> None:
    one, other = make_result(make_model("m")), make_result(make_model("m"), num_images=99)
    code, _, errors = compare([one, other], "--fail-if", "mr>+0.5")
    assert code == 2 and "has other images than" in errors and "99 images" in errors
    code, output, _ = compare([one, other], "--fail-if", "p50_ms>+1%")
    assert code == 0 and "The results have different images: miss rate, AP and recall" in output
    assert compare([one], "--fail-if", "mr>+0.5")[0] == 2 and compare([one], "--fail-if", "mr>50")[0] == 0


def test_file_of_schema_3_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Schemas 4 and 5 added fields; a file without them has no energy."""
    content = json.loads(json.dumps(asdict(make_result(make_model("m")))))
    for key in ("power", "state_before", "state_after"):
        del content[key]
    for key in ("energy", "conditions", "gpu_memory_mib", "gpu_memory_reason", "context_mib", "scenarios"):
        del content["models"][0][key]
    (tmp_path / "old.json").write_text(json.dumps({**content, "schema": 3}))
    write_result(tmp_path / "new.json", make_result(make_model("m")))
    paths = [str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    assert main(["compare", *paths, "--fail-if", "p50_ms>+1%"]) == 0
    assert main(["compare", *paths, "--fail-if", "energy_mj>+1%"]) == 1
    assert "energy_mj was not measured in new" in capsys.readouterr().out


def test_energy_and_marks_are_compared(compare: Callable[..., tuple[int, str, str]]) -> None:
    def make_measured(joules: float, marks: tuple[str, ...] = ()) -> BenchResult:
        energy = EnergyResult(joules_per_frame=joules, above_idle=joules / 2, reason="")
        model = replace(make_model("m"), energy=energy, conditions=RunConditions(marks=marks))
        return replace(make_result(model), power=PowerSource({"INA3221": "VDD_IN"}))

    results = [make_measured(0.1), make_measured(0.12, ("throttled: CPU quota, 4 events",))]
    code, out, _ = compare(results, "--fail-if", "energy_mj>+10%", "--fail-if", "above_idle_mj>+11")
    assert code == 1 and "energy, mJ" in out.splitlines()[0]
    assert "FAILED: energy_mj>+10%: m (b): 100.00 mJ in a, now 120.00 mJ: +20.00 %" in out
    assert "ok: above_idle_mj>+11: m (b): 50.00 mJ in a, now 60.00 mJ: +10.00 mJ" in out
    assert (
        "m [!]" in out
        and "[!] m (b): throttled: CPU quota, 4 events." in out
        and "a: energy by INA3221: VDD_IN." in out
    )


def test_cameras_and_sustained_latency_are_compared(compare: Callable[..., tuple[int, str, str]]) -> None:
    def make_measured(cameras: int, p50_ms: float) -> BenchResult:
        part = SustainedPart(0, 60, 600, p50_ms, 2 * p50_ms, 3 * p50_ms)
        run = SustainedResult(600, 600, False, part, part, (part,), 0, None, None, "no change shown", "", (0, 600))
        return make_result(replace(make_model("m"), cameras=CameraResult(10, 1, cameras, ()), sustained=run))

    results = [make_measured(5, 20), make_measured(4, 22)]
    conditions = ("cameras<-0", "sustained_p50_ms>+20%", "sustained_p99_ms>+5%")
    code, out, _ = compare(results, *(text for condition in conditions for text in ("--fail-if", condition)))
    assert code == 1 and "FAILED: cameras<-0: m (b): 5.00 in a, now 4.00: -1.00" in out
    assert "ok: sustained_p50_ms>+20%: m (b): 20.00 ms in a, now 22.00 ms: +10.00 %" in out
    assert "FAILED: sustained_p99_ms>+5%" in out


def test_table_of_gpu_has_memory_or_reason() -> None:
    gpu = replace(make_model("m"), gpu_memory_mib=512.0, gpu_memory_reason="")
    result = replace(make_result(gpu, replace(make_model("n"), gpu_memory_reason="no NVML")), device="cuda")
    text = format_text_table(result)
    assert "GPU memory" in text.splitlines()[0] and " 512" in text and "GPU memory not measured: no NVML." in text
    assert "GPU memory" not in format_text_table(make_result(gpu)).splitlines()[0]
    conditions = RunConditions(memory_used_mib=2300.0)
    jetson = replace(
        make_result(replace(gpu, conditions=conditions)),
        device="cuda",
        state_before=DeviceState(memory_used_mib=1800.0, is_memory_unified=True),
    )
    note = "Unified memory: the CPU and the GPU share it. In use on the machine: 1800 MiB before, at most 2300 MiB (m)"
    assert note in format_text_table(jetson)


def test_files_of_other_versions_exit_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.json"
    content = json.loads(json.dumps(asdict(make_result(make_model("m")))))
    for schema, hint in ((2, "Measure again with hkd-bench --json."), (99, "Update hkd-det.")):
        path.write_text(json.dumps({**content, "schema": schema}))
        assert main(["compare", str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"hkd-bench: {path}: expected a result of hkd-bench with schema 3, 4 or 5, got {schema}. {hint}"
    assert main(["compare", str(tmp_path / "absent.json")]) == 2


@pytest.mark.slow
def test_table_plot_and_page_contain_all_devices(tmp_path: Path, compare: Callable[..., tuple[int, str, str]]) -> None:
    fast, slow, beaten = make_model("fast", 0.3, 5), make_model("slow", 0.2, 10), make_model("beaten", 0.4, 12)
    results = [make_result(fast, slow, beaten), make_result(replace(fast, name="<fast>"), slow)]
    page, plot = tmp_path / "page.html", tmp_path / "plot.svg"
    flags = ["--names", "pi5,laptop", "--html", str(page), "--plot", str(plot), "--fail-if", "mr>25"]
    code, output, _ = compare(results, *flags)
    assert code == 1
    rows = [line.split() for line in output.splitlines() if line.startswith(("pi5 ", "laptop "))]
    assert [row[:2] for row in rows] == [
        ["pi5", "fast"], ["pi5", "slow"], ["pi5", "beaten"], ["laptop", "<fast>"], ["laptop", "slow"],
    ]  # fmt: skip
    assert [row[-1] == "yes" for row in rows] == [True, True, False, True, True]
    text = page.read_text()
    assert "<script" not in text and "&lt;fast&gt;" in text and "<fast>" not in text
    assert 'class="failed"' in text and "<svg" in text and "peak memory, MiB" in text
    assert plot.stat().st_size > 5000


def test_plot_without_miss_rate_is_an_error(tmp_path: Path, compare: Callable[..., tuple[int, str, str]]) -> None:
    model = make_model("m")
    accuracy = replace(model.accuracy[0], miss_rates={"Reasonable": None, "All": None}, intervals={}, recall=None)
    timed = make_result(replace(model, accuracy=(accuracy,)), num_images=0)
    code, output, errors = compare([timed, timed], "--plot", str(tmp_path / "p.svg"))
    assert code == 1 and "the results contain no miss rate" in errors
    assert compare([timed, timed], "--fail-if", "p50_ms>+1%", "--html", str(tmp_path / "p.html"))[0] == 0
    code, output, _ = compare([timed, timed], "--fail-if", "mr>+1")
    assert code == 1 and "mr was not measured in b" in output


def test_pareto_front_against_all_pairs() -> None:
    models = [make_model(str(i), rate, ms) for i, (rate, ms) in enumerate([(0.3, 5), (0.2, 9), (0.25, 9), (0.2, 12)])]
    dominated = {
        one.name
        for one in models
        for other in models
        if other is not one
        and (other.miss_rates["Reasonable"] or 0) <= (one.miss_rates["Reasonable"] or 0)
        and other.latency.p50_ms <= one.latency.p50_ms
    }
    assert {model.name for model in find_pareto_front(models)} == {"0", "1", "2", "3"} - dominated


def test_condition_with_two_operators_is_rejected() -> None:
    assert parse_condition("p90_ms>=-2.5%").limit == -2.5
    with pytest.raises(UsageError):
        parse_condition("mr>>+1")


def test_schema_is_current_and_accepts_results_only(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "docs" / "generate_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert SCHEMA.read_text() == module.format_bench_schema(), "run python docs/generate_reference.py"
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    write_result(tmp_path / "r.json", make_result(make_model("m")))
    content = json.loads((tmp_path / "r.json").read_text())
    validator.validate(content)
    assert read_result(tmp_path / "r.json") == make_result(make_model("m"))
    for changes in ({"schema": 2}, {"models": "none"}, {"runs": "many"}, {"surplus": 1}, {"models": [{"name": "m"}]}):
        assert not validator.is_valid({**content, **changes})
    del content["models"][0]["e2e_ms"]
    assert not validator.is_valid(content)
