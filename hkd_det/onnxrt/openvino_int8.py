"""Workaround for INT8 models in the CPU plugin of OpenVINO."""

from typing import Any

import numpy as np

from hkd_det.errors import import_package

UINT8_ZERO_POINT = 128  # of the activations of INT8 models


def use_unsigned_activations(model: Any) -> int:
    """Replace int8 activations by uint8 with a zero point that is larger by 128. The values stay the same.

    hkd-export quantizes activations to int8 with zero point 0, because TensorRT requires it. The CPU plugin of OpenVINO
    2026.4.1 computes wrong values for a convolution behind a concatenation of int8 activations on processors with AVX2
    only. uint8 with zero point 128 has the same values, and the plugin is right.

    An activation is FakeQuantize, Convert to int8, Convert to float32, Subtract of the zero point (omitted by other
    tools), and Multiply with the scale.

    Args:
        model: OpenVINO `Model`. It is changed.

    Returns:
        Number of changed activations.
    """
    openvino = import_package("openvino", "OpenVINO", "Run pip install 'hkd-det[openvino]'.")
    ops = import_package("openvino.opset13", "OpenVINO", "Run pip install 'hkd-det[openvino]'.")
    num_changed = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Convert" or node.get_output_element_type(0) != openvino.Type.i8:
            continue
        quantize = node.input_value(0).get_node()
        back_nodes = [target.get_node() for target in node.output(0).get_target_inputs()]
        if quantize.get_type_name() != "FakeQuantize" or {one.get_type_name() for one in back_nodes} != {"Convert"}:
            continue
        inputs = [quantize.input_value(index) for index in range(5)]
        ranges = [ops.constant(value.get_node().get_data() + np.float32(UINT8_ZERO_POINT)) for value in inputs[3:]]
        levels = quantize.get_attributes()["levels"]
        unsigned = ops.convert(ops.fake_quantize(*inputs[:3], *ranges, levels), "u8")
        for back in back_nodes:
            _replace_dequantization(ops, back, ops.convert(unsigned, "f32"))
        num_changed += 1
    model.validate_nodes_and_infer_types()
    return num_changed


def _replace_dequantization(ops: Any, back: Any, unsigned: Any) -> None:
    """Connect the users of a Convert to float32 to the unsigned values, less their zero point."""
    for target in list(back.output(0).get_target_inputs()):
        zero_point, outputs = np.float32(UINT8_ZERO_POINT), [target]
        user = target.get_node()
        if (
            user.get_type_name() == "Subtract"
            and (offset := _read_constant(user.input_value(1).get_node())) is not None
        ):
            zero_point, outputs = offset + zero_point, list(user.output(0).get_target_inputs())
        shifted = ops.subtract(unsigned, ops.constant(zero_point))
        for output in outputs:
            output.replace_source_output(shifted.output(0))


def _read_constant(node: Any) -> Any:
    """Return the value of a constant, or of one behind a Convert, as float32. None for other nodes."""
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node.get_data().astype(np.float32) if node.get_type_name() == "Constant" else None
