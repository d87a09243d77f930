"""Float16 and bfloat16: a graph in which every value's type is written, so that no runtime has to choose.

The body is reckoned in half, all else stays FP32 (`parts.py`), the last layers included: neighbouring scores closer
than half's rounding would tie, and ties are all kept (`hkd_det/ops/nms.py`). Between the two stand Cast nodes.
Inputs and outputs keep their types.

onnxruntime.transformers.float16 knows no bfloat16; NVIDIA's modelopt.onnx.autocast knows both and brings torch along:
hence these lines.
"""

from typing import Any, Literal

import numpy as np

from hkd_deploy.precision.graph_regions import GraphRegions, find_constants, find_float_tensors, list_node_inputs
from hkd_deploy.precision.model import import_onnx
from hkd_det.errors import DataError

HalfPrecision = Literal["fp16", "bf16"]


# What is the same in half, but for rounding. Sums over many values, exponentials and what is not listed stay FP32.
HALF_OPS = frozenset({
    "Add", "AveragePool", "Clip", "Concat", "Conv", "ConvTranspose", "Div", "Elu", "Flatten", "Gemm",
    "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "MatMul", "Max",
    "MaxPool", "Min", "Mul", "PRelu", "Pad", "Relu", "Reshape", "Resize", "Sigmoid", "Slice", "Split", "Squeeze",
    "Sub", "Tanh", "Transpose", "Unsqueeze",
})  # fmt: skip


FP16_MAX = float(np.finfo(np.float16).max)


BF16_OPSET, BF16_IR_VERSION = (
    22,
    10,
)  # the first in which Conv and the poolings take bfloat16, and the IR that goes with it


def convert_to_half(model: Any, regions: GraphRegions, precision: HalfPrecision) -> Any:
    """A copy of an FP32 model with its body in half. Raises DataError for a weight that float16 cannot hold."""
    onnx = import_onnx()
    if precision == "bf16":
        made = onnx.version_converter.convert_version(model, BF16_OPSET)
        made.ir_version = BF16_IR_VERSION
        onnx.helper.set_model_props(made, {entry.key: entry.value for entry in model.metadata_props})
    else:
        made = onnx.ModelProto()
        made.CopyFrom(model)
    _HalfConverter(onnx, made, regions, precision).rewrite()
    _remove_unused(made)
    del made.graph.value_info[:]
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(made, strict_mode=True), full_check=True)
    return made


class _HalfConverter:
    """One walk over the nodes. A value x of the body becomes x_fp16; who needs it in FP32 gets x back by a Cast."""

    def __init__(self, onnx: Any, model: Any, regions: GraphRegions, precision: HalfPrecision) -> None:
        self.onnx, self.graph, self.precision = onnx, model.graph, precision
        self.float_values, self.constants = find_float_tensors(model), find_constants(model)
        self.half_nodes = {
            node.name for node in model.graph.node if node.name in regions.body and node.op_type in HALF_OPS
        }
        self.dtype = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.BFLOAT16
        self.half_values: set[str] = set()  # values that have a half twin
        self.restored_values: set[str] = set()  # values that only half nodes give, and that have been cast back
        self.half_only_values: set[str] = set()  # values that only half nodes give
        self.nodes: list[Any] = []

    def rewrite(self) -> None:
        for node in list(self.graph.node):
            if node.name in self.half_nodes:
                self._convert_node(node)
            elif node.op_type == "Shape":  # the twin has the same
                node.input[0] = (
                    self._make_half_name(node.input[0]) if node.input[0] in self.half_only_values else node.input[0]
                )
            else:
                for name in list_node_inputs(node):
                    self._restore_float(name)
            self.nodes.append(node)
        for output in self.graph.output:
            self._restore_float(output.name)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)

    def _convert_node(self, node: Any) -> None:
        # Resize's scales are floats whatever it resizes.
        count = 1 if node.op_type == "Resize" else len(node.input)
        for index in range(count):
            if node.input[index] in self.float_values:
                node.input[index] = self._get_half_value(node.input[index])
        for index, name in enumerate(node.output):
            if name in self.float_values:
                self.half_values.add(name)
                self.half_only_values.add(name)
                node.output[index] = self._make_half_name(name)

    def _get_half_value(self, name: str) -> str:
        twin = self._make_half_name(name)
        if name not in self.half_values:
            self.half_values.add(name)
            if name in self.constants:
                self.graph.initializer.append(self._make_half_tensor(name, twin))
            else:
                self.nodes.append(self._make_cast(name, twin, self.dtype))
        return twin

    def _restore_float(self, name: str) -> None:
        if name in self.half_only_values and name not in self.restored_values:
            self.restored_values.add(name)
            self.nodes.append(self._make_cast(self._make_half_name(name), name, self.onnx.TensorProto.FLOAT))

    def _make_half_tensor(self, name: str, half_name: str) -> Any:
        values = self.onnx.numpy_helper.to_array(self.constants[name])
        largest = float(np.abs(values).max(initial=0))
        if self.precision == "fp16" and largest > FP16_MAX:
            raise DataError(f"weight {name} reaches {largest:.3g}, more than float16 can hold; use --precision bf16")
        if self.precision == "fp16":
            return self.onnx.numpy_helper.from_array(values.astype(np.float16), half_name)
        return self.onnx.helper.make_tensor(half_name, self.dtype, values.shape, values.ravel())

    def _make_cast(self, source: str, target: str, dtype: int) -> Any:
        return self.onnx.helper.make_node("Cast", [source], [target], name=f"{target}_cast", to=dtype)

    def _make_half_name(self, name: str) -> str:
        return f"{name}_{self.precision}"


def _remove_unused(model: Any) -> None:
    """Take out the FP32 weights of which only the half twin is read."""
    read = {value.name for value in model.graph.output}
    nodes = []
    for node in reversed(model.graph.node):
        if read.intersection(node.output):
            read.update(list_node_inputs(node))
            nodes.append(node)
    weights = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(weights)
    model.graph.node.extend(reversed(nodes))
