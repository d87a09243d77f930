"""Interface of an image source."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_GAP_S = 10.0  # longer gaps are pauses, or changes of a clock
SHORTENED_GAP_S = 2.0


class Frame(NamedTuple):
    """One image with its time.

    Attributes:
        image_rgb (uint8[H, W, 3]): RGB.
        timestamp_s: Capture time by `time.monotonic()` for a live source, otherwise the position in the video.
    """

    image_rgb: NDArray[np.uint8]
    timestamp_s: float


def wait_forever() -> bool:
    """Return True: the default of `iterate_frames` waits without a limit."""
    return True


class FrameSource(ABC):
    """An opened image source. It can be iterated once.

    Args:
        name: Display name, without credentials.
        is_live: True if only the newest image is returned and late images are dropped.
        fps: Frames per second. None if unknown.
        num_frames: Number of frames. None if unknown or unlimited.
    """

    def __init__(self, name: str, is_live: bool, fps: float | None, num_frames: int | None) -> None:
        self.name = name
        self.is_live = is_live
        self.fps = fps
        self.num_frames = num_frames

    @property
    def num_dropped(self) -> int:
        """Number of frames that arrived but were not returned."""
        return 0

    @property
    def status(self) -> str:
        """Description of a connection problem. Empty if there is none."""
        return ""

    @abstractmethod
    def iterate_frames(self, on_idle: Callable[[], bool] = wait_forever) -> Iterator[Frame]:
        """Iterate over the frames.

        Args:
            on_idle: Called about ten times per second while a live source has no frame. The iteration ends if it
                returns False.

        Yields:
            The frames.
        """

    def __iter__(self) -> Iterator[Frame]:
        return self.iterate_frames()

    @abstractmethod
    def close(self) -> None:
        """Close the file or the camera."""


def sanitize_fps(fps: float) -> float | None:
    """Replace frame rates that stand for unknown by None.

    Args:
        fps: Frame rate of a container or camera.

    Returns:
        The frame rate. None for 0, NaN, and clock rates above 1000.
    """
    return fps if 0 < fps <= 1000 else None


def limit_gap(gap_s: float, step_s: float) -> float:
    """Limit the time between two frames, so that a clock that jumps does not stop or stretch a video.

    Args:
        gap_s: Difference of two times of frames, seconds.
        step_s: Time between two frames at the frame rate, seconds.

    Returns:
        The difference. `step_s` if it is not positive. 2 s, or `step_s` if that is longer, if it is more than 10 s.
    """
    if not gap_s > 0:
        return step_s
    return gap_s if gap_s <= max(MAX_GAP_S, 2 * step_s) else max(SHORTENED_GAP_S, step_s)
