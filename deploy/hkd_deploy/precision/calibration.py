"""Calibration: value ranges of the layer inputs, measured on images of the user."""

import contextlib
import importlib
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.model_metadata import ModelMetadata
from hkd_deploy.precision.model import Fp32Model, import_onnx, make_progress_bar
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import HkdError, UsageError
from hkd_det.image import read_image
from hkd_det.letterbox import Letterbox
from hkd_det.onnxrt.session import open_session
from hkd_det.structures import Sample

CalibrationMethod = Literal["minmax", "entropy", "percentile"]
CALIBRATION_METHODS: tuple[CalibrationMethod, ...] = ("minmax", "entropy", "percentile")
SEED = 0
MIN_RECOMMENDED_IMAGES = 300  # with fewer images the ranges depend on the selection
MAX_HISTOGRAM_VALUES = 1 << 16  # values per feature map in a histogram; the maximum is taken over all values

TensorRanges = dict[str, float]  # value name to the largest absolute value that INT8 represents


def load_calibration_samples(data: str, count: int) -> list[Sample]:
    """Select images of a train split with a fixed seed; print a warning if they are few.

    Args:
        data: Dataset name or data YAML.
        count: Number of images. All images are returned if the split has fewer.

    Returns:
        The samples in dataset order.

    Raises:
        UsageError: If `count` is below 1.
        HkdError: If the dataset cannot be read.
    """
    if count < 1:
        raise UsageError(f"--calib-images {count}: expected at least 1.")
    try:
        samples = load_dataset(data, "train")
    except HkdError as error:
        raise type(error)(
            f"calibration images: {str(error).rstrip('.')}. Set --calib-data to another dataset."
        ) from error
    indices = sorted(Random(SEED).sample(range(len(samples)), min(count, len(samples))))
    if len(indices) < MIN_RECOMMENDED_IMAGES:
        warning = f"{len(indices)} calibration images; at least {MIN_RECOMMENDED_IMAGES} are recommended"
        print(f"hkd-export: warning: {warning}", file=sys.stderr)
    return [samples[index] for index in indices]


def make_network_input(metadata: ModelMetadata, image_rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Letterbox an image to the input size of a model. Graphs with a dynamic size accept this size as well.

    Args:
        metadata: Metadata of the model.
        image_rgb (uint8 array[H, W, 3]): RGB.

    Returns:
        batch (uint8 array[1, h, w, 3]): RGB.
    """
    return Letterbox((image_rgb.shape[0], image_rgb.shape[1]), metadata.imgsz_hw).apply(image_rgb)[None]


def calibrate(
    source: Fp32Model, layers: Sequence[str], samples: Sequence[Sample]
) -> dict[CalibrationMethod, TensorRanges]:
    """Run the FP32 model and measure the range of the feature input of each layer.

    `minmax` is the largest absolute value. `entropy` and `percentile` are the histogram methods of ONNX Runtime.

    Args:
        source: The FP32 model.
        layers: Node names of the layers.
        samples: Calibration images.

    Returns:
        Method to the range of each layer input.
    """
    names = sorted({node.input[0] for node in source.model.graph.node if node.name in set(layers)})
    entropy, percentile = _create_collector("entropy", 128), _create_collector("percentile", 2048)
    max_abs = dict.fromkeys(names, 0.0)
    images = (read_image(sample.path) for sample in samples)
    inputs = (make_network_input(source.model_metadata, image) for image in images)
    for values in run_model(source.model, names, make_progress_bar(inputs, "calibrating", "image", len(samples))):
        for name, value in values.items():
            max_abs[name] = max(max_abs[name], float(np.abs(value).max()))
        subset = {name: value.ravel()[:: max(1, value.size // MAX_HISTOGRAM_VALUES)] for name, value in values.items()}
        with contextlib.redirect_stdout(io.StringIO()):  # the collectors print on every call
            entropy.collect(subset)
            percentile.collect(subset)
    return {"minmax": max_abs, "entropy": _compute_ranges(entropy), "percentile": _compute_ranges(percentile)}


def run_model(
    model: Any, names: Sequence[str], inputs: Iterable[NDArray[Any]]
) -> Iterable[dict[str, NDArray[np.float32]]]:
    """Run a model on ONNX Runtime and return values from inside its graph.

    Args:
        model: onnx.ModelProto with one input. It is not modified.
        names: Names of the values to return.
        inputs: Batches in the shape and dtype of the model input.

    Yields:
        Value name to array, for each batch.
    """
    onnx = import_onnx()
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    outputs = {value.name for value in extended.graph.output}
    extended.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    with TemporaryDirectory(prefix="hkd-precision-") as temp_dir:
        path = Path(temp_dir) / "extended.onnx"
        onnx.save(extended, path)
        session = open_session(path)
        (model_input,) = session.get_inputs()
        for batch in inputs:
            yield dict(zip(names, session.run(list(names), {model_input.name: batch}), strict=True))


def _create_collector(method: str, num_bins: int) -> Any:
    """Create a histogram collector of ONNX Runtime with its default settings."""
    calibrate_module = importlib.import_module("onnxruntime.quantization.calibrate")
    return calibrate_module.HistogramCollector(
        method=method, symmetric=True, num_bins=num_bins, num_quantized_bins=128, percentile=99.999, scenario="same"
    )


def _compute_ranges(collector: Any) -> TensorRanges:
    with contextlib.redirect_stdout(io.StringIO()):
        limits = collector.compute_collection_result()
    return {name: float(max(abs(limit[0]), abs(limit[1]))) for name, limit in limits.items()}
