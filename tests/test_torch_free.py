"""What runs on a device imports where torch is not installed."""

import pkgutil
import subprocess
import sys

import hkd_bench
import hkd_deploy
import hkd_det

LEARNING = (
    "hkd_det.models",
    "hkd_det.losses",
    "hkd_det.distill",
    "hkd_det.train",
    "hkd_deploy.export",
    "hkd_bench.quickstart",
)
WITHOUT = """
import importlib, importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm", "onnx", "ultralytics"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
for module in sys.argv[1:]:
    importlib.import_module(module)
"""


def test_every_device_module_imports_without_torch() -> None:
    modules = [
        module.name
        for package in (hkd_det, hkd_deploy, hkd_bench)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if not module.name.startswith(LEARNING)
    ]
    assert len(modules) > 40 and "hkd_deploy.pipeline" in modules and "hkd_bench.worker" in modules
    modules = [name for name in modules if not name.endswith("__main__")]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *modules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
