"""Tests of the demo as a service: signals, systemd, progress without a terminal."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hkd_deploy.backends.base import StageTimes
from hkd_deploy.demo.cli import main
from hkd_deploy.demo.progress import ProgressReport, format_totals
from hkd_deploy.demo.run import CameraPipeline
from hkd_deploy.demo.service import Heartbeat, StopSignals, SystemdNotifier
from hkd_deploy.streams.sources import FrameSource

COMMAND = [sys.executable, "-c", "import sys; from hkd_deploy.demo.cli import main; sys.exit(main())"]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """The socket of systemd: its address, and a function that returns the lines that were sent."""
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address)
        receiver.setblocking(False)

        def read() -> list[str]:
            lines: list[str] = []
            with suppress(BlockingIOError):
                while True:
                    lines += receiver.recv(4096).decode().split("\n")
            return lines

        yield address, read


@pytest.mark.slow
def test_notifier_sends_ready_after_the_first_frame(manager: tuple[str, Callable[[], list[str]]]) -> None:
    address, read = manager
    notifier = SystemdNotifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "200000"})
    notifier.update(0, lambda: "opening")
    assert read() == ["STATUS=opening"]
    notifier.update(1, lambda: "running")
    assert read() == ["READY=1", "WATCHDOG=1"]
    num_sent = 0
    for _ in range(20):  # one second
        time.sleep(0.05)
        notifier.update(2, lambda: "running")
        lines = read()
        assert set(lines) <= {"WATCHDOG=1"}
        num_sent += len(lines)
    assert 7 <= num_sent <= 11  # every 0.1 s
    notifier.close()
    assert read() == ["STOPPING=1"]


def test_notifier_with_abstract_socket_and_without_systemd() -> None:
    name = f"hkd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0{name}")
        SystemdNotifier({"NOTIFY_SOCKET": f"@{name}"}).update(1, lambda: "x")
        assert receiver.recv(100) == b"READY=1\nSTATUS=x"
    SystemdNotifier({}).update(1, lambda: "x")
    SystemdNotifier({"NOTIFY_SOCKET": "/nowhere/notify"}).update(1, lambda: "x")  # no error: systemd was restarted


def test_command_reports_to_systemd(
    tiny_onnx: Callable[..., Path],
    camera: Any,
    manager: tuple[str, Callable[[], list[str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, read = manager
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    assert main([str(tiny_onnx()), "--source", camera.address, "--no-show", "--max-frames", "30"]) == 0
    lines = read()
    assert lines.index("READY=1") < lines.index("WATCHDOG=1") < lines.index("STOPPING=1")


def test_heartbeat_touches_its_file_every_five_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, path, touched = 100.0, tmp_path / "alive", []
    monkeypatch.setattr("hkd_deploy.demo.service.monotonic", lambda: now_s)
    heartbeat = Heartbeat(path)
    assert path.exists()
    for second in range(12):
        now_s = 100.0 + second
        os.utime(path, (0, 0))
        heartbeat.update()
        touched += [second] if path.stat().st_mtime > 0 else []
    assert touched == [5, 10]
    with pytest.raises(OSError, match="alive"):
        Heartbeat(tmp_path / "missing" / "alive")


def test_first_signal_is_deferred_and_second_raises() -> None:
    with StopSignals() as stop_signals:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)  # outside of the run
        reached_end = False
        with pytest.raises(KeyboardInterrupt), stop_signals.defer():
            signal.raise_signal(signal.SIGTERM)
            assert stop_signals.is_requested()
            reached_end = True
        assert reached_end
        with pytest.raises(KeyboardInterrupt), stop_signals.defer():
            signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_cameras_that_hang_within_two_seconds(
    tiny_onnx: Callable[..., Path], make_camera: Callable[..., Any], tmp_path: Path, stop: signal.Signals
) -> None:
    cameras = [make_camera() for _ in range(4)]
    cameras[3].hang()  # never delivers
    events, folder = tmp_path / "events.jsonl", tmp_path / "videos"
    flags = [flag for camera in cameras for flag in ("--source", camera.address)]
    flags += ["--no-show", "--events", str(events), "--save", str(folder)]
    process = subprocess.Popen([*COMMAND, str(tiny_onnx()), *flags], stderr=subprocess.PIPE, text=True)
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s and not (events.exists() and events.read_text().count("\n") > 20):
        time.sleep(0.05)
    for camera in cameras[:2]:
        camera.hang()
    time.sleep(0.5)
    stop_s = time.monotonic()
    process.send_signal(stop)
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - stop_s < 2
    assert process.returncode == 0 and "Traceback" not in errors
    assert len(list(folder.glob("*.mp4"))) == 3  # the fourth has no frame


class FakeSource(FrameSource):
    """A source whose status can be set."""

    problem = ""

    def __init__(self, name: str) -> None:
        super().__init__(name, is_live=True, fps=None, num_frames=None)

    @property
    def status(self) -> str:
        return self.problem

    def iterate_frames(self, *_: object) -> Iterator[Any]:
        return iter(())

    def close(self) -> None:
        pass


def test_progress_without_terminal_has_time_stamped_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr("hkd_deploy.demo.progress.perf_counter", lambda: now_s)
    sources = [FakeSource("gate"), FakeSource("yard")]
    pipelines = [CameraPipeline(source.name, source, 0.3) for source in sources]
    lines: list[tuple[float, str]] = []
    with ProgressReport(pipelines) as progress:
        for second in range(200):
            now_s = 100.0 + second
            pipelines[0].stats.add(StageTimes(1, 1, 1), 5.0)
            sources[1].problem = f"image unchanged for {second} s" if 12 <= second < 15 else ""
            progress.update()
            lines += [(second, line) for line in capsys.readouterr().err.splitlines()]
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (gate|yard): \d+ frames, ", line) for _, line in lines)
    gate = [second for second, line in lines if " gate: " in line]
    assert gate == [0, 10, 20, 30, 40, 50, 110, 170]  # every 10 s, after a minute every 60 s
    yard = [(second, line.partition("fps")[2]) for second, line in lines if " yard: " in line][:2]
    assert yard == [(12, ", image unchanged for 12 s"), (15, "")]
    assert "200 frames" in capsys.readouterr().err  # the last state


def test_json_log_has_one_object_per_line(
    tiny_onnx: Callable[..., Path], make_camera: Callable[..., Any], tmp_path: Path
) -> None:
    cameras, config, log = [make_camera(), make_camera()], tmp_path / "cameras.yaml", tmp_path / "log"
    names = ("door", 'quoted "\\ Tür')
    entries = [{"name": name, "source": camera.address} for name, camera in zip(names, cameras, strict=True)]
    config.write_text(json.dumps({"cameras": entries}))
    flags = ["--cameras", str(config), "--log-format", "json", "--events", "-", "--webhook", "http://127.0.0.1:9/x"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*COMMAND, str(tiny_onnx()), *flags], stdout=subprocess.DEVNULL, stderr=stream, text=True
        )
    wait_for_text(log, "nothing listens at this port", '"camera": "door"', "T\\u00fcr")
    cameras[0].off()
    wait_for_text(log, "camera lost")
    config.write_text("cameras: []")
    process.send_signal(signal.SIGUSR1)
    wait_for_text(log, "reload: ")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert all({"time", "level", "message"} <= set(line) <= {"time", "level", "message", "camera"} for line in lines)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["time"]) for line in lines)
    assert {line.get("camera") for line in lines} == {*names, None}
    levels = {key: [line["level"] for line in lines if key in line["message"]] for key in ("camera lost", "reload:")}
    assert set(levels["camera lost"]) == {"warning"} and levels["reload:"] == ["error"]
    assert sum(line["message"].startswith("end: ") for line in lines) == 2
    done = subprocess.run([*COMMAND, *flags], capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == ""
    assert json.loads(line)["level"] == "error" and "at least one camera" in json.loads(line)["message"]


def wait_for_text(path: Path, *texts: str) -> None:
    end_s = time.monotonic() + 30
    while not all(text in path.read_text() for text in texts):
        assert time.monotonic() < end_s, path.read_text()
        time.sleep(0.05)


def test_progress_in_terminal_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    sources = [FakeSource("gate"), FakeSource("yard")]
    pipelines = [CameraPipeline(source.name, source, 0.3) for source in sources]
    with ProgressReport(pipelines) as progress:
        pipelines[0].stats.add(StageTimes(1, 1, 1), 5.0)
        sources[1].problem = "camera lost: off"
        progress.update()
        progress.update()  # too early for another
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.count("\r") == 2
    assert printed.startswith("\r2 cameras: 1 frames, ") and "1 with a problem (yard: camera lost: off)" in printed
    assert format_totals(pipelines[:1]).startswith("1 camera: 1 frames, ")
