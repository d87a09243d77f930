"""`Frame` and `FrameSource`: what every stream gives, whatever it is read from."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Frame(NamedTuple):
    """One picture and its time.

    picture_rgb: uint8 RGB (H, W, 3).
    timestamp_s: of a live source when it was captured, by time.monotonic(); else its place in the film.
    """

    image_rgb: NDArray[np.uint8]
    timestamp_s: float


def wait_forever() -> bool:
    """Wait for as long as it takes: what `frames` does when nobody says otherwise."""
    return True


class FrameSource(ABC):
    """An open stream; iterate it once.

    name: to show to people, without a password. live: the newest frame is given and late ones are
    dropped; otherwise every frame is given in order. fps: frames a second, None where unknown or
    meaningless. frame_count: None where unknown or endless. dropped: frames that came and were not given.
    """

    def __init__(self, name: str, is_live: bool, fps: float | None, num_frames: int | None) -> None:
        self.name = name
        self.is_live = is_live
        self.fps = fps
        self.num_frames = num_frames

    @property
    def num_dropped(self) -> int:
        """Frames that came too late to be looked at."""
        return 0

    @property
    def status(self) -> str:
        """What a live source is waiting for; empty while all is well."""
        return ""

    @abstractmethod
    def iterate_frames(self, on_idle: Callable[[], bool] = wait_forever) -> Iterator[Frame]:
        """The frames. `waiting` is called some ten times a second while a live source has none; False ends it."""

    def __iter__(self) -> Iterator[Frame]:
        return self.iterate_frames()

    @abstractmethod
    def close(self) -> None:
        """Let go of the file or the camera."""


def sanitize_fps(fps: float) -> float | None:
    """A frame rate as a container declares it, None for the zeros, NaNs and clock rates that stand for unknown."""
    return fps if 0 < fps <= 1000 else None
