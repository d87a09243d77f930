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

from hkd_deploy.artifact import Manifest
from hkd_deploy.precision.source import Source, import_onnx
from hkd_det.datasets.catalogue import open_data
from hkd_det.datasets.sample import Sample, read_picture
from hkd_det.errors import HkdError, UsageError
from hkd_det.letterbox import Letterbox
from hkd_det.onnx_session import open_session

Method = Literal["minmax", "entropy", "percentile"]
METHODS: tuple[Method, ...] = ("minmax", "entropy", "percentile")
SEED = 0
FEW = 300  # below it ranges depend on which pictures they were
SAMPLED = 1 << 16  # values of one map that go into a histogram; the largest value is sought among all

# Of each value: the largest absolute number INT8 is to hold.
Reach = dict[str, float]


def calibration_samples(data: str, count: int) -> list[Sample]:
    """`count` pictures of a data set's train split, drawn with a fixed seed, in a fixed order; all if there are fewer.

    Says so in one line if they are few. Raises as `open_data` does, with what to do about it.
    """
    if count < 1:
        raise UsageError(f"--calib-images {count}: at least 1")
    try:
        samples = open_data(data, "train")
    except HkdError as error:
        raise type(error)(f"no pictures to calibrate on: {error} (--calib DATA names others)") from error
    drawn = sorted(Random(SEED).sample(range(len(samples)), min(count, len(samples))))
    if len(drawn) < FEW:
        few = f"{len(drawn)} pictures to calibrate on, fewer than {FEW}: much depends on which they are"
        print(f"hkd-export: {few}", file=sys.stderr)
    return [samples[index] for index in drawn]


def network_input(manifest: Manifest, picture_rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture [H, W, 3] as a batch of one, letterboxed; a graph that takes other sizes takes this one, too."""
    return Letterbox((picture_rgb.shape[0], picture_rgb.shape[1]), manifest.imgsz_hw).apply(picture_rgb)[None]


def calibrate(source: Source, layers: Sequence[str], samples: Sequence[Sample]) -> dict[Method, Reach]:
    """Run the FP32 graph on the samples and see what enters the layers: their reach by each method.

    minmax: the largest value there was. entropy, percentile: ONNX Runtime's, of the values' histogram.
    """
    names = sorted({node.input[0] for node in source.model.graph.node if node.name in set(layers)})
    entropy, percentile = _collector("entropy", 128), _collector("percentile", 2048)
    largest = dict.fromkeys(names, 0.0)
    pictures = (read_picture(sample.path) for sample in samples)
    inputs = (network_input(source.manifest, picture) for picture in pictures)
    progress = tqdm(inputs, "calibrating", total=len(samples), unit="picture", leave=False)
    for found in values_of(source.model, names, progress):
        for name, values in found.items():
            largest[name] = max(largest[name], float(np.abs(values).max()))
        thinned = {name: values.ravel()[:: max(1, values.size // SAMPLED)] for name, values in found.items()}
        with contextlib.redirect_stdout(io.StringIO()):  # it prints at every call
            entropy.collect(thinned)
            percentile.collect(thinned)
    return {"minmax": largest, "entropy": _reach(entropy), "percentile": _reach(percentile)}


def values_of(
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


def _collector(method: str, bins: int) -> Any:
    """ONNX Runtime's, with its own defaults."""
    calibrate_module = importlib.import_module("onnxruntime.quantization.calibrate")
    return calibrate_module.HistogramCollector(
        method=method, symmetric=True, num_bins=bins, num_quantized_bins=128, percentile=99.999, scenario="same"
    )


def _reach(collector: Any) -> Reach:
    with contextlib.redirect_stdout(io.StringIO()):
        ends = collector.compute_collection_result()
    return {name: float(max(abs(found[0]), abs(found[1]))) for name, found in ends.items()}
