"""Tests of live sources with a real HTTP camera on this machine: newest frame, age, connection loss, reconnection."""

import threading
import time
from itertools import islice
from typing import Any

import cv2
import numpy as np
import pytest

from hkd_deploy.streams import Frame, FrameSource, live, open_source, redact_url
from hkd_deploy.streams.live import ReconnectPolicy
from hkd_deploy.streams.sources import sanitize_fps
from hkd_det.errors import UnavailableError

FAST_POLICY = ReconnectPolicy(open_timeout_s=2, read_timeout_s=0.5, retry_s=0.05)

Camera = Any  # of conftest.py


def decode_number(frame: Frame) -> int:
    """Return the number of the frame, which the camera encodes as gray level."""
    image = frame.image_rgb
    assert image.shape == (64, 96, 3)
    assert image.dtype == np.uint8
    assert np.ptp(image) == 0  # not corrupted
    return int(image[0, 0, 0]) - 20


def take(source: FrameSource, count: int) -> list[Frame]:
    """Return the next `count` frames; stop after 10 s without a frame."""
    deadline_s = time.monotonic() + 10
    return list(islice(source.iterate_frames(lambda: time.monotonic() < deadline_s), count))


def drain(source: FrameSource) -> None:
    """Read buffered frames until there are none."""
    list(source.iterate_frames(lambda: False))


def test_camera_frames_in_order_without_repeats(camera: Camera) -> None:
    with open_source(camera.address, FAST_POLICY) as source:
        assert source.is_live
        assert source.num_frames is None
        frames = take(source, 20)
    numbers = [decode_number(frame) for frame in frames]
    assert len(set(numbers)) == 20
    assert numbers == sorted(numbers)


def test_camera_timestamps_are_monotonic_clock(camera: Camera) -> None:
    with open_source(camera.address, FAST_POLICY) as source:
        before_s = time.monotonic()
        timestamps = [frame.timestamp_s for frame in take(source, 10)]
    assert timestamps == sorted(timestamps)
    assert before_s - 1 < timestamps[0] < timestamps[-1] <= time.monotonic()


def test_camera_slow_reader_gets_newest_frame(camera: Camera) -> None:
    with open_source(camera.address, FAST_POLICY) as source:
        first = take(source, 1)[0]
        dropped = source.num_dropped
        time.sleep(0.5)  # about 50 frames
        second = take(source, 1)[0]
        age_s = time.monotonic() - second.timestamp_s
        assert decode_number(second) - decode_number(first) >= 10
        assert age_s < 0.25
        assert source.num_dropped - dropped == pytest.approx(decode_number(second) - decode_number(first) - 1, abs=3)


def test_camera_reconnects_without_invented_frames(camera: Camera) -> None:
    with open_source(camera.address, FAST_POLICY) as source:
        before = take(source, 3)
        camera.off()
        deadline_s = time.monotonic() + 10
        while not source.status and time.monotonic() < deadline_s:
            time.sleep(0.02)
        assert source.status.startswith("camera lost: ")
        drain(source)
        idle_calls = []
        assert list(source.iterate_frames(lambda: idle_calls.append(1) or len(idle_calls) < 3)) == []
        assert len(idle_calls) == 3
        last_sent = camera.sent - 1
        camera.on()
        after = take(source, 3)
        assert source.status == ""
    numbers = [decode_number(frame) for frame in before + after]
    assert numbers == sorted(set(numbers))
    assert decode_number(after[0]) > last_sent
    assert camera.connections >= 2


@pytest.mark.slow
def test_camera_hang_reconnects(camera: Camera) -> None:
    with open_source(camera.address, FAST_POLICY) as source:
        take(source, 3)
        camera.hang()
        drain(source)
        threading.Timer(1.0, camera.resume).start()
        start_s = time.monotonic()
        assert len(take(source, 1)) == 1
        assert time.monotonic() - start_s > 0.9
    assert camera.connections >= 2


def test_close_lost_camera_returns_quickly(camera: Camera) -> None:
    policy = ReconnectPolicy(open_timeout_s=2, read_timeout_s=0.5, retry_s=30)
    with open_source(camera.address, policy) as source:
        take(source, 1)
        camera.off()
        while not source.status:
            time.sleep(0.02)
        start_s = time.monotonic()
    assert time.monotonic() - start_s < 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("camera")]


def test_open_unreachable_camera_hides_password(camera: Camera, capfd: pytest.CaptureFixture[str]) -> None:
    camera.off()
    address = camera.address.replace("http://", "http://admin:se/cr@et@")
    with pytest.raises(UnavailableError) as caught, open_source(address, FAST_POLICY):
        pass
    message = str(caught.value)
    name = camera.address.replace("http://", "http://***@")
    assert message.startswith(f"{name}: not a valid URL. Check host and port. In a password, ")
    output = message + "".join(capfd.readouterr())
    assert "se/cr" not in output
    assert "et@" not in output
    assert "admin" not in output


def test_open_missing_webcam_raises() -> None:
    # OpenCV itself warns on stderr; hkd-demo turns that off.
    with (
        pytest.raises(UnavailableError, match=r"camera 97: the camera returns no image\. Check that it is connected"),
        open_source("97"),
    ):
        pass


def test_open_webcam_uses_index(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Webcam:
        def read(self) -> tuple[bool, np.ndarray]:
            time.sleep(0.005)
            return True, np.full((4, 6, 3), (1, 2, 3), np.uint8)

        def set(self, key: int, value: float) -> bool:
            return key == cv2.CAP_PROP_BUFFERSIZE and value == 1

        def get(self, key: int) -> float:
            return 30.0 if key == cv2.CAP_PROP_FPS else 0.0

        def release(self) -> None:
            opened.append("released")

    monkeypatch.setattr(cv2, "VideoCapture", lambda *arguments: opened.append(arguments) or Webcam())
    with open_source("2") as source:
        frames = take(source, 2)
        assert (source.name, source.fps, source.is_live) == ("camera 2", 30.0, True)
    assert opened == [(2,), "released"]
    assert frames[0].image_rgb[0, 0].tolist() == [3, 2, 1]  # converted from BGR


@pytest.mark.parametrize(
    ("declared", "expected"), [(25.0, 25.0), (0.0, None), (-1.0, None), (float("nan"), None), (90_000.0, None)]
)
def test_sanitize_fps(declared: float, expected: float | None) -> None:
    assert sanitize_fps(declared) == expected


@pytest.mark.slow
def test_camera_backlog_of_a_slow_line_is_reported_and_skipped(camera: Camera) -> None:
    camera.fps = 20
    ages = []
    with open_source(camera.address, FAST_POLICY) as source:
        take(source, 20)
        connections = camera.connections
        camera.bytes_per_s = 5 * 700  # about a third of the rate of the images
        deadline_s = time.monotonic() + 5
        for frame in source.iterate_frames(lambda: time.monotonic() < deadline_s):
            now_s = time.monotonic()
            ages.append((now_s - frame.timestamp_s, now_s - camera.made_s[decode_number(frame)]))
            if now_s > deadline_s:
                break
    reported, true = np.array(ages).T
    assert true.max() > 1.5  # there was a backlog
    assert np.median(np.abs(reported - true)) < 0.5
    assert camera.connections > connections  # a new connection skipped it


@pytest.mark.slow
def test_camera_silence_is_reported_as_age(camera: Camera) -> None:
    camera.fps = 20
    policy = ReconnectPolicy(open_timeout_s=2, read_timeout_s=5)
    with open_source(camera.address, policy) as source:
        take(source, 10)
        camera.hang()
        drain(source)
        threading.Timer(1.5, camera.resume).start()
        (frame,) = take(source, 1)
        assert 1 < time.monotonic() - frame.timestamp_s < 2
        frames = take(source, 10)
        assert time.monotonic() - frames[-1].timestamp_s < 0.5


def test_camera_without_data_is_lost_before_the_read_ends(camera: Camera) -> None:
    with open_source(camera.address, ReconnectPolicy(open_timeout_s=2, read_timeout_s=0.3)) as source:
        take(source, 3)
        camera.hang()
        drain(source)
        deadline_s = time.monotonic() + 2
        list(source.iterate_frames(lambda: not source.status and time.monotonic() < deadline_s))
        assert source.status.startswith("camera lost: ")
        assert time.monotonic() < deadline_s


@pytest.mark.slow
def test_camera_that_repeats_an_image_is_reported(camera: Camera, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "FROZEN_AFTER_S", 0.3)
    camera.fps = 20
    with open_source(camera.address, FAST_POLICY) as source:
        take(source, 5)
        assert source.status == ""
        camera.is_frozen = True
        take(source, 12)
        assert source.status.startswith("image unchanged for ")
        camera.is_frozen = False
        take(source, 3)
        assert source.status == ""


# urllib leaves the connection of its first request, without a password, to the garbage collector.
ignore_unclosed_socket = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@ignore_unclosed_socket
@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        ({"login": ("admin", "other")}, "the camera refuses user and password. Check them (http://user:password@host"),
        ({"path": "/elsewhere"}, "the camera has no stream at this path. Check the path"),
        ({"page": b"<html>Log in</html>"}, "not a video, but a web page. Check the path"),
    ],
)
def test_failures_of_a_camera_differ(camera: Camera, prepare: dict[str, Any], message: str) -> None:
    pytest.importorskip("av")
    for name, value in prepare.items():
        setattr(camera, name, value)
    address = camera.address.replace("http://", "http://admin:pa%40ss@")
    with pytest.raises(UnavailableError) as caught, open_source(address, FAST_POLICY):
        pass
    assert str(caught.value).startswith(f"{redact_url(address)}: {message}")
    assert "pa%40ss" not in str(caught.value) and "pa@ss" not in str(caught.value)


@ignore_unclosed_socket
def test_camera_with_password(camera: Camera) -> None:
    camera.login = ("admin", "pa@s/s")
    with open_source(camera.address.replace("http://", "http://admin:pa%40s%2Fs@"), FAST_POLICY) as source:
        assert len(take(source, 3)) == 3


def test_unencoded_password_is_explained(camera: Camera) -> None:
    camera.off()
    address = camera.address.replace("http://", "http://admin:pa/ss@")
    with pytest.raises(UnavailableError, match=r"In a password, write / as %2F, @ as %40") as caught:
        open_source(address, FAST_POLICY).__enter__()
    assert "pa/ss" not in str(caught.value)


def test_unknown_host_and_closed_port_differ() -> None:
    with pytest.raises(UnavailableError, match=r"^http://nowhere\.invalid/x: unknown host nowhere\.invalid\."):
        open_source("http://nowhere.invalid/x", FAST_POLICY).__enter__()
    with pytest.raises(UnavailableError, match=r"^rtsp://127\.0\.0\.1:1/x: nothing listens at port 1\."):
        open_source("rtsp://127.0.0.1:1/x", FAST_POLICY).__enter__()
