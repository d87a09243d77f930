"""`student.engine.json`: what an engine is, where it runs, and what it was made of.

The engine itself is TensorRT's plain plan, as trtexec, Triton and DeepStream read it; all else is said here.
"""

import hashlib
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from hkd_deploy.trt.cuda import Gpu
from hkd_det.errors import DataError, UnavailableError
from hkd_det.files import replacing

FORMAT = 1


@dataclass(frozen=True)
class TensorFacts:
    """An input or output of the engine; -1 in `shape` where the profile leaves it free."""

    name: str
    dtype: str
    shape: list[int]


@dataclass(frozen=True)
class ProfileFacts:
    """Shapes of the input: the smallest, the one it is tuned for, the largest."""

    smallest: list[int]
    usual: list[int]
    largest: list[int]


@dataclass(frozen=True)
class Sidecar:
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
    compatible: list[str]
    dla: int | None
    precision_asked: str
    precision_found: dict[str, int]
    inputs: list[TensorFacts]
    outputs: list[TensorFacts]
    profile: ProfileFacts | None
    workspace_mib: int
    context_mib: float
    build_s: float
    date: str
    source: str
    source_sha256: str
    engine_sha256: str
    metadata: dict[str, str]


def this_platform() -> str:
    """As "linux-aarch64": an engine does not cross it."""
    return f"{platform.system()}-{platform.machine()}".lower()


def sidecar_path(engine: Path) -> Path:
    """`student.engine` to `student.engine.json`, in the same folder."""
    return engine.with_name(f"{engine.name}.json")


def sha256_of(content: bytes) -> str:
    """64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def write_engine(path: Path, plan: bytes, sidecar: Sidecar) -> None:
    """Write engine and sidecar, each in one step. Killed between the two, the hash tells, and loading says so."""
    text = msgspec.json.format(msgspec.json.encode(asdict(sidecar)), indent=2)
    with replacing(path) as engine_aside, replacing(sidecar_path(path)) as sidecar_aside:
        engine_aside.write_bytes(plan)
        sidecar_aside.write_bytes(text + b"\n")


def read_sidecar(engine: Path) -> Sidecar:
    """What the file beside `engine` says. Raises DataError if either is not there, or it is damaged or newer."""
    if not engine.is_file():
        raise DataError(f"{engine}: no such engine; hkd-export MODEL.onnx --trt builds one")
    path = sidecar_path(engine)
    if not path.is_file():
        raise DataError(
            f"{engine}: {path.name} is missing beside it; copy both, or build it: hkd-export MODEL.onnx --trt"
        )
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Sidecar)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: damaged ({error}); build the engine again: hkd-export MODEL.onnx --trt") from None
    if found.format > FORMAT:
        raise DataError(f"{path}: written by a newer hkd-det; update with pip install -U hkd-det")
    return found


def read_plan(engine: Path, sidecar: Sidecar) -> bytes:
    """The engine's bytes. Raises DataError if they are not those the sidecar was written for."""
    plan = engine.read_bytes()
    if sha256_of(plan) != sidecar.engine_sha256:
        raise DataError(f"{engine}: truncated or changed since it was built; {_again(sidecar)}")
    return plan


def check_home(engine: Path, sidecar: Sidecar, tensorrt: str, gpu: Gpu) -> None:
    """Raises UnavailableError unless `engine` was built for this TensorRT, this GPU and this platform."""
    if not _runs_with(tensorrt, sidecar):
        found, wanted = f"TensorRT {tensorrt}", f"TensorRT {sidecar.tensorrt}"
    elif sidecar.platform != this_platform():
        found, wanted = this_platform(), sidecar.platform
    elif not _runs_on(gpu, sidecar):
        found, wanted = f"{gpu.name} (SM {gpu.sm})", f"{sidecar.gpu} (SM {sidecar.sm})"
    else:
        return
    raise UnavailableError(f"{engine}: built for {wanted}, this machine has {found}; {_again(sidecar)}")


def _again(sidecar: Sidecar) -> str:
    return f"build it here: hkd-export {sidecar.source} --trt"


def _runs_with(tensorrt: str, sidecar: Sidecar) -> bool:
    if "version" not in sidecar.compatible:
        return tensorrt == sidecar.tensorrt
    here, built = _numbers(tensorrt), _numbers(sidecar.tensorrt)
    return here[:1] == built[:1] and here >= built


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]+", version))  # "10.0.0b6" was one


def _runs_on(gpu: Gpu, sidecar: Sidecar) -> bool:
    if "hardware" in sidecar.compatible:
        return int(gpu.sm.split(".")[0]) >= 8  # Ampere
    return (gpu.name, gpu.sm) == (sidecar.gpu, sidecar.sm)
