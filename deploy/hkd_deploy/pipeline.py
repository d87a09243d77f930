"""Inference with models of `hkd-export`, and the function that opens any model."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.backends import OpenedBackend, open_backend
from hkd_deploy.backends.base import Backend, Detector, PerformanceHint, RuntimeOutputs, StageTimes
from hkd_deploy.model_metadata import ModelMetadata
from hkd_det.errors import DataError, UsageError
from hkd_det.image import check_image
from hkd_det.letterbox import PAD_VALUE, STRIDE, Letterbox, format_imgsz
from hkd_det.shipped import SHIPPED_MODELS, resolve_model
from hkd_det.structures import Detections


class ExportedDetector(Detector):
    """A model of `hkd-export`: letterbox, backend and conversion of boxes to image pixels.

    Several threads may call it.

    Args:
        opened: The opened model.
        imgsz_hw: Limit of the input of a model with a dynamic size: height and width in pixels. None for that of its
            export.

    Raises:
        UsageError: The input size of the model is fixed, or `imgsz_hw` exceeds that of its export.
        DataError: Metadata and graph contradict each other.
    """

    def __init__(self, opened: OpenedBackend, imgsz_hw: tuple[int, int] | None = None) -> None:
        runtime = opened.runtime
        self.metadata = ModelMetadata.from_metadata(runtime.metadata, runtime.path)
        self.backend = opened.name
        self.device = runtime.device
        self._runtime: Backend = runtime
        self._num_requests = opened.num_requests
        # With concurrent requests, single images keep all of them busy.
        self.max_batch = runtime.batch or (1 if opened.num_requests > 1 else opened.max_batch)
        is_size_free = self.metadata.dynamic or self.metadata.letterbox
        if runtime.input_hw != (None if is_size_free else self.metadata.imgsz_hw):
            raise DataError(
                f"{runtime.path}: imgsz {'any' if is_size_free else self.metadata.imgsz_hw} in the metadata, "
                f"but {runtime.input_hw or 'any'} in the graph. Export the model again."
            )
        if imgsz_hw:
            self.metadata = _limit_imgsz(self.metadata, imgsz_hw, runtime.path)

    def predict_timed(self, image_rgb: NDArray[np.uint8]) -> tuple[Detections, StageTimes]:
        """Run inference on one image and measure the stages. See `Detector.predict_timed`."""
        start = perf_counter()
        return self._run_timed([self._make_letterbox(image_rgb)], [image_rgb], start)[0]

    def predict_timed_batch(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[tuple[Detections, StageTimes]]:
        """Run inference on a list of images and measure the stages. See `Detector.predict_timed_batch`."""
        start = perf_counter()
        letterboxes = [self._make_letterbox(image) for image in images_rgb]
        results: dict[int, tuple[Detections, StageTimes]] = {}
        for indices in self._split_batches(letterboxes):
            outputs = self._run_timed([letterboxes[i] for i in indices], [images_rgb[i] for i in indices], start)
            results.update(zip(indices, outputs, strict=True))
            start = perf_counter()
        return [results[i] for i in range(len(images_rgb))]

    def predict_batches(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Run inference on a list of images. See `Detector.predict_batches`."""
        letterboxes = [self._make_letterbox(image) for image in images_rgb]
        results: dict[int, Detections] = {}

        def predict_batch(indices: Sequence[int]) -> None:
            batch = self._make_batch([letterboxes[i] for i in indices], [images_rgb[i] for i in indices])
            outputs = self._runtime.run(batch)
            results.update((i, _to_source_detections(letterboxes[i], outputs, row)) for row, i in enumerate(indices))

        batches = self._split_batches(letterboxes)
        if self._num_requests > 1 and len(batches) > 1:
            from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - slow import, only for OpenVINO throughput

            with ThreadPoolExecutor(self._num_requests) as pool:
                list(pool.map(predict_batch, batches))
        else:
            for indices in batches:
                predict_batch(indices)
        return [results[i] for i in range(len(images_rgb))]

    def _run_timed(
        self, letterboxes: Sequence[Letterbox], images_rgb: Sequence[NDArray[np.uint8]], start_s: float
    ) -> list[tuple[Detections, StageTimes]]:
        """Run the graph once, on images of one input size. `start_s` is when the preprocessing started."""
        batch = self._make_batch(letterboxes, images_rgb)
        preprocessed_s = perf_counter()
        outputs = self._runtime.run(batch)
        inferred_s = perf_counter()
        detections = [_to_source_detections(letterbox, outputs, row) for row, letterbox in enumerate(letterboxes)]
        times = StageTimes(
            preprocess_ms=1e3 * (preprocessed_s - start_s),
            inference_ms=1e3 * (inferred_s - preprocessed_s),
            postprocess_ms=1e3 * (perf_counter() - inferred_s),
        )
        return [(found, times) for found in detections]

    def _make_letterbox(self, image_rgb: NDArray[np.uint8]) -> Letterbox:
        """Compute the position of an image in the input of the graph."""
        check_image(image_rgb)
        image_hw = (image_rgb.shape[0], image_rgb.shape[1])
        metadata = self.metadata
        if metadata.letterbox:
            if image_hw[0] > metadata.max_imgsz_hw[0] or image_hw[1] > metadata.max_imgsz_hw[1]:
                raise DataError(
                    f"{self._runtime.path}: frame of {format_imgsz(image_hw)} exceeds the limit of "
                    f"{format_imgsz(metadata.max_imgsz_hw)}. "
                    f"Export the model with --max-imgsz {format_imgsz(image_hw)}."
                )
            return Letterbox(image_hw, image_hw)
        if metadata.dynamic:
            # Scale as for a fixed input of imgsz, then use the smallest input that contains the scaled image.
            height, width = Letterbox(image_hw, metadata.imgsz_hw).content_hw
            return Letterbox(image_hw, (-(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE))
        return Letterbox(image_hw, metadata.imgsz_hw)

    def _make_batch(
        self, letterboxes: Sequence[Letterbox], images_rgb: Sequence[NDArray[np.uint8]]
    ) -> NDArray[np.uint8]:
        """Letterbox images of one input size to [B, H, W, 3]. Unused rows of a fixed batch are gray."""
        size = self._runtime.batch or len(letterboxes)
        if size == 1 and letterboxes[0].source_hw == letterboxes[0].input_hw:
            return np.ascontiguousarray(images_rgb[0])[None]  # no copy for an image of the input size
        batch = np.empty((size, *letterboxes[0].input_hw, 3), np.uint8)
        for row, (letterbox, image) in enumerate(zip(letterboxes, images_rgb, strict=True)):
            letterbox.apply(image, batch[row])
        batch[len(letterboxes) :] = PAD_VALUE
        return batch

    def _split_batches(self, letterboxes: Sequence[Letterbox]) -> list[list[int]]:
        """Group image indices by input size, in batches of at most the limit of the graph."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, letterbox in enumerate(letterboxes):
            by_size.setdefault(letterbox.input_hw, []).append(index)
        step = self.max_batch or max(1, len(letterboxes))
        return [indices[start : start + step] for indices in by_size.values() for start in range(0, len(indices), step)]


def open_detector(
    model: Path | str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    backend: str | None = None,
    performance_hint: PerformanceHint = "latency",
    model_config: Path | str | None = None,
    imgsz_hw: tuple[int, int] | None = None,
) -> Detector:
    """Open a model on exactly the requested device.

    An ONNX or OpenVINO file that `hkd-export` did not write needs a model configuration, unless it is recognized.

    Args:
        model: An .onnx file, an .engine file, an OpenVINO directory or .xml file, or the name of a shipped model
            (`hkd_det.shipped.SHIPPED_MODELS`). None opens the shipped model for CPUs.
        device: cpu, cuda or cuda:N.
        threads: Number of CPU threads per operator. None for the default of the runtime.
        backend: One of `hkd_deploy.backends.BACKENDS`. None selects the backend by the file type.
        performance_hint: For OpenVINO: `latency` for single images, `throughput` for lists.
        model_config: YAML file or name of the model configuration (default: its metadata, or MODEL.yaml next to it).
        imgsz_hw: Input size of a model with a dynamic size: height and width in pixels, multiples of 32, at most those
            of its export. None for those of the export.

    Returns:
        The detector. Use it at once, or in a `with` block that releases it.

    Raises:
        UsageError: An argument is invalid, or the backend does not support it.
        DataError: The file is missing or damaged, or its model configuration is missing or invalid.
        UnavailableError: The runtime or the device is missing.

    Examples:
        >>> detector = open_detector()
        >>> detections = detector("street.jpg", conf=0.3)
        >>> with open_detector("student.onnx", device="cuda") as detector:
        ...     detections = detector(image_rgb)
    """
    # These modules import YAML, which an import of hkd_deploy does not need.
    from hkd_deploy.external import is_external_model, open_external_detector  # noqa: PLC0415 - see above

    path = resolve_model(model)
    if not path.exists():
        names = ", ".join(SHIPPED_MODELS)
        raise DataError(f"{path}: no such model file. Create it with hkd-export, or use a shipped model: {names}.")
    if model_config or is_external_model(path):
        if imgsz_hw:
            raise _make_fixed_size_error(path)
        config_path = Path(model_config) if model_config else None
        return open_external_detector(path, device, threads, backend, performance_hint, config_path)
    with ExitStack() as stack:
        opened = stack.enter_context(open_backend(path, device, threads, backend, performance_hint))
        detector = ExportedDetector(opened, imgsz_hw)
        detector.attach_resources(stack.pop_all())
    return detector


def check_imgsz(metadata: ModelMetadata, imgsz_hw: tuple[int, int], path: Path) -> None:
    """Check that a model accepts an input size.

    Args:
        metadata: Metadata of the model.
        imgsz_hw: Height and width in pixels.
        path: The model, for error messages.

    Raises:
        UsageError: The size of the model is fixed, or the new one is no multiple of 32 or exceeds that of the export.
    """
    if not metadata.dynamic:
        raise _make_fixed_size_error(path)
    if any(side <= 0 or side % STRIDE for side in imgsz_hw):
        raise UsageError(
            f"{path}: input of {format_imgsz(imgsz_hw)}: width and height must be multiples of {STRIDE}. "
            f"The export allows up to {format_imgsz(metadata.imgsz_hw)}."
        )
    if any(side > limit for side, limit in zip(imgsz_hw, metadata.imgsz_hw, strict=True)):
        raise UsageError(
            f"{path}: input of {format_imgsz(imgsz_hw)}: its export allows up to {format_imgsz(metadata.imgsz_hw)}. "
            f"Export it with hkd-export --dynamic size --imgsz {format_imgsz(imgsz_hw)}."
        )


def _limit_imgsz(metadata: ModelMetadata, imgsz_hw: tuple[int, int], path: Path) -> ModelMetadata:
    """Return the metadata of a model at another input size."""
    check_imgsz(metadata, imgsz_hw, path)
    flops = metadata.flops if imgsz_hw == metadata.imgsz_hw else None  # those of the other size are not known
    return replace(metadata, imgsz_hw=imgsz_hw, max_imgsz_hw=imgsz_hw, flops=flops)


def _make_fixed_size_error(path: Path) -> UsageError:
    return UsageError(
        f"{path}: its input size is fixed. Export the model with hkd-export --dynamic size to choose the size."
    )


def _to_source_detections(letterbox: Letterbox, outputs: RuntimeOutputs, index: int) -> Detections:
    boxes, scores, count = outputs
    num_valid = int(count[index])
    return Detections(letterbox.boxes_to_source(boxes[index, :num_valid]), scores[index, :num_valid])
