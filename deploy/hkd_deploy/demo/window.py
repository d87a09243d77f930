"""A window on the screen, where there is one."""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import UnavailableError

CLOSE_KEYS = (ord("q"), ord("Q"), 27)  # 27 is Esc


class Window:
    """An open window. It closes at q, Esc or its own button."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._is_shown = False

    def show(self, image_rgb: NDArray[np.uint8]) -> None:
        """Show a picture, uint8 RGB (H, W, 3)."""
        cv2.imshow(self._title, cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR))
        self._is_shown = True

    def is_open(self, wait_ms: int = 1) -> bool:
        """Let the window breathe for `wait_ms`, at least 1; False once the user has closed it."""
        if cv2.waitKey(max(1, wait_ms)) & 0xFF in CLOSE_KEYS:
            return False
        # Asked only after the first picture: some window systems report a window as hidden until then.
        return not self._is_shown or cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) >= 1


@contextmanager
def open_window(title: str) -> Iterator[Window]:
    """Open a window; UnavailableError, with what to do, where OpenCV or the machine has none."""
    reason = display_error(cv2.getBuildInformation(), sys.platform, os.environ)
    if reason:
        raise UnavailableError(reason)
    try:
        cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)
    except cv2.error as error:
        raise UnavailableError(f"no window: {str(error).strip()}; save a film instead: --save out.mp4") from None
    try:
        yield Window(title)
    finally:
        cv2.destroyAllWindows()


def display_error(build_information: str, platform: str, environment: Mapping[str, str]) -> str:
    """Why no window can be opened, and what to do; empty if one can.

    Asked first, as OpenCV's Qt ends the whole process when it finds no display.
    """
    if re.search(r"^\s*GUI:\s*NONE\s*$", build_information, re.MULTILINE):
        return (
            "no window: this OpenCV is built without them; save a film instead (--save out.mp4), or "
            "pip uninstall -y opencv-python-headless && pip install opencv-python"
        )
    if platform.startswith("linux") and not (environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY")):
        return "no window: no display here (DISPLAY is not set); save a film instead: --save out.mp4 --no-window"
    return ""
