"""`--check`: the real parser and builder on a machine without a GPU; nothing is written.

They run in a process of their own, with whichever TensorRT is here: the one of `make tensorrt-cpu`, else the installed.
That process writes one JSON answer: `python -m hkd_deploy.trt.cli MODEL.onnx ANSWER.json OPTIONS`.

`hkd-export --trt`: its flags, and what they do.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from hkd_deploy.trt.builder import BuildOptions, TrtLog, build_plan
from hkd_deploy.trt.cuda import import_tensorrt, install_hint
from hkd_deploy.trt.engine import (
    EngineLayer,
    build_engine,
    check_precision,
    count_precisions,
    format_counts,
    format_layer_table,
    parse_build_log,
)
from hkd_deploy.trt.engine_info import get_engine_info_path
from hkd_deploy.trt.onnx_file import read_onnx_file
from hkd_deploy.trt.profile import parse_profile
from hkd_deploy.trt.progress import memory_warning
from hkd_det.errors import DataError, HkdError, UnavailableError, UsageError
from hkd_det.files import atomic_write

LAUNCHER_PATH = Path(".tensorrt") / "python"  # what deploy/tensorrt_cpu.py writes


REPO_DIR = Path(__file__).parents[3]


@dataclass(frozen=True)
class CheckResult:
    """A file that TensorRT parses and builds. operators: layers of each kind the parser made; layers: those built."""

    tensorrt: str
    layer_counts: dict[str, int]
    layers: list[EngineLayer]
    plan_bytes: int
    build_s: float


@dataclass(frozen=True)
class CheckError:
    """Why not, as a command prints it; `kind` is the error's class."""

    error_class: str
    message: str


def check_build(path: Path, options: BuildOptions) -> CheckResult:
    """Parse and build an ONNX file, leaving nothing behind.

    What belongs to the device is left out of the options: timing cache and compatibility.
    Raises DataError with TensorRT's reason if it can't, UnavailableError where no TensorRT is.
    """
    options = replace(options, timing_cache=None, version_compatible=False, hardware_compatible=False)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [*_find_interpreter(), "-m", __name__, str(path), str(answer), msgspec.json.encode(options).decode()]
        # A session of its own: Ctrl-C is for this process, which then ends that one.
        done = subprocess.run(command, check=False, start_new_session=True)
        if not answer.exists():
            raise DataError(f"{path}: TensorRT's process ended with code {done.returncode} and said nothing")
        found = msgspec.json.decode(answer.read_bytes(), type=dict[str, msgspec.Raw])
    if "refused" in found:
        refused = msgspec.json.decode(found["refused"], type=CheckError)
        kinds = {kind.__name__: kind for kind in (DataError, UnavailableError, UsageError)}
        raise kinds[refused.error_class](refused.message)
    return msgspec.json.decode(found["checked"], type=CheckResult)


def _find_interpreter() -> list[str]:
    """How to start a Python that has tensorrt."""
    for folder in (Path.cwd(), REPO_DIR):
        if (folder / LAUNCHER_PATH).exists():
            return [str(folder / LAUNCHER_PATH)]
    if importlib.util.find_spec("tensorrt"):
        return [sys.executable]
    raise UnavailableError(f"--dry-run needs TensorRT: make tensorrt-cpu (in the project's folder), or {install_hint()}")


def _build_and_check(path: Path, options: BuildOptions) -> CheckResult:
    trt = import_tensorrt()
    source = read_onnx_file(path)
    log = TrtLog()
    built = build_plan(trt, source, options, log)
    layers = parse_build_log(log.layers)
    if not layers:
        raise DataError(f"{path}: TensorRT {trt.__version__} has built it, but does not say in which precision")
    check_precision(source, layers)
    return CheckResult(trt.__version__, built.layer_counts, layers, len(built.plan), built.build_s)


def main(argv: Sequence[str]) -> None:
    """The child's body: the answer goes into the file named second."""
    path, answer, options = argv
    try:
        checked = _build_and_check(Path(path), msgspec.json.decode(options, type=BuildOptions))
        found: dict[str, object] = {"checked": checked}
    except HkdError as error:
        found = {"refused": CheckError(type(error).__name__, str(error))}
    Path(answer).write_bytes(msgspec.json.encode(found))



DEFAULT_WORKSPACE_MIB = 1024


MIB = 2**20


MAX_LISTED_TYPES = 4  # of layers, on one line


FLAGS = (
    "dry_run",
    "print_layers",
    "trt_profile",
    "workspace",
    "timing_cache",
    "dla",
    "version_compatible",
    "hardware_compatible",
    "device",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The group of flags for TensorRT."""
    group = parser.add_argument_group("TensorRT, on the device that will run it")
    group.add_argument("--trt", action="store_true", help="build an engine, in the precision of the ONNX file")
    group.add_argument("--dry-run", action="store_true", help="with --trt: only see whether it builds; needs no GPU")
    group.add_argument("--print-layers", action="store_true", help="with --trt: list the layers that were really built")
    group.add_argument("--trt-profile", metavar="MIN,OPT,MAX", help="of a dynamic graph: 1,4,8 or 1x320x256,4x640x512,...")
    group.add_argument(
        "--workspace", type=int, default=DEFAULT_WORKSPACE_MIB, metavar="MIB", help="for one layer; by default 1024"
    )
    group.add_argument("--timing-cache", metavar="FILE", help="measured tactics: read if there, written afterwards")
    group.add_argument("--dla", type=int, metavar="CORE", help="Jetson's accelerator; the GPU does what it can't")
    group.add_argument("--version-compatible", action="store_true", help="allow later TensorRT of the same major version")
    group.add_argument("--hardware-compatible", action="store_true", help="allow any GPU from Ampere on")
    group.add_argument("--device", help="with --trt: the GPU to build on and for, cuda or cuda:1")


def get_build_device(flags: argparse.Namespace) -> str:
    """The GPU to build on and for."""
    device: str = flags.device or "cuda"
    return device


def run_trt(onnx: Path, flags: argparse.Namespace, output: Path | None = None) -> Path | None:
    """What --trt says: build the engine of an ONNX file, or --check that it can be built, and tell what came out.

    The engine's path; None where nothing was written.
    """
    options = make_build_options(flags)
    source = read_onnx_file(onnx)
    if flags.dry_run:
        checked = check_build(onnx, options)
        kinds = [f"{count} {kind.lower()}" for kind, count in checked.layer_counts.items()]
        common = ", ".join([*kinds[:MAX_LISTED_TYPES], *["..."] * (len(kinds) > MAX_LISTED_TYPES)])
        print(
            f"{onnx}: TensorRT {checked.tensorrt} parses it ({sum(checked.layer_counts.values())} layers: {common}) and "
            f"builds {checked.plan_bytes / MIB:.1f} MiB in {checked.build_s:.1f} s; layers that multiply: "
            f"{format_counts(count_precisions(checked.layers))} (asked: {source.precision}); nothing was written"
        )
        if flags.print_layers:
            print(format_layer_table(checked.layers))
        return None
    engine = output or onnx.with_suffix(".engine")
    if engine.suffix != ".engine":
        raise UsageError(f"--output {engine}: must end in .engine")
    if line := memory_warning(len(source.content), options.workspace_mib):
        print(line)
    sidecar, layers = build_engine(source, engine, options, get_build_device(flags))
    print(
        f"{engine}: {sidecar.gpu}, TensorRT {sidecar.tensorrt}, {engine.stat().st_size / MIB:.1f} MiB, built in "
        f"{sidecar.build_s:.0f} s; layers that multiply: {format_counts(sidecar.precision_actual)} "
        f"(asked: {sidecar.precision_requested}); facts in {get_engine_info_path(engine).name}"
    )
    if flags.print_layers:
        print(format_layer_table(layers))
        _write_layers(engine, layers)
    return engine


def _write_layers(engine: Path, layers: list[EngineLayer]) -> None:
    path = engine.with_name(f"{engine.name}.layers.json")
    with atomic_write(path) as aside:
        aside.write_bytes(msgspec.json.format(msgspec.json.encode(layers), indent=2) + b"\n")
    print(f"{path}: {len(layers)} layers")


def make_build_options(flags: argparse.Namespace) -> BuildOptions:
    """What the flags ask of the builder. Raises UsageError for what makes no sense."""
    if flags.workspace < 1:
        raise UsageError(f"--workspace {flags.workspace}: at least 1 MiB")
    if flags.dla is not None and flags.dla < 0:
        raise UsageError(f"--dla {flags.dla}: a core's number, 0 or 1")
    return BuildOptions(
        profile=parse_profile(flags.trt_profile) if flags.trt_profile else None,
        workspace_mib=flags.workspace,
        dla=flags.dla,
        version_compatible=flags.version_compatible,
        hardware_compatible=flags.hardware_compatible,
        timing_cache=Path(flags.timing_cache) if flags.timing_cache else None,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
