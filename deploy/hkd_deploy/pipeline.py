"""The pipeline: a frame in, people out, each stage timed. Letterbox, ONNX Runtime, the way back."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.artifact import Manifest
from hkd_deploy.backends.onnx_runtime import OnnxRuntime, open_onnx_runtime
from hkd_det.detections import Detections
from hkd_det.errors import DataError
from hkd_det.letterbox import Letterbox


@dataclass(frozen=True)
class StageTimes:
    """Wall-clock milliseconds of one frame: letterbox, the graph, and the boxes' way back."""

    preprocess_ms: float
    inference_ms: float
    postprocess_ms: float

    @property
    def total_ms(self) -> float:
        """From the frame to its detections."""
        return self.preprocess_ms + self.inference_ms + self.postprocess_ms


class Detector:
    """An open model. `manifest` says what it is, `device` where it runs.

    Keeps nothing between frames: several threads may call one detector.
    """

    def __init__(self, runtime: OnnxRuntime) -> None:
        self.manifest = Manifest.from_metadata(runtime.metadata, runtime.path)
        self.device = runtime.device
        self._runtime = runtime
        if self.manifest.imgsz_hw != runtime.input_hw:
            raise DataError(
                f"{runtime.path}: metadata says imgsz {self.manifest.imgsz_hw}, the graph takes {runtime.input_hw}; "
                "export it again"
            )
        if runtime.batch not in (None, 1):
            raise DataError(f"{runtime.path}: takes {runtime.batch} pictures at once, not one; export it with batch 1")

    def __call__(self, frame_rgb: NDArray[np.uint8]) -> Detections:
        """People in one frame, uint8 RGB (H, W, 3) of any size: boxes in pixels of the frame."""
        return self.timed(frame_rgb)[0]

    def timed(self, frame_rgb: NDArray[np.uint8]) -> tuple[Detections, StageTimes]:
        """As a call, and how long each stage took. Raises ValueError for what is no frame."""
        _check_frame(frame_rgb)
        start = perf_counter()
        box = Letterbox((frame_rgb.shape[0], frame_rgb.shape[1]), self.manifest.imgsz_hw)
        batch = box.apply(frame_rgb)[None]  # [1, H, W, 3]
        prepared = perf_counter()
        boxes, scores, count = self._runtime.run(batch)
        inferred = perf_counter()
        found = int(count[0])
        detections = Detections(box.to_source(boxes[0, :found]), scores[0, :found])
        done = perf_counter()
        return detections, StageTimes(
            preprocess_ms=1e3 * (prepared - start),
            inference_ms=1e3 * (inferred - prepared),
            postprocess_ms=1e3 * (done - inferred),
        )


@contextmanager
def open_detector(path: Path | str, device: str = "cpu", threads: int | None = None) -> Iterator[Detector]:
    """Open an exported model on cpu, cuda or cuda:N, and on nothing else.

    threads: CPU threads inside one operator; None leaves it to the runtime.
    Raises UsageError, DataError or UnavailableError, each saying what to do.
    """
    with open_onnx_runtime(Path(path), device, threads) as runtime:
        yield Detector(runtime)


def _check_frame(frame_rgb: object) -> None:
    if not isinstance(frame_rgb, np.ndarray):
        raise ValueError(f"a frame is a numpy array, uint8 RGB (H, W, 3), not {type(frame_rgb).__name__}")
    if frame_rgb.dtype != np.uint8 or frame_rgb.ndim != 3 or frame_rgb.shape[2] != 3:
        raise ValueError(f"a frame is uint8 RGB (H, W, 3), not {frame_rgb.dtype} {frame_rgb.shape}")
    if frame_rgb.size == 0:
        raise ValueError(f"an empty frame: {frame_rgb.shape}")
