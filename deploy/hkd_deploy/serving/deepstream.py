"""Files for DeepStream: nvinfer configuration, labels, model and the source of the output parser.

nvinfer prepares images itself: it scales with a fixed aspect ratio, places the image top left and passes float32
[B, 3, H, W] RGB times net-scale-factor. It pads with black instead of gray 114. `write_nvinfer_graph` converts a graph
of fixed size to this input. Keys: chapter "Gst-nvinfer" of the DeepStream developer guide.
"""

import ast
import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from hkd_deploy.model_metadata import PREPROCESS_FLOAT01, ModelMetadata
from hkd_deploy.precision.graph import list_node_inputs
from hkd_deploy.precision.model import parse_onnx_model
from hkd_deploy.serving.model_file import ModelFile
from hkd_det.errors import DataError, UsageError, import_package
from hkd_det.files import atomic_write, write_text

COUNT_OUTPUT = "count"
NHWC_TO_NCHW, NCHW_TO_NHWC = [0, 3, 1, 2], [0, 2, 3, 1]
PARSER_FILES = ("nvdsinfer_hkd.cpp", "Makefile")
MIN_OBJECT_SCORE = 0.3  # as the default of hkd-demo --conf

# network-mode of nvinfer. It has no value for bfloat16, and ignores the value for a finished engine.
NETWORK_MODES = {"fp32": 0, "int8": 1, "fp16": 2}

BUILD_ENGINE_HINT = (
    "Run hkd-export MODEL.onnx --serving deepstream, then build the engine from the .onnx file written there."
)


def write_deepstream(model: ModelFile, folder: Path, max_batch: int) -> Path:
    """Write the files for one model. On the device, run `make` there and pass config_infer_primary.txt to nvinfer.

    Args:
        model: The model file.
        folder: Parent directory. The model name becomes the directory name.
        max_batch: Batch size if the batch dimension of the model is free.

    Returns:
        The directory of the model.

    Raises:
        UsageError: nvinfer cannot feed the graph. The message names the flag to export with.
        DataError: The graph or its metadata is damaged.
        UnavailableError: The onnx package is missing.
    """
    metadata = ModelMetadata.from_metadata(model.metadata, model.path)
    _check_deepstream_input(model, metadata)
    labels, config = _read_labels(model), make_deepstream_config(model, metadata, max_batch)
    model_dir = folder / model.path.stem
    model_dir.mkdir(parents=True, exist_ok=True)
    with atomic_write(model_dir / model.path.name) as temp_path:
        if model.is_engine:
            shutil.copyfile(model.path, temp_path)
        else:
            write_nvinfer_graph(model.path, metadata, temp_path)
    parser_dir = files("hkd_deploy.serving") / "nvdsinfer_hkd"
    for name in PARSER_FILES:
        write_text(model_dir / name, (parser_dir / name).read_text(encoding="utf-8"))
    write_text(model_dir / "labels.txt", "\n".join(labels) + "\n")
    write_text(model_dir / "config_infer_primary.txt", config)
    return model_dir


def make_deepstream_config(model: ModelFile, metadata: ModelMetadata, max_batch: int) -> str:
    """Create the content of config_infer_primary.txt. Its paths are relative to the file.

    Args:
        model: The model file.
        metadata: Metadata of the model.
        max_batch: Batch size if the batch dimension of the model is free.

    Returns:
        The text, in the key file format of GLib.
    """
    batch = metadata.batch or max_batch
    height, width = metadata.imgsz_hw
    lines = [
        "[property]",
        "gpu-id=0",
        "gie-unique-id=1",
        *_format_model_lines(model, metadata, batch),
        f"network-mode={NETWORK_MODES.get(model.precision, 0)}",
        "network-type=0",
        f"batch-size={batch}",
        f"infer-dims=3;{height};{width}",
        "interval=0",
        "process-mode=1",
        "# preprocessing as in training: RGB / 255, fixed aspect ratio, top left",
        "net-scale-factor=0.00392156862745098",
        "model-color-format=0",
        "maintain-aspect-ratio=1",
        "symmetric-padding=0",
        "# the graph suppresses duplicates: no clustering, no NMS",
        "cluster-mode=4",
        f"num-detected-classes={len(_read_labels(model))}",
        "labelfile-path=labels.txt",
        "parse-bbox-func-name=NvDsInferParseCustomHkd",
        "custom-lib-path=libnvdsinfer_hkd.so",
        "",
        "[class-attrs-all]",
        f"pre-cluster-threshold={MIN_OBJECT_SCORE}",
    ]
    return "\n".join(lines) + "\n"


def write_nvinfer_graph(source_path: Path, metadata: ModelMetadata, target_path: Path) -> None:
    """Convert a graph to the input float32 [B, 3, H, W] RGB, 0 to 1, and remove the output `count`.

    Args:
        source_path: ONNX file of fixed size. A uint8 input is converted; the rest of the graph stays unchanged.
        metadata: Metadata of the file.
        target_path: The file to write.

    Raises:
        DataError: The first operators of the graph are not those of `hkd-export`.
        UnavailableError: The onnx package is missing.
    """
    hint = "Run pip install onnx, or write the DeepStream files on the machine that exports the model."
    onnx = import_package("onnx", "onnx", hint)
    model = parse_onnx_model(onnx, source_path.read_bytes(), source_path)
    if metadata.preprocess == "uint8":
        _convert_input_to_nchw(onnx, model, source_path)
        _update_metadata(onnx, model)
    _drop_output(model, COUNT_OUTPUT)
    onnx.checker.check_model(model)
    onnx.save(model, target_path)


def _convert_input_to_nchw(onnx: Any, model: Any, path: Path) -> None:
    """Replace the cast to float32 and the transpose that follows by one multiplication by 255."""
    graph, helper, float32 = model.graph, onnx.helper, onnx.TensorProto.FLOAT
    images = graph.input[0]
    consumers = [node for node in graph.node if images.name in list_node_inputs(node)]
    if len(consumers) != 1 or consumers[0].op_type != "Cast" or consumers[0].attribute[0].i != float32:
        raise DataError(
            f"{path}: expected a cast of {images.name} to float32 as the first operator. Export the model again."
        )
    (cast,) = consumers
    transposes = [
        node for node in graph.node if node.op_type == "Transpose" and _is_nchw_transpose(node, cast.output[0])
    ]
    nchw_names = [node.output[0] for node in transposes] or [f"{images.name}_planes"]
    scale = onnx.numpy_helper.from_array(np.array(255, np.float32), f"{images.name}_white")
    first_nodes = [
        helper.make_node("Mul", [images.name, scale.name], [name], name=f"{name}_from_0_1") for name in nchw_names
    ]
    # The optimizer of ONNX Runtime, which processed INT8 files, reads the image shape before the transpose.
    if any(cast.output[0] in list_node_inputs(node) for node in graph.node if node not in transposes):
        nhwc_name = cast.output[0]
        first_nodes.append(
            helper.make_node("Transpose", [nchw_names[0]], [nhwc_name], name=f"{nhwc_name}_back", perm=NCHW_TO_NHWC)
        )
    nodes = [new for node in graph.node if node not in transposes for new in (first_nodes if node == cast else [node])]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(scale)
    dims = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
    images.CopyFrom(helper.make_tensor_value_info(images.name, float32, [dims[axis] for axis in NHWC_TO_NCHW]))


def _is_nchw_transpose(transpose: Any, input_name: str) -> bool:
    return transpose.input[0] == input_name and list(transpose.attribute[0].ints) == NHWC_TO_NCHW


def _update_metadata(onnx: Any, model: Any) -> None:
    """Set the preprocessing that hkd-export --no-preprocess writes. The other keys stay."""
    entries = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, entries | {"hkd.preprocess": json.dumps(PREPROCESS_FLOAT01)})


def _drop_output(model: Any, name: str) -> None:
    """Remove an output. Runtimes skip the operators that only this output needs.

    nvinfer treats the first dimension of every output as the batch and allocates memory for the others. An output of
    shape [B] gets no memory, and TensorRT would write to an invalid address.
    """
    outputs = [output for output in model.graph.output if output.name != name]
    del model.graph.output[:]
    model.graph.output.extend(outputs)


def _format_model_lines(model: ModelFile, metadata: ModelMetadata, batch: int) -> list[str]:
    name = model.path.name
    if model.is_engine:
        return [f"model-engine-file={name}"]
    if model.precision != "fp32":
        # nvinfer rejects an engine whose largest batch is below batch-size
        profile = f" --trt-profile 1,{batch},{batch}" if metadata.batch is None else ""
        return [
            "# build on the device, in this directory (the builder of nvinfer is not strongly typed):",
            f"#   hkd-export {name} --trt{profile}",
            f"model-engine-file={model.path.with_suffix('.engine').name}",
        ]
    # nvinfer builds the engine at the first start and saves it under exactly this name
    return [f"onnx-file={name}", f"model-engine-file={name}_b{batch}_gpu0_fp32.engine"]


def _check_deepstream_input(model: ModelFile, metadata: ModelMetadata) -> None:
    (images,) = model.inputs
    path = model.path
    if model.is_engine and metadata.preprocess != "float01":
        raise UsageError(f"{path}: input {images}: nvinfer passes float32 (B, 3, H, W). {BUILD_ENGINE_HINT}")
    if metadata.letterbox:
        raise UsageError(f"{path}: exported with --letterbox, which nvinfer does itself. Export without it.")
    if metadata.raw:
        raise UsageError(f"{path}: exported with --raw, but the output parser expects boxes. Export without it.")
    if metadata.dynamic:
        raise UsageError(
            f"{path}: the input size is free, but nvinfer needs a fixed size. Export without --dynamic size."
        )
    if model.is_engine and COUNT_OUTPUT in {output.name for output in model.outputs}:
        raise UsageError(
            f"{path}: output {COUNT_OUTPUT} has no dimension after the batch; nvinfer allocates no memory for it. "
            f"{BUILD_ENGINE_HINT}"
        )


def _read_labels(model: ModelFile) -> list[str]:
    try:
        names = ast.literal_eval(model.metadata["names"])
        return [str(names[index]) for index in range(len(names))]
    except (KeyError, ValueError, SyntaxError, TypeError) as error:
        raise DataError(f"{model.path}: metadata names: cannot be read ({error}). Export the model again.") from None
