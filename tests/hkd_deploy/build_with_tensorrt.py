"""Parse an ONNX file, build an engine, and print properties of both as JSON.

    .tensorrt/python build_with_tensorrt.py model.onnx [MIN_SHAPE MAX_SHAPE]      both as 1,3,96,160

Exits with the errors of the parser if there are any. This script does not use hkd_deploy: the tests compare its result
with the exported graph.
"""

import json
import sys
from pathlib import Path

import tensorrt as trt


def main(path: str, *profile: str) -> None:
    """Build an engine and print its properties.

    Args:
        path: The ONNX file.
        profile: Smallest and largest input shape. They apply to free dimensions only.
    """
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(Path(path).read_bytes()):
        sys.exit("\n".join(str(parser.get_error(index)) for index in range(parser.num_errors)))
    config = builder.create_builder_config()
    images = network.get_input(0)
    if -1 in tuple(images.shape):
        trt_profile = builder.create_optimization_profile()
        min_shape, max_shape = (
            tuple(
                value if dim == -1 else dim for dim, value in zip(images.shape, map(int, text.split(",")), strict=True)
            )
            for text in profile
        )
        trt_profile.set_shape(images.name, min_shape, max_shape, max_shape)
        config.add_optimization_profile(trt_profile)
    plan = builder.build_serialized_network(network, config)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    properties = {
        "plan_bytes": plan.nbytes,
        "input": images.dtype.name,
        "outputs": {tensor.name: [tensor.dtype.name, len(tensor.shape)] for tensor in outputs},
        "quantize_layers": sum(layer.type == trt.LayerType.QUANTIZE for layer in layers),
        "layer_types": sorted({layer.get_output(0).dtype.name for layer in layers}),
    }
    print(json.dumps(properties))


main(*sys.argv[1:])
