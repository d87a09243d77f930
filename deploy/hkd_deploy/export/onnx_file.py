"""Writing ONNX: the deployed graph with its description inside, in one step."""

import json
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import onnx
import torch

from hkd_deploy.artifact import FORMAT, PREPROCESS
from hkd_deploy.export.graph import DeployedDetector
from hkd_det.files import replacing
from hkd_det.imgsz import STRIDE
from hkd_det.models.sizes import cost
from hkd_det.models.yolo import YoloSpec
from hkd_det.train.checkpoint import DetectorCheckpoint, weights_sha256

OPSET = 17  # what ONNX Runtime 1.16, TensorRT 8.6 and OpenVINO 2024 all read


def write_onnx(checkpoint: DetectorCheckpoint, path: Path, imgsz_hw: tuple[int, int], batch: int | None) -> None:
    """Export a trained detector for pictures of `imgsz_hw`; `batch` None leaves the batch size free.

    FP32. The metadata holds the keys the field's readers know and ours under `hkd.`.
    """
    deployed = DeployedDetector(checkpoint.build()).eval()
    example = torch.zeros(batch or 1, *imgsz_hw, 3, dtype=torch.uint8)
    names = ["boxes", "scores", "count"]
    free = None if batch else {name: {0: "batch"} for name in ("images", *names)}
    with replacing(path) as aside:
        with warnings.catch_warnings():
            # The tracer warns of shapes that become constants: they should, height and width are fixed here.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                deployed,
                (example,),
                str(aside),
                input_names=["images"],
                output_names=names,
                dynamic_axes=free,
                opset_version=OPSET,
                dynamo=False,
            )
        model = onnx.load(aside)
        model.ir_version = min(model.ir_version, 8)
        onnx.helper.set_model_props(model, metadata(checkpoint, imgsz_hw, batch))
        onnx.checker.check_model(model)
        onnx.save(model, aside)


def metadata(checkpoint: DetectorCheckpoint, imgsz_hw: tuple[int, int], batch: int | None) -> dict[str, str]:
    """What the file says of itself."""
    weight = cost(checkpoint.build(), imgsz_hw)
    return {
        "description": f"hkd-det {checkpoint.model}, pedestrian detector, end to end",
        "author": "hkd-det",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": version("hkd-det"),
        "license": f"{_licence(checkpoint)} (code); weights: as their training data allows",
        "task": "detect",
        "stride": str(STRIDE),
        "batch": str(batch or "dynamic"),
        "imgsz": str(list(imgsz_hw)),
        "names": "{0: 'person'}",
        "hkd.format": str(FORMAT),
        "hkd.model": checkpoint.model,
        "hkd.parameters": str(weight.parameters),
        "hkd.flops": str(weight.flops),
        "hkd.preprocess": json.dumps(PREPROCESS),
        "hkd.weights_sha256": weights_sha256(checkpoint.weights),
        "hkd.data": str(checkpoint.config["data"]),
    }


def _licence(checkpoint: DetectorCheckpoint) -> str:
    """A YOLO model's network is Ultralytics' work, whoever trained it."""
    return "AGPL-3.0" if isinstance(checkpoint.spec, YoloSpec) else "Apache-2.0"
