"""Tests that the modules for devices import without torch."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import hkd_bench
import hkd_deploy
import hkd_det

TORCH_MODULES = (
    "hkd_det.models",
    "hkd_det.ops",
    "hkd_det.distill",
    "hkd_det.train",
    "hkd_deploy.export.diagnose",
    "hkd_deploy.export.exporter",
    "hkd_deploy.export.graph",
    "hkd_bench.quickstart.candidates",
    "hkd_bench.quickstart.own_data",
    "hkd_bench.quickstart.steps",
)
NO_TORCH = """
import importlib, importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm", "onnx", "ultralytics"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
"""
IMPORT_MODULES = f"""{NO_TORCH}
for module in sys.argv[1:]:
    importlib.import_module(module)
"""
RUN_COMMAND = f"""{NO_TORCH}
sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
"""


def test_device_modules_import_without_torch() -> None:
    modules = [
        module.name
        for package in (hkd_det, hkd_deploy, hkd_bench)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if not module.name.startswith(TORCH_MODULES)
    ]
    assert len(modules) > 40 and "hkd_deploy.pipeline" in modules and "hkd_bench.worker" in modules
    modules = [name for name in modules if not name.endswith("__main__")]
    done = subprocess.run([sys.executable, "-c", IMPORT_MODULES, *modules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("hkd_det.train.cli", ["--data", "citypersons", "--download"], "cityscapes-dataset.com"),
        ("hkd_det.train.cli", ["--list-layers", "--model", "mini-student"], "pip install 'hkd-det[train]'."),
        ("hkd_deploy.export.cli", ["best.pt"], "pip install 'hkd-det[train]', or export the weights on"),
        pytest.param(
            "hkd_bench.quickstart", [], ": not installed. Run pip install 'hkd-det[train]'.", marks=pytest.mark.slow
        ),
    ],
)
def test_command_without_torch_ends_in_one_line(module: str, flags: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN_COMMAND, module, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
