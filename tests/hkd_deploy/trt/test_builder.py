"""Memory estimate and progress bar of a build. test_engine.py and test_cli.py test the build itself."""

from pathlib import Path

import pytest

from hkd_deploy.trt import builder
from hkd_deploy.trt.builder import BuildProgress, estimate_build_mib, format_memory_note

MIB = 2**20


def set_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total_gib: float, available_mib: int) -> None:
    path = tmp_path / "meminfo"
    path.write_text(
        f"MemTotal:  {int(total_gib * 2**20)} kB\nMemFree:  1 kB\nMemAvailable: {available_mib * 1024} kB\n"
        "HugePages_Total:  0\n"
    )
    monkeypatch.setattr(builder, "MEMINFO", path)


def test_estimate_build_mib() -> None:
    assert estimate_build_mib(10 * MIB, 1024) == 800 + 4 * 10 + 1024
    assert estimate_build_mib(1, 0) == 800 + 4


def test_memory_note_small_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_memory(tmp_path, monkeypatch, 7.4, 5000)
    note = "The build needs about 1864 MiB (estimated). 5000 MiB are available."
    assert format_memory_note(10 * MIB, 1024) == note


def test_memory_note_too_little_memory_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_memory(tmp_path, monkeypatch, 7.4, 1863)
    note = format_memory_note(10 * MIB, 1024)
    assert note is not None and note.startswith("warning: ") and "only 1863 MiB" in note and "--workspace 256" in note


def test_memory_note_large_machine_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_memory(tmp_path, monkeypatch, 64, 100)
    assert format_memory_note(10 * MIB, 1024) is None


def test_memory_note_without_meminfo_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "MEMINFO", tmp_path / "absent")
    assert format_memory_note(10 * MIB, 1024) is None


@pytest.fixture
def progress() -> BuildProgress:
    return BuildProgress("building")


def percent(progress: BuildProgress) -> float:
    return float(progress._progress.done)


def test_nested_phases_are_parts_of_a_step(progress: BuildProgress) -> None:
    with progress:
        progress.start("all", None, 4)
        assert percent(progress) == 0
        assert progress.step("all")
        assert percent(progress) == 25
        progress.start("part", "all", 2)
        assert progress.step("part")
        assert percent(progress) == pytest.approx(25 + 25 / 2)
        progress.start("deeper", "part", 5)
        assert progress.step("deeper")
        assert percent(progress) == pytest.approx(25 + 25 / 2 + 25 / 10)
        for phase in ("deeper", "part"):
            progress.finish(phase)
        assert progress.step("all")
        assert percent(progress) == 50
        progress.finish("all")


def test_outermost_phase_starts_at_zero(progress: BuildProgress) -> None:
    with progress:
        progress.start("all", None, 2)
        progress.step("all")
        progress.finish("all")
        progress.start("next", None, 10)
        assert percent(progress) == 0
        progress.step("next")
        assert percent(progress) == 10


def test_bar_never_decreases_or_exceeds_100(progress: BuildProgress) -> None:
    with progress:
        progress.start("all", None, 1)
        progress.step("all")
        progress.step("all")  # one step too many
        progress.start("late", "all", 10)
        assert percent(progress) == 100
        progress.step("unannounced")
        progress.finish("unannounced")
        assert percent(progress) == 100


def test_step_after_cancel_returns_false(progress: BuildProgress) -> None:
    with progress:
        progress.start("all", None, 0)
        progress.cancel()
        assert not progress.step("all")
