"""Progress without a terminal: one time-stamped line per minute, and no bars."""

import re

import pytest

from hkd_det import console
from hkd_det.console import Progress, format_duration, iterate_with_progress, log_line, log_stage


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def strftime(self, _format: str) -> str:
        return "TIME"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05")])
def test_duration_is_formatted(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_without_terminal_a_line_per_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(100, "train", "step", initial=10) as bar:
        for _ in range(3):
            clock.now_s += 25
            bar.update(5, {"loss": 1.5})
        bar.set_label("epoch 2")
        bar.update(15)
    captured = capsys.readouterr()
    # 15 steps took 75 seconds; 75 remain.
    assert captured.out == "TIME train: 25/100 steps, 6:15 left  loss 1.50\n" and captured.err == ""


def test_unknown_total_has_no_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(0, "compare", "image") as bar:
        clock.now_s += 61
        bar.update(4)
    assert capsys.readouterr().out == "TIME compare: 4 images\n"


def test_disabled_progress_prints_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, "train", "step", is_enabled=False) as bar:
        clock.now_s += 100
        bar.update()
    assert capsys.readouterr() == ("", "")


def test_iteration_yields_all_items(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    items = []
    for item in iterate_with_progress("abc", 3, "read", "file"):
        items.append(item)
        clock.now_s += 61
    assert items == ["a", "b", "c"]
    assert capsys.readouterr().out.splitlines()[0] == "TIME read: 1/3 files, 2:02 left"


def test_lines_have_a_time_stamp(capsys: pytest.CaptureFixture[str]) -> None:
    log_line("epoch 1")
    log_stage("read the dataset")
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "T ", line) for line in lines] == [
        "T epoch 1",
        "T read the dataset",
    ]


def test_terminal_shows_a_bar_and_no_stages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "is_terminal", lambda: True)
    log_stage("read the dataset")
    with Progress(2, "train", "step") as bar:
        bar.update(2, {"loss": 0.5})
        log_line("epoch 1")
    captured = capsys.readouterr()
    assert captured.out == "epoch 1\n" and "train" in captured.err


def test_bytes_and_percent_have_their_own_form(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2**21, "download a.zip", "B") as bar:
        bar.restart(2**20)
        clock.now_s += 61
        bar.set_status("interrupted")
        bar.update(2**19)
    with Progress(100, "build", "%") as bar:
        clock.now_s += 61
        bar.update(12.6)
    assert capsys.readouterr().out.splitlines() == [
        "TIME download a.zip: 1.5 MiB/2.0 MiB, 1:01 left  interrupted",
        "TIME build: 13 %",
    ]
