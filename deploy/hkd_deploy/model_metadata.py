"""`Manifest`: what an exported model file says about itself, in its ONNX metadata."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from hkd_det.errors import DataError
from hkd_det.letterbox import PAD_VALUE

METADATA_FORMAT = 2  # of the metadata and of the graph's inputs and outputs; a reader knows all up to its own


# What the graph expects its input to have been through; a file that asks for anything else is refused.
PREPROCESS: dict[str, object] = {
    "layout": "NHWC",
    "color": "RGB",
    "dtype": "uint8",
    "letterbox": "top-left",
    "pad": PAD_VALUE,
}


# The graph letterboxes: nothing at all.
PREPROCESS_IN_GRAPH = {**PREPROCESS, "letterbox": "in graph"}


# All but the detector's own mean and deviation.
PREPROCESS_FLOAT01 = {**PREPROCESS, "layout": "NCHW", "dtype": "float32", "range": [0, 1]}


T = TypeVar("T")


@dataclass(frozen=True)
class ModelMetadata:
    """Facts about one exported detector.

    imgsz_hw: (height, width) pixels the network sees; the most it sees where `dynamic_size`.
    batch: pictures the graph takes at once; None where any number will do.
    flops: of one picture at imgsz_hw; one multiply-add counts as two.
    weights_sha256: 64 hexadecimal digits, of the trained weights that were exported.
    data: what the weights were trained on.
    max_hw: (height, width) pixels of the largest picture the graph takes: imgsz_hw, unless it letterboxes.
    dynamic_size: whether it takes any size up to max_hw and pads inside.
    letterbox: whether it takes any size up to max_hw, letterboxes inside, and answers in pixels of the picture.
    preprocess: "uint8": (B, H, W, 3) RGB; "float01": float32 (B, 3, H, W) RGB, 0..1.
    raw: whether every candidate comes out, before any is chosen.
    """

    model: str
    imgsz_hw: tuple[int, int]
    batch: int | None
    parameters: int
    flops: int
    weights_sha256: str
    data: str
    license: str
    date: str
    version: str
    max_imgsz_hw: tuple[int, int]
    dynamic: bool = False
    letterbox: bool = False
    preprocess: Literal["uint8", "float01"] = "uint8"
    raw: bool = False

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Path) -> "ModelMetadata":
        """The manifest in the metadata of the file at `path`.

        Raises DataError, naming the file, for a file that hkd-export did not write, one of a newer
        format, a missing key or a value that cannot be read.
        """
        written_in = _parse_format_version(metadata, path)

        def read(key: str, parse: Callable[[str], T]) -> T:
            if key not in metadata:
                raise DataError(f"{path}: its metadata has no {key}: damaged, or changed after export; export it again")
            try:
                return parse(metadata[key])
            except ValueError as error:
                raise DataError(f"{path}: metadata {key} is {metadata[key]!r}: {error}; export it again") from None

        read("task", _check_task)
        first = written_in == 1  # the one graph there was: uint8 pictures of one size, letterboxed by the reader
        known = (PREPROCESS,) if first else (PREPROCESS, PREPROCESS_IN_GRAPH, PREPROCESS_FLOAT01)
        prepared = read("hkd.preprocess", partial(_parse_preprocess, known))
        return cls(
            model=read("hkd.model", _parse_nonempty_text),
            imgsz_hw=read("imgsz", _parse_imgsz_hw),
            batch=read("batch", _parse_batch_size),
            parameters=read("hkd.parameters", _parse_positive_int),
            flops=read("hkd.flops", _parse_positive_int),
            weights_sha256=read("hkd.weights_sha256", _parse_sha256),
            data=read("hkd.data", _parse_nonempty_text),
            license=read("license", _parse_nonempty_text),
            date=read("date", _parse_nonempty_text),
            version=read("version", _parse_nonempty_text),
            max_imgsz_hw=read("imgsz" if first else "hkd.max_hw", _parse_imgsz_hw),
            dynamic=not first and read("hkd.dynamic_size", _parse_bool),
            letterbox=prepared == PREPROCESS_IN_GRAPH,
            preprocess="float01" if prepared == PREPROCESS_FLOAT01 else "uint8",
            raw=not first and read("hkd.raw", _parse_bool),
        )


def _parse_format_version(metadata: Mapping[str, str], path: Path) -> int:
    if "hkd.format" not in metadata:
        raise DataError(f"{path}: not an hkd-det model (its metadata has no hkd.format); make one with hkd-export")
    found = metadata["hkd.format"]
    if not found.isascii() or not found.isdigit() or int(found) < 1:
        raise DataError(f"{path}: metadata hkd.format is {found!r}, not a whole number; export it again")
    if int(found) > METADATA_FORMAT:
        raise DataError(
            f"{path}: written in format {found} by a newer hkd-det, this one reads up to {METADATA_FORMAT}; "
            "update with pip install -U hkd-det"
        )
    return int(found)


def _parse_nonempty_text(value: str) -> str:
    if not value.strip():
        raise ValueError("empty")
    return value


def _parse_positive_int(value: str) -> int:
    if not re.fullmatch(r"[0-9]+", value) or int(value) == 0:
        raise ValueError("not a whole number above 0")
    return int(value)


def _parse_batch_size(value: str) -> int | None:
    return None if value == "dynamic" else _parse_positive_int(value)


def _parse_imgsz_hw(value: str) -> tuple[int, int]:
    match = re.fullmatch(r"\[([0-9]+), ?([0-9]+)\]", value)
    if not match:
        raise ValueError("not of the form [height, width]")
    return _parse_positive_int(match[1]), _parse_positive_int(match[2])


def _parse_sha256(value: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError("not 64 hexadecimal digits")
    return value


def _check_task(value: str) -> None:
    if value != "detect":
        raise ValueError("only 'detect' is known here")


def _parse_bool(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError("neither true nor false")
    return value == "true"


def _parse_preprocess(supported: Sequence[dict[str, object]], value: str) -> dict[str, object]:
    found = json.loads(value)  # JSONDecodeError is a ValueError
    if found not in supported:
        raise ValueError(f"only {' or '.join(json.dumps(one) for one in supported)} is known here")
    return dict(found)
