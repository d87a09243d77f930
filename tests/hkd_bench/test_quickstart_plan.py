"""Tests of the plan of `hkd-quickstart --data`: choice of student, epochs and input size, and stages that resume."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hkd_bench.quickstart import main
from hkd_bench.quickstart.plan import (
    MAX_EPOCHS,
    NARROW,
    WIDE,
    DataCounts,
    OwnDataOptions,
    PlanFile,
    Speeds,
    Stage,
    StudentCandidate,
    choose_size,
    choose_students,
    estimate_stages,
    plan_training,
    run_stages,
)
from hkd_det.errors import DataError, UsageError

SPEEDS = Speeds({NARROW: 0.1, WIDE: 0.3}, {NARROW: 0.03, WIDE: 0.1}, 0.02, 3.0)
COUNTS = DataCounts(train=240, val=60, total=300, evaluated=60)
CANDIDATES = [
    StudentCandidate(NARROW, 192, 4.0, 0.5),
    StudentCandidate(NARROW, 320, 9.0, 0.7),
    StudentCandidate(NARROW, 448, 18.0, 0.8),
    StudentCandidate(WIDE, 192, 8.0, 0.5),
    StudentCandidate(WIDE, 320, 20.0, 0.7),
]


def make_options(**values: Any) -> OwnDataOptions:
    return OwnDataOptions(data="mine.yaml", save_dir=Path("runs/mine"), **values)


@pytest.mark.parametrize(
    ("max_ms", "num_train", "expected"),
    [
        (None, 240, [(NARROW, 320)]),
        (5, 240, [(NARROW, 192)]),
        (15, 240, [(NARROW, 320)]),
        (20, 240, [(NARROW, 448)]),
        (8.5, 240, [(WIDE, 192), (NARROW, 192)]),
        (8.5, 50, [(NARROW, 192)]),
    ],
)
def test_student_is_the_best_within_the_budget(max_ms: float | None, num_train: int, expected: list[Any]) -> None:
    students = choose_students(CANDIDATES, max_ms, num_train)
    assert [(student.model, student.size) for student in students] == expected


def test_budget_below_the_fastest_student_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--max-ms 3: the fastest student, yolox-nano-hswish-192, takes 4\.0 ms\."):
        choose_students(CANDIDATES, 3, 240)


def test_candidate_without_time_is_not_chosen() -> None:
    candidates = [StudentCandidate(NARROW, 320, None, 0.9), *CANDIDATES[:1]]
    assert choose_students(candidates, 10, 240) == [CANDIDATES[0]]


def test_hours_decide_epochs_and_teacher() -> None:
    students = [CANDIDATES[1]]
    long, short = (plan_training(students, make_options(hours=hours), SPEEDS, COUNTS) for hours in (3, 0.25))
    assert (long.teacher, long.epochs) == (WIDE, MAX_EPOCHS)
    assert short.teacher == "" and 3 <= short.epochs < 30
    for plan, hours in ((long, 3), (short, 0.25)):
        assert sum(estimate_stages(plan, SPEEDS, COUNTS).values()) <= 3600 * hours


def test_hours_without_time_for_three_epochs_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"--hours 0\.05: 240 training images and 3 epochs take about .*--hours 0\.\d+"
    ):
        plan_training([CANDIDATES[1]], make_options(hours=0.05), SPEEDS, COUNTS)


def test_epochs_of_the_user_are_kept() -> None:
    plan = plan_training([CANDIDATES[1]], make_options(epochs=7), SPEEDS, COUNTS)
    assert (plan.epochs, plan.teacher) == (7, WIDE)
    plan = plan_training([CANDIDATES[1]], make_options(epochs=7, hours=0.25), SPEEDS, COUNTS)
    assert (plan.epochs, plan.teacher) == (7, "")


def test_few_images_have_the_shipped_teacher() -> None:
    counts = DataCounts(train=80, val=20, total=100, evaluated=20)
    assert plan_training([CANDIDATES[1]], make_options(), SPEEDS, counts).teacher == ""


def make_row(
    size: int, p50_ms: float | None, miss_rate: float, conclusion: str = "no difference shown"
) -> dict[str, Any]:
    return {"size": size, "p50_ms": p50_ms, "miss_rate": miss_rate, "conclusion": conclusion}


@pytest.mark.parametrize(
    ("rows", "max_ms", "expected"),
    [
        ([make_row(256, 5, 0.3), make_row(320, 8, 0.31)], 10, (320, True)),
        ([make_row(256, 5, 0.2, "better"), make_row(320, 8, 0.31)], 10, (256, True)),
        ([make_row(256, 5, 0.3), make_row(320, 12, 0.31)], 10, (256, True)),
        ([make_row(256, 11, 0.3), make_row(320, 12, 0.31)], 10, (256, False)),
        ([make_row(256, None, 0.1, "better"), make_row(320, 8, 0.31)], 10, (320, True)),
        ([make_row(256, 5, 0.2, "better"), make_row(320, 8, 0.31)], None, (320, True)),
    ],
)
def test_trained_size_stays_unless_another_is_better(
    rows: list[Mapping[str, Any]], max_ms: float | None, expected: tuple[int, bool]
) -> None:
    assert choose_size(rows, 320, max_ms) == expected


def make_stages(calls: list[str], tmp_path: Path, setting: int = 0) -> list[Stage]:
    def make(name: str, settings: dict[str, Any], after: tuple[str, ...]) -> Stage:
        def run(results: Mapping[str, Any]) -> dict[str, Any]:
            calls.append(name)
            (tmp_path / name).touch()
            return {"value": settings.get("value", 0), "seen": sorted(results)}

        return Stage(name, name, settings, after, 1.0, run, (tmp_path / name,))

    return [make("a", {"value": setting}, ()), make("b", {}, ("a",)), make("c", {}, ())]


def test_finished_stages_are_not_repeated(tmp_path: Path) -> None:
    calls: list[str] = []
    for _ in range(2):
        run_stages(make_stages(calls, tmp_path), PlanFile.load(tmp_path / "plan.json"), {}, 3, 0.0)
    assert calls == ["a", "b", "c"]


def test_changed_setting_repeats_what_depends_on_it(tmp_path: Path) -> None:
    calls: list[str] = []
    for setting in (0, 1):
        run_stages(make_stages(calls, tmp_path, setting), PlanFile.load(tmp_path / "plan.json"), {}, 3, 0.0)
    assert calls == ["a", "b", "c", "a", "b"]


def test_missing_file_repeats_its_stage(tmp_path: Path) -> None:
    calls: list[str] = []
    run_stages(make_stages(calls, tmp_path), PlanFile.load(tmp_path / "plan.json"), {}, 3, 0.0)
    (tmp_path / "b").unlink()
    run_stages(make_stages(calls, tmp_path), PlanFile.load(tmp_path / "plan.json"), {}, 3, 0.0)
    assert calls == ["a", "b", "c", "b"]


def test_failed_stage_keeps_the_stages_before_it(tmp_path: Path) -> None:
    calls: list[str] = []
    stages = make_stages(calls, tmp_path)

    def fail(_: Mapping[str, Any]) -> dict[str, Any]:
        raise DataError("data: broken. Repair them.")

    broken = Stage("b", "b", {}, ("a",), 1.0, fail)
    with pytest.raises(DataError):
        run_stages([stages[0], broken, stages[2]], PlanFile.load(tmp_path / "plan.json"), {}, 3, 0.0)
    run_stages(stages, PlanFile.load(tmp_path / "plan.json"), {}, 3, 0.0)
    assert calls == ["a", "b", "c"]


def test_plan_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"schema": 0}))
    with pytest.raises(DataError, match="Choose another --save-dir"):
        PlanFile.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-ms", "15"], "--max-ms: requires --data. Add --data DATA."),
        (["--max-ms", "0"], "--max-ms: requires --data. Add --data DATA."),
        (["--plan"], "--plan: requires --data. Add --data DATA."),
        (["--data", "x.yaml", "--hours", "0"], "--hours: expected a number above 0, got 0.0."),
        (["--data", "x.yaml", "--device-bench", "a.json"], "--device-bench: requires --max-ms."),
    ],
)
def test_invalid_flags_are_usage_errors(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--data", "gone.yaml"], ["--data", "gone.yaml", "--threads", "0"]])
def test_flag_errors_need_no_torch(flags: list[str]) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from hkd_bench.quickstart import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False)
    message = "--threads: expected at least 1, got 0." if "--threads" in flags else "gone.yaml: no such file."
    assert process.returncode in (1, 2) and process.stderr.startswith(f"hkd-quickstart: {message}")


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from hkd_bench.quickstart import main; main(['--help'])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0 and "--max-ms" in process.stdout
