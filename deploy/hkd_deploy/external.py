"""Inference with ONNX and OpenVINO detectors of other tools, which a model configuration describes.

Normalization, decoding and NMS run outside the graph, as in the tools of these models.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.backends import BACKENDS, get_default_backend
from hkd_deploy.backends.base import Detector, PerformanceHint, StageTimes, make_closed_error
from hkd_deploy.backends.onnxruntime import make_tensorrt_provider, make_tensorrt_rtx_provider, prefers_float_int8
from hkd_deploy.model_metadata import ModelMetadata
from hkd_deploy.trt.onnx_file import count_parameters, read_onnx_metadata
from hkd_det.errors import DataError, UsageError
from hkd_det.image import check_image
from hkd_det.onnxrt.detector import OnnxDetector
from hkd_det.onnxrt.graph_io import read_graph_io
from hkd_det.onnxrt.model_config import read_model_config
from hkd_det.onnxrt.openvino import (
    OpenVinoSession,
    count_openvino_parameters,
    hash_model_files,
    is_openvino_model,
    list_model_files,
    read_openvino_metadata,
)
from hkd_det.onnxrt.recognition import load_model_config
from hkd_det.onnxrt.session import open_session
from hkd_det.structures import Detections

UNKNOWN_LICENSE = "unknown"


class ExternalDetector(Detector):
    """An ONNX or OpenVINO detector of another tool. Several threads may call it.

    Args:
        model: The opened model.
        backend: Name of the backend.
        device: Device that runs the model.
    """

    def __init__(self, model: OnnxDetector, backend: str, device: str) -> None:
        self.backend, self.device = backend, device
        self._path = model.path
        self._model: OnnxDetector | None = model
        self.metadata = ModelMetadata(
            model=model.config.name or model.path.stem,
            imgsz_hw=model.input_hw,
            batch=model.batch,
            parameters=(count_openvino_parameters if is_openvino_model(model.path) else count_parameters)(model.path),
            flops=None,
            weights_sha256=hash_model_files(model.path),
            data="",
            license=model.config.license or UNKNOWN_LICENSE,
            date="",
            version="",
            max_imgsz_hw=model.input_hw,
        )

    def predict_timed(self, image_rgb: NDArray[np.uint8]) -> tuple[Detections, StageTimes]:
        """Run inference on one image and measure the stages. See `Detector.predict_timed`."""
        start = perf_counter()
        check_image(image_rgb)
        model = self._get_model()
        letterboxes, batch = model.preprocess([image_rgb])
        preprocessed = perf_counter()
        outputs = model.run(batch)
        inferred = perf_counter()
        (detections,) = model.postprocess(outputs, letterboxes)
        end = perf_counter()
        return detections, StageTimes(
            preprocess_ms=1e3 * (preprocessed - start),
            inference_ms=1e3 * (inferred - preprocessed),
            postprocess_ms=1e3 * (end - inferred),
        )

    def predict_batches(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Run inference on a list of images. See `Detector.predict_batches`."""
        for image in images_rgb:
            check_image(image)
        return self._get_model()(images_rgb)

    def close(self) -> None:
        """Release the model. See `Detector.close`."""
        self._model = None

    def _get_model(self) -> OnnxDetector:
        if self._model is None:
            raise make_closed_error(self._path)
        return self._model


def _open_onnx_session(path: Path, device: str, threads: int | None) -> Any:
    """Open a file with ONNX Runtime; an INT8 file of hkd-export --precision as its backend does."""
    is_own_int8 = path.is_file() and read_onnx_metadata(path).get("hkd.precision") == "int8"
    return open_session(path, device, threads, disable_quant_qdq=is_own_int8 and prefers_float_int8(device))


SessionOpener = Callable[[Path, str, int | None], Any]
SESSION_OPENERS: dict[str, SessionOpener] = {
    "onnxruntime": _open_onnx_session,
    "openvino": lambda path, device, threads: OpenVinoSession(path, device, threads, None),
    "openvino-bf16": lambda path, device, threads: OpenVinoSession(path, device, threads, "bf16"),
    "ort-tensorrt": lambda path, device, threads: open_session(
        path, device, threads, make_tensorrt_provider(path, device)
    ),
    "ort-tensorrt-rtx": lambda path, device, threads: open_session(
        path, device, threads, make_tensorrt_rtx_provider(path, device)
    ),
}


def open_external_detector(
    path: Path,
    device: str = "cpu",
    threads: int | None = None,
    backend: str | None = None,
    performance_hint: PerformanceHint = "latency",
    model_config: Path | None = None,
) -> ExternalDetector:
    """Open a detector of another tool on exactly the requested device.

    Args:
        path: The .onnx file, .xml file or OpenVINO directory.
        device: cpu, cuda or cuda:N.
        threads: Number of CPU threads per operator. None for the default of the runtime.
        backend: One of `SESSION_OPENERS`. None selects it by the file type.
        performance_hint: Must be `latency`.
        model_config: YAML file or name of the model configuration (default: see `load_model_config`).

    Returns:
        The detector.

    Raises:
        UsageError: An argument is invalid, or the backend does not support external models.
        DataError: The file or its model configuration is missing, damaged or invalid.
        UnavailableError: The runtime or the device is missing.
    """
    if path.suffix != ".onnx" and not is_openvino_model(path):
        raise UsageError(f"--model-config {model_config}: requires an .onnx file or an OpenVINO model, got {path}.")
    backend = backend or get_default_backend(path)
    if backend not in BACKENDS:
        raise UsageError(f"--backend: expected one of {', '.join(BACKENDS)}, got {backend}.")
    openers = list(SESSION_OPENERS) if path.suffix == ".onnx" else ["openvino", "openvino-bf16"]
    if backend not in openers or performance_hint != "latency":
        raise UsageError(
            f"--backend {backend}: {path} is not a model of hkd-export. "
            f"Set --backend to one of {', '.join(openers)}, with the performance hint latency."
        )
    session = SESSION_OPENERS[backend](path, device, threads)
    config = load_model_config(path, read_graph_io(session), model_config)
    return ExternalDetector(OnnxDetector(path, session, config), backend, device)


def check_model_config(path: Path, backend: str, model_config: Path | None) -> None:
    """Check that a model of another tool has a valid configuration, without its device.

    Args:
        path: The .onnx file, .xml file or OpenVINO directory.
        backend: Backend that runs the model; its package reads the file.
        model_config: YAML file or name of the model configuration (default: see `load_model_config`).

    Raises:
        UsageError: There is no configuration, or it is invalid.
        DataError: The model is damaged.
        UnavailableError: The runtime is missing.
    """
    if model_config is None:
        reader = "openvino" if path.suffix != ".onnx" or backend.startswith("openvino") else "onnxruntime"
        load = partial(load_model_config, path, read_graph_io(SESSION_OPENERS[reader](path, "cpu", 1)))
    else:
        load = partial(read_model_config, model_config)
    try:
        load()
    except DataError as error:
        raise UsageError(str(error)) from None


def is_external_model(path: Path) -> bool:
    """Return whether a file is an ONNX or OpenVINO model of another tool than `hkd-export`.

    Args:
        path: Model file or directory. A damaged file is not an external model: its runtime reports the error.
    """
    try:
        if is_openvino_model(path):
            return "hkd.format" not in read_openvino_metadata(list_model_files(path)[0].parent)
        return path.suffix == ".onnx" and path.is_file() and "hkd.format" not in read_onnx_metadata(path)
    except DataError:
        return False
