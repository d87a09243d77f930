"""The graph as nvinfer feeds and reads it: made of a finished ONNX file of any precision.

DeepStream: a folder with nvinfer's configuration, the labels, the model and the source of its output parser.

nvinfer prepares pictures itself: scaled with the aspect ratio kept, top left, float32 (B, 3, H, W) RGB times
net-scale-factor. Any graph of one size is made to take that (`nvinfer_graph.py`). (It pads with black, not our grey.)
Keys: the page "Gst-nvinfer" of the DeepStream developer guide.
"""

import ast
import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from hkd_deploy.model_metadata import METADATA_FORMAT, PREPROCESS_FLOAT01, ModelMetadata
from hkd_deploy.precision.graph_regions import list_node_inputs
from hkd_deploy.precision.model import parse_onnx_model
from hkd_deploy.serving.model_file import ModelFile
from hkd_det.errors import DataError, UsageError, import_package
from hkd_det.files import atomic_write, write_text

COUNT_OUTPUT = "count"


NHWC_TO_NCHW, NCHW_TO_NHWC = [0, 3, 1, 2], [0, 2, 3, 1]  # (B, H, W, 3) to (B, 3, H, W), and back


def write_nvinfer_graph(source_path: Path, metadata: ModelMetadata, target_path: Path) -> None:
    """Write `source` to `target` for float32 (B, 3, H, W) RGB 0..1, without the output `count`. Needs onnx.

    source: takes that already, or uint8 (B, H, W, 3) RGB of one size; all behind its first steps stays as it is.
    Raises DataError for a graph that begins in another way than hkd-export's.
    """
    # Not on a device.
    onnx = import_package(
        "onnx", "onnx", "DeepStream's files are made where the weights are, with it: pip install onnx"
    )
    model = parse_onnx_model(onnx, source_path.read_bytes(), source_path)
    if metadata.preprocess == "uint8":
        _convert_input_to_nchw(onnx, model, source_path)
        _update_metadata(onnx, model, metadata)
    _drop_output(model, COUNT_OUTPUT)
    onnx.checker.check_model(model)
    onnx.save(model, target_path)


def _convert_input_to_nchw(onnx: Any, model: Any, path: Path) -> None:
    """Put one multiplication by 255 in the place of the cast to float32 and the transpose behind it."""
    graph, helper, float32 = model.graph, onnx.helper, onnx.TensorProto.FLOAT
    images = graph.input[0]
    readers = [node for node in graph.node if images.name in list_node_inputs(node)]
    if len(readers) != 1 or readers[0].op_type != "Cast" or readers[0].attribute[0].i != float32:
        raise DataError(f"{path}: does not begin with a cast of {images.name} to float32; export it again")
    (cast,) = readers
    transposes = [
        node for node in graph.node if node.op_type == "Transpose" and _is_nchw_transpose(node, cast.output[0])
    ]
    planes = [node.output[0] for node in transposes] or [f"{images.name}_planes"]
    white = onnx.numpy_helper.from_array(np.array(255, np.float32), f"{images.name}_white")
    start = [helper.make_node("Mul", [images.name, white.name], [name], name=f"{name}_from_0_1") for name in planes]
    # ONNX Runtime's optimiser, which has been over an INT8 file, reads the picture's shape before the transpose.
    if any(cast.output[0] in list_node_inputs(node) for node in graph.node if node not in transposes):
        back = cast.output[0]
        start.append(helper.make_node("Transpose", [planes[0]], [back], name=f"{back}_back", perm=NCHW_TO_NHWC))
    nodes = [made for node in graph.node if node not in transposes for made in (start if node == cast else [node])]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(white)
    sides = [side.dim_param or side.dim_value for side in images.type.tensor_type.shape.dim]
    images.CopyFrom(helper.make_tensor_value_info(images.name, float32, [sides[place] for place in NHWC_TO_NCHW]))


def _is_nchw_transpose(transpose: Any, input_name: str) -> bool:
    return transpose.input[0] == input_name and list(transpose.attribute[0].ints) == NHWC_TO_NCHW


def _update_metadata(onnx: Any, model: Any, metadata: ModelMetadata) -> None:
    """What `hkd-export --no-preprocess` says of such a graph; the rest of the metadata stays."""
    described = {entry.key: entry.value for entry in model.metadata_props} | {
        "hkd.format": str(METADATA_FORMAT),
        "hkd.preprocess": json.dumps(PREPROCESS_FLOAT01),
        "hkd.max_hw": str(list(metadata.max_imgsz_hw)),
        "hkd.dynamic_size": "false",
        "hkd.raw": "false",
    }
    onnx.helper.set_model_props(model, described)


def _drop_output(model: Any, name: str) -> None:
    """Take an output away; what only it needs is no runtime's work.

    nvinfer takes the first side of every output for the batch and gives memory for the rest: of a number a
    picture, [B], nothing is left, and TensorRT would write to no address.
    """
    kept = [output for output in model.graph.output if output.name != name]
    del model.graph.output[:]
    model.graph.output.extend(kept)


PARSER_FILES = ("nvdsinfer_hkd.cpp", "Makefile")


MIN_OBJECT_SCORE = 0.3  # the least score that becomes an object, as hkd-demo's --conf


# nvinfer's numbers for what it builds itself. It has none for bfloat16, and an engine is run as it was built.
NETWORK_MODES = {"fp32": 0, "int8": 1, "fp16": 2}


BUILD_ENGINE_HINT = (
    "first hkd-export MODEL.onnx --target deepstream, then build the engine from the .onnx written there"
)


def write_deepstream(model: ModelFile, folder: Path, max_batch: int) -> Path:
    """Write `folder`/NAME; its path. In it: `make`, then give config_infer_primary.txt to nvinfer.

    max_batch: pictures in one call, where the file leaves the batch free.
    Raises UsageError, naming the flag to export with, for a graph that nvinfer cannot feed.
    """
    manifest = ModelMetadata.from_metadata(model.metadata, model.path)
    _check_deepstream_input(model, manifest)
    labels, settings = _read_labels(model), make_deepstream_config(model, manifest, max_batch)
    target = folder / model.path.stem
    target.mkdir(parents=True, exist_ok=True)
    with atomic_write(target / model.path.name) as aside:
        if model.is_engine:
            shutil.copyfile(model.path, aside)
        else:
            write_nvinfer_graph(model.path, manifest, aside)
    for name in PARSER_FILES:
        write_text(target / name, (files("hkd_deploy.serving") / "nvdsinfer_hkd" / name).read_text(encoding="utf-8"))
    write_text(target / "labels.txt", "\n".join(labels) + "\n")
    write_text(target / "config_infer_primary.txt", settings)
    return target


def make_deepstream_config(model: ModelFile, metadata: ModelMetadata, max_batch: int) -> str:
    """The text of config_infer_primary.txt; its paths are relative to itself."""
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
        "# the picture as the network was trained on it: RGB / 255, aspect ratio kept, top left",
        "net-scale-factor=0.00392156862745098",
        "model-color-format=0",
        "maintain-aspect-ratio=1",
        "symmetric-padding=0",
        "# doubles are left out in the graph: no clustering, no NMS",
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


def _format_model_lines(model: ModelFile, metadata: ModelMetadata, batch: int) -> list[str]:
    name = model.path.name
    if model.is_engine:
        return [f"model-engine-file={name}"]
    if model.precision != "fp32":
        # an engine for fewer pictures than batch-size is refused
        profile = f" --trt-profile 1,{batch},{batch}" if metadata.batch is None else ""
        return [
            "# made on the device, in this folder (nvinfer's builder does not type strongly):",
            f"#   hkd-export {name} --trt{profile}",
            f"model-engine-file={model.path.with_suffix('.engine').name}",
        ]
    # nvinfer builds the engine on first start and saves it under exactly this name
    return [f"onnx-file={name}", f"model-engine-file={name}_b{batch}_gpu0_fp32.engine"]


def _check_deepstream_input(model: ModelFile, metadata: ModelMetadata) -> None:
    (images,) = model.inputs
    if model.is_engine and metadata.preprocess != "float01":
        raise UsageError(f"{model.path}: takes {images}, nvinfer gives float32 (B, 3, H, W); {BUILD_ENGINE_HINT}")
    if metadata.letterbox:
        raise UsageError(f"{model.path}: letterboxes (--letterbox), nvinfer does so itself; export without it")
    if metadata.raw:
        raise UsageError(f"{model.path}: gives raw candidates (--raw), nvinfer's parser wants boxes; export without it")
    if metadata.dynamic:
        raise UsageError(f"{model.path}: its size is free, nvinfer's is fixed; export with --dynamic batch, or none")
    if model.is_engine and COUNT_OUTPUT in {output.name for output in model.outputs}:
        raise UsageError(
            f"{model.path}: its output count has no side behind the batch, and nvinfer gives it no memory; "
            f"{BUILD_ENGINE_HINT}"
        )


def _read_labels(model: ModelFile) -> list[str]:
    try:
        names = ast.literal_eval(model.metadata["names"])
        return [str(names[index]) for index in range(len(names))]
    except (KeyError, ValueError, SyntaxError, TypeError) as error:
        raise DataError(f"{model.path}: metadata names cannot be read ({error}); export it again") from None
