"""Tests of the demo window: availability, closing by key and by button."""

from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from hkd_deploy.demo.output import Window, explain_missing_display, open_window
from hkd_det.errors import UnavailableError

HEADLESS = "  GUI:                           NONE\n  Media I/O:\n"
WITH_GTK = "  GUI:                           GTK3\n    GTK+:  YES (ver 3.24)\n"


def test_explain_missing_display_headless_opencv() -> None:
    reason = explain_missing_display(HEADLESS, "linux", {"DISPLAY": ":0"})
    assert "pip uninstall -y opencv-python-headless && pip install opencv-python" in reason
    assert "--save out.mp4" in reason


@pytest.mark.parametrize("environment", [{}, {"DISPLAY": ""}])
def test_explain_missing_display_no_display(environment: dict[str, str]) -> None:
    assert "DISPLAY is not set" in explain_missing_display(WITH_GTK, "linux", environment)


@pytest.mark.parametrize(
    ("platform", "environment"),
    [("linux", {"DISPLAY": ":0"}), ("linux", {"WAYLAND_DISPLAY": "wayland-0"}), ("darwin", {}), ("win32", {})],
)
def test_explain_missing_display_available(platform: str, environment: dict[str, str]) -> None:
    assert explain_missing_display(WITH_GTK, platform, environment) == ""


def test_opencv_build_information_has_gui_line() -> None:
    assert "GUI:" in cv2.getBuildInformation()


class Screen:
    """Fake of the window system. `keys` are pressed in order; -1 is no key."""

    def __init__(self) -> None:
        self.keys: list[int] = []
        self.visible = 1.0
        self.shown: list[np.ndarray] = []
        self.open = 0


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    fake = Screen()
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: WITH_GTK)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", lambda *_: setattr(fake, "open", fake.open + 1))
    monkeypatch.setattr(cv2, "destroyAllWindows", lambda: setattr(fake, "open", 0))
    monkeypatch.setattr(cv2, "imshow", lambda _, image_bgr: fake.shown.append(image_bgr))
    monkeypatch.setattr(cv2, "waitKey", lambda _: fake.keys.pop(0) if fake.keys else -1)
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: fake.visible)
    return fake


@pytest.mark.parametrize("key", [ord("q"), ord("Q"), 27, 0x100000 + 27])  # GTK sets high bits for Num Lock
def test_is_open_close_key_returns_false(screen: Screen, key: int) -> None:
    with open_window("test") as window:
        assert screen.open == 1
        screen.keys = [-1, ord("x"), key]
        assert [window.is_open() for _ in range(3)] == [True, True, False]
    assert screen.open == 0


def test_is_open_close_button_returns_false(screen: Screen) -> None:
    window = Window("test")
    screen.visible = 0
    assert window.is_open()  # no image yet
    window.show(np.full((4, 5, 3), (1, 2, 3), np.uint8))
    assert not window.is_open()
    assert screen.shown[0][0, 0].tolist() == [3, 2, 1]


def test_open_window_backend_failure_raises(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise cv2.error("Can't initialize GTK backend")

    monkeypatch.setattr(cv2, "namedWindow", fail)
    with (
        pytest.raises(UnavailableError, match=r"--show: Can't initialize GTK backend\. Open a page in a browser"),
        open_window("t"),
    ):
        pass
    assert screen.open == 0
