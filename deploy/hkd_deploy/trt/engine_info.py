"""The JSON file NAME.engine.json, which describes the engine NAME.engine in the same directory.

The .engine file is the plain serialized engine, so that trtexec, Triton and DeepStream can read it.
"""

import json
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from hkd_deploy.model_metadata import TensorInfo
from hkd_deploy.trt.cuda import GpuInfo
from hkd_deploy.trt.profile import Profile
from hkd_det.config import dataclass_from_dict
from hkd_det.errors import DataError, UnavailableError, UsageError, first_error_line
from hkd_det.files import atomic_write, bytes_sha256

FORMAT = 1
AMPERE_MAJOR = 8  # compute capability


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
        raise DataError(f"{path}: written by a newer version of hkd-det. Run pip install -U hkd-det.")
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
