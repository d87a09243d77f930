"""Export of trained weights to a verified ONNX file with metadata. Requires torch."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from hkd_deploy.export.diagnose import locate_difference
from hkd_deploy.export.graph import ExportModule, get_min_input_hw
from hkd_deploy.export.parity import Parity, Reference
from hkd_deploy.export.verify import ExportedModel, Verification
from hkd_deploy.model_metadata import (
    METADATA_FORMAT,
    PREPROCESS,
    PREPROCESS_FLOAT01,
    PREPROCESS_IN_GRAPH,
    REFERENCE_KEY,
    ExportOptions,
)
from hkd_deploy.trt.onnx_file import read_onnx_metadata
from hkd_det.datasets.catalog import dataset_license
from hkd_det.errors import HkdError
from hkd_det.files import atomic_write
from hkd_det.letterbox import STRIDE
from hkd_det.models.checkpoint import DetectorCheckpoint, get_family, spec_to_dict, weights_sha256
from hkd_det.models.yolox_weights import ARCHITECTURE_KEY, load_yolox
from hkd_det.models.zoo import count_params_and_flops, read_model_name
from hkd_det.structures import Detections, Sample
from hkd_det.train.engine import predict_dataset

OPSET = 17  # supported by ONNX Runtime 1.16, TensorRT 8.6 and OpenVINO 2024
IR_VERSION = 8  # the IR version of opset 17
# Metadata that stay true if the weights are exported again. The best threshold depends little on the input size.
ORIGIN_KEYS = (
    "license", "hkd.weights_sha256", "hkd.data", "hkd.epoch", "hkd.miss_rate", "hkd.miss_rate_dataset", "hkd.conf",
)  # fmt: skip


def load_exported_weights(path: Path) -> DetectorCheckpoint:
    """Read the weights of an ONNX file, to export them again with another graph.

    Args:
        path: FP32 file of a YOLOX model, by `hkd-export` or by Megvii.

    Returns:
        The weights with the origin that the metadata state.

    Raises:
        DataError: The file is damaged.
    """
    metadata = read_onnx_metadata(path)
    detector = load_yolox(path)
    model = metadata.get("hkd.model") or read_model_name(path)
    origin = {key: metadata[key] for key in ORIGIN_KEYS if key in metadata}
    config: dict[str, Any] = {"origin": origin}
    if "hkd.data" in metadata:
        config |= {"data": metadata["hkd.data"], "imgsz_hw": json.loads(metadata["imgsz"])}
    return DetectorCheckpoint.from_detector(detector, model, config, 0, 1.0)


def export_detector(
    checkpoint: DetectorCheckpoint, path: Path, options: ExportOptions, image_paths: Sequence[Path]
) -> Parity:
    """Export a detector to ONNX and compare it with torch.

    Args:
        checkpoint: The trained detector.
        path: ONNX file to write.
        options: Inputs and outputs of the graph.
        image_paths: Images to compare the outputs on.

    Returns:
        The differences between the file and torch.

    Raises:
        ParityError: If the outputs differ by more than the tolerances. No file is written.
        DataError: If there is no image to compare on.
    """
    reference = make_torch_reference(checkpoint, f"the weights of {checkpoint.model}", options)
    return export_and_verify(checkpoint, path, options, Verification(reference, image_paths))


def export_and_verify(
    checkpoint: DetectorCheckpoint, path: Path, options: ExportOptions, verification: Verification
) -> Parity:
    """Export a detector to ONNX and add the file to a verification.

    The metadata contain the suggested score threshold and the distributions that the verification measures.

    Args:
        checkpoint: The trained detector.
        path: ONNX file to write.
        options: Inputs and outputs of the graph.
        verification: Verification with the torch reference.

    Returns:
        The differences between the file and torch.

    Raises:
        ParityError: If the outputs differ by more than the tolerances. No file is written.
        DataError: If there is no image to compare on.
    """
    with atomic_write(path) as temp_path:
        export_onnx(checkpoint, temp_path, options)
        parity = verification.add(ExportedModel(path, "onnxruntime", is_exact=True), temp_path)
        assert parity is not None  # only models of reduced precision are skipped
        _write_measured_metadata(temp_path, verification)
    return parity


def make_torch_reference(checkpoint: DetectorCheckpoint, name: str, options: ExportOptions) -> Reference:
    """Return the trained detector in torch on the CPU as the reference.

    Outputs come from the module that is exported. Miss rates come from the detector as training validates it, so that
    they also verify the exported graph.

    Args:
        checkpoint: The trained detector.
        name: Name for the table and messages.
        options: Inputs and outputs of the graph.
    """
    export_module = ExportModule(checkpoint.build(), options).eval()

    @torch.no_grad()
    def run(batch: NDArray[Any]) -> list[NDArray[Any]]:
        return [value.numpy() for value in export_module(torch.from_numpy(batch))]

    def predict(samples: Sequence[Sample]) -> list[Detections]:
        return predict_dataset(export_module.detector, samples, options.imgsz_hw, bf16=False)

    def locate(path: Path, batch: NDArray[Any]) -> str:
        return locate_difference(export_module, path, batch)

    return Reference(name, "torch", options, run, predict, locate)


def export_onnx(checkpoint: DetectorCheckpoint, path: Path, options: ExportOptions) -> None:
    """Export a detector to an FP32 ONNX file with metadata, without a comparison.

    Args:
        checkpoint: The trained detector.
        path: ONNX file to write.
        options: Inputs and outputs of the graph.
    """
    export_module = ExportModule(checkpoint.build(), options).eval()
    names = get_output_names(options)
    with atomic_write(path) as temp_path:
        with warnings.catch_warnings():
            # The tracer warns about shapes that become constants. All of them are independent of the dynamic axes.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                export_module,
                (_make_example_input(options),),
                str(temp_path),
                input_names=["images"],
                output_names=names,
                dynamic_axes=_get_dynamic_axes(options, names),
                opset_version=OPSET,
                dynamo=False,
            )
        model = onnx.load(temp_path)
        model.ir_version = min(model.ir_version, IR_VERSION)
        onnx.helper.set_model_props(model, make_metadata(checkpoint, options))
        onnx.checker.check_model(model)
        onnx.save(model, temp_path)


def make_metadata(checkpoint: DetectorCheckpoint, options: ExportOptions) -> dict[str, str]:
    """Return the metadata entries of the exported file.

    Keys without a prefix are those of Ultralytics; keys with the prefix `hkd.` are read by
    `hkd_deploy.model_metadata.ModelMetadata`.

    Args:
        checkpoint: The trained detector.
        options: Inputs and outputs of the graph.
    """
    complexity = count_params_and_flops(checkpoint.build(), options.imgsz_hw)
    return {
        "description": f"hkd-det {checkpoint.model}, pedestrian detector, {'raw' if options.raw else 'end to end'}",
        "author": "hkd-det",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": version("hkd-det"),
        "license": f"{get_family(checkpoint.spec).license} (code); weights: as {_get_weights_license(checkpoint)}",
        "task": "detect",
        "stride": str(STRIDE),
        "batch": str(options.batch or "dynamic"),
        "imgsz": str(list(options.imgsz_hw)),
        "channels": "3",
        "names": "{0: 'person'}",
        "hkd.format": str(METADATA_FORMAT),
        "hkd.model": checkpoint.model,
        "hkd.parameters": str(complexity.num_params),
        "hkd.flops": str(complexity.flops),
        "hkd.preprocess": json.dumps(_describe_preprocess(options)),
        "hkd.max_imgsz": str(list(options.max_hw)),
        "hkd.dynamic": _format_bool(options.dynamic_size),
        "hkd.raw": _format_bool(options.raw),
        ARCHITECTURE_KEY: json.dumps({"spec": spec_to_dict(checkpoint.spec), "changes": asdict(checkpoint.changes)}),
        "hkd.weights_sha256": weights_sha256(checkpoint.weights),
        "hkd.data": _get_training_data(checkpoint),
        **_make_eval_metadata(checkpoint),
        **checkpoint.config.get("origin", {}),
    }


def get_output_names(options: ExportOptions) -> list[str]:
    """Return the names of the graph outputs in order.

    Args:
        options: Options of the graph.
    """
    return ["boxes", "logits"] if options.raw else ["boxes", "scores", "count"]


def _make_example_input(options: ExportOptions) -> Tensor:
    """Return the smallest input. The tracer stores top-k sizes as constants, which larger inputs also satisfy."""
    height, width = get_min_input_hw(options.imgsz_hw) if options.dynamic_size else options.imgsz_hw
    if options.preprocess:
        return torch.zeros(options.batch or 1, height, width, 3, dtype=torch.uint8)
    return torch.zeros(options.batch or 1, 3, height, width)


def _get_dynamic_axes(options: ExportOptions, names: list[str]) -> dict[str, dict[int, str]]:
    axes: dict[str, dict[int, str]] = {name: {} for name in ("images", *names)}
    if options.batch is None:
        for value_axes in axes.values():
            value_axes[0] = "batch"
    if options.dynamic_size or options.letterbox_hw:
        height_axis = 1 if options.preprocess else 2
        axes["images"] |= {height_axis: "height", height_axis + 1: "width"}
    if options.dynamic_size and options.raw:
        for name in names:
            axes[name][1] = "anchor_points"
    return axes


def _write_measured_metadata(path: Path, verification: Verification) -> None:
    """Add the suggested threshold and the distributions of the detections, as far as they can be measured."""
    conf, measured = verification.suggest_conf(), {}
    if conf is not None:
        measured["hkd.conf"] = f"{conf:.3f}"
    if reference := verification.measure_reference(conf):
        measured[REFERENCE_KEY] = reference.to_json()
    if measured:
        model = onnx.load(path)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        onnx.helper.set_model_props(model, metadata | measured)
        onnx.save(model, path)


def _describe_preprocess(options: ExportOptions) -> dict[str, object]:
    if options.letterbox_hw:
        return PREPROCESS_IN_GRAPH
    return PREPROCESS if options.preprocess else PREPROCESS_FLOAT01


def _make_eval_metadata(checkpoint: DetectorCheckpoint) -> dict[str, str]:
    """Return the epoch, miss rate and dataset of the validation that selected the weights, if there was one."""
    config = checkpoint.config
    if "setup" not in config:
        return {}
    return {
        "hkd.epoch": str(checkpoint.epoch),
        "hkd.miss_rate": f"{checkpoint.miss_rate:.6f}",
        "hkd.miss_rate_dataset": f"{_get_training_data(checkpoint)}, val, {config['setup']}, trained weights in torch",
    }


def _get_weights_license(checkpoint: DetectorCheckpoint) -> str:
    """Return the license of the training data. It is unknown if the data YAML is not on this machine."""
    data = _get_training_data(checkpoint)
    try:
        terms = dataset_license(data)
    except HkdError:
        terms = ""
    return f"the owners of {data} allow: {terms}" if terms else "their training data allows"


def _get_training_data(checkpoint: DetectorCheckpoint) -> str:
    """Return the name of the training dataset. Checkpoints of other training loops may lack it."""
    return str(checkpoint.config.get("data", "unknown"))


def _format_bool(value: bool) -> str:
    return "true" if value else "false"
