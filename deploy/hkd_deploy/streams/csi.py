"""CSI cameras (ribbon cable) of Jetson modules and Raspberry Pi boards: `--source csi://0`.

OpenCV from pip has no GStreamer, and these cameras need the image processor of the vendor. Its program writes raw
images to a pipe, which this module reads:

* `gst-launch-1.0` with the element nvarguscamerasrc (Jetson) or libcamerasrc (other boards),
* `rpicam-vid` or `libcamera-vid` (Raspberry Pi).

Raw images have no timestamps. The capture time is that of the first byte of an image.
"""

import os
import selectors
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_deploy.streams.live import CameraFrame, ReconnectPolicy
from hkd_det.errors import UnavailableError, UsageError

SCHEME = "csi"
STRIDE_PX = 64  # rows of this length have no padding in any of the programs
MAX_SIDE, MAX_FPS = 8192, 240
START_TIMEOUT_S = 15.0  # the image processor and the exposure control start
STOP_TIMEOUT_S = 0.3
READ_BYTES = 1 << 20
GSTREAMER = "gst-launch-1.0"
RASPBERRY_PI = ("rpicam-vid", "libcamera-vid")


@dataclass(frozen=True)
class CsiCamera:
    """One camera and the images that it is asked for.

    Attributes:
        index: Number of the camera: `sensor-id` of nvarguscamerasrc, `--camera` of rpicam-vid.
        width: Image width, pixels, a multiple of 64.
        height: Image height, pixels, even.
        fps: Frames per second.
    """

    index: int
    width: int = 1280
    height: int = 720
    fps: int = 30


class CsiReader:
    """The images that the program of a camera writes.

    Args:
        command: The program and its arguments. It writes I420 images to the standard output.
        camera: Size and rate of the images.
        policy: Timeouts.

    Attributes:
        fps: Frames per second, as asked for.
        decoder: Empty: the images are not encoded.

    Raises:
        UnavailableError: The program does not start.
    """

    def __init__(self, command: Sequence[str], camera: CsiCamera, policy: ReconnectPolicy) -> None:
        self._camera, self._policy = camera, policy
        self._name, self.decoder = f"{SCHEME}://{camera.index}", ""
        self.fps: float | None = camera.fps
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._messages
            )
        except OSError as error:
            self._messages.close()
            raise UnavailableError(f"{self._name}: {command[0]}: {error.strerror}. Check its installation.") from None
        assert self._process.stdout is not None
        self._pipe = self._process.stdout.fileno()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._pipe, selectors.EVENT_READ)
        self._has_image = False

    def read(self) -> CameraFrame:
        """Wait for the next frame; see `CameraReader.read`."""
        width, height = self._camera.width, self._camera.height
        content = np.empty((height * 3 // 2, width), np.uint8)
        buffer, captured_s, position = content.data.cast("B"), 0.0, 0
        while position < len(buffer):
            timeout_s = self._policy.read_timeout_s if self._has_image else START_TIMEOUT_S
            if not self._selector.select(timeout_s):
                raise UnavailableError(f"{self._name}: no data for {timeout_s:g} s. {self._format_hint()}")
            if not position:
                captured_s = time.monotonic()
            part = os.read(self._pipe, min(READ_BYTES, len(buffer) - position))
            if not part:
                raise UnavailableError(f"{self._name}: the program of the camera ended. {self._format_hint()}")
            buffer[position : position + len(part)] = part
            position += len(part)
        self._has_image = True
        return CameraFrame(lambda: convert_i420(content), captured_s)

    def close(self) -> None:
        """End the program."""
        self._selector.close()
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._messages.close()

    def _format_hint(self) -> str:
        """Return the last line that the program wrote, or a hint if there is none."""
        self._messages.seek(0)
        lines = self._messages.read()[-4096:].decode(errors="replace").split("\n")
        texts = ["".join(char for char in line if char.isprintable()).strip() for line in lines]
        last = next((text for text in reversed(texts) if text), "")
        hint = "Check the ribbon cable and that no other program uses the camera."
        return f"It says: {last[:200]}. {hint}" if last else hint


def open_csi(address: str, policy: ReconnectPolicy) -> CsiReader:
    """Start the program of a CSI camera.

    Args:
        address: As for `parse_csi_address`.
        policy: Timeouts.

    Raises:
        UsageError: The address is invalid.
        UnavailableError: No program for CSI cameras is installed, or it does not start.
    """
    camera = parse_csi_address(address)
    return CsiReader(make_csi_command(camera), camera, policy)


def parse_csi_address(address: str) -> CsiCamera:
    """Parse the address of a CSI camera.

    Args:
        address: `csi://0`, with size and rate `csi://0?width=1920&height=1080&fps=30`. The default is 1280x720 at 30.

    Raises:
        UsageError: A part is unknown, or a value is out of range.
    """
    expected = f"Expected {SCHEME}://0 or {SCHEME}://0?width=1920&height=1080&fps=30"
    parts = urlsplit(address)
    values = {"index": parts.netloc, **dict(parse_qsl(parts.query, keep_blank_values=True))}
    limits = {"index": (0, 99), "width": (STRIDE_PX, MAX_SIDE), "height": (2, MAX_SIDE), "fps": (1, MAX_FPS)}
    if parts.path.strip("/") or not values.keys() <= limits.keys():
        raise UsageError(f"--source {address}: unknown part. {expected}.")
    numbers = {name: int(text) for name, text in values.items() if text.isascii() and text.isdigit()}
    for name in values:
        low, high = limits[name]
        if not low <= numbers.get(name, -1) <= high:
            raise UsageError(f"--source {address}: {name}: expected an integer from {low} to {high}. {expected}.")
    camera = CsiCamera(**numbers)
    if camera.width % STRIDE_PX or camera.height % 2:
        raise UsageError(f"--source {address}: expected a width that is a multiple of {STRIDE_PX} and an even height.")
    return camera


def make_csi_command(camera: CsiCamera) -> list[str]:
    """Return the command that writes the images of a camera, of the programs that are installed.

    Args:
        camera: The camera.

    Raises:
        UnavailableError: No program for CSI cameras is installed.
    """
    size = f"width={camera.width},height={camera.height},framerate={camera.fps}/1"
    raw = f"video/x-raw,format=I420,width={camera.width},height={camera.height}"
    if _has_element("nvarguscamerasrc"):
        return [
            GSTREAMER, "-q", "nvarguscamerasrc", f"sensor-id={camera.index}",
            "!", f"video/x-raw(memory:NVMM),{size}", "!", "nvvidconv", "!", raw, "!", "fdsink", "fd=1", "sync=false",
        ]  # fmt: skip
    for program in RASPBERRY_PI:
        if shutil.which(program):
            return [
                program, "--camera", str(camera.index), "--timeout", "0", "--nopreview", "--codec", "yuv420", "--flush",
                "--width", str(camera.width), "--height", str(camera.height), "--framerate", str(camera.fps),
                "--output", "-",
            ]  # fmt: skip
    if camera.index == 0 and _has_element("libcamerasrc"):  # it takes names of cameras, not numbers
        return [
            GSTREAMER, "-q", "libcamerasrc", "!", f"video/x-raw,{size}", "!", "videoconvert", "!", raw,
            "!", "fdsink", "fd=1", "sync=false",
        ]  # fmt: skip
    raise UnavailableError(
        f"{SCHEME}://{camera.index}: no program for CSI cameras is installed. Install {GSTREAMER} with "
        "nvarguscamerasrc (Jetson: nvidia-l4t-gstreamer), rpicam-apps (Raspberry Pi), or gstreamer1.0-libcamera."
    )


def convert_i420(content: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert an image with planes Y, U and V at half size.

    Args:
        content (uint8[H * 3 / 2, W]): The planes.

    Returns:
        uint8[H, W, 3]: RGB.
    """
    return cv2.cvtColor(content, cv2.COLOR_YUV2RGB_I420).astype(np.uint8, copy=False)


def _has_element(name: str) -> bool:
    """Return whether GStreamer and one of its elements are installed."""
    inspect = shutil.which("gst-inspect-1.0")
    if not inspect or not shutil.which(GSTREAMER):
        return False
    return subprocess.run([inspect, "--exists", name], capture_output=True, timeout=30, check=False).returncode == 0
