"""Changes of the file of `--cameras`: lines and zones that the page of `--web` saves, and what a reload applies."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Protocol

import yaml

from hkd_deploy.demo.analytics import replace_analytics
from hkd_deploy.demo.base import Counter, Tracker
from hkd_deploy.demo.cameras import CameraConfig, Line, Point, Zone, make_shapes, read_cameras
from hkd_deploy.demo.delivery import Report
from hkd_deploy.demo.run import CameraPipeline
from hkd_deploy.demo.tracking import PersonTracker
from hkd_deploy.streams import FrameSource, LiveSource
from hkd_det.config import dataclass_from_dict
from hkd_det.draw import Redaction
from hkd_det.errors import DataError, HkdError, UsageError
from hkd_det.files import atomic_write

MAX_SHAPES = 50  # lines and zones of one camera
MAX_NAME_LENGTH = 60
DECIMALS = 4


@dataclass(frozen=True)
class SceneEntry:
    """Lines and zones from outside, before they are checked: normalized points by name."""

    lines: dict[str, tuple[Point, ...]]
    zones: dict[str, tuple[Point, ...]]


def parse_scene(content: Any) -> tuple[tuple[Line, ...], tuple[Zone, ...]]:
    """Check lines and zones from outside.

    Args:
        content: Mapping with the keys `lines` and `zones`, each a mapping from a name to a list of normalized points.

    Returns:
        Lines and zones. Coordinates are rounded to four decimals.

    Raises:
        UsageError: A key or a value is invalid.
    """
    entry = dataclass_from_dict(SceneEntry, content, "scene")
    num_shapes = len(entry.lines) + len(entry.zones)
    if num_shapes > MAX_SHAPES:
        raise UsageError(f"scene: expected at most {MAX_SHAPES} lines and zones, got {num_shapes}.")
    for name in [*entry.lines, *entry.zones]:
        if not name.strip() or not name.isprintable() or len(name) > MAX_NAME_LENGTH:
            raise UsageError(f"scene: expected a printable name of at most {MAX_NAME_LENGTH} characters, got {name!r}.")
    return make_shapes(_round(entry.lines), _round(entry.zones), "scene")


def write_scene(path: Path, camera: str, lines: Sequence[Line], zones: Sequence[Zone]) -> None:
    """Replace the lines and zones of a camera in a file. All other keys are kept, and so are the permissions.

    Comments are kept, except inside the replaced keys. A file that contains anchors, or a form that cannot be changed
    at this place, is written again without comments.

    Args:
        path: The file.
        camera: Name of the camera.
        lines: Its lines.
        zones: Its zones.

    Raises:
        DataError: The file is missing or is not YAML, or the camera is not in it.
        UsageError: The file is invalid.
        OSError: The file cannot be written.
    """
    path = path.resolve()  # the file, not a link to it, is replaced
    names = [config.name for config in read_cameras(path)]
    if camera not in names:
        raise DataError(f"{path}: no camera {camera}. The file changed: reload or restart hkd-demo.")
    index = names.index(camera)
    text = path.read_bytes().decode("utf-8-sig")
    expected = yaml.safe_load(text)
    changed = text
    for key, shapes in (("lines", lines), ("zones", zones)):
        value = {shape.name: [list(point) for point in shape.points] for shape in shapes}
        if value or key in expected["cameras"][index]:
            expected["cameras"][index][key] = value
            changed = _replace_value(changed, index, key, value)
    if not _is_equal(changed, expected):
        changed = yaml.safe_dump(expected, sort_keys=False, allow_unicode=True)
    with atomic_write(path) as temp_path:
        temp_path.write_bytes(changed.encode())
        shutil.copymode(path, temp_path)  # addresses contain passwords


class CameraPage(Protocol):
    """A page that shows the cameras, and saves lines and zones to the file.

    Attributes:
        file_lock: Held while they are saved and set.
    """

    file_lock: Lock

    def set_camera(self, camera: CameraConfig) -> None:
        """Replace the settings of a camera, or add one; see `WebSink.set_camera`."""


@dataclass(frozen=True)
class _Change:
    """What a reload does with one camera of the file.

    Attributes:
        camera: New settings, with the privacy of the run if it has none.
        pipeline: The running camera, or a new one.
        analytics: Tracker and counters for its lines and zones.
        source: New source. None keeps the source.
    """

    camera: CameraConfig
    pipeline: CameraPipeline
    analytics: tuple[Tracker | None, Sequence[Counter]]
    source: FrameSource | None


class CameraReloader:
    """Applies the changed file of `--cameras` to a run. Cameras that do not change are not interrupted.

    Tracks, counts and statistics of a camera stay, also if its address changes. The whole file is checked first:
    nothing changes if a part of it is invalid.

    Args:
        read: Reads the file.
        cameras: The cameras of the run.
        pipelines: Their pipelines. New cameras are appended; removed ones stay in the list.
        make_pipeline: Creates the pipeline of a new camera.
        conf: Minimum score of shown detections of a camera that states none, 0 to 1.
        privacy: Privacy of a camera that states none.
        open_source: Opens a source; see `open_source`. Live sources open in the background.
        report: Called with one line for each reload.
        page: The page that shows the cameras. None without one.
    """

    def __init__(
        self,
        read: Callable[[], Sequence[CameraConfig]],
        cameras: Sequence[CameraConfig],
        pipelines: list[CameraPipeline],
        make_pipeline: Callable[[CameraConfig, FrameSource], CameraPipeline],
        conf: float,
        privacy: Redaction | None,
        open_source: Callable[[str], AbstractContextManager[FrameSource]],
        report: Report,
        page: CameraPage | None = None,
    ) -> None:
        self._read, self._pipelines, self._make_pipeline = read, pipelines, make_pipeline
        self._conf, self._privacy, self._open_source = conf, privacy, open_source
        self._report, self._page = report, page
        self._cameras = {camera.name: camera for camera in cameras}
        self._opened: dict[FrameSource, ExitStack] = {}  # sources that a reload opened

    def reload(self) -> None:
        """Read and apply the file, and report what changed. Call it between two frames, in the thread of the detector.

        If the file is invalid, or a new source cannot be opened, this is reported and nothing changes.
        """
        try:
            self._report(f"reload: {self._update()}")
        except HkdError as error:
            self._report(f"reload: {error} The configuration stays as it was.", level="error")
        except OSError as error:
            text = f"reload: {error.filename}: {error.strerror}. The configuration stays as it was."
            self._report(text, level="error")

    def _update(self) -> str:
        """Read and apply the file. Return what changed."""
        with self._page.file_lock if self._page else nullcontext():
            cameras = {camera.name: camera for camera in self._read()}
            for pipeline in self._pipelines:
                pipeline.apply_scenes()
            changes = self._prepare(cameras)
            for pipeline in self._pipelines:
                if pipeline.name not in cameras and not pipeline.is_removed:
                    self._close_source(pipeline)
                    pipeline.remove()
            for change in changes:
                self._apply(change)
            summary = _describe_changes(self._cameras, cameras)
            self._cameras = cameras
        return summary

    def close(self) -> None:
        """Close the sources that were opened."""
        for stack in self._opened.values():
            stack.close()

    def _prepare(self, cameras: Mapping[str, CameraConfig]) -> list[_Change]:
        """Do all that can fail: open sources, and create trackers and counters."""
        running = {pipeline.name: pipeline for pipeline in self._pipelines}
        changes, opened = [], {}
        with ExitStack() as undo:
            for name, camera in cameras.items():
                pipeline, source = running.get(name), None
                if pipeline is None or pipeline.is_removed or camera.source != self._cameras[name].source:
                    stack = undo.enter_context(ExitStack())
                    source = stack.enter_context(self._open_source(camera.source))
                    opened[source] = stack
                if pipeline is None:
                    assert source is not None
                    pipeline = self._make_pipeline(camera, source)
                analytics = replace_analytics(pipeline, camera.lines, camera.zones)
                effective = replace(camera, privacy=camera.privacy or self._privacy)
                changes.append(_Change(effective, pipeline, analytics, source))
            undo.pop_all()
        self._opened |= opened
        return changes

    def _apply(self, change: _Change) -> None:
        camera, pipeline = change.camera, change.pipeline
        if pipeline not in self._pipelines:
            self._pipelines.append(pipeline)
        elif change.source is not None:
            self._close_source(pipeline)
            pipeline.replace_source(change.source)
        pipeline.conf = self._conf if camera.conf is None else camera.conf
        pipeline.privacy = camera.privacy
        tracker, counters = change.analytics
        if isinstance(tracker, PersonTracker):
            tracker.min_score = pipeline.conf
        pipeline.set_scene(tracker, counters, camera.lines, camera.zones)
        if self._page:
            self._page.set_camera(camera)

    def _close_source(self, pipeline: CameraPipeline) -> None:
        """Close the source of a camera. A camera that hangs is not waited for."""
        if isinstance(pipeline.source, LiveSource):
            pipeline.source.stop()
        if stack := self._opened.pop(pipeline.source, None):
            Thread(target=stack.close, daemon=True).start()


def _describe_changes(old: Mapping[str, CameraConfig], new: Mapping[str, CameraConfig]) -> str:
    names = {
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "changed": [name for name in new if name in old and new[name] != old[name]],
    }
    parts = [f"{kind} {', '.join(cameras)}" for kind, cameras in names.items() if cameras]
    return f"{'; '.join(parts) or 'no changes'}."


def _round(shapes: dict[str, tuple[Point, ...]]) -> dict[str, tuple[Point, ...]]:
    return {name: tuple((round(x, DECIMALS), round(y, DECIMALS)) for x, y in points) for name, points in shapes.items()}


def _is_equal(text: str, expected: Any) -> bool:
    try:
        return bool(yaml.safe_load(text) == expected)
    except yaml.YAMLError:
        return False


def _replace_value(text: str, index: int, key: str, value: Any) -> str:
    """Replace or add one key of a camera in the text of the file. The caller checks the result."""
    flow = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6).strip()
    try:
        root: Any = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:
        return text
    entry = root.value[0][1].value[index]
    for key_node, value_node in entry.value:
        if key_node.value == key:
            start = text.index(":", key_node.end_mark.index) + 1
            return f"{text[:start]} {flow}{text[_find_end(value_node) :]}"
    if entry.flow_style:
        end = entry.end_mark.index - 1
        return f"{text[:end]}, {key}: {flow}{text[end:]}"
    end = text.find("\n", _find_end(entry))
    head, tail = (text, "") if end < 0 else (text[:end].removesuffix("\r"), text[end:])
    newline = "\r\n" if "\r\n" in text else "\n"
    return f"{head}{newline}{' ' * entry.value[0][0].start_mark.column}{key}: {flow}{tail}"


def _find_end(node: yaml.Node) -> int:
    """Return the index behind a value. The end of a block in PyYAML is the next token, behind comments."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _find_end(last[1] if isinstance(node, yaml.MappingNode) else last)
    return int(node.end_mark.index)
