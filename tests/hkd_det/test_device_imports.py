"""The leaf modules, the ONNX detectors and the dataset readers import no optional package."""

import subprocess
import sys

MODULES = [
    *(f"hkd_det.{name}" for name in ("errors", "structures", "image", "letterbox", "config", "files", "console")),
    *(f"hkd_det.onnxrt.{name}" for name in ("session", "model_config", "detector")),
    "hkd_det.datasets.catalog",
    "hkd_det.datasets.caltech_extract",
]
OPTIONAL_PACKAGES = {
    *("PIL", "jinja2", "matplotlib", "msgspec", "onnx", "onnxruntime", "openvino", "psutil", "pycocotools"),
    *("requests", "scipy", "tabulate", "timm", "torch", "torchvision", "tqdm", "ultralytics", "urllib3"),
}
CODE = """
import importlib, sys

for name in sys.argv[1:]:
    importlib.import_module(name)
print(*{name.partition(".")[0] for name in sys.modules})
"""


def test_leaves_and_readers_import_no_optional_package() -> None:
    command = [sys.executable, "-c", CODE, *MODULES]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    packages = set(process.stdout.split())
    assert {"cv2", "hkd_det", "numpy", "yaml"} <= packages
    assert not packages & OPTIONAL_PACKAGES
