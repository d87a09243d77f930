"""CSI cameras, by programs that write raw images: a program named rpicam-vid, and GStreamer where it is installed."""

import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hkd_deploy.streams import open_source
from hkd_deploy.streams.csi import CsiCamera, CsiReader, make_csi_command, parse_csi_address
from hkd_deploy.streams.live import LiveSource, ReconnectPolicy
from hkd_det.errors import UnavailableError, UsageError

WIDTH, HEIGHT = 128, 72
ADDRESS = f"csi://0?width={WIDTH}&height={HEIGHT}&fps=20"
POLICY = ReconnectPolicy(read_timeout_s=0.5, retry_s=0.1)
# BT.601, limited range, of the pure colors: Y, U, V.
RED, BLUE = (81, 90, 240), (41, 240, 110)

PROGRAM = """#!{python}
import sys, time
print("sensor is ready", file=sys.stderr, flush=True)
for number in range({count}):
    y, u, v = {colors}[number % 2]
    sys.stdout.buffer.write(bytes([y]) * ({width} * {height}) + bytes([u]) * ({width} * {height} // 4))
    sys.stdout.buffer.write(bytes([v]) * ({width} * {height} // 4))
    sys.stdout.buffer.flush()
    time.sleep(0.05)
print("the sensor was removed", file=sys.stderr, flush=True)
time.sleep({then_s})
"""


def install_program(directory: Path, monkeypatch: pytest.MonkeyPatch, count: int, then_s: float = 0.0) -> None:
    """Install a rpicam-vid that writes red and blue images in turn."""
    path = directory / "rpicam-vid"
    size = {"width": WIDTH, "height": HEIGHT}
    path.write_text(PROGRAM.format(python=sys.executable, count=count, colors=(RED, BLUE), then_s=then_s, **size))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))


def is_color(image_rgb: np.ndarray, color_rgb: tuple[int, int, int]) -> bool:
    return bool(np.abs(image_rgb.astype(int) - color_rgb).max() <= 3)


def test_images_have_their_colors_and_ages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_program(tmp_path, monkeypatch, 1000)
    with open_source(ADDRESS, POLICY) as source:
        assert isinstance(source, LiveSource) and source.fps == 20
        frames = [frame for frame, _ in zip(source, range(6), strict=False)]
        age_s = time.monotonic() - frames[-1].timestamp_s
    assert age_s < 0.5 and all(frame.image_rgb.shape == (HEIGHT, WIDTH, 3) for frame in frames)
    colors = [(is_color(frame.image_rgb, (255, 0, 0)), is_color(frame.image_rgb, (0, 0, 255))) for frame in frames]
    assert all(red != blue for red, blue in colors) and len(set(colors)) == 2
    assert (np.diff([frame.timestamp_s for frame in frames]) > 0.02).all()


def test_program_that_ends_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_program(tmp_path, monkeypatch, 3)
    with open_source(ADDRESS, POLICY, lambda: None) as source:
        statuses, num_frames, end_s = set(), 0, time.monotonic() + 10
        while num_frames < 5 and time.monotonic() < end_s:  # more than one program writes
            num_frames += source.take_frame(0.02) is not None
            statuses.add(source.status)
    assert num_frames >= 5
    assert any("the program of the camera ended. It says: the sensor was removed" in status for status in statuses)


def test_program_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_program(tmp_path, monkeypatch, 1, then_s=60)
    camera = parse_csi_address(ADDRESS)
    reader = CsiReader(make_csi_command(camera), camera, POLICY)
    reader.read()
    with pytest.raises(UnavailableError, match=r"^csi://0: no data for 0\.5 s\. It says: the sensor was removed"):
        reader.read()
    start_s = time.monotonic()
    reader.close()
    assert time.monotonic() - start_s < 1
    with pytest.raises(ChildProcessError):  # no process is left, also no ended one
        os.waitpid(reader._process.pid, os.WNOHANG)


def test_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(UnavailableError, match=r"^csi://1: no program .* installed\. Install gst-launch-1.0 with nvarg"),
        open_source("csi://1", POLICY),
    ):
        pass


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("csi://", "index: expected an integer from 0 to 99"),
        ("csi://front", "index: expected"),
        ("csi://0?width=1000", "a multiple of 64"),
        ("csi://0?height=721", "an even height"),
        ("csi://0?fps=0", "fps: expected an integer from 1 to 240"),
        ("csi://0?size=2", "unknown part"),
        ("csi://0/1", "unknown part"),
    ],
)
def test_invalid_address_is_a_usage_error(address: str, message: str) -> None:
    with pytest.raises(UsageError, match=message), open_source(address, POLICY, lambda: None):
        pass


def test_jetson_uses_gstreamer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gst-inspect-1.0", "gst-launch-1.0", "rpicam-vid"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    command = make_csi_command(CsiCamera(2, 1920, 1080, 60))
    assert command[:4] == ["gst-launch-1.0", "-q", "nvarguscamerasrc", "sensor-id=2"]
    assert "video/x-raw(memory:NVMM),width=1920,height=1080,framerate=60/1" in command


@pytest.mark.skipif(shutil.which("gst-launch-1.0") is None, reason="gst-launch-1.0 is not installed")
def test_gstreamer_writes_images_without_padding() -> None:
    camera = CsiCamera(0, 192, 108, 30)
    raw = f"video/x-raw,format=I420,width={camera.width},height={camera.height},framerate=30/1"
    source = ["videotestsrc", "pattern=blue", "is-live=true"]  # instead of the source of a Jetson
    command = ["gst-launch-1.0", "-q", *source, "!", raw, "!", "fdsink", "fd=1", "sync=false"]
    reader = CsiReader(command, camera, POLICY)
    try:
        images = [reader.read().to_rgb() for _ in range(3)]
    finally:
        reader.close()
    assert all(is_color(image, (0, 0, 255)) for image in images)
