"""The JSON file NAME.engine.json, which describes the engine NAME.engine in the same directory, and its profile.

The .engine file is the plain serialized engine, so that trtexec, Triton and DeepStream can read it. The optimization
profile of a dynamic graph contains the minimum, optimum and maximum input shape of the engine.
"""

import itertools
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hkd_deploy.model_metadata import TensorInfo
from hkd_deploy.trt.bindings import GpuInfo
from hkd_det.config import dataclass_from_dict
from hkd_det.errors import DataError, UnavailableError, UsageError, first_error_line
from hkd_det.files import atomic_write, bytes_sha256
from hkd_det.letterbox import STRIDE

FORMAT = 1
AMPERE_MAJOR = 8  # compute capability
DEFAULT_BATCHES = (1, 4, 8)  # minimum, optimum, maximum of a profile: suits a few cameras

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """Shapes of the input `images`.

    Attributes:
        min: Smallest shape.
        opt: Shape for which the engine is optimized.
        max: Largest shape.
    """

    min: Shape
    opt: Shape
    max: Shape


@dataclass(frozen=True)
class ProfileShape:
    """One of the three shapes of --trt-profile.

    Attributes:
        batch: Number of images.
        size_hw: Height and width in pixels, or None if the graph has a fixed size.
    """

    batch: int
    size_hw: tuple[int, int] | None


def parse_profile(text: str) -> tuple[ProfileShape, ProfileShape, ProfileShape]:
    """Parse the value of --trt-profile.

    Args:
        text: Minimum, optimum and maximum, as "1,4,8" (batch) or "1x320x256,4x640x512,8x640x512"
            (batch x width x height).

    Returns:
        The three shapes, in ascending order.

    Raises:
        UsageError: If the text has another form or the shapes do not ascend.
    """
    parsed = [_parse_profile_shape(part) for part in text.split(",")]
    if len(parsed) != 3 or None in parsed:
        raise UsageError(
            f"--trt-profile {text}: expected MIN,OPT,MAX as 1,4,8 (batch) "
            "or 1x320x256,4x640x512,8x640x512 (batch x width x height)."
        )
    smallest, optimum, largest = (shape for shape in parsed if shape)
    values = [(shape.batch, *(shape.size_hw or ())) for shape in (smallest, optimum, largest)]
    if len({len(value) for value in values}) > 1 or any(
        low > high for lower, upper in itertools.pairwise(values) for low, high in zip(lower, upper, strict=True)
    ):
        raise UsageError(f"--trt-profile {text}: expected three shapes of the same form in ascending order.")
    return smallest, optimum, largest


def _parse_profile_shape(text: str) -> ProfileShape | None:
    match = re.fullmatch(r"([1-9][0-9]*)(?:x([1-9][0-9]*)x([1-9][0-9]*))?", text.strip())
    if not match:
        return None
    return ProfileShape(int(match[1]), (int(match[3]), int(match[2])) if match[2] else None)


def resolve_profile(
    shape: Sequence[int],
    requested: tuple[ProfileShape, ProfileShape, ProfileShape] | None,
    metadata: Mapping[str, str],
    path: Path,
) -> Profile | None:
    """Determine the optimization profile of a graph.

    The default profile has the batches 1, 4 and 8. Its largest size is that of the metadata, which is also the optimum.
    Its smallest size is a quarter of it.

    Args:
        shape: Shape of the input `images`, NHWC or NCHW. Free dimensions are -1.
        requested: Shapes of --trt-profile, or None for the default.
        metadata: Metadata of the ONNX file.
        path: The ONNX file, for messages.

    Returns:
        The profile, or None if the graph has no free dimension.

    Raises:
        UsageError: If `requested` contradicts a fixed dimension.
        DataError: If the largest size is needed and missing in the metadata.
    """
    if -1 not in shape:
        if requested:
            raise UsageError(f"--trt-profile: {path} has the fixed shape {list(shape)}. Export it with --dynamic.")
        return None
    profile_shapes = requested or _make_default_shapes(shape, metadata, path)
    return Profile(*(_fill_free_dims(shape, profile_shape, path) for profile_shape in profile_shapes))


def _get_hw_axes(shape: Sequence[int]) -> tuple[int, int]:
    return (1, 2) if shape[-1] == 3 else (2, 3)  # NHWC, else NCHW


def _select_hw(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _get_hw_axes(shape))


def _make_default_shapes(
    shape: Sequence[int], metadata: Mapping[str, str], path: Path
) -> tuple[ProfileShape, ProfileShape, ProfileShape]:
    min_batch, opt_batch, max_batch = DEFAULT_BATCHES if shape[0] == -1 else (shape[0],) * 3
    max_hw = min_hw = None
    if -1 in _select_hw(shape):
        max_hw = _read_max_imgsz_hw(metadata, path)
        min_hw = (_compute_quarter_side(max_hw[0]), _compute_quarter_side(max_hw[1]))
    return ProfileShape(min_batch, min_hw), ProfileShape(opt_batch, max_hw), ProfileShape(max_batch, max_hw)


def _read_max_imgsz_hw(metadata: Mapping[str, str], path: Path) -> tuple[int, int]:
    text = metadata.get("hkd.max_imgsz", metadata.get("imgsz", ""))
    match = re.fullmatch(r"\[([0-9]+), ?([0-9]+)\]", text)
    if not match:
        raise DataError(f"{path}: the metadata contains no largest input size. Set --trt-profile.")
    return int(match[1]), int(match[2])


def _compute_quarter_side(side: int) -> int:
    """Return a quarter of a side as a multiple of the stride."""
    return min(side, max(STRIDE, side // 4 // STRIDE * STRIDE))


def _fill_free_dims(shape: Sequence[int], profile_shape: ProfileShape, path: Path) -> Shape:
    """Replace the free dimensions of `shape`. Raise UsageError if a fixed dimension has another value."""
    axis_h, axis_w = _get_hw_axes(shape)
    size_hw = profile_shape.size_hw
    if size_hw is None:
        if -1 in _select_hw(shape):
            raise UsageError(f"--trt-profile: {path} has a free size. Set batch x width x height, as 1x640x512.")
        size_hw = (shape[axis_h], shape[axis_w])
    filled = list(shape)
    filled[0], filled[axis_h], filled[axis_w] = profile_shape.batch, *size_hw
    if any(dim not in (-1, value) for dim, value in zip(shape, filled, strict=True)):
        raise UsageError(
            f"--trt-profile: {path} takes {list(shape)}, where -1 is free, got {filled}. Export it with --dynamic."
        )
    return tuple(filled)


@dataclass(frozen=True)
class EngineInfo:
    """Content of the JSON file.

    Attributes:
        format: Version of this format.
        tensorrt: TensorRT version of the build.
        gpu: Product name of the GPU of the build.
        sm: Compute capability of the GPU, for example "8.7".
        platform: Operating system and architecture, for example "linux-aarch64".
        version_compatible: Whether the engine runs on later TensorRT releases of the same major version.
        hardware_compatible: Whether the engine runs on other GPUs, from Ampere on.
        dla: Core of the deep learning accelerator, or None.
        precision_requested: Precision of the ONNX file.
        precision_actual: Number of compute layers by precision.
        inputs: Input tensors.
        outputs: Output tensors.
        profile: Optimization profile, or None for a static graph.
        workspace_mib: Limit of the scratch memory of one layer, MiB.
        context_mib: Device memory during execution without the weights, MiB.
        build_s: Duration of the build, seconds.
        date: Time of the build, ISO 8601, UTC.
        source: Name of the ONNX file.
        source_sha256: SHA-256 of the ONNX file.
        engine_sha256: SHA-256 of the engine.
        metadata: Metadata of the ONNX file, for `ModelMetadata.from_metadata`.
        build_memory_mib: Peak resident memory of the process during the build, MiB; None in files of older versions.
        build_gpu_memory_mib: Highest increase of the memory in use on the GPU during the build, MiB; None if it was not
            measured. With unified memory it contains that of the process.
    """

    format: int
    tensorrt: str
    gpu: str
    sm: str
    platform: str
    version_compatible: bool
    hardware_compatible: bool
    dla: int | None
    precision_requested: str
    precision_actual: dict[str, int]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    profile: Profile | None
    workspace_mib: int
    context_mib: float
    build_s: float
    date: str
    source: str
    source_sha256: str
    engine_sha256: str
    metadata: dict[str, str]
    build_memory_mib: float | None = None
    build_gpu_memory_mib: float | None = None


def get_current_platform() -> str:
    """Return operating system and architecture, for example "linux-aarch64"."""
    return f"{platform.system()}-{platform.machine()}".lower()


def get_engine_info_path(engine_path: Path) -> Path:
    """Return the path of the JSON file.

    Args:
        engine_path: For example `student.engine`.

    Returns:
        `student.engine.json` in the same directory.
    """
    return engine_path.with_name(f"{engine_path.name}.json")


def write_engine(engine_path: Path, plan: bytes, engine_info: EngineInfo) -> None:
    """Write an engine and its JSON file, each atomically.

    An interruption between the two files leaves a hash that does not match. `read_plan` detects it.

    Args:
        engine_path: The engine to write.
        plan: The serialized engine.
        engine_info: Content of the JSON file.
    """
    text = json.dumps(asdict(engine_info), indent=2, ensure_ascii=False)
    with atomic_write(engine_path) as temp_engine, atomic_write(get_engine_info_path(engine_path)) as temp_info:
        temp_engine.write_bytes(plan)
        temp_info.write_bytes(f"{text}\n".encode())


def read_engine_info(engine_path: Path) -> EngineInfo:
    """Read the JSON file of an engine.

    Args:
        engine_path: The engine.

    Returns:
        Content of the JSON file.

    Raises:
        DataError: If one of the files is missing, or the JSON file is damaged or has a newer format.
    """
    if not engine_path.is_file():
        raise DataError(f"{engine_path}: no such engine. Build it with hkd-export MODEL.onnx --trt.")
    path = get_engine_info_path(engine_path)
    if not path.is_file():
        raise DataError(f"{engine_path}: {path.name} is missing. Copy both files, or run hkd-export MODEL.onnx --trt.")
    try:
        engine_info = dataclass_from_dict(EngineInfo, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, UsageError) as error:
        reason = first_error_line(error)
        raise DataError(f"{path}: damaged ({reason}). Build the engine again: hkd-export MODEL.onnx --trt.") from None
    if engine_info.format > FORMAT:
        raise DataError(f"{path}: written by a newer version of hkd-det. Update hkd-det on this machine.")
    return engine_info


def read_plan(engine_path: Path, engine_info: EngineInfo) -> bytes:
    """Read an engine and compare its hash.

    Args:
        engine_path: The engine.
        engine_info: Content of its JSON file.

    Returns:
        The serialized engine.

    Raises:
        DataError: If the engine is not the one that the JSON file describes.
    """
    plan = engine_path.read_bytes()
    if bytes_sha256(plan) != engine_info.engine_sha256:
        raise DataError(f"{engine_path}: truncated or changed since it was built. {_format_rebuild_hint(engine_info)}")
    return plan


def check_compatibility(engine_path: Path, engine_info: EngineInfo, tensorrt: str, gpu: GpuInfo) -> None:
    """Check that an engine runs on this machine.

    Args:
        engine_path: The engine, for messages.
        engine_info: Content of its JSON file.
        tensorrt: Version of the installed TensorRT.
        gpu: GPU that runs the engine.

    Raises:
        UnavailableError: If the engine was built for another TensorRT, GPU or platform.
    """
    if not _is_version_compatible(tensorrt, engine_info):
        actual, expected = f"TensorRT {tensorrt}", f"TensorRT {engine_info.tensorrt}"
    elif engine_info.platform != get_current_platform():
        actual, expected = get_current_platform(), engine_info.platform
    elif not _is_gpu_compatible(gpu, engine_info):
        actual, expected = f"{gpu.name} (SM {gpu.sm})", f"{engine_info.gpu} (SM {engine_info.sm})"
    else:
        return
    raise UnavailableError(
        f"{engine_path}: built for {expected}, this machine has {actual}. {_format_rebuild_hint(engine_info)}"
    )


def _format_rebuild_hint(engine_info: EngineInfo) -> str:
    return f"Build it on this machine: hkd-export {engine_info.source} --trt."


def _is_version_compatible(tensorrt: str, engine_info: EngineInfo) -> bool:
    if not engine_info.version_compatible:
        return tensorrt == engine_info.tensorrt
    installed, built = _parse_version(tensorrt), _parse_version(engine_info.tensorrt)
    return installed[:1] == built[:1] and installed >= built


def _parse_version(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]+", version))  # also of pre-releases such as 10.0.0b6


def _is_gpu_compatible(gpu: GpuInfo, engine_info: EngineInfo) -> bool:
    if engine_info.hardware_compatible:
        return int(gpu.sm.split(".")[0]) >= AMPERE_MAJOR
    return (gpu.name, gpu.sm) == (engine_info.gpu, engine_info.sm)
