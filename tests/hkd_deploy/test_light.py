"""The runtime is light: no torch, no ONNX Runtime before a model is opened, and soon there."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PROBE = """
import json, sys, time
start = time.process_time()
import hkd_deploy
heavy = {"torch", "onnx", "matplotlib", "scipy"}
early = sorted((heavy | {"onnxruntime", "openvino", "tensorrt", "yaml"}) & set(sys.modules))
with hkd_deploy.open_detector(sys.argv[1]):
    pass
opened_s = time.process_time() - start
import hkd_deploy.streams, hkd_deploy.demo.cli
with hkd_deploy.open_detector(sys.argv[1], backend="openvino"):
    pass
late = sorted(heavy & set(sys.modules))
print(json.dumps({"opened_s": opened_s, "early": early, "late": late}))
"""


def test_imports(tiny_onnx: Callable[..., Path]) -> None:
    path = tiny_onnx()
    runs = []
    for _ in range(3):  # the least of three counts
        done = subprocess.run([sys.executable, "-c", PROBE, str(path)], capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    assert all(run["early"] == run["late"] == [] for run in runs)
    # Processor time: it hardly knows of other work on the machine. 0.16 s where this was written.
    assert min(run["opened_s"] for run in runs) < 0.5
