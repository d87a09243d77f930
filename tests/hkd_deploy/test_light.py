"""The runtime is light: no torch, no ONNX Runtime before a model is opened, and soon there."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PROBE = """
import json, sys, time
start = time.perf_counter()
import hkd_deploy, hkd_deploy.streams, hkd_deploy.demo.command
imported_s = time.perf_counter() - start
early = [name for name in ("torch", "onnxruntime", "onnx", "matplotlib", "scipy") if name in sys.modules]
with hkd_deploy.open_detector(sys.argv[1]):
    pass
late = [name for name in ("torch", "onnx", "matplotlib", "scipy") if name in sys.modules]
print(json.dumps({"imported_s": imported_s, "opened_s": time.perf_counter() - start, "early": early, "late": late}))
"""


def test_imports(tiny_onnx: Callable[..., Path]) -> None:
    path = tiny_onnx()
    runs = []
    for _ in range(3):  # the least of three: other work on the machine only ever adds
        done = subprocess.run([sys.executable, "-c", PROBE, str(path)], capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    assert all(run["early"] == run["late"] == [] for run in runs)
    # The target is 0.5 s (0.33 s measured on 2 idle cores); the bound leaves room for a busy machine.
    assert min(run["opened_s"] for run in runs) < 1.5
