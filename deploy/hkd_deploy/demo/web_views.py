"""What the page of `hkd-demo --web` shows: the newest frame and the statistics of each camera, without addresses."""

import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from threading import Lock
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_deploy.demo.base import FrameResult
from hkd_deploy.demo.cameras import CameraConfig, Line, Zone
from hkd_deploy.demo.metrics import DOWN
from hkd_deploy.demo.run import CameraPipeline
from hkd_deploy.power_rails import RailSensor, SensorMissingError

HISTORY_S = 600  # time of the plot of persons
MAX_AGES = 300  # number of frames of the percentiles of the age
MAX_IMAGE_WIDTH = 1280  # wider images are reduced for the page, pixels
JPEG_QUALITY = 75
THERMAL_DIRECTORY = Path("/sys/class/thermal")
HIDDEN = "the camera"  # replaces an address
URL_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*[^\s.,:;)]")
IPV4_PATTERN = re.compile(r"(?<![\w.])\d{1,3}(\.\d{1,3}){3}(:\d+)?(?![\w.]*\w)")
HOST_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(?:.*@)?(\[[^\]]*\]|[^/:?#]*)", re.DOTALL)


class CameraView:
    """One camera on the page. `add` and `set_status` are called by the thread of the detector, the rest by the server.

    Args:
        camera: The camera.
        number: Its number, from 1: its name on the page if the name contains the address.

    Attributes:
        name: Name on the page.
        seq: Number of frames so far.
        lines: Lines that the page shows.
        zones: Zones that the page shows.
    """

    def __init__(self, camera: CameraConfig, number: int) -> None:
        self._camera, self._number = camera, number
        self.name = make_page_name(camera, number)
        self.seq = 0
        self.lines, self.zones = camera.lines, camera.zones
        self._lock = Lock()
        self._result: FrameResult | None = None
        self._status = ""
        self._ages_ms: deque[float] = deque(maxlen=MAX_AGES)
        self._bins: deque[list[int]] = deque(maxlen=HISTORY_S)  # second, number of frames, sum of persons
        self._encoded: tuple[int, dict[str, Any], bytes] = (0, {}, b"")

    def add(self, result: FrameResult) -> None:
        """Keep a frame. It replaces the previous one.

        Args:
            result: The frame.
        """
        second = int(time.time())
        with self._lock:
            self._result, self._status = result, result.status
            self.seq += 1
            if result.age_ms is not None:
                self._ages_ms.append(result.age_ms)
            if not self._bins or self._bins[-1][0] != second:
                self._bins.append([second, 0, 0])
            self._bins[-1][1] += 1
            self._bins[-1][2] += len(result.detections)

    def set_status(self, status: str) -> None:
        """Keep the status.

        Args:
            status: Description of a problem. Empty if there is none.
        """
        with self._lock:
            self._status = status

    def set_scene(self, lines: Sequence[Line], zones: Sequence[Zone]) -> None:
        """Replace the lines and zones.

        Args:
            lines: Lines.
            zones: Zones.
        """
        self.lines, self.zones = tuple(lines), tuple(zones)

    def set_camera(self, camera: CameraConfig) -> None:
        """Replace the settings. The shown image gets the new privacy, also that of a lost camera.

        Args:
            camera: The camera. Its privacy is that of the run if it has none.
        """
        with self._lock:
            self._camera, self.name = camera, make_page_name(camera, self._number)
            self.lines, self.zones = camera.lines, camera.zones
            if self._result is not None and self._result.privacy != camera.privacy:
                self._result = replace(self._result, privacy=camera.privacy)
                self.seq += 1

    def encode(self) -> tuple[dict[str, Any], bytes]:
        """Encode the newest frame, once for all viewers.

        Returns:
            Properties of the frame, with `seq` and normalized boxes, and its JPEG. Both are empty without a frame.
        """
        with self._lock:
            seq, result = self.seq, self._result
        if result is None:
            return {}, b""
        if self._encoded[0] != seq:
            self._encoded = (seq, _describe_frame(result, seq), encode_jpeg(result.image_rgb))
        return self._encoded[1], self._encoded[2]

    @property
    def camera_name(self) -> str:
        """Name of the camera in the run. It can contain the address: never send it to a browser."""
        return self._camera.name

    def describe(self, pipeline: CameraPipeline | None, since: int) -> dict[str, Any]:
        """Return the state of the camera for the page.

        Args:
            pipeline: The running camera. None before the run.
            since: The plot is returned from this second on (time since 1970).
        """
        with self._lock:
            result, status, ages_ms = self._result, self._status, list(self._ages_ms)
            history = [[second, round(total / count, 2)] for second, count, total in self._bins if second >= since]
        status = status or (pipeline.status if pipeline else "")
        if pipeline and pipeline.is_ended:
            status = status or "ended"
        is_down = status.startswith(DOWN)
        if result is None and not status:
            status = "opening"
        state: dict[str, Any] = {
            "name": self.name,
            "status": self.hide_address(status),
            "is_down": is_down,
            "is_removed": pipeline is not None and pipeline.is_removed,
            "history": history,
            "lines": {line.name: line.points for line in self.lines},
            "zones": {zone.name: zone.points for zone in self.zones},
            "num_frames": pipeline.stats.num_frames if pipeline else 0,
            "num_dropped": pipeline.source.num_dropped if pipeline else 0,
            "num_lost": pipeline.num_lost if pipeline else 0,
            "fps": round(pipeline.stats.recent_fps, 1) if pipeline and result and not is_down else 0,
            "age_percentiles_ms": [round(float(age)) for age in np.percentile(ages_ms, (50, 99))] if ages_ms else [],
        }
        if result is not None:
            state |= {
                "stages_ms": {name.removesuffix("_ms"): round(ms, 1) for name, ms in asdict(result.times).items()},
                "age_ms": None if result.age_ms is None else round(result.age_ms),
                "persons": len(result.detections),
                "counts": _make_json(result.counts),
                "model": result.overlay[0] if result.overlay else "",
            }
        return state

    def hide_address(self, text: str) -> str:
        """Replace the name and the address of the camera in a message.

        Args:
            text: Message.

        Returns:
            The message with the name on the page.
        """
        if self._camera.name != self.name:
            text = text.replace(self._camera.name, self.name)
        text = IPV4_PATTERN.sub(HIDDEN, URL_PATTERN.sub(HIDDEN, text))
        host = find_host(self._camera.source)
        return re.sub(rf"(?<![\w.-]){re.escape(host)}(:\d+)?(?![\w-])", HIDDEN, text) if host else text


def make_page_name(camera: CameraConfig, number: int) -> str:
    """Return the name of a camera on the page, without its address and without directories.

    Args:
        camera: The camera.
        number: Number of the camera, from 1.

    Returns:
        The name, the name of the file, or `camera NUMBER`.
    """
    host = find_host(camera.source)
    if "://" in camera.name or IPV4_PATTERN.search(camera.name) or (host and host.lower() in camera.name.lower()):
        return f"camera {number}"
    return Path(camera.name).name if camera.name.startswith(camera.source) else camera.name


def find_host(source: str) -> str:
    """Return the host of a URL, without brackets. Empty if the source is no URL or has no host.

    Args:
        source: Image source, as for `open_source`.
    """
    match = HOST_PATTERN.match(source)
    return match[1].strip("[]") if match else ""


def encode_jpeg(image_rgb: NDArray[np.uint8]) -> bytes:
    """Encode an image for the page, with a width of at most 1280 pixels.

    Args:
        image_rgb (uint8[H, W, 3]): RGB.

    Returns:
        The JPEG.
    """
    height, width = image_rgb.shape[:2]
    if width > MAX_IMAGE_WIDTH:
        size_wh = (MAX_IMAGE_WIDTH, max(1, round(height * MAX_IMAGE_WIDTH / width)))
        image_rgb = cv2.resize(image_rgb, size_wh, interpolation=cv2.INTER_AREA)
    image_bgr = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".jpg", image_bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1])


def read_temperature_c(directory: Path = THERMAL_DIRECTORY) -> float | None:
    """Read the temperature of the hottest sensor of the device.

    Args:
        directory: Directory of the thermal zones of Linux.

    Returns:
        Temperature in degrees Celsius. None if there is no sensor.
    """
    values = []
    for path in directory.glob("thermal_zone*/temp"):
        try:
            values.append(int(path.read_text()) / 1000)
        except (OSError, ValueError):  # a sensor of a part that is off
            continue
    return max((value for value in values if -40 < value < 200), default=None)


def read_power_w(root: Path = Path("/")) -> float | None:
    """Read the power of a Jetson board.

    Args:
        root: Root directory of the system.

    Returns:
        Power in watts. None if the power monitors are missing or off, or if no rail is known to be that of the board.
    """
    try:
        return RailSensor(root).read()
    except (SensorMissingError, OSError, ValueError):
        return None


def _describe_frame(result: FrameResult, seq: int) -> dict[str, Any]:
    height, width = result.original_rgb.shape[:2]
    boxes = result.detections.boxes_xyxy / np.array([width, height, width, height], np.float32)
    return {
        "seq": seq,
        "boxes": [[round(value, 4) for value in box] for box in boxes.tolist()],
        "scores": [round(score, 2) for score in result.detections.scores.tolist()],
        "ids": None if result.track_ids is None else result.track_ids.tolist(),
    }


def _make_json(value: Any) -> Any:
    """Return counts with text keys, and without objects that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _make_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_make_json(item) for item in value]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    return round(float(value), 2)
