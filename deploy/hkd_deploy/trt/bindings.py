"""The tensorrt package: there and new enough, or how to get it on this machine."""

import platform
import sys
from pathlib import Path
from typing import Any

from hkd_det.errors import UnavailableError
from hkd_det.packages import import_package

MIN_VERSION = (10, 0)  # strongly typed networks and the progress monitor; JetPack 6 has 10.3
JETSON_RELEASE_FILE = Path("/etc/nv_tegra_release")


def import_tensorrt() -> Any:
    """The module. Raises UnavailableError where it is missing, broken or too old, saying what to do."""
    trt = import_package("tensorrt", "TensorRT", install_hint())
    if parse_trt_version(trt) < MIN_VERSION:
        raise UnavailableError(
            f"TensorRT {trt.__version__} is too old: from {MIN_VERSION[0]}.{MIN_VERSION[1]} on (JetPack 6); "
            "here the .onnx file runs with --backend onnxruntime"
        )
    return trt


def parse_trt_version(trt: Any) -> tuple[int, int]:
    """(major, minor) of the module."""
    major, minor, *_ = trt.__version__.split(".")
    return int(major), int(minor)


def is_jetson() -> bool:
    """Whether this is an NVIDIA Jetson with its own Linux."""
    return JETSON_RELEASE_FILE.exists()


def install_hint() -> str:
    """What to do for TensorRT on this machine."""
    return _format_install_hint(platform.system(), platform.machine(), is_jetson())


def _format_install_hint(system: str, machine: str, jetson: bool) -> str:
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    if jetson:
        return (
            "on a Jetson it comes with JetPack: sudo apt install python3-libnvinfer, and a virtual environment of the "
            "system's own Python, made with --system-site-packages "
            f"(this is {python}; JetPack 7 has 3.12, JetPack 6 3.10)"
        )
    if system == "Linux" and machine in ("x86_64", "aarch64"):
        return "pip install tensorrt (needs NVIDIA's driver); to check a file without a GPU: make tensorrt-cpu"
    return f"engines are built and run on Linux with an NVIDIA GPU, not on {system} {machine}; use the .onnx file here"
