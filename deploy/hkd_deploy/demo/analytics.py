"""Flags of tracking, lines, zones and heat maps, and the objects that they create."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic

from hkd_deploy.demo.base import Counter, FrameResult, FrameSink, Tracker
from hkd_deploy.demo.cameras import CameraConfig, Line, Point, Zone, make_line, make_zone
from hkd_deploy.demo.counting import SceneCounter
from hkd_deploy.demo.density import HeatMap
from hkd_deploy.demo.run import CameraPipeline
from hkd_deploy.demo.tracking import PersonTracker
from hkd_deploy.streams import FrameSource
from hkd_det.errors import UsageError

HEATMAP_SUFFIX = ".png"
HEATMAP_INTERVAL_S = 60.0


def add_analytics_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags.

    Args:
        parser: Parser of hkd-demo.
    """
    group = parser.add_argument_group("tracking and counting")
    group.add_argument(
        "--track", action="store_true", help="track people: an id for each person; requires the extra track"
    )
    group.add_argument(
        "--line",
        action="append",
        default=[],
        metavar="NAME=X1,Y1,X2,Y2",
        help="count the people who cross a line, in both directions; fractions of width and height, 0 to 1; "
        "repeat it for several; implies --track",
    )
    group.add_argument(
        "--zone",
        action="append",
        default=[],
        metavar="NAME=X1,Y1,X2,Y2,X3,Y3,...",
        help="count the people in a polygon, entries, exits and dwell time; repeat it for several; implies --track",
    )
    group.add_argument(
        "--heatmap",
        type=Path,
        metavar="FILE",
        help="image (.png) of where people are, over the last frame; written every minute and at the end; "
        "a directory for several cameras",
    )


def apply_analytics_flags(flags: argparse.Namespace, cameras: Sequence[CameraConfig]) -> list[CameraConfig]:
    """Check the flags, and add lines and zones to the camera.

    Args:
        flags: Parsed flags.
        cameras: The cameras.

    Returns:
        The cameras with their lines and zones.

    Raises:
        UsageError: A line or a zone is invalid, or there are several cameras.
    """
    if flags.heatmap and len(cameras) == 1 and flags.heatmap.suffix.lower() != HEATMAP_SUFFIX:
        raise UsageError(f"--heatmap {flags.heatmap}: expected a file ending in {HEATMAP_SUFFIX}.")
    if not flags.line and not flags.zone:
        return list(cameras)
    if len(cameras) > 1:
        flag = "--line" if flags.line else "--zone"
        raise UsageError(f"{flag}: requires a single camera. Write lines and zones of several into --cameras FILE.")
    lines, zones = list(cameras[0].lines), list(cameras[0].zones)
    names = {line.name for line in lines}
    for text in flags.line:
        name, points = _parse_points("--line", text, names)
        lines.append(make_line(name, points, f"--line {name}"))
    names = {zone.name for zone in zones}
    for text in flags.zone:
        name, points = _parse_points("--zone", text, names)
        zones.append(make_zone(name, points, f"--zone {name}"))
    return [replace(cameras[0], lines=tuple(lines), zones=tuple(zones))]


def create_analytics(
    camera: CameraConfig, conf: float, is_tracking: bool
) -> tuple[PersonTracker | None, list[SceneCounter]]:
    """Create the tracker and the counters of a camera.

    Args:
        camera: The camera.
        conf: Minimum score of shown detections.
        is_tracking: True to track without lines and zones too.

    Returns:
        tracker: None if the camera needs none.
        counters: One if the camera has lines or zones, otherwise none.

    Raises:
        UnavailableError: The package `trackers` is not installed.
    """
    has_scene = bool(camera.lines or camera.zones)
    tracker = PersonTracker(conf) if is_tracking or has_scene else None
    return tracker, [SceneCounter(camera.lines, camera.zones)] if has_scene else []


def make_pipeline(
    flags: argparse.Namespace,
    default_conf: float,
    sinks: Sequence[FrameSink],
    camera: CameraConfig,
    source: FrameSource,
) -> CameraPipeline:
    """Create a camera of a run, with the values of the flags where its settings state none.

    Args:
        flags: Parsed flags.
        default_conf: Minimum score of shown detections, 0 to 1.
        sinks: Outputs.
        camera: The settings.
        source: The opened source.

    Raises:
        UnavailableError: The package `trackers` is not installed.
    """
    conf = default_conf if camera.conf is None else camera.conf
    tracker, counters = create_analytics(camera, conf, flags.track)
    privacy = camera.privacy or flags.privacy
    return CameraPipeline(camera.name, source, conf, sinks, privacy, tracker, counters, camera.lines, camera.zones)


def make_added_pipeline(
    flags: argparse.Namespace,
    default_conf: float,
    sinks: Sequence[FrameSink],
    camera: CameraConfig,
    source: FrameSource,
) -> CameraPipeline:
    """Create a camera that is added to a run; see `make_pipeline`.

    Raises:
        UsageError: An output has one file per camera, which were opened at the start.
        UnavailableError: The package `trackers` is not installed.
    """
    for flag in [flag for flag, path in (("--save", flags.save), ("--heatmap", flags.heatmap)) if path]:
        raise UsageError(f"{flag}: has no file for the new camera {camera.name}. Restart hkd-demo to add it.")
    return make_pipeline(flags, default_conf, sinks, camera, source)


def replace_analytics(
    pipeline: CameraPipeline, lines: Sequence[Line], zones: Sequence[Zone]
) -> tuple[Tracker | None, list[Counter]]:
    """Create the tracker and the counters of a running camera for other lines and zones.

    Args:
        pipeline: The camera. It is not changed.
        lines: The lines.
        zones: The zones.

    Returns:
        tracker: That of the camera, or a new one if it has none and needs it.
        counters: Those of the camera, with a changed `SceneCounter`; see `SceneCounter.with_shapes`.

    Raises:
        UnavailableError: The package `trackers` is not installed.
    """
    tracker = pipeline.tracker
    others = [counter for counter in pipeline.counters if not isinstance(counter, SceneCounter)]
    if not lines and not zones:
        return tracker, others
    scene = next((counter for counter in pipeline.counters if isinstance(counter, SceneCounter)), SceneCounter())
    return tracker or PersonTracker(pipeline.conf), [scene.with_shapes(lines, zones), *others]


class HeatMapSink:
    """The file of `--heatmap` of one camera. It is a `FrameSink`.

    Args:
        path: The file: .png.

    Attributes:
        path: The file.
        is_saved: Whether the file was written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.is_saved = path, False
        self._heat_map = HeatMap()
        self._last: FrameResult | None = None
        self._saved_s = monotonic()

    def write(self, result: FrameResult) -> None:
        """Add the people of a frame; see `FrameSink.write`."""
        image_hw = (result.original_rgb.shape[0], result.original_rgb.shape[1])
        self._heat_map.add(result.detections.boxes_xyxy, result.timestamp_s, image_hw)
        self._last = result
        if monotonic() - self._saved_s >= HEATMAP_INTERVAL_S:
            self.close()

    def write_status(self, camera: str, status: str) -> None:
        """Do nothing: a lost camera adds no time."""

    def close(self) -> None:
        """Save the map over the last image, in which people are hidden with `--privacy`. Without a frame there is none.

        Raises:
            DataError: The file cannot be written.
        """
        if self._last is not None:
            self._heat_map.save(self.path, self._last.image_rgb)
            self.is_saved, self._saved_s = True, monotonic()


def _parse_points(flag: str, text: str, names: set[str]) -> tuple[str, tuple[Point, ...]]:
    """Parse NAME=x1,y1,x2,y2,... and add the name to `names`."""
    name, _, numbers = text.rpartition("=")
    try:
        values = [float(number) for number in numbers.split(",")]
    except ValueError:
        values = []
    if not name.strip() or not name.isprintable() or len(values) < 4 or len(values) % 2:
        raise UsageError(f"{flag} {text}: expected NAME=X1,Y1,X2,Y2 with fractions of width and height.")
    if name in names:
        raise UsageError(f"{flag} {name}: this name is used twice. Choose another name.")
    names.add(name)
    return name, tuple(zip(values[::2], values[1::2], strict=True))
