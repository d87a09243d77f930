"""Calibration: how far the values that enter each layer reach, on the user's own pictures."""

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
from tqdm import tqdm

from hkd_deploy.model_metadata import ModelMetadata
from hkd_deploy.precision.model import Fp32Model, import_onnx
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import HkdError, UsageError
from hkd_det.image import read_image
from hkd_det.letterbox import Letterbox
from hkd_det.onnxrt.session import open_session
from hkd_det.structures import Sample

CalibrationMethod = Literal["minmax", "entropy", "percentile"]
CALIBRATION_METHODS: tuple[CalibrationMethod, ...] = ("minmax", "entropy", "percentile")
SEED = 0
MIN_RECOMMENDED_IMAGES = 300  # below it ranges depend on which pictures they were
MAX_HISTOGRAM_VALUES = 1 << 16  # values of one map that go into a histogram; the largest value is sought among all

# Of each value: the largest absolute number INT8 is to hold.
TensorRanges = dict[str, float]


def load_calibration_samples(data: str, count: int) -> list[Sample]:
    """`count` pictures of a data set's train split, drawn with a fixed seed, in a fixed order; all if there are fewer.

    Says so in one line if they are few. Raises as `open_data` does, with what to do about it.
    """
    if count < 1:
        raise UsageError(f"--calib-images {count}: at least 1")
    try:
        samples = load_dataset(data, "train")
    except HkdError as error:
        raise type(error)(f"no pictures to calibrate on: {error} (--calib DATA names others)") from error
    drawn = sorted(Random(SEED).sample(range(len(samples)), min(count, len(samples))))
    if len(drawn) < MIN_RECOMMENDED_IMAGES:
        few = f"{len(drawn)} pictures to calibrate on, fewer than {MIN_RECOMMENDED_IMAGES}: much depends on which they are"
        print(f"hkd-export: {few}", file=sys.stderr)
    return [samples[index] for index in drawn]


def make_network_input(metadata: ModelMetadata, image_rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture [H, W, 3] as a batch of one, letterboxed; a graph that takes other sizes takes this one, too."""
    return Letterbox((image_rgb.shape[0], image_rgb.shape[1]), metadata.imgsz_hw).apply(image_rgb)[None]


def calibrate(
    source: Fp32Model, layers: Sequence[str], samples: Sequence[Sample]
) -> dict[CalibrationMethod, TensorRanges]:
    """Run the FP32 graph on the samples and see what enters the layers: their reach by each method.

    minmax: the largest value there was. entropy, percentile: ONNX Runtime's, of the values' histogram.
    """
    names = sorted({node.input[0] for node in source.model.graph.node if node.name in set(layers)})
    entropy, percentile = _create_collector("entropy", 128), _create_collector("percentile", 2048)
    largest = dict.fromkeys(names, 0.0)
    pictures = (read_image(sample.path) for sample in samples)
    inputs = (make_network_input(source.model_metadata, picture) for picture in pictures)
    progress = tqdm(inputs, "calibrating", total=len(samples), unit="picture", leave=False)
    for found in run_model(source.model, names, progress):
        for name, values in found.items():
            largest[name] = max(largest[name], float(np.abs(values).max()))
        thinned = {
            name: values.ravel()[:: max(1, values.size // MAX_HISTOGRAM_VALUES)] for name, values in found.items()
        }
        with contextlib.redirect_stdout(io.StringIO()):  # it prints at every call
            entropy.collect(thinned)
            percentile.collect(thinned)
    return {"minmax": largest, "entropy": _compute_ranges(entropy), "percentile": _compute_ranges(percentile)}


def run_model(
    model: Any, names: Sequence[str], inputs: Iterable[NDArray[Any]]
) -> Iterable[dict[str, NDArray[np.float32]]]:
    """The values `names` inside a graph, for each input in turn."""
    onnx = import_onnx()
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    there = {value.name for value in shown.graph.output}
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    with TemporaryDirectory(prefix="hkd-precision-") as folder:
        path = Path(folder) / "shown.onnx"
        onnx.save(shown, path)
        session = open_session(path)
        (entry,) = session.get_inputs()
        for batch in inputs:
            yield dict(zip(names, session.run(list(names), {entry.name: batch}), strict=True))


def _create_collector(method: str, num_bins: int) -> Any:
    """ONNX Runtime's, with its own defaults."""
    calibrate_module = importlib.import_module("onnxruntime.quantization.calibrate")
    return calibrate_module.HistogramCollector(
        method=method, symmetric=True, num_bins=num_bins, num_quantized_bins=128, percentile=99.999, scenario="same"
    )


def _compute_ranges(collector: Any) -> TensorRanges:
    with contextlib.redirect_stdout(io.StringIO()):
        ends = collector.compute_collection_result()
    return {name: float(max(abs(found[0]), abs(found[1]))) for name, found in ends.items()}
