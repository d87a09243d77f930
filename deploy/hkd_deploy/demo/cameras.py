"""Cameras of a run: the file of `--cameras`, and names for `--source`.

Lines and zones are in normalized coordinates: fractions of the width and height of the image, from the top left corner.
They stay valid if the size of the image changes, for example with another stream of the same camera.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hkd_deploy.streams import redact_url
from hkd_det.config import check_range, dataclass_from_dict
from hkd_det.draw import Redaction
from hkd_det.errors import UsageError
from hkd_det.files import read_yaml

Point = tuple[float, float]
MIN_ZONE_POINTS = 3


@dataclass(frozen=True)
class Line:
    """A line that people cross.

    Attributes:
        name: Name, unique for its camera.
        points: Both ends (x, y), normalized.
    """

    name: str
    points: tuple[Point, Point]


@dataclass(frozen=True)
class Zone:
    """An area of the image.

    Attributes:
        name: Name, unique for its camera.
        points: Corners (x, y) of a polygon, normalized. At least three.
    """

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class CameraConfig:
    """Settings of one camera.

    Attributes:
        name: Unique name, without credentials.
        source: Image source, as for `open_source`. It can contain a password: never print it.
        conf: Minimum score of shown detections, 0 to 1. None for the value of the run.
        privacy: How people are made unrecognizable. None for the value of the run.
        lines: Lines that people cross.
        zones: Areas.
    """

    name: str
    source: str
    conf: float | None = None
    privacy: Redaction | None = None
    lines: tuple[Line, ...] = ()
    zones: tuple[Zone, ...] = ()


@dataclass(frozen=True)
class CameraEntry:
    """One camera of the file, before lines and zones are checked. Attributes as in `CameraConfig`."""

    name: str
    source: str
    conf: float | None = None
    privacy: Redaction | None = None
    lines: dict[str, tuple[Point, ...]] = field(default_factory=dict)
    zones: dict[str, tuple[Point, ...]] = field(default_factory=dict)


def read_cameras(path: Path) -> list[CameraConfig]:
    """Read the file of `--cameras`.

    Args:
        path: YAML file with the key `cameras`: a list of mappings with the keys of `CameraConfig`, of which `name` and
            `source` are required. `lines` and `zones` map a name to a list of points.

    Returns:
        The cameras, in the order of the file.

    Raises:
        DataError: The file is missing or is not YAML.
        UsageError: A key is unknown or missing, a value is invalid, or two cameras have the same name.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or list(content) != ["cameras"]:
        raise UsageError(f"{path}: expected one key, cameras. Write cameras: and a list of name and source.")
    entries = content["cameras"]
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{path}: cameras: expected a list with at least one camera. Add - name: and source:.")
    configs: list[CameraConfig] = []
    for index, entry in enumerate(entries):
        config = _read_camera(entry, path, index)
        if config.name in [other.name for other in configs]:
            raise UsageError(f"{path}: cameras[{index}].name: {config.name} is the name of two cameras. Rename one.")
        configs.append(config)
    return configs


def name_sources(sources: Sequence[str]) -> list[CameraConfig]:
    """Create the cameras of `--source`. The name is the source without credentials.

    Args:
        sources: Image sources, as for `open_source`.

    Returns:
        One camera per source. A name that is used before gets a number: `NAME (2)`.
    """
    configs: list[CameraConfig] = []
    names: set[str] = set()
    for source in sources:
        base = name = f"camera {source}" if source.isascii() and source.isdigit() else redact_url(source)
        number = 1
        while name in names:
            number += 1
            name = f"{base} ({number})"
        names.add(name)
        configs.append(CameraConfig(name, source))
    return configs


def make_slugs(cameras: Sequence[str]) -> dict[str, str]:
    """Return a name for topics and directories for each camera: letters, digits, - and _ only, all different.

    Args:
        cameras: Names of the cameras.
    """
    slugs: dict[str, str] = {}
    for camera in cameras:
        base = slug = re.sub(r"[^A-Za-z0-9-]+", "_", camera).strip("_") or "camera"
        number = 2
        while slug in slugs.values():
            slug, number = f"{base}_{number}", number + 1
        slugs[camera] = slug
    return slugs


def _read_camera(entry: Any, path: Path, index: int) -> CameraConfig:
    where = f"{path}: cameras[{index}]"
    source = entry.get("source") if isinstance(entry, dict) else ""
    if not isinstance(source, (str, int, type(None))) or isinstance(source, bool):
        raise UsageError(f"{where}.source: expected one source as text.")  # without the value: it can have a password
    values = dataclass_from_dict(CameraEntry, entry, where)
    if not values.name.strip() or not values.name.isprintable():
        raise UsageError(f"{where}.name: expected a printable name, got {values.name!r}.")
    if not values.source:
        raise UsageError(f"{where}.source: expected an address, a file or a webcam, got an empty text.")
    where = f"{path}: {values.name}"
    if values.conf is not None:
        check_range(f"{where}.conf", values.conf, 0, 1)
    lines, zones = make_shapes(values.lines, values.zones, where)
    return CameraConfig(values.name, values.source, values.conf, values.privacy, lines, zones)


def make_shapes(
    lines: Mapping[str, tuple[Point, ...]], zones: Mapping[str, tuple[Point, ...]], where: str
) -> tuple[tuple[Line, ...], tuple[Zone, ...]]:
    """Create the lines and zones of a camera.

    Args:
        lines: Normalized points by name.
        zones: Normalized points by name.
        where: Prefix of error messages.

    Returns:
        Lines and zones.

    Raises:
        UsageError: A point is outside the image, a line has not two points, or a zone has no area.
    """
    return (
        tuple(make_line(name, points, f"{where}.lines.{name}") for name, points in lines.items()),
        tuple(make_zone(name, points, f"{where}.zones.{name}") for name, points in zones.items()),
    )


def make_line(name: str, points: tuple[Point, ...], where: str) -> Line:
    """Check and create a line.

    Args:
        name: Name.
        points: Points, normalized.
        where: File and key, or flag, for messages.

    Returns:
        The line.

    Raises:
        UsageError: It does not have two different points, or a coordinate is outside 0 to 1.
    """
    _check_points(points, where)
    if len(points) != 2 or points[0] == points[1]:
        raise UsageError(f"{where}: expected two different points [[x1, y1], [x2, y2]], got {_format(points)}.")
    return Line(str(name), (points[0], points[1]))


def make_zone(name: str, points: tuple[Point, ...], where: str) -> Zone:
    """Check and create a zone.

    Args:
        name: Name.
        points: Points, normalized.
        where: File and key, or flag, for messages.

    Returns:
        The zone.

    Raises:
        UsageError: It has fewer than three points, or no area, or a coordinate is outside 0 to 1.
    """
    _check_points(points, where)
    if len(points) < MIN_ZONE_POINTS or _compute_area(points) == 0:
        raise UsageError(f"{where}: expected at least three points of a polygon with an area, got {_format(points)}.")
    return Zone(str(name), points)


def _check_points(points: tuple[Point, ...], where: str) -> None:
    for point in points:
        if not all(0 <= value <= 1 for value in point):
            raise UsageError(
                f"{where}: expected fractions of width and height, 0 to 1, got {_format((point,))}. Divide pixels by "
                "the size of the image."
            )


def _compute_area(points: tuple[Point, ...]) -> float:
    """Return the area of a polygon by the shoelace formula, rounded so that points on a line have area 0."""
    pairs = zip(points, points[1:] + points[:1], strict=True)
    return round(abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in pairs)) / 2, 9)


def _format(points: tuple[Point, ...]) -> str:
    return ", ".join(f"[{x:g}, {y:g}]" for x, y in points) or "none"
