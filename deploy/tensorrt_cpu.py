"""Put a real TensorRT (Python API, ONNX parser, builder) into a folder, on a machine without a GPU.

    python deploy/tensorrt_cpu.py .tensorrt
    .tensorrt/python -c "import tensorrt; print(tensorrt.__version__)"

The libraries behind the tensorrt wheels are not on the package index, but TensorRT for RTX lies inside the
wheel of its ONNX Runtime provider, and the tensorrt bindings load on top of it. Parsing a graph and
building an engine work; running one needs a GPU. Linux x86-64, pip and gcc; about 1.5 GB of disk.
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
# The bindings load the plugin library at import; nothing here uses a plugin.
PLUGIN_STUB = "int initLibNvInferPlugins(void *logger, const char *name) { return 1; }"


def install_tensorrt(folder: Path) -> Path:
    """Fill `folder` and return its `python`, a launcher that finds tensorrt; at once if it is there already."""
    launcher = folder / "python"
    if launcher.exists():
        return launcher
    site, lib = folder / "site", folder / "lib"
    for part in (site, lib):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    _download_wheels(folder / "wheels", site)
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
        (found,) = source.glob(pattern)
        (lib / name).symlink_to(found)


def _compile_stub(lib: Path) -> None:
    name = "libnvinfer_plugin.so.11"
    command = ["gcc", "-x", "c", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(lib / name), "-"]
    subprocess.run(command, input=PLUGIN_STUB, text=True, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Put a real TensorRT into a folder, without a GPU.")
    parser.add_argument("folder", type=Path)
    print(install_tensorrt(parser.parse_args().folder.resolve()))
