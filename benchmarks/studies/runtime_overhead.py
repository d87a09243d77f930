"""Overhead of the detector over a plain runtime session per frame, and the time to import and open it.

    python benchmarks/studies/runtime_overhead.py student.onnx

Calls of the session and of the detector alternate, so that a change of the machine's speed affects both. A frame of
the input size needs no resizing: the whole difference is overhead. A camera frame is compared with the shortest
possible letterbox: one resize into a gray canvas, then the session.
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
from hkd_det.letterbox import PAD_VALUE
from hkd_det.onnxrt.openvino import create_core, read_model
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
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help=".onnx file of hkd-export with a fixed input size")
    parser.add_argument("--runs", type=int, default=300, help="pairs of calls per row (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the runtime (default: %(default)s)")
    flags = parser.parse_args()
    cv2.setNumThreads(flags.threads)
    print("backend      frame      session ms  detector ms   ratio  difference ms")
    for backend in ("onnxruntime", "openvino"):
        measure_overhead(flags.model, backend, flags.runs, flags.threads)
    print("\nbackend      import and open, s: minimum, median of 7 new processes")
    for backend in ("onnxruntime", "openvino"):
        seconds = sorted(measure_opening_s(flags.model, backend) for _ in range(7))
        print(f"{backend:12} {seconds[0]:.2f} {seconds[3]:.2f}")


def measure_overhead(model: Path, backend: str, runs: int, threads: int) -> None:
    """Print a row for a frame of the input size, and one for a camera frame.

    Args:
        model: The .onnx file.
        backend: "onnxruntime" or "openvino".
        runs: Pairs of calls per row.
        threads: Threads of the runtime.
    """
    session = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}[backend](model, threads)
    with open_detector(model, backend=backend, threads=threads) as detector:
        input_hw = detector.metadata.imgsz_hw
        for frame_hw in (input_hw, CAMERA_HW):
            frame = np.random.default_rng(0).integers(0, 256, (*frame_hw, 3), dtype=np.uint8)
            reference = session if frame_hw == input_hw else add_letterbox(session, input_hw)
            print_row(backend, frame_hw, time_alternately(reference, detector, frame, runs))


def open_onnxruntime(model: Path, threads: int) -> Callable[[Frame], Any]:
    """Return a function that runs a frame of the input size through ONNX Runtime.

    Args:
        model: The .onnx file.
        threads: Threads of the runtime.
    """
    session = open_session(model, threads=threads)
    return lambda frame: session.run(["boxes", "scores", "count"], {"images": frame[None]})


def open_openvino(model: Path, threads: int) -> Callable[[Frame], Any]:
    """Return a function that runs a frame of the input size through OpenVINO in float32, as the detector does.

    Args:
        model: The .onnx file.
        threads: Threads of the runtime.
    """
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(threads)}
    request = create_core().compile_model(read_model(model), "CPU", settings).create_infer_request()
    return lambda frame: request.infer({"images": frame[None]}, share_inputs=True)


def add_letterbox(session: Callable[[Frame], Any], input_hw: tuple[int, int]) -> Callable[[Frame], Any]:
    """Return a function that resizes a camera frame into a canvas and runs it.

    Args:
        session: Runs a frame of the input size.
        input_hw: Input height and width, pixels.
    """
    scale = min(input_hw[0] / CAMERA_HW[0], input_hw[1] / CAMERA_HW[1])
    height, width = round(CAMERA_HW[0] * scale), round(CAMERA_HW[1] * scale)
    canvas = np.full((*input_hw, 3), PAD_VALUE, np.uint8)

    def run(frame: Frame) -> Any:
        canvas[:height, :width] = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
        return session(canvas)

    return run


def time_alternately(
    session: Callable[[Frame], Any], detector: Callable[[Frame], Any], frame: Frame, runs: int
) -> NDArray[np.float64]:
    """Time both functions on a frame; the order within a pair alternates as well.

    Args:
        session: The reference.
        detector: The detector.
        frame: uint8 [H, W, 3].
        runs: Pairs of calls.

    Returns:
        float64 [runs, 2], ms: reference and detector.
    """
    times_ms = np.zeros((runs, 2))
    for turn in range(-10, runs):
        for column in (0, 1) if turn % 2 else (1, 0):
            start = perf_counter()
            (session, detector)[column](frame)
            if turn >= 0:
                times_ms[turn, column] = 1e3 * (perf_counter() - start)
    return times_ms


def print_row(backend: str, frame_hw: tuple[int, int], times_ms: NDArray[np.float64]) -> None:
    """Print the medians; the difference is the median over pairs.

    Args:
        backend: Name of the backend.
        frame_hw: Height and width of the frame, pixels.
        times_ms: float64 [runs, 2] of `time_alternately`.
    """
    session_ms, detector_ms = np.median(times_ms, 0)
    difference_ms = np.median(times_ms[:, 1] - times_ms[:, 0])
    size = f"{frame_hw[1]}x{frame_hw[0]}"
    ratio = detector_ms / session_ms
    print(f"{backend:12} {size:11} {session_ms:9.2f} {detector_ms:12.2f} {ratio:7.3f} {difference_ms:14.3f}")


def measure_opening_s(model: Path, backend: str) -> float:
    """Return the seconds from the first import to an open detector, in a new process.

    Args:
        model: The .onnx file.
        backend: Name of the backend.
    """
    code = OPEN.format(model=str(model), backend=backend)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(process.stdout)


if __name__ == "__main__":
    main()
