"""Description of a model file: the metadata that `hkd-export` writes, its options, inputs and outputs."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from hkd_deploy.drift import DriftReference
from hkd_det.errors import DataError, UsageError
from hkd_det.letterbox import PAD_VALUE

REFERENCE_KEY = "hkd.reference"
MIN_DYNAMIC_SIDE = 224  # a graph with a dynamic size pads smaller inputs: NMS needs 1,000 candidates
METADATA_FORMAT = 1  # version of the metadata keys and of the graph interface

# Keys of files that versions before the renaming wrote in the same metadata format.
FORMER_KEYS = {"hkd.max_imgsz": "hkd.max_hw", "hkd.dynamic": "hkd.dynamic_size"}

# Preprocessing that the graph expects. These are the accepted values of the key hkd.preprocess.
PREPROCESS: dict[str, object] = {
    "layout": "NHWC",
    "color": "RGB",
    "dtype": "uint8",
    "letterbox": "top-left",
    "pad": PAD_VALUE,
}
PREPROCESS_IN_GRAPH = {**PREPROCESS, "letterbox": "in graph"}
PREPROCESS_FLOAT01 = {**PREPROCESS, "layout": "NCHW", "dtype": "float32", "range": [0, 1]}
SUPPORTED_PREPROCESS = (PREPROCESS, PREPROCESS_IN_GRAPH, PREPROCESS_FLOAT01)

# Data types as ONNX Runtime, OpenVINO and TensorRT name them, to NumPy names.
NUMPY_DTYPES = {
    "tensor(uint8)": "uint8",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "u8": "uint8",
    "f32": "float32",
    "f16": "float16",
    "i32": "int32",
    "i64": "int64",
    "UINT8": "uint8",
    "FLOAT": "float32",
    "HALF": "float16",
    "INT32": "int32",
    "INT64": "int64",
}

T = TypeVar("T")


@dataclass(frozen=True)
class ModelMetadata:
    """Metadata of a detector.

    A model of another tool has no `data`, `date` and `version`, and `weights_sha256` is that of its file.

    Attributes:
        model: Model name, for example `mini-student`.
        imgsz_hw: (height, width) of the network input, pixels. The upper limit if `dynamic` is true.
        batch: Fixed batch size of the graph. None if the batch dimension is free.
        parameters: Number of parameters.
        flops: FLOPs per image at `imgsz_hw`. A multiply-accumulate counts as two. None if unknown.
        weights_sha256: SHA-256 of the trained weights, 64 hexadecimal digits.
        data: Dataset that the weights were trained on.
        license: License of the code and of the weights.
        date: Time of export, ISO 8601.
        version: Version of hkd-det that wrote the file.
        max_imgsz_hw: (height, width) of the largest accepted image, pixels. Differs from `imgsz_hw` only if
            `letterbox` is true.
        dynamic: True if height and width of the input are free up to `max_imgsz_hw`.
        letterbox: True if the graph accepts images of any size, letterboxes them and returns boxes in image pixels.
        preprocess: `uint8` for input [B, H, W, 3] uint8 RGB, `float01` for input [B, 3, H, W] RGB, 0 to 1.
        raw: True if the graph returns all candidate boxes with their logits, without duplicate suppression.
        conf: Suggested minimum score of shown detections, 0 to 1. None if the file does not suggest one.
        reference: Distributions of the detections on the validation images. None if the file does not contain them.
    """

    model: str
    imgsz_hw: tuple[int, int]
    batch: int | None
    parameters: int
    flops: int | None
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
    conf: float | None = None
    reference: DriftReference | None = None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Path) -> "ModelMetadata":
        """Parse the metadata strings of a model file.

        Args:
            metadata: Keys and values of the file.
            path: The file, for error messages.

        Returns:
            The parsed metadata.

        Raises:
            DataError: `hkd-export` did not write the file, a newer version wrote it, or a key is missing or invalid.
        """
        _check_format_version(metadata, path)

        def read(key: str, parse: Callable[[str], T]) -> T:
            stored_key = key if key in metadata else FORMER_KEYS.get(key, key)
            if stored_key not in metadata:
                raise DataError(f"{path}: metadata key {key} is missing. Export the model again.")
            try:
                return parse(metadata[stored_key])
            except ValueError as error:
                raise DataError(
                    f"{path}: metadata {stored_key}: invalid value {metadata[stored_key]!r}: {error}. "
                    "Export the model again."
                ) from None

        read("task", _check_task)
        preprocess = read("hkd.preprocess", _parse_preprocess)
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
            max_imgsz_hw=read("hkd.max_imgsz", _parse_imgsz_hw),
            dynamic=read("hkd.dynamic", _parse_bool),
            letterbox=preprocess == PREPROCESS_IN_GRAPH,
            preprocess="float01" if preprocess == PREPROCESS_FLOAT01 else "uint8",
            raw=read("hkd.raw", _parse_bool),
            conf=read("hkd.conf", _parse_score) if "hkd.conf" in metadata else None,
            reference=read(REFERENCE_KEY, DriftReference.from_json) if REFERENCE_KEY in metadata else None,
        )


@dataclass(frozen=True)
class TensorInfo:
    """Description of an input or output tensor.

    Attributes:
        name: Name in the graph.
        dtype: NumPy name of the data type.
        shape: Dimensions. None for a free dimension.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        dims = ", ".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.name} {self.dtype} ({dims})"


def make_tensor_info(name: str, dtype: str, shape: Iterable[Any]) -> TensorInfo:
    """Convert the tensor description of a runtime.

    Args:
        name: Name in the graph.
        dtype: Data type as ONNX Runtime, OpenVINO or TensorRT names it. An unknown name is kept.
        shape: Dimensions. A symbol, None or a negative number means a free dimension.

    Returns:
        The description with a NumPy data type.
    """
    dims = tuple(dim if isinstance(dim, int) and dim >= 0 else None for dim in shape)
    return TensorInfo(name, NUMPY_DTYPES.get(dtype, dtype), dims)


def _check_format_version(metadata: Mapping[str, str], path: Path) -> None:
    if "hkd.format" not in metadata:
        raise DataError(f"{path}: not an hkd-det model: metadata key hkd.format is missing. Create it with hkd-export.")
    version = metadata["hkd.format"]
    if not version.isascii() or not version.isdigit() or int(version) < 1:
        raise DataError(
            f"{path}: metadata hkd.format: expected a positive integer, got {version!r}. Export the model again."
        )
    if int(version) > METADATA_FORMAT:
        raise DataError(
            f"{path}: metadata hkd.format: expected {METADATA_FORMAT}, got {version} from a newer hkd-det. "
            "Update hkd-det on this machine."
        )


def _parse_nonempty_text(value: str) -> str:
    if not value.strip():
        raise ValueError("expected a non-empty string")
    return value


def _parse_positive_int(value: str) -> int:
    if not re.fullmatch(r"[0-9]+", value) or int(value) == 0:
        raise ValueError("expected a positive integer")
    return int(value)


def _parse_score(value: str) -> float:
    score = float(value)
    if not 0 <= score <= 1:
        raise ValueError("expected a number from 0 to 1")
    return score


def _parse_batch_size(value: str) -> int | None:
    return None if value == "dynamic" else _parse_positive_int(value)


def _parse_imgsz_hw(value: str) -> tuple[int, int]:
    match = re.fullmatch(r"\[([0-9]+), ?([0-9]+)\]", value)
    if not match:
        raise ValueError("expected [height, width]")
    return _parse_positive_int(match[1]), _parse_positive_int(match[2])


def _parse_sha256(value: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError("expected 64 hexadecimal digits")
    return value


def _check_task(value: str) -> None:
    if value != "detect":
        raise ValueError("expected 'detect'")


def _parse_bool(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError("expected true or false")
    return value == "true"


def _parse_preprocess(value: str) -> dict[str, object]:
    preprocess = json.loads(value)  # a JSONDecodeError is a ValueError
    if preprocess not in SUPPORTED_PREPROCESS:
        raise ValueError(f"expected {' or '.join(json.dumps(accepted) for accepted in SUPPORTED_PREPROCESS)}")
    return dict(preprocess)


@dataclass(frozen=True)
class ExportOptions:
    """Inputs and outputs of the exported graph.

    Attributes:
        imgsz_hw: (height, width) of the network input in pixels; the upper limit if `dynamic_size`.
        batch: Images per batch, or None for a dynamic batch size.
        dynamic_size: Accept any size up to `imgsz_hw` and pad to multiples of 32 in the graph.
        letterbox_hw: (height, width) of the largest image in pixels if the graph letterboxes images of any size.
            None if the caller letterboxes.
        preprocess: Take uint8 RGB (B, H, W, 3). If False, take float32 RGB (B, 3, H, W), 0 to 1.
        raw: Return the boxes and logits of all candidates instead of the final detections.

    Raises:
        UsageError: If two options exclude each other or `batch` is below 1.
    """

    imgsz_hw: tuple[int, int]
    batch: int | None = 1
    dynamic_size: bool = False
    letterbox_hw: tuple[int, int] | None = None
    preprocess: bool = True
    raw: bool = False

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise UsageError(f"--batch {self.batch}: expected at least 1. For any batch size, set --dynamic batch.")
        if self.letterbox_hw is None:
            return
        if self.raw:
            raise UsageError("--raw: not available with --letterbox; raw boxes are in network input pixels. Omit one.")
        if not self.preprocess:
            raise UsageError("--no-preprocess: not available with --letterbox, which is preprocessing. Omit one.")
        if self.dynamic_size:
            raise UsageError("--dynamic size: not available with --letterbox, which accepts any size. Omit one.")

    @property
    def max_hw(self) -> tuple[int, int]:
        """(height, width) of the largest image that the graph accepts, in pixels."""
        return self.letterbox_hw or self.imgsz_hw


def read_export_options(metadata: ModelMetadata) -> ExportOptions:
    """Return the options that a model file was exported with.

    Args:
        metadata: Metadata of the file.
    """
    return ExportOptions(
        metadata.imgsz_hw,
        metadata.batch,
        metadata.dynamic,
        metadata.max_imgsz_hw if metadata.letterbox else None,
        metadata.preprocess == "uint8",
        metadata.raw,
    )
