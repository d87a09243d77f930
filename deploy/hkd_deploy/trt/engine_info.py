"""`student.engine.json`: what an engine is, where it runs, and what it was made of.

The engine itself is TensorRT's plain plan, as trtexec, Triton and DeepStream read it; all else is said here.
"""

import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from hkd_deploy.trt.cuda import GpuInfo
from hkd_det.errors import DataError, UnavailableError
from hkd_det.files import atomic_write, bytes_sha256

FORMAT = 1


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of the engine; -1 in `shape` where the profile leaves it free."""

    name: str
    dtype: str
    shape: list[int]


@dataclass(frozen=True)
class ProfileInfo:
    """Shapes of the input: the smallest, the one it is tuned for, the largest."""

    min: list[int]
    opt: list[int]
    max: list[int]


@dataclass(frozen=True)
class EngineInfo:
    """Facts about one engine.

    gpu, sm, platform: where it was built, and runs. compatible: "version", "hardware", or neither.
    precision_found: layers in each precision, of those that multiply by weights.
    source, source_sha256: the ONNX file. context_mib: device memory while it runs, weights not counted.
    metadata: the ONNX file's own; what `Manifest.from_metadata` reads.
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
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    profile: ProfileInfo | None
    workspace_mib: int
    context_mib: float
    build_s: float
    date: str
    source: str
    source_sha256: str
    engine_sha256: str
    metadata: dict[str, str]


def current_platform() -> str:
    """As "linux-aarch64": an engine does not cross it."""
    return f"{platform.system()}-{platform.machine()}".lower()


def get_engine_info_path(engine: Path) -> Path:
    """`student.engine` to `student.engine.json`, in the same folder."""
    return engine.with_name(f"{engine.name}.json")


def write_engine(path: Path, plan: bytes, engine_info: EngineInfo) -> None:
    """Write engine and sidecar, each in one step. Killed between the two, the hash tells, and loading says so."""
    text = msgspec.json.format(msgspec.json.encode(asdict(engine_info)), indent=2)
    with atomic_write(path) as engine_aside, atomic_write(get_engine_info_path(path)) as sidecar_aside:
        engine_aside.write_bytes(plan)
        sidecar_aside.write_bytes(text + b"\n")


def read_engine_info(engine: Path) -> EngineInfo:
    """What the file beside `engine` says. Raises DataError if either is not there, or it is damaged or newer."""
    if not engine.is_file():
        raise DataError(f"{engine}: no such engine; hkd-export MODEL.onnx --trt builds one")
    path = get_engine_info_path(engine)
    if not path.is_file():
        raise DataError(
            f"{engine}: {path.name} is missing beside it; copy both, or build it: hkd-export MODEL.onnx --trt"
        )
    try:
        found = msgspec.json.decode(path.read_bytes(), type=EngineInfo)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: damaged ({error}); build the engine again: hkd-export MODEL.onnx --trt") from None
    if found.format > FORMAT:
        raise DataError(f"{path}: written by a newer hkd-det; update with pip install -U hkd-det")
    return found


def read_plan(engine: Path, engine_info: EngineInfo) -> bytes:
    """The engine's bytes. Raises DataError if they are not those the sidecar was written for."""
    plan = engine.read_bytes()
    if bytes_sha256(plan) != engine_info.engine_sha256:
        raise DataError(f"{engine}: truncated or changed since it was built; {_format_rebuild_hint(engine_info)}")
    return plan


def check_compatibility(engine: Path, engine_info: EngineInfo, tensorrt: str, gpu: GpuInfo) -> None:
    """Raises UnavailableError unless `engine` was built for this TensorRT, this GPU and this platform."""
    if not _is_version_compatible(tensorrt, engine_info):
        found, wanted = f"TensorRT {tensorrt}", f"TensorRT {engine_info.tensorrt}"
    elif engine_info.platform != current_platform():
        found, wanted = current_platform(), engine_info.platform
    elif not _is_gpu_compatible(gpu, engine_info):
        found, wanted = f"{gpu.name} (SM {gpu.sm})", f"{engine_info.gpu} (SM {engine_info.sm})"
    else:
        return
    raise UnavailableError(
        f"{engine}: built for {wanted}, this machine has {found}; {_format_rebuild_hint(engine_info)}"
    )


def _format_rebuild_hint(engine_info: EngineInfo) -> str:
    return f"build it here: hkd-export {engine_info.source} --trt"


def _is_version_compatible(tensorrt: str, engine_info: EngineInfo) -> bool:
    if not engine_info.version_compatible:
        return tensorrt == engine_info.tensorrt
    here, built = _parse_version(tensorrt), _parse_version(engine_info.tensorrt)
    return here[:1] == built[:1] and here >= built


def _parse_version(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]+", version))  # "10.0.0b6" was one


def _is_gpu_compatible(gpu: GpuInfo, engine_info: EngineInfo) -> bool:
    if engine_info.hardware_compatible:
        return int(gpu.sm.split(".")[0]) >= 8  # Ampere
    return (gpu.name, gpu.sm) == (engine_info.gpu, engine_info.sm)
