"""Install a real TensorRT (Python API, ONNX parser and builder) in a directory, on a machine without a GPU.

    python deploy/tensorrt_cpu.py .tensorrt
    .tensorrt/python -c "import tensorrt; print(tensorrt.__version__)"

The package index does not have the libraries of the tensorrt wheels. The wheel of the TensorRT for RTX provider of ONNX
Runtime contains compatible libraries, and the tensorrt bindings load them. Parsing a graph and building an engine work;
running an engine needs a GPU. Requires Linux x86-64, pip, gcc and about 1.5 GB of disk space.
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
# The bindings load the plugin library at import. No plugin is used.
PLUGIN_STUB = "int initLibNvInferPlugins(void *logger, const char *name) { return 1; }"


def install_tensorrt(folder: Path) -> Path:
    """Install TensorRT unless it is installed already.

    Args:
        folder: Target directory.

    Returns:
        `python` in this directory, a launcher of the current interpreter that can import tensorrt.
    """
    launcher = folder / "python"
    if launcher.exists():
        return launcher
    site_dir, lib_dir = folder / "site", folder / "lib"
    for directory in (site_dir, lib_dir):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    _download_wheels(folder / "wheels", site_dir)
    _link_libraries(site_dir / "onnxruntime_ep_nv_tensorrt_rtx", lib_dir)
    _compile_stub(lib_dir)
    (site_dir / "tensorrt").mkdir()
    (site_dir / "tensorrt" / "__init__.py").write_text(
        "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    )
    launcher.write_text(
        f'#!/bin/sh\nLD_LIBRARY_PATH="{lib_dir}:$LD_LIBRARY_PATH" PYTHONPATH="{site_dir}:$PYTHONPATH" '
        f'exec "{sys.executable}" "$@"\n'
    )
    launcher.chmod(0o755)
    return launcher


def _download_wheels(wheel_dir: Path, site_dir: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(wheel_dir), BINDINGS_PACKAGE, LIBRARIES_PACKAGE], check=True)
    for wheel in wheel_dir.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site_dir)
    shutil.rmtree(wheel_dir)


def _link_libraries(source_dir: Path, lib_dir: Path) -> None:
    for name, pattern in LIBRARY_LINKS.items():
        (library,) = source_dir.glob(pattern)
        (lib_dir / name).symlink_to(library)


def _compile_stub(lib_dir: Path) -> None:
    name = "libnvinfer_plugin.so.11"
    command = ["gcc", "-x", "c", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(lib_dir / name), "-"]
    subprocess.run(command, input=PLUGIN_STUB, text=True, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Install a real TensorRT in a directory, without a GPU.")
    parser.add_argument("folder", type=Path, help="target directory")
    print(install_tensorrt(parser.parse_args().folder.resolve()))
