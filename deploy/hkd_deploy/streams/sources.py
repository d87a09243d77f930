"""Image sources: their interface, and image files in order. A damaged file raises an error."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import DataError
from hkd_det.image import IMAGE_SUFFIXES, read_image

MAX_GAP_S = 10.0  # longer gaps are pauses, or changes of a clock
SHORTENED_GAP_S = 2.0
SLIDESHOW_FPS = 2.0  # display rate of image files


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

    Attributes:
        decoder: Device that decoded the last frame, `cpu`, `cuda` ... Empty if no hardware decoder was requested.
    """

    decoder = ""

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


class ImageSource(FrameSource):
    """Image files, in order.

    Args:
        name: Display name.
        paths: The image files.
    """

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        super().__init__(name, is_live=False, fps=SLIDESHOW_FPS, num_frames=len(paths))
        self._paths = paths

    def iterate_frames(self, on_idle: Callable[[], bool] = wait_forever) -> Iterator[Frame]:  # noqa: ARG002 - not live
        """Iterate over the images.

        Args:
            on_idle: No effect.

        Yields:
            The images, with timestamps at 2 frames per second.

        Raises:
            DataError: A file is damaged.
        """
        for index, path in enumerate(self._paths):
            yield Frame(read_image(path), index / SLIDESHOW_FPS)

    def close(self) -> None:
        """Do nothing: no file stays open between frames."""


def list_images(folder: Path) -> list[Path]:
    """List the image files of a directory by name, without hidden files and subdirectories.

    Args:
        folder: The directory.

    Returns:
        The paths, sorted.

    Raises:
        DataError: The directory contains no images.
    """
    paths = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    if not paths:
        below = next((path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES), None)
        if below:
            raise DataError(f"{folder}: no images in this directory, but in {below.parent}. Give that directory.")
        raise DataError(f"{folder}: no images in this directory. Supported types: {' '.join(sorted(IMAGE_SUFFIXES))}.")
    return paths
