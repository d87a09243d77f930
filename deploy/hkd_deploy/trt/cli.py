"""Flags of hkd-export for TensorRT: build an engine (--trt), or only check that it builds (--dry-run).

A dry run needs no GPU. Its parser and builder run in a child process, because the Python environment that has a
TensorRT for CPUs can be another one: the environment of `make tensorrt-cpu`, otherwise the current one. The child
process runs `python -m hkd_deploy.trt.cli MODEL.onnx REPLY.json OPTIONS` and writes its result to the JSON file.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hkd_deploy.trt.bindings import TrtLog, get_install_hint, import_tensorrt
from hkd_deploy.trt.builder import DEFAULT_WORKSPACE_MIB, BuildOptions, build_plan, format_memory_note
from hkd_deploy.trt.engine import (
    EngineLayer,
    build_engine,
    check_precision,
    count_precisions,
    format_layer_table,
    format_precision_counts,
    parse_build_log,
)
from hkd_deploy.trt.engine_info import get_engine_info_path, parse_profile
from hkd_deploy.trt.onnx_file import OnnxFile, read_onnx_file
from hkd_det.config import check_range, dataclass_from_dict
from hkd_det.errors import DataError, HkdError, UnavailableError, UsageError
from hkd_det.files import write_text

MIB = 2**20
MAX_LISTED_TYPES = 4  # layer types in the summary line of a dry run
TENSORRT_DIR = ".tensorrt"  # deploy/tensorrt_cpu.py writes it, with `python`
TENSORRT_VARIABLE = "HKD_TENSORRT"  # environment variable: another path of this directory
REPO_DIR = Path(__file__).parents[3]
FLAGS = (  # argparse names of all flags that require --trt
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


@dataclass(frozen=True)
class DryRunResult:
    """Result of a successful dry run.

    Attributes:
        tensorrt: TensorRT version.
        layer_counts: Number of parsed layers by TensorRT layer type.
        layers: Layers of the built engine that compute.
        plan_bytes: Size of the serialized engine.
        build_s: Duration of the build, seconds.
    """

    tensorrt: str
    layer_counts: dict[str, int]
    layers: tuple[EngineLayer, ...]
    plan_bytes: int
    build_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this module.

    Args:
        parser: Parser of hkd-export.
    """
    group = parser.add_argument_group("TensorRT", "run on the device that uses the engine; all flags require --trt")
    group.add_argument("--trt", action="store_true", help="build an engine in the precision of the ONNX file")
    group.add_argument(
        "--dry-run", action="store_true", help="parse and build, but write nothing; needs no GPU; requires --trt"
    )
    group.add_argument("--print-layers", action="store_true", help="list the layers of the built engine")
    group.add_argument(
        "--trt-profile",
        metavar="MIN,OPT,MAX",
        help="shapes of a dynamic graph: 1,4,8 (batch) or 1x320x256,4x640x512,8x640x512 (batch x width x height)",
    )
    group.add_argument(
        "--workspace",
        type=int,
        default=DEFAULT_WORKSPACE_MIB,
        metavar="MIB",
        help="limit of the scratch memory of one layer (default: %(default)s)",
    )
    group.add_argument(
        "--timing-cache", metavar="FILE", help="measured tactics: read if the file exists, written after the build"
    )
    group.add_argument(
        "--dla", type=int, metavar="CORE", help="core of the DLA of a Jetson; unsupported layers run on the GPU"
    )
    group.add_argument(
        "--version-compatible",
        action="store_true",
        help="build an engine for later TensorRT releases of the same major version",
    )
    group.add_argument(
        "--hardware-compatible", action="store_true", help="build an engine for other GPUs, from Ampere on"
    )
    group.add_argument("--device", help="GPU to build on, cuda or cuda:N (default: cuda)")


def get_build_device(flags: argparse.Namespace) -> str:
    """Return the GPU to build on.

    Args:
        flags: Parsed flags.

    Returns:
        "cuda" or "cuda:N".
    """
    device: str = flags.device or "cuda"
    return device


def make_build_options(flags: argparse.Namespace) -> BuildOptions:
    """Convert flags to build options.

    Args:
        flags: Parsed flags.

    Returns:
        The options.

    Raises:
        UsageError: If a value is invalid.
    """
    check_range("--workspace", flags.workspace, 1)
    if flags.dla is not None and flags.dla < 0:
        raise UsageError(f"--dla {flags.dla}: expected the number of a core, 0 or 1.")
    return BuildOptions(
        profile=parse_profile(flags.trt_profile) if flags.trt_profile else None,
        workspace_mib=flags.workspace,
        dla=flags.dla,
        version_compatible=flags.version_compatible,
        hardware_compatible=flags.hardware_compatible,
        timing_cache=Path(flags.timing_cache) if flags.timing_cache else None,
    )


def run_trt(onnx_path: Path, flags: argparse.Namespace, output: Path | None = None) -> Path | None:
    """Run --trt: build an engine, or check that it builds, and print a summary.

    Args:
        onnx_path: The model.
        flags: Parsed flags.
        output: The engine to write. None replaces the suffix of the model by `.engine`.

    Returns:
        The engine, or None for a dry run.

    Raises:
        UsageError, DataError, UnavailableError: As `build_engine` and `check_build`.
    """
    options = make_build_options(flags)
    onnx_file = read_onnx_file(onnx_path)
    if flags.dry_run:
        result = check_build(onnx_path, options)
        print(_format_dry_run(onnx_file, result))
        if flags.print_layers:
            print(format_layer_table(result.layers))
        return None
    engine_path = output or onnx_path.with_suffix(".engine")
    if engine_path.suffix != ".engine":
        raise UsageError(f"--output {engine_path}: expected a name that ends in .engine.")
    if note := format_memory_note(len(onnx_file.content), options.workspace_mib):
        print(note)
    engine_info, layers = build_engine(onnx_file, engine_path, options, get_build_device(flags))
    print(
        f"{engine_path}: {engine_info.gpu}, TensorRT {engine_info.tensorrt}, "
        f"{engine_path.stat().st_size / MIB:.1f} MiB, built in {engine_info.build_s:.0f} s. Compute layers: "
        f"{format_precision_counts(engine_info.precision_actual)} (requested: {engine_info.precision_requested}). "
        f"Properties: {get_engine_info_path(engine_path).name}."
    )
    if flags.print_layers:
        print(format_layer_table(layers))
        _write_layers(engine_path, layers)
    return engine_path


def _format_dry_run(onnx_file: OnnxFile, result: DryRunResult) -> str:
    types = [f"{count} {layer_type.lower()}" for layer_type, count in result.layer_counts.items()]
    listed = ", ".join([*types[:MAX_LISTED_TYPES], *["..."] * (len(types) > MAX_LISTED_TYPES)])
    num_layers = sum(result.layer_counts.values())
    return (
        f"{onnx_file.path}: TensorRT {result.tensorrt} parses it ({num_layers} layers: {listed}) "
        f"and builds an engine of {result.plan_bytes / MIB:.1f} MiB in {result.build_s:.1f} s. Compute layers: "
        f"{format_precision_counts(count_precisions(result.layers))} (requested: {onnx_file.precision}). "
        "Nothing was written."
    )


def _write_layers(engine_path: Path, layers: Sequence[EngineLayer]) -> None:
    path = engine_path.with_name(f"{engine_path.name}.layers.json")
    write_text(path, json.dumps([asdict(layer) for layer in layers], indent=2) + "\n")
    print(f"{path}: {len(layers)} layers")


def check_build(onnx_path: Path, options: BuildOptions) -> DryRunResult:
    """Parse and build an ONNX file without a GPU, and write nothing.

    The timing cache and the two compatibility options have no effect: they need the device.

    Args:
        onnx_path: The model.
        options: Build options.

    Returns:
        Facts about the engine.

    Raises:
        DataError: If TensorRT cannot parse or build the file.
        UsageError: If an option does not fit the file.
        UnavailableError: If no TensorRT is installed.
    """
    options = replace(options, timing_cache=None, version_compatible=False, hardware_compatible=False)
    with tempfile.TemporaryDirectory() as temp_dir:
        reply_path = Path(temp_dir) / "reply.json"
        command = [*_find_interpreter(), "-m", __name__, str(onnx_path), str(reply_path), json.dumps(asdict(options))]
        # A new session: Ctrl-C reaches this process only, and subprocess.run then ends the child.
        process = subprocess.run(command, check=False, start_new_session=True)
        if not reply_path.exists():
            raise DataError(
                f"{onnx_path}: the TensorRT process ended with code {process.returncode} without a result. "
                "Close other programs if the memory was full."
            )
        reply = json.loads(reply_path.read_text(encoding="utf-8"))
    if "error" in reply:
        error_classes = {cls.__name__: cls for cls in (DataError, UnavailableError, UsageError)}
        raise error_classes[reply["error"]["error_class"]](reply["error"]["message"])
    return dataclass_from_dict(DryRunResult, reply["result"])


def _find_interpreter() -> list[str]:
    """Return the start of a command line for a Python that has the tensorrt package."""
    if selected := os.environ.get(TENSORRT_VARIABLE):
        launcher = Path(selected) / "python"
        if not launcher.exists():
            raise UnavailableError(f"{TENSORRT_VARIABLE} {selected}: expected the .tensorrt of make tensorrt-cpu.")
        return [str(launcher)]
    cache_dir = Path.home() / ".cache" / "hkd-det" / "tensorrt"
    for directory in (Path.cwd() / TENSORRT_DIR, REPO_DIR / TENSORRT_DIR, cache_dir):
        if (directory / "python").exists():
            return [str(directory / "python")]
    if importlib.util.find_spec("tensorrt"):
        return [sys.executable]
    raise UnavailableError(
        f"--dry-run: TensorRT is not installed. Run make tensorrt-cpu in the repository, or set {TENSORRT_VARIABLE} to "
        f"its .tensorrt. {get_install_hint()}"
    )


def _run_dry_run(onnx_path: Path, options: BuildOptions) -> DryRunResult:
    trt = import_tensorrt()
    onnx_file = read_onnx_file(onnx_path)
    log = TrtLog()
    build_result = build_plan(trt, onnx_file, options, log)
    layers = tuple(parse_build_log(log.layers))
    if not layers:
        raise DataError(
            f"{onnx_path}: the log of TensorRT {trt.__version__} does not contain the layers. Install another version."
        )
    check_precision(onnx_file, layers)
    plan_bytes = len(build_result.plan)
    return DryRunResult(trt.__version__, build_result.layer_counts, layers, plan_bytes, build_result.build_s)


def main(argv: Sequence[str]) -> None:
    """Run the child process of a dry run.

    Args:
        argv: The ONNX file, the JSON file for the result, and the build options as JSON.
    """
    onnx_path, reply_path, options_json = argv
    try:
        options = dataclass_from_dict(BuildOptions, json.loads(options_json))
        reply: dict[str, object] = {"result": asdict(_run_dry_run(Path(onnx_path), options))}
    except HkdError as error:
        reply = {"error": {"error_class": type(error).__name__, "message": str(error)}}
    Path(reply_path).write_text(json.dumps(reply), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
