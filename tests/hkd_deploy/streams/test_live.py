"""Live sources, against a real HTTP camera on this machine: newest frame, loss, return, no invented frame."""

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
from hkd_deploy.streams.base import sanitize_fps
from hkd_deploy.streams.camera import ReconnectPolicy
from hkd_det.errors import UnavailableError

QUICK = ReconnectPolicy(open_timeout_s=2, read_timeout_s=0.5, initial_backoff_s=0.05, max_backoff_s=0.1)

Camera = Any  # of conftest.py


def number(frame: Frame) -> int:
    """Which of the camera's frames this is."""
    picture = frame.image_rgb
    assert picture.shape == (64, 96, 3)
    assert picture.dtype == np.uint8
    assert np.ptp(picture) == 0  # nothing smeared, nothing put together
    return int(picture[0, 0, 0]) - 20


def take(source: FrameSource, count: int) -> list[Frame]:
    """The next so many frames; fails after 10 s without one."""
    deadline_s = time.monotonic() + 10
    return list(islice(source.iterate_frames(lambda: time.monotonic() < deadline_s), count))


def drain(source: FrameSource) -> None:
    """Take what still lies in the mailbox, until nothing comes for a moment."""
    list(source.iterate_frames(lambda: False))


def test_frames_come_in_order_each_once(camera: Camera) -> None:
    with open_source(camera.address, QUICK) as source:
        assert source.is_live
        assert source.num_frames is None
        frames = take(source, 20)
    numbers = [number(frame) for frame in frames]
    assert len(set(numbers)) == 20
    assert numbers == sorted(numbers)


def test_stamps_are_the_monotonic_clock(camera: Camera) -> None:
    with open_source(camera.address, QUICK) as source:
        before_s = time.monotonic()
        stamps = [frame.timestamp_s for frame in take(source, 10)]
    assert stamps == sorted(stamps)
    assert before_s - 1 < stamps[0] < stamps[-1] <= time.monotonic()


def test_a_slow_reader_gets_the_newest_and_the_rest_is_counted(camera: Camera) -> None:
    with open_source(camera.address, QUICK) as source:
        first = take(source, 1)[0]
        dropped = source.num_dropped
        time.sleep(0.5)  # some 50 frames
        second = take(source, 1)[0]
        age_s = time.monotonic() - second.timestamp_s
        assert number(second) - number(first) >= 10
        assert age_s < 0.25
        assert source.num_dropped - dropped == pytest.approx(number(second) - number(first) - 1, abs=3)


def test_a_lost_camera_is_found_again_and_nothing_is_invented(camera: Camera) -> None:
    with open_source(camera.address, QUICK) as source:
        before = take(source, 3)
        camera.off()
        deadline_s = time.monotonic() + 10
        while not source.status and time.monotonic() < deadline_s:
            time.sleep(0.02)
        assert source.status.startswith("camera lost, asking again in ")
        drain(source)
        waits = []
        assert list(source.iterate_frames(lambda: waits.append(1) or len(waits) < 3)) == []
        assert len(waits) == 3
        last_sent = camera.sent - 1
        camera.on()
        after = take(source, 3)
        assert source.status == ""
    numbers = [number(frame) for frame in before + after]
    assert numbers == sorted(set(numbers))
    assert number(after[0]) > last_sent
    assert camera.connections >= 2


def test_a_camera_that_hangs_is_asked_again(camera: Camera) -> None:
    with open_source(camera.address, QUICK) as source:
        take(source, 3)
        camera.hang()
        drain(source)
        threading.Timer(1.0, camera.on_again).start()
        start_s = time.monotonic()
        assert len(take(source, 1)) == 1
        assert time.monotonic() - start_s > 0.9
    assert camera.connections >= 2


def test_closing_is_prompt_while_a_camera_is_lost(camera: Camera) -> None:
    patience = ReconnectPolicy(open_timeout_s=2, read_timeout_s=0.5, initial_backoff_s=30)
    with open_source(camera.address, patience) as source:
        take(source, 1)
        camera.off()
        while not source.status:
            time.sleep(0.02)
        start_s = time.monotonic()
    assert time.monotonic() - start_s < 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("camera")]


def test_no_camera_at_the_start_names_the_address_without_the_password(
    camera: Camera, capfd: pytest.CaptureFixture[str]
) -> None:
    camera.off()
    address = camera.address.replace("http://", "http://admin:se/cr@et@")
    with pytest.raises(UnavailableError) as caught, open_source(address, QUICK):
        pass
    message = str(caught.value)
    assert message.startswith(camera.address.replace("http://", "http://***@") + ": gives no picture; check")
    shown = message + "".join(capfd.readouterr())
    assert "se/cr" not in shown
    assert "et@" not in shown
    assert "admin" not in shown


def test_no_webcam() -> None:
    # Number 97: nobody has plugged in so many. OpenCV warns on stderr by itself; the command turns that off.
    with pytest.raises(UnavailableError, match="camera 97: gives no picture; is it plugged in"), open_source("97"):
        pass


def test_a_webcam_goes_through_opencv_by_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert frames[0].image_rgb[0, 0].tolist() == [3, 2, 1]  # BGR ends here


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_waits_double_up_to_the_longest(failures: int) -> None:
    full_s = min(30.0, 2.0 ** min(failures, 10))
    assert 0.75 * full_s <= ReconnectPolicy().compute_backoff_s(failures) <= full_s


def test_waits_differ() -> None:
    assert len({ReconnectPolicy().compute_backoff_s(5) for _ in range(10)}) > 1


@pytest.mark.parametrize(
    ("declared", "taken"), [(25.0, 25.0), (0.0, None), (-1.0, None), (float("nan"), None), (90_000.0, None)]
)
def test_frame_rates_that_mean_unknown(declared: float, taken: float | None) -> None:
    assert sanitize_fps(declared) == taken
