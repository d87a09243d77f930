"""The tensorrt package: import, version, installation hint and log. It is imported on use."""

import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hkd_det.errors import UnavailableError, import_package

MIN_VERSION = (10, 0)  # the first with strongly typed networks and a progress monitor; JetPack 6 has 10.3
JETSON_RELEASE_FILE = Path("/etc/nv_tegra_release")


@dataclass
class TrtLog:
    """Messages of TensorRT that are needed later.

    Attributes:
        errors: All error messages, in order.
        layers: The verbose message that lists the layers of the built engine. Empty if there was none.
    """

    errors: list[str] = field(default_factory=list)
    layers: str = ""

    @property
    def first_error(self) -> str:
        """The first error as one line."""
        return " ".join(self.errors[0].split()) if self.errors else "no reason given"


def make_trt_logger(trt: Any, log: TrtLog) -> Any:
    """Create a TensorRT logger that writes to a `TrtLog` and prints nothing.

    Args:
        trt: The module `tensorrt`.
        log: Receives the messages.

    Returns:
        The `ILogger`.
    """

    class Recorder(trt.ILogger):  # type: ignore[misc]  # the module is untyped
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                log.errors.append(msg)
            elif msg.startswith("Layers:"):
                log.layers = msg

    return Recorder()


def import_tensorrt() -> Any:
    """Import the tensorrt package.

    Returns:
        The module.

    Raises:
        UnavailableError: If the package is missing, does not load or is too old. The message contains the
            installation command for this machine.
    """
    trt = import_package("tensorrt", "TensorRT", get_install_hint())
    if parse_trt_version(trt) < MIN_VERSION:
        raise UnavailableError(
            f"TensorRT {trt.__version__} is too old: version {MIN_VERSION[0]}.{MIN_VERSION[1]} or later is required "
            "(JetPack 6). Run the .onnx file with --backend onnxruntime instead."
        )
    return trt


def parse_trt_version(trt: Any) -> tuple[int, int]:
    """Parse the version of the tensorrt package.

    Args:
        trt: The module `tensorrt`.

    Returns:
        Major and minor version.
    """
    major, minor, *_ = trt.__version__.split(".")
    return int(major), int(minor)


def is_jetson() -> bool:
    """Return whether this machine is an NVIDIA Jetson with Jetson Linux."""
    return JETSON_RELEASE_FILE.exists()


def get_install_hint() -> str:
    """Return how to install TensorRT on this machine."""
    return _format_install_hint(platform.system(), platform.machine(), is_jetson())


def _format_install_hint(system: str, machine: str, jetson: bool) -> str:
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    if jetson:
        return (
            "on a Jetson it is part of JetPack: sudo apt install python3-libnvinfer. Use the Python of the system, in "
            "a virtual environment made with --system-site-packages "
            f"(this is {python}; JetPack 7 has 3.12, JetPack 6 has 3.10)"
        )
    if system == "Linux" and machine in ("x86_64", "aarch64"):
        return "pip install tensorrt (requires the NVIDIA driver). For --dry-run without a GPU: make tensorrt-cpu"
    return (
        f"engines are built and run on Linux with an NVIDIA GPU, not on {system} {machine}. Use the .onnx file instead"
    )
