"""What exported forms are compared with: the trained detector, or where there is no torch, the ONNX file. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.artifact import ModelMetadata
from hkd_deploy.export.options import ExportOptions, read_export_options
from hkd_deploy.export.parity import RunFunction
from hkd_deploy.precision.judge import predict_samples
from hkd_det.datasets.sample import Sample
from hkd_det.detections import Detections
from hkd_det.onnx_session import open_session


@dataclass(frozen=True, eq=False)
class Reference:
    """What says how it should be.

    name, runs_on: for the reader. options: of the graph that `run` runs, a picture at a time.
    detect: people in whole pictures. explain: where inside an ONNX file the difference begins, by a batch of one on
    which it shows; part of a sentence.
    """

    name: str
    backend: str
    options: ExportOptions
    run: RunFunction
    predict: Callable[[Sequence[Sample]], list[Detections]]
    locate_difference: Callable[[Path, NDArray[Any]], str]


def onnx_reference(path: Path) -> Reference:
    """An ONNX file of hkd-export on ONNX Runtime. Raises as `open_session` and `Manifest.from_metadata` do."""
    session = open_session(path)
    options = read_export_options(ModelMetadata.from_metadata(session.get_modelmeta().custom_metadata_map, path))

    def run(batch: NDArray[Any]) -> list[NDArray[Any]]:
        answers = session.run(None, {"images": np.repeat(batch, options.batch or 1, axis=0)})
        return [answer[:1] for answer in answers]

    def detect(samples: Sequence[Sample]) -> list[Detections]:
        return predict_samples(path, "cpu", "onnxruntime", samples, path.name)

    return Reference(
        str(path), "onnxruntime", options, run, detect, lambda _path, _batch: "there is no torch to tell where"
    )
