"""Inference with ONNX detectors of other tools, which a model configuration describes.

Normalization, decoding and NMS run outside the graph, as in the tools of these models.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.backends import BACKENDS
from hkd_deploy.backends.base import Detector, PerformanceHint, StageTimes, make_closed_error
from hkd_deploy.backends.onnxruntime import make_tensorrt_provider, make_tensorrt_rtx_provider
from hkd_deploy.backends.openvino import Precision, compile_openvino_model
from hkd_deploy.model_metadata import ModelMetadata
from hkd_deploy.trt.onnx_file import count_parameters, read_onnx_metadata
from hkd_det.errors import UsageError
from hkd_det.files import file_sha256
from hkd_det.image import check_image
from hkd_det.onnxrt.detector import OnnxDetector
from hkd_det.onnxrt.model_config import load_model_config
from hkd_det.onnxrt.session import open_session
from hkd_det.structures import Detections

UNKNOWN_LICENSE = "unknown license"
# Data types as OpenVINO names them, to names of ONNX Runtime.
ORT_DTYPES = {"f32": "tensor(float)", "f16": "tensor(float16)", "u8": "tensor(uint8)"}


class ExternalDetector(Detector):
    """An ONNX detector of another tool. Several threads may call it.

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
            parameters=count_parameters(model.path),
            flops=None,
            weights_sha256=file_sha256(model.path),
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


class OpenVinoSession:
    """OpenVINO with the interface of `onnxruntime.InferenceSession` that `OnnxDetector` uses.

    Args:
        path: The ONNX file.
        device: Must be cpu.
        threads: Number of CPU threads. None for the default of OpenVINO.
        precision: bf16 for bfloat16, None for float32.

    Raises:
        HkdError: As `compile_openvino_model`.
    """

    def __init__(self, path: Path, device: str, threads: int | None, precision: Precision | None) -> None:
        self._compiled = compile_openvino_model(path, device, threads, precision)[1]
        self._request = self._compiled.create_infer_request()
        self._lock = Lock()  # a request serves one thread at a time

    def get_inputs(self) -> list[SimpleNamespace]:
        """Return name, type and shape of each input. A free dimension is None."""
        return [
            SimpleNamespace(
                name=port.get_any_name(),
                type=ORT_DTYPES.get(port.element_type.get_type_name(), port.element_type.get_type_name()),
                shape=[dim.get_length() if dim.is_static else None for dim in port.partial_shape],
            )
            for port in self._compiled.inputs
        ]

    def get_outputs(self) -> list[SimpleNamespace]:
        """Return the name of each output."""
        return [SimpleNamespace(name=port.get_any_name()) for port in self._compiled.outputs]

    def run(self, output_names: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run inference on a batch.

        Args:
            output_names: Names of the outputs.
            feeds: Input arrays by name.

        Returns:
            The outputs.
        """
        with self._lock:
            self._request.infer(dict(feeds), share_inputs=True)
            # Copy: the request owns the memory and overwrites it in the next call.
            return [self._request.get_tensor(name).data.copy() for name in output_names]


SessionOpener = Callable[[Path, str, int | None], Any]
SESSION_OPENERS: dict[str, SessionOpener] = {
    "onnxruntime": open_session,
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
    backend: str = "onnxruntime",
    performance_hint: PerformanceHint = "latency",
    model_config: Path | None = None,
) -> ExternalDetector:
    """Open an ONNX detector of another tool on exactly the requested device.

    Args:
        path: The ONNX file.
        device: cpu, cuda or cuda:N.
        threads: Number of CPU threads per operator. None for the default of the runtime.
        backend: One of `SESSION_OPENERS`.
        performance_hint: Must be `latency`.
        model_config: YAML file of the model configuration (default: MODEL.yaml next to MODEL.onnx).

    Returns:
        The detector.

    Raises:
        UsageError: An argument is invalid, or the backend does not support external models.
        DataError: The file or its model configuration is missing, damaged or invalid.
        UnavailableError: The runtime or the device is missing.
    """
    if backend not in BACKENDS:
        raise UsageError(f"--backend: expected one of {', '.join(BACKENDS)}, got {backend}.")
    if backend not in SESSION_OPENERS or performance_hint != "latency":
        raise UsageError(
            f"--backend {backend}: {path} is not a model of hkd-export. "
            f"Set --backend to one of {', '.join(SESSION_OPENERS)}, with the performance hint latency."
        )
    if path.suffix != ".onnx":
        raise UsageError(f"--model-config {model_config}: requires an .onnx file, got {path}.")
    config = load_model_config(path, read_onnx_metadata(path), model_config)
    return ExternalDetector(
        OnnxDetector(path, SESSION_OPENERS[backend](path, device, threads), config), backend, device
    )
