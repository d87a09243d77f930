"""Tests of live sources with a real HTTP camera on this machine: newest frame, connection loss, reconnection."""

import threading
import time
from itertools import islice
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkd_deploy.streams import Frame, FrameSource, open_source
from hkd_deploy.streams.sources import ReconnectPolicy, sanitize_fps
from hkd_det.errors import UnavailableError

FAST_POLICY = ReconnectPolicy(open_timeout_s=2, read_timeout_s=0.5, initial_backoff_s=0.05, max_backoff_s=0.1)

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
        assert source.status.startswith("camera lost, reconnecting in ")
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
    policy = ReconnectPolicy(open_timeout_s=2, read_timeout_s=0.5, initial_backoff_s=30)
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
    assert message.startswith(camera.address.replace("http://", "http://***@") + ": the camera returns no image. Check")
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


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_backoff_doubles_up_to_maximum(failures: int) -> None:
    full_s = min(30.0, 2.0 ** min(failures, 10))
    assert 0.75 * full_s <= ReconnectPolicy().compute_backoff_s(failures) <= full_s


def test_backoff_is_random() -> None:
    assert len({ReconnectPolicy().compute_backoff_s(5) for _ in range(10)}) > 1


@pytest.mark.parametrize(
    ("declared", "expected"), [(25.0, 25.0), (0.0, None), (-1.0, None), (float("nan"), None), (90_000.0, None)]
)
def test_sanitize_fps(declared: float, expected: float | None) -> None:
    assert sanitize_fps(declared) == expected
