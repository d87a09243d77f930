"""Install TensorRT (Python API, ONNX parser, builder) into a directory, on a machine without a GPU.

    python deploy/tensorrt_cpu.py .tensorrt
    .tensorrt/python -c "import tensorrt; print(tensorrt.__version__)"

The package index does not contain the libraries of the tensorrt wheels. The bindings also work with the libraries of
TensorRT for RTX, which are part of the wheel of its ONNX Runtime provider. This is sufficient to parse a graph and to
build an engine, but not to run one. Requires Linux x86-64, pip, gcc and about 1.5 GB of disk space.
"""

import argparse
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

BINDINGS_PACKAGE = "tensorrt_cu13_bindings==11.4.0.106"
LIBRARIES_PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0"
LIBRARY_LINKS = {
    "libnvinfer.so.11": "libtensorrt_rtx.so.1.*",
    "libnvonnxparser.so.11": "libtensorrt_onnxparser_rtx.so.1.*",
    "libtensorrt_rtx.so.1": "libtensorrt_rtx.so.1.*",
    "libcudart.so.13": "libcudart.so.13.*",
}
# The bindings load the plugin library on import. No plugin is used.
PLUGIN_STUB = "int initLibNvInferPlugins(void *logger, const char *name) { return 1; }"


def install_tensorrt(directory: Path) -> Path:
    """Install TensorRT. Does nothing if it is installed already.

    Args:
        directory: Target directory.

    Returns:
        A launcher in the directory: a Python that can import tensorrt.
    """
    launcher = directory / "python"
    if launcher.exists():
        return launcher
    site, lib = directory / "site", directory / "lib"
    for part in (site, lib):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    _download_wheels(directory / "wheels", site)
    _link_libraries(site / "onnxruntime_ep_nv_tensorrt_rtx", lib)
    _compile_stub(lib)
    (site / "tensorrt").mkdir()
    (site / "tensorrt" / "__init__.py").write_text(
        "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    )
    launcher.write_text(
        f'#!/bin/sh\nLD_LIBRARY_PATH="{lib}:$LD_LIBRARY_PATH" PYTHONPATH="{site}:$PYTHONPATH" '
        f'exec "{sys.executable}" "$@"\n'
    )
    launcher.chmod(0o755)
    return launcher


def _download_wheels(wheels: Path, site: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(wheels), BINDINGS_PACKAGE, LIBRARIES_PACKAGE], check=True)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    shutil.rmtree(wheels)


def _link_libraries(source: Path, lib: Path) -> None:
    for name, pattern in LIBRARY_LINKS.items():
        (library,) = source.glob(pattern)
        (lib / name).symlink_to(library)


def _compile_stub(lib: Path) -> None:
    name = "libnvinfer_plugin.so.11"
    command = ["gcc", "-x", "c", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(lib / name), "-"]
    subprocess.run(command, input=PLUGIN_STUB, text=True, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Install TensorRT into a directory, on a machine without a GPU.")
    parser.add_argument("directory", type=Path, help="target directory")
    print(install_tensorrt(parser.parse_args().directory.resolve()))
