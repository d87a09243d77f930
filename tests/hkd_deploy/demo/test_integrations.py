"""Tests of MQTT, webhook, metrics and recording as flags of the command, with a camera."""

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hkd_deploy.demo.cli import main

COMMAND = [sys.executable, "-c", "import sys; from hkd_deploy.demo.cli import main; sys.exit(main())"]


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def scrape(port: int) -> dict[tuple[str, ...], float]:
    parser = pytest.importorskip("prometheus_client.parser")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        families = parser.text_string_to_metric_families(response.read().decode())
        return {
            (sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples
        }


@pytest.mark.slow
def test_absent_receivers_change_neither_frames_nor_the_end(
    tiny_onnx: Callable[..., Path], camera: Any, tmp_path: Path
) -> None:
    av, _ = pytest.importorskip("av"), pytest.importorskip("paho.mqtt.client")
    metrics_port, dead_port = find_free_port(), find_free_port()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never answers
        flags = ["--mqtt", f"mqtt://me:s3cret@127.0.0.1:{silent.getsockname()[1]}/hkd", "--events-every", "0"]
        flags += ["--webhook", f"http://127.0.0.1:{dead_port}/s3cret", "--metrics", str(metrics_port)]
        flags += ["--record", str(tmp_path / "videos"), "--conf", "0"]
        command = [*COMMAND, str(tiny_onnx()), "--source", camera.address, "--threads", "1", *flags]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            end_s, samples = time.monotonic() + 30, {}
            while time.monotonic() < end_s and samples.get(("hkd_frames_total", camera.address), 0) < 60:
                time.sleep(0.2)
                try:
                    samples = scrape(metrics_port)
                except OSError:
                    continue
            stop_s = time.monotonic()
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert time.monotonic() - stop_s < 3
    assert samples["hkd_camera_up", camera.address] == 1
    assert samples["hkd_recorded_frames_total", camera.address] > 0
    assert samples["hkd_recorded_frames_dropped_total", camera.address] == 0
    assert samples["hkd_frame_age_seconds_count", camera.address] == samples["hkd_frames_total", camera.address]
    num_frames = int(re.match(r"(\d+) frames", out)[1])  # type: ignore[index]
    (path,) = (tmp_path / "videos").glob("*/*.mp4")
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == num_frames
    webhook = f"webhook http://127.0.0.1:{dead_port}"
    assert f"{webhook}: nothing listens at this port." in err
    assert f"{webhook}: events: 0 delivered, {num_frames + 1} not delivered, 0 dropped." in err  # with the first status
    assert "s3cret" not in out + err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mqtt-discovery"], "--mqtt-discovery: requires --mqtt."),
        (["--mqtt", "mqtt://u:s3cret@host:x/"], "--mqtt mqtt://***@host:x/: the URL is invalid."),
        (["--webhook", "host/path"], "--webhook host/path: expected a URL"),
        (["--webhook", "http://host/", "--events-every", "-1"], "--events-every"),
        (["--metrics", "host:http"], "--metrics host:http: expected PORT or HOST:PORT."),
        (["--record-max-age", "7d"], "--record-max-age: requires --record."),
        (["--record", "videos", "--record-segment", "10"], "--record-segment 10: expected a number above 0 and s, m"),
        (["--record", "videos", "--record-max-size", "20"], "--record-max-size 20: expected a number above 0 and MB"),
    ],
)
def test_invalid_flags_are_usage_errors(
    flags: list[str],
    message: str,
    tiny_onnx: Callable[..., Path],
    camera: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(tiny_onnx()), "--source", camera.address, *flags]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "s3cret" not in printed
    assert not (tmp_path / "videos").exists()
