"""Changes of the file of `--cameras`: the lines and zones of one camera, as the page of `--web` saves them."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hkd_deploy.demo.cameras import Line, Point, Zone, make_shapes, read_cameras
from hkd_det.config import dataclass_from_dict
from hkd_det.errors import DataError, UsageError
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
        raise DataError(f"{path}: no camera {camera}. The file changed after the start: restart hkd-demo.")
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
