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
    "hkd_bench.quickstart",
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
RUN_TRAIN = f"""{NO_TORCH}
from hkd_det.train.cli import main
sys.exit(main(sys.argv[1:]))
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "citypersons", "--download"], "cityscapes-dataset.com"),
        (["--data", "citypersons", "--model", "mini-student"], "torch is not installed. Run pip install"),
    ],
)
def test_hkd_train_without_torch(flags: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN_TRAIN, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1
