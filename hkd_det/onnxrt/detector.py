"""ONNX detectors: images to `Detections`, for the output formats of common detectors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import DataError
from hkd_det.letterbox import Letterbox
from hkd_det.onnxrt.decode import decode_outputs
from hkd_det.onnxrt.model_config import OnnxModelConfig, load_model_config
from hkd_det.onnxrt.session import open_session
from hkd_det.structures import Detections

INPUT_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}


class OnnxDetector:
    """An open ONNX detector.

    Attributes:
        path: ONNX file.
        config: Input and output conventions.
        batch: Number of images per run of the graph, or None if it is dynamic.
        input_hw: Height and width of the model input in pixels.

    Args:
        path: ONNX file, for error messages.
        session: `onnxruntime.InferenceSession` of the file.
        config: Input and output conventions.

    Raises:
        DataError: The input of the graph does not match the configuration.
    """

    def __init__(self, path: Path, session: Any, config: OnnxModelConfig) -> None:
        self.path, self.config = path, config
        self._session = session
        self._input_name, self._input_dtype, self.batch, self.input_hw = _read_input_info(path, session, config)
        self._output_names = [value.name for value in session.get_outputs()]

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
        outputs = self._session.run(self._output_names, {self._input_name: batch})
        return dict(zip(self._output_names, outputs, strict=True))

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
            decoded = list(decode_outputs(outputs, self.config, self.input_hw))
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
    """Open an ONNX detector on the requested device, without fallback to another device.

    Args:
        path: ONNX file.
        device: "cpu", "cuda" or "cuda:N".
        config_path: YAML file of the model configuration (default: see `load_model_config`).
        threads: CPU threads per operator (default: one per physical core).

    Returns:
        The open detector.

    Raises:
        UsageError: The device or the number of threads is invalid.
        DataError: The model or its configuration is missing or invalid.
        UnavailableError: ONNX Runtime or the device is not available.
    """
    session = open_session(path, device, threads)
    config = load_model_config(path, session.get_modelmeta().custom_metadata_map, config_path)
    return OnnxDetector(path, session, config)


def normalize_input(
    images_rgb: NDArray[np.uint8], config: OnnxModelConfig, dtype: type[np.generic]
) -> NDArray[np.generic]:
    """Convert a batch of images to the value range, channel order, layout and number type of the model.

    Args:
        images_rgb (array[B, H, W, 3]): RGB, uint8.
        config: Input conventions.
        dtype: Number type of the model input.

    Returns:
        array[B, 3, H, W] or array[B, H, W, 3]: Contiguous, of type `dtype`.
    """
    images: NDArray[Any] = images_rgb if config.color_order == "rgb" else images_rgb[..., ::-1]
    is_identity = config.input_scale == 255 and set(config.mean) == {0.0} and set(config.std) == {1.0}
    if not is_identity:
        images = _scale_channels(images, config)
    if config.layout == "NCHW":
        images = images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images, dtype=dtype)


def _scale_channels(images: NDArray[np.uint8], config: OnnxModelConfig) -> NDArray[np.float32]:
    """Subtract mean and divide by std, one channel at a time: broadcasting over the last axis is ten times slower."""
    planes = np.empty((3, *images.shape[:3]), np.float32)
    for channel, (mean, std) in enumerate(zip(config.mean, config.std, strict=True)):
        np.multiply(images[..., channel], np.float32(config.input_scale / 255 / std), out=planes[channel])
        planes[channel] -= np.float32(mean / std)
    return planes.transpose(1, 2, 3, 0)  # [B, H, W, 3]


def _read_input_info(
    path: Path, session: Any, config: OnnxModelConfig
) -> tuple[str, type[np.generic], int | None, tuple[int, int]]:
    """Return name, number type, batch size, and height and width of the only input."""
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type not in INPUT_DTYPES or len(inputs[0].shape) != 4:
        actual = [(value.name, value.type, value.shape) for value in inputs]
        raise DataError(f"{path}: expected one input of 4 dimensions and type uint8 or float, got {actual}.")
    shape = list(inputs[0].shape)
    channels, sides = (shape[1], shape[2:]) if config.layout == "NCHW" else (shape[3], shape[1:3])
    if isinstance(channels, int) and channels != 3:
        raise DataError(
            f"{path}: expected 3 channels in the layout {config.layout}, got the input shape {shape}. Check the key "
            "layout of the model configuration."
        )
    input_hw = _resolve_input_hw(path, sides, config)
    return inputs[0].name, INPUT_DTYPES[inputs[0].type], _get_static_dim(shape[0]), input_hw


def _resolve_input_hw(path: Path, input_dims: Sequence[int | str | None], config: OnnxModelConfig) -> tuple[int, int]:
    requested = config.imgsz_hw or (None, None)
    resolved = [_get_static_dim(dim) or side for dim, side in zip(input_dims, requested, strict=True)]
    if config.imgsz_hw and tuple(resolved) != tuple(requested):
        raise DataError(
            f"{path}: imgsz_hw is {list(requested)} in the model configuration, but the input is {list(input_dims)}. "
            "Omit imgsz_hw, or set the size of the input."
        )
    height, width = resolved
    if height is None or width is None:
        raise DataError(f"{path}: the input size is dynamic. Set imgsz_hw: [H, W] in the model configuration.")
    return height, width


def _get_static_dim(dimension: int | str | None) -> int | None:
    """Return a dimension of the graph, or None if it is dynamic."""
    return dimension if isinstance(dimension, int) and dimension > 0 else None
