"""`--check`: the real parser and builder on a machine without a GPU; nothing is written.

They run in a process of their own, with whichever TensorRT is here: the one of `make tensorrt-cpu`, else the installed.
That process writes one JSON answer: `python -m hkd_deploy.trt.checking MODEL.onnx ANSWER.json OPTIONS`.
"""

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from hkd_deploy.trt.bindings import import_tensorrt, install_hint
from hkd_deploy.trt.builder import BuildOptions, TrtLog, build_plan
from hkd_deploy.trt.engine_file import check_precision
from hkd_deploy.trt.layers import EngineLayer, parse_build_log
from hkd_deploy.trt.source import read_onnx_file
from hkd_det.errors import DataError, HkdError, UnavailableError, UsageError

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
    options = replace(options, timing_cache=None, compatible=())
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
    raise UnavailableError(f"--check needs TensorRT: make tensorrt-cpu (in the project's folder), or {install_hint()}")


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


if __name__ == "__main__":
    main(sys.argv[1:])
