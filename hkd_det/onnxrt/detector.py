"""ONNX detectors and ensembles of them: images to `Detections`.

An ensemble is a YAML file. Paths are relative to it:

    models:
      - {model: yolox_nano.onnx, model_config: yolox.yaml}
      - {model: picodet_s.onnx}        # described by picodet_s.yaml or by its metadata
    iou: 0.55
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.config import check_range, dataclass_from_dict
from hkd_det.errors import DataError, UsageError
from hkd_det.files import read_yaml
from hkd_det.letterbox import Letterbox
from hkd_det.onnxrt.decoding import decode_outputs
from hkd_det.onnxrt.graph_io import INPUT_DTYPES, make_size_inputs, read_graph_io, read_image_input
from hkd_det.onnxrt.model_config import OnnxModelConfig, normalize_input
from hkd_det.onnxrt.openvino import OpenVinoSession, is_openvino_model
from hkd_det.onnxrt.recognition import load_model_config
from hkd_det.onnxrt.session import open_session
from hkd_det.structures import FUSION_IOU, Detections, fuse_detections


class OnnxDetector:
    """An open ONNX or OpenVINO detector.

    Attributes:
        path: Model file.
        config: Input and output conventions.
        batch: Number of images per run of the graph, or None if it is dynamic.
        input_hw: Height and width of the model input in pixels.

    Args:
        path: Model file, for error messages.
        session: `onnxruntime.InferenceSession` of the file, or an `OpenVinoSession`.
        config: Input and output conventions.

    Raises:
        DataError: The input of the graph does not match the configuration.
    """

    def __init__(self, path: Path, session: Any, config: OnnxModelConfig) -> None:
        self.path, self.config = path, config
        self._session, self._graph = session, read_graph_io(session)
        image_input, self.batch, self.input_hw = read_image_input(path, self._graph, config)
        self._input_name, self._input_dtype = image_input.name, INPUT_DTYPES[image_input.type]
        self._output_names = [value.name for value in self._graph.outputs]

    def __call__(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detect persons in images of any size.

        Args:
            images_rgb (list of array[H, W, 3]): RGB, uint8.

        Returns:
            Detections per image, in pixels of that image.

        Raises:
            DataError: The outputs do not have the shapes of `config.output_format`.
        """
        detections: list[Detections] = []
        step = self.batch or max(1, len(images_rgb))
        for start in range(0, len(images_rgb), step):
            letterboxes, batch = self.preprocess(images_rgb[start : start + step])
            detections += self.postprocess(self.run(batch), letterboxes)
        return detections

    def preprocess(self, images_rgb: Sequence[NDArray[np.uint8]]) -> tuple[list[Letterbox], NDArray[np.generic]]:
        """Resize and normalize images.

        Args:
            images_rgb (list of array[H, W, 3]): RGB, uint8; at least one, and at most `batch`.

        Returns:
            letterboxes: Position of each image in the model input.
            batch (array[B, ...]): Model input. Unused rows of a fixed batch contain the first image.
        """
        letterboxes = [
            Letterbox(
                (image.shape[0], image.shape[1]),
                self.input_hw,
                self.config.resize_mode,
                self.config.pad_value,
                self.config.interpolation,
            )
            for image in images_rgb
        ]
        inputs = [letterbox.apply(image) for letterbox, image in zip(letterboxes, images_rgb, strict=True)]
        inputs += [inputs[0]] * ((self.batch or len(inputs)) - len(inputs))  # fill a graph of fixed batch size
        images = inputs[0][None] if len(inputs) == 1 else np.stack(inputs)
        return letterboxes, normalize_input(images, self.config, self._input_dtype)

    def run(self, batch: NDArray[np.generic]) -> dict[str, NDArray[Any]]:
        """Run the graph.

        Args:
            batch (array[B, ...]): Model input of `preprocess`.

        Returns:
            Output arrays by name.
        """
        outputs = self._session.run(self._output_names, self.make_feeds(batch))
        return dict(zip(self._output_names, outputs, strict=True))

    def make_feeds(self, batch: NDArray[np.generic]) -> dict[str, NDArray[Any]]:
        """Return the values of all inputs of the graph.

        Args:
            batch (array[B, ...]): Model input of `preprocess`.

        Returns:
            Input name to array.
        """
        return {self._input_name: batch, **make_size_inputs(self._graph, len(batch), self.input_hw)}

    def postprocess(self, outputs: dict[str, NDArray[Any]], letterboxes: Sequence[Letterbox]) -> list[Detections]:
        """Decode outputs, suppress duplicates and map boxes to the images.

        Args:
            outputs: Output arrays by name.
            letterboxes: Position of each image in the model input.

        Returns:
            Detections per image, in pixels of that image.

        Raises:
            DataError: The outputs do not have the shapes of `config.output_format`.
        """
        try:
            decoded = list(decode_outputs(outputs, self.config, self.input_hw, len(letterboxes)))
        except ValueError as error:
            raise DataError(
                f"{self.path}: the outputs are not in the format {self.config.output_format}: {error}. "
                "Change output_format in the model configuration."
            ) from None
        return [
            Detections(letterbox.boxes_to_source(boxes), scores)
            for letterbox, (boxes, scores) in zip(letterboxes, decoded, strict=False)  # without the filled images
        ]


def open_onnx_detector(
    path: Path, device: str = "cpu", config_path: Path | None = None, threads: int | None = None
) -> OnnxDetector:
    """Open a detector on the requested device, without fallback to another device.

    Args:
        path: ONNX file for ONNX Runtime; .xml file or directory for OpenVINO.
        device: "cpu", "cuda" or "cuda:N"; OpenVINO supports the CPU only.
        config_path: YAML file or name of the model configuration (default: see `load_model_config`).
        threads: CPU threads per operator (default: one per physical core).

    Returns:
        The open detector.

    Raises:
        UsageError: The device or the number of threads is invalid.
        DataError: The model or its configuration is missing or invalid.
        UnavailableError: The runtime or the device is not available.
    """
    session: Any = (
        OpenVinoSession(path, device, threads) if is_openvino_model(path) else open_session(path, device, threads)
    )
    return OnnxDetector(path, session, load_model_config(path, read_graph_io(session), config_path))


@dataclass(frozen=True)
class EnsembleMember:
    """A detector of an ensemble.

    Attributes:
        model: ONNX file or OpenVINO model.
        model_config: YAML file or name of its configuration, or "" to look next to or inside the file.
    """

    model: str
    model_config: str = ""


@dataclass(frozen=True)
class EnsembleConfig:
    """Contents of an ensemble file.

    Attributes:
        models: The detectors.
        iou: Boxes are fused if their IoU is larger, 0 to 1.
    """

    models: tuple[EnsembleMember, ...]
    iou: float = FUSION_IOU

    def __post_init__(self) -> None:
        if not self.models:
            raise UsageError("models: expected at least one `{model: FILE.onnx}`.")
        check_range("iou", self.iou, 0, 1)


class OnnxEnsemble:
    """Several open ONNX detectors that are used as one.

    Args:
        detectors: The detectors.
        iou: Boxes are fused if their IoU is larger.
    """

    def __init__(self, detectors: Sequence[OnnxDetector], iou: float) -> None:
        self.detectors, self.iou = tuple(detectors), iou

    def __call__(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detect persons in images of any size.

        Args:
            images_rgb (list of array[H, W, 3]): RGB, uint8.

        Returns:
            Fused detections per image, in pixels of that image.
        """
        per_model = [detector(images_rgb) for detector in self.detectors]
        return [fuse_detections(detections, self.iou)[0] for detections in zip(*per_model, strict=True)]


def open_onnx_ensemble(path: Path, device: str = "cpu", threads: int | None = None) -> OnnxEnsemble:
    """Open the detectors of an ensemble file.

    Args:
        path: YAML file.
        device: "cpu", "cuda" or "cuda:N".
        threads: CPU threads per operator (default: one per physical core).

    Returns:
        The open ensemble.

    Raises:
        DataError: The file is not readable, or a model is missing or invalid.
        UsageError: The file is not an ensemble, or a setting is out of range.
        UnavailableError: ONNX Runtime or the device is not available.
    """
    config = dataclass_from_dict(EnsembleConfig, read_yaml(path), f"{path}:")
    detectors = []
    for member in config.models:
        description = _resolve_member_config(path, member) if member.model_config else None
        detectors.append(open_onnx_detector(path.parent / member.model, device, description, threads))
    return OnnxEnsemble(detectors, config.iou)


def _resolve_member_config(path: Path, member: EnsembleMember) -> Path:
    """Return the configuration of a member: a file relative to the ensemble, or a name."""
    beside = path.parent / member.model_config
    return beside if beside.exists() or beside.suffix else Path(member.model_config)
