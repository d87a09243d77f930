"""`Manifest`: what an exported model file says about itself, in its ONNX metadata."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hkd_det.errors import DataError
from hkd_det.letterbox import PAD_VALUE

FORMAT = 1  # of the metadata and of the graph's inputs and outputs; a reader knows all up to its own

# What the graph expects its input to have been through. There is one way; a file that asks for another is refused.
PREPROCESS = {"layout": "NHWC", "color": "RGB", "dtype": "uint8", "letterbox": "top-left", "pad": PAD_VALUE}

T = TypeVar("T")


@dataclass(frozen=True)
class Manifest:
    """Facts about one exported detector.

    imgsz_hw: (height, width) pixels of the graph's input.
    batch: pictures the graph takes at once; None where any number will do.
    flops: of one picture at imgsz_hw; one multiply-add counts as two.
    weights_sha256: 64 hexadecimal digits, of the trained weights that were exported.
    data: what the weights were trained on.
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

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Path) -> "Manifest":
        """The manifest in the metadata of the file at `path`.

        Raises DataError, naming the file, for a file that hkd-export did not write, one of a newer
        format, a missing key or a value that cannot be read.
        """
        _check_format(metadata, path)

        def read(key: str, parse: Callable[[str], T]) -> T:
            if key not in metadata:
                raise DataError(f"{path}: its metadata has no {key}: damaged, or changed after export; export it again")
            try:
                return parse(metadata[key])
            except ValueError as error:
                raise DataError(f"{path}: metadata {key} is {metadata[key]!r}: {error}; export it again") from None

        read("task", _detect_task)
        read("hkd.preprocess", _known_preprocess)
        return cls(
            model=read("hkd.model", _text),
            imgsz_hw=read("imgsz", _size_hw),
            batch=read("batch", _batch),
            parameters=read("hkd.parameters", _count),
            flops=read("hkd.flops", _count),
            weights_sha256=read("hkd.weights_sha256", _sha256),
            data=read("hkd.data", _text),
            license=read("license", _text),
            date=read("date", _text),
            version=read("version", _text),
        )


def _check_format(metadata: Mapping[str, str], path: Path) -> None:
    if "hkd.format" not in metadata:
        raise DataError(f"{path}: not an hkd-det model (its metadata has no hkd.format); make one with hkd-export")
    found = metadata["hkd.format"]
    if not found.isascii() or not found.isdigit() or int(found) < 1:
        raise DataError(f"{path}: metadata hkd.format is {found!r}, not a whole number; export it again")
    if int(found) > FORMAT:
        raise DataError(
            f"{path}: written in format {found} by a newer hkd-det, this one reads up to {FORMAT}; "
            "update with pip install -U hkd-det"
        )


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("empty")
    return value


def _count(value: str) -> int:
    if not re.fullmatch(r"[0-9]+", value) or int(value) == 0:
        raise ValueError("not a whole number above 0")
    return int(value)


def _batch(value: str) -> int | None:
    return None if value == "dynamic" else _count(value)


def _size_hw(value: str) -> tuple[int, int]:
    match = re.fullmatch(r"\[([0-9]+), ?([0-9]+)\]", value)
    if not match:
        raise ValueError("not of the form [height, width]")
    return _count(match[1]), _count(match[2])


def _sha256(value: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError("not 64 hexadecimal digits")
    return value


def _detect_task(value: str) -> None:
    if value != "detect":
        raise ValueError("only 'detect' is known here")


def _known_preprocess(value: str) -> None:
    if json.loads(value) != PREPROCESS:  # JSONDecodeError is a ValueError
        raise ValueError(f"only {json.dumps(PREPROCESS)} is known here")
