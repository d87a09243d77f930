"""What the detector adds to the bare session, frame by frame, and how long import and opening take.

    python benchmarks/studies/runtime_overhead.py student.onnx

Calls alternate: bare, detector, bare, ... so that a machine that grows warm or busy slows both. A frame of the input's
size needs no resizing: all that the detector takes longer is overhead. A camera's frame is compared with the least
program that letterboxes it: one resize into a grey canvas, and the session.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_deploy import open_detector
from hkd_deploy.backends.openvino import create_core, read_model
from hkd_det.letterbox import PAD_VALUE
from hkd_det.onnxrt.session import open_session

CAMERA_HW = (1080, 1920)
OPEN = """
import time
start = time.perf_counter()
from hkd_deploy import open_detector
with open_detector({model!r}, backend={backend!r}, threads=1):
    print(time.perf_counter() - start)
"""
Frame = NDArray[np.uint8]


def main() -> None:
    """Print two small tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an .onnx file of hkd-export, of fixed size")
    parser.add_argument("--runs", type=int, default=300, help="pairs of calls a row (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    flags = parser.parse_args()
    cv2.setNumThreads(flags.threads)
    print("backend      frame         bare ms  detector ms   ratio  difference ms")
    for backend in ("onnxruntime", "openvino"):
        overhead(flags.model, backend, flags.runs, flags.threads)
    print("\nbackend      import and open, s: least, median of 7 fresh processes")
    for backend in ("onnxruntime", "openvino"):
        seconds = sorted(opening_s(flags.model, backend) for _ in range(7))
        print(f"{backend:12} {seconds[0]:.2f} {seconds[3]:.2f}")


def overhead(model: Path, backend: str, runs: int, threads: int) -> None:
    """A row for a frame of the input's size, and one for a camera's."""
    bare = {"onnxruntime": bare_onnxruntime, "openvino": bare_openvino}[backend](model, threads)
    with open_detector(model, backend=backend, threads=threads) as detector:
        input_hw = detector.metadata.imgsz_hw
        for frame_hw in (input_hw, CAMERA_HW):
            frame = np.random.default_rng(0).integers(0, 256, (*frame_hw, 3), dtype=np.uint8)
            least = bare if frame_hw == input_hw else letterboxing(bare, input_hw)
            print_row(backend, frame_hw, alternate(least, detector, frame, runs))


def bare_onnxruntime(model: Path, threads: int) -> Callable[[Frame], Any]:
    """Runs a frame of the input's size."""
    session = open_session(model, threads=threads)
    return lambda frame: session.run(["boxes", "scores", "count"], {"images": frame[None]})


def bare_openvino(model: Path, threads: int) -> Callable[[Frame], Any]:
    """The same, in float32 as the detector has it."""
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(threads)}
    request = create_core().compile_model(read_model(model), "CPU", settings).create_infer_request()
    return lambda frame: request.infer({"images": frame[None]}, share_inputs=True)


def letterboxing(bare: Callable[[Frame], Any], input_hw: tuple[int, int]) -> Callable[[Frame], Any]:
    """Shrinks a frame into a canvas, then runs it."""
    scale = min(input_hw[0] / CAMERA_HW[0], input_hw[1] / CAMERA_HW[1])
    height, width = round(CAMERA_HW[0] * scale), round(CAMERA_HW[1] * scale)
    canvas = np.full((*input_hw, 3), PAD_VALUE, np.uint8)

    def run(frame: Frame) -> Any:
        canvas[:height, :width] = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
        return bare(canvas)

    return run


def alternate(
    bare: Callable[[Frame], Any], detector: Callable[[Frame], Any], frame: Frame, runs: int
) -> NDArray[np.float64]:
    """[runs, 2] milliseconds; who goes first alternates as well."""
    times_ms = np.zeros((runs, 2))
    for turn in range(-10, runs):
        for which in (0, 1) if turn % 2 else (1, 0):
            start = perf_counter()
            (bare, detector)[which](frame)
            if turn >= 0:
                times_ms[turn, which] = 1e3 * (perf_counter() - start)
    return times_ms


def print_row(backend: str, frame_hw: tuple[int, int], times_ms: NDArray[np.float64]) -> None:
    """Medians; the difference is the median of the pairs' own."""
    bare_ms, detector_ms = np.median(times_ms, 0)
    difference_ms = np.median(times_ms[:, 1] - times_ms[:, 0])
    size = f"{frame_hw[1]}x{frame_hw[0]}"
    print(
        f"{backend:12} {size:11} {bare_ms:9.2f} {detector_ms:12.2f} {detector_ms / bare_ms:7.3f} {difference_ms:14.3f}"
    )


def opening_s(model: Path, backend: str) -> float:
    """From the first import to an open detector, in a process of its own."""
    code = OPEN.format(model=str(model), backend=backend)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


if __name__ == "__main__":
    main()
