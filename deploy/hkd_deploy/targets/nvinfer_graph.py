"""The graph as nvinfer feeds and reads it: made of a finished ONNX file of any precision."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from hkd_deploy.artifact import METADATA_FORMAT, PREPROCESS_FLOAT01, ModelMetadata
from hkd_deploy.precision.parts import list_node_inputs
from hkd_deploy.precision.source import parse_onnx_model
from hkd_det.errors import DataError
from hkd_det.packages import import_package

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
