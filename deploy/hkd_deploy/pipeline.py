"""The pipeline: frames in, people out, each stage timed. Letterbox, a backend, the way back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import overload

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.backends import OpenedBackend, open_backend
from hkd_deploy.backends.base import Backend, PerformanceHint, RuntimeOutputs
from hkd_deploy.model_metadata import ModelMetadata
from hkd_det.errors import DataError
from hkd_det.letterbox import PAD_VALUE, STRIDE, Letterbox, format_imgsz
from hkd_det.structures import Detections


@dataclass(frozen=True)
class StageTimes:
    """Wall-clock milliseconds of one frame: letterbox, the graph, and the boxes' way back.

    A graph that letterboxes itself does so in `inference_ms`; what comes before is then next to nothing.
    """

    preprocess_ms: float
    inference_ms: float
    postprocess_ms: float

    @property
    def total_ms(self) -> float:
        """From the frame to its detections."""
        return self.preprocess_ms + self.inference_ms + self.postprocess_ms


class Detector:
    """An open model. `manifest` says what it is, `backend` and `device` what runs it where.

    Keeps nothing between frames: several threads may call one detector.
    """

    def __init__(self, opened: OpenedBackend) -> None:
        runtime = opened.runtime
        self.metadata = ModelMetadata.from_metadata(runtime.metadata, runtime.path)
        self.backend = opened.name
        self.device = runtime.device
        self._runtime: Backend = runtime
        self._num_requests = opened.num_requests
        self._max_batch = runtime.batch or (1 if opened.num_requests > 1 else opened.max_batch)
        free = self.metadata.dynamic or self.metadata.letterbox
        if runtime.input_hw != (None if free else self.metadata.imgsz_hw):
            raise DataError(
                f"{runtime.path}: metadata says imgsz {'any' if free else self.metadata.imgsz_hw}, "
                f"the graph takes {runtime.input_hw or 'any'}; export it again"
            )

    @overload
    def __call__(self, frame_rgb: NDArray[np.uint8]) -> Detections: ...

    @overload
    def __call__(self, frame_rgb: Sequence[NDArray[np.uint8]]) -> list[Detections]: ...

    def __call__(self, frame_rgb: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> Detections | list[Detections]:
        """People in one frame, uint8 RGB (H, W, 3) of any size, or in each of a list: boxes in pixels of the frame.

        A list goes through the graph in batches as large as it takes. Raises ValueError for what is no frame,
        DataError for a frame larger than a graph takes that letterboxes itself.
        """
        if isinstance(frame_rgb, (list, tuple)):
            return self._predict_batches(frame_rgb)
        return self.predict_timed(frame_rgb)[0]  # type: ignore[arg-type]

    def predict_timed(self, frame_rgb: NDArray[np.uint8]) -> tuple[Detections, StageTimes]:
        """One frame as in a call, and how long each stage took."""
        start = perf_counter()
        box = self._make_letterbox(frame_rgb)
        batch = self._make_batch([box], [frame_rgb])
        prepared = perf_counter()
        answers = self._runtime.run(batch)
        inferred = perf_counter()
        detections = _to_source_detections(box, answers, 0)
        done = perf_counter()
        return detections, StageTimes(
            preprocess_ms=1e3 * (prepared - start),
            inference_ms=1e3 * (inferred - prepared),
            postprocess_ms=1e3 * (done - inferred),
        )

    def _predict_batches(self, frames_rgb: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        boxes = [self._make_letterbox(frame) for frame in frames_rgb]
        found: dict[int, Detections] = {}

        def detect(places: Sequence[int]) -> None:
            batch = self._make_batch([boxes[place] for place in places], [frames_rgb[place] for place in places])
            answers = self._runtime.run(batch)
            found.update((place, _to_source_detections(boxes[place], answers, row)) for row, place in enumerate(places))

        batches = self._split_batches(boxes)
        if self._num_requests > 1 and len(batches) > 1:
            from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - needed by few, and not light

            with ThreadPoolExecutor(self._num_requests) as pool:
                list(pool.map(detect, batches))
        else:
            for places in batches:
                detect(places)
        return [found[place] for place in range(len(frames_rgb))]

    def _make_letterbox(self, frame_rgb: NDArray[np.uint8]) -> Letterbox:
        """Where the frame goes in the graph's input."""
        _check_frame(frame_rgb)
        frame_hw = (frame_rgb.shape[0], frame_rgb.shape[1])
        manifest = self.metadata
        if manifest.letterbox:
            if frame_hw[0] > manifest.max_imgsz_hw[0] or frame_hw[1] > manifest.max_imgsz_hw[1]:
                raise DataError(
                    f"{self._runtime.path}: a frame of {format_imgsz(frame_hw)}, the graph takes up to "
                    f"{format_imgsz(manifest.max_imgsz_hw)}; export it with --max-size {format_imgsz(frame_hw)}"
                )
            return Letterbox(frame_hw, frame_hw)
        if manifest.dynamic:
            # The picture as large as in imgsz, in the smallest input that holds it.
            height, width = Letterbox(frame_hw, manifest.imgsz_hw).content_hw
            return Letterbox(frame_hw, (-(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE))
        return Letterbox(frame_hw, manifest.imgsz_hw)

    def _make_batch(
        self, letterboxes: Sequence[Letterbox], frames_rgb: Sequence[NDArray[np.uint8]]
    ) -> NDArray[np.uint8]:
        """[B, H, W, 3] of frames that go into the same input; a fixed batch is filled up with grey."""
        size = self._runtime.batch or len(letterboxes)
        if size == 1 and letterboxes[0].source_hw == letterboxes[0].input_hw:
            return np.ascontiguousarray(frames_rgb[0])[None]  # a frame of a graph's own size is not even copied
        batch = np.empty((size, *letterboxes[0].input_hw, 3), np.uint8)
        for row, (box, frame) in enumerate(zip(letterboxes, frames_rgb, strict=True)):
            box.apply(frame, batch[row])
        batch[len(letterboxes) :] = PAD_VALUE
        return batch

    def _split_batches(self, letterboxes: Sequence[Letterbox]) -> list[list[int]]:
        """Places of the frames that go through together: of one input size, as many as the graph takes.

        Where calls run side by side, a graph of any batch is given single frames: that keeps all of them busy.
        """
        by_size: dict[tuple[int, int], list[int]] = {}
        for place, box in enumerate(letterboxes):
            by_size.setdefault(box.input_hw, []).append(place)
        most = self._max_batch or max(1, len(letterboxes))
        return [places[start : start + most] for places in by_size.values() for start in range(0, len(places), most)]


@contextmanager
def open_detector(
    path: Path | str,
    device: str = "cpu",
    threads: int | None = None,
    backend: str | None = None,
    performance_hint: PerformanceHint = "latency",
) -> Iterator[Detector]:
    """Open an exported model on cpu, cuda or cuda:N, and on nothing else.

    path: an .onnx file, an .engine file or an OpenVINO folder. threads: CPU threads inside one operator; None leaves
    it to the runtime. backend: one of `backends.opening.BACKENDS`; None takes the one of the file.
    hint: of OpenVINO only, "throughput" answers lists as fast as it can, "latency" single frames.
    Raises UsageError, DataError or UnavailableError, each saying what to do.
    """
    with open_backend(Path(path), device, threads, backend, performance_hint) as opened:
        yield Detector(opened)


def _to_source_detections(letterbox: Letterbox, outputs: RuntimeOutputs, index: int) -> Detections:
    """One picture's people, in pixels of its frame."""
    boxes, scores, count = outputs
    found = int(count[index])
    return Detections(letterbox.boxes_to_source(boxes[index, :found]), scores[index, :found])


def _check_frame(frame_rgb: object) -> None:
    if not isinstance(frame_rgb, np.ndarray):
        raise ValueError(f"a frame is a numpy array, uint8 RGB (H, W, 3), not {type(frame_rgb).__name__}")
    if frame_rgb.dtype != np.uint8 or frame_rgb.ndim != 3 or frame_rgb.shape[2] != 3:
        raise ValueError(f"a frame is uint8 RGB (H, W, 3), not {frame_rgb.dtype} {frame_rgb.shape}")
    if frame_rgb.size == 0:
        raise ValueError(f"an empty frame: {frame_rgb.shape}")
