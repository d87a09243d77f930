"""Tests that a device needs only numpy, opencv, pyyaml and a runtime, and that the runtime is imported on use."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

# Packages of the extras, and torch.
ABSENT = (
    "PIL", "av", "jinja2", "matplotlib", "msgspec", "onnx", "psutil", "pycocotools", "requests", "scipy",
    "simplejpeg", "supervision", "tabulate", "timm", "torch", "torchvision", "tqdm", "trackers",
    "ultralytics", "urllib3",
)  # fmt: skip

BASE_INSTALL = f"""
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
"""

RUN_MODEL = f"""{BASE_INSTALL}
import numpy as np
import hkd_deploy
from hkd_deploy.demo.cli import main

model, video, output = sys.argv[1:]
for backend in ("onnxruntime", "openvino"):
    with hkd_deploy.open_detector(model, backend=backend) as detector:
        assert len(detector(np.full((50, 70, 3), 255, np.uint8))) == 1
sys.exit(main([model, "--source", video, "--save", output]))
"""

LIST_RUNTIMES = """
import sys
import hkd_deploy
print(sorted({"onnxruntime", "openvino", "tensorrt", "yaml"} & set(sys.modules)))
"""

IMPORT_MODULES = f"""{BASE_INSTALL}
import importlib

for module in sys.argv[1:]:
    importlib.import_module(module)
"""


RUN_COMMAND = f"""{BASE_INSTALL}
import importlib

sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_base_install_runs_model_and_demo(tiny_onnx: Callable[..., Path], tmp_path: Path) -> None:
    video, output = tmp_path / "street.avi", tmp_path / "out.mp4"
    writer = cv2.VideoWriter(str(video), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for _ in range(5):
        writer.write(np.full((48, 64, 3), 255, np.uint8))
    writer.release()
    command = [sys.executable, "-c", RUN_MODEL, str(tiny_onnx()), str(video), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("5 frames, ") and output.is_file()


@pytest.mark.slow
@pytest.mark.parametrize("module", ["hkd_deploy.backends.tensorrt", "hkd_deploy.serving.writers", "hkd_deploy.streams"])
def test_base_install_imports_device_modules(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_MODULES, module], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "flags", "code", "message"),
    [
        ("hkd_det.train.cli", ["--help"], 0, "usage: hkd-train"),
        ("hkd_det.train.cli", ["--data", "coco-person", "--download"], 1, "not installed. Run pip install 'hkd-det["),
        ("hkd_bench.quickstart", ["--help"], 0, "usage: hkd-quickstart"),
        ("hkd_deploy.demo.cli", ["--source", "rtsp://127.0.0.1:1/x", "--events", "-"], 1, "'hkd-det[live]'."),
    ],
)
def test_base_install_names_the_extra_of_a_command(module: str, flags: list[str], code: int, message: str) -> None:
    command = [sys.executable, "-c", RUN_COMMAND, module, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code and message in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_import_loads_no_runtime() -> None:
    command = [sys.executable, "-c", LIST_RUNTIMES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
