"""Parse an ONNX file and build an engine, with the TensorRT of the interpreter that runs this; prints facts as JSON.

    .tensorrt/python build_with_tensorrt.py model.onnx [SMALLEST LARGEST]      both as 1,3,96,160

Exits with the parser's errors where there are any.
"""

import json
import sys

import tensorrt as trt


def main(path: str, *profile: str) -> None:
    """Sizes of a free shape come from `profile`; what is fixed in the file stays."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    with open(path, "rb") as file:  # noqa: PTH123 - as short as the program it stands for
        if not parser.parse(file.read()):
            sys.exit("\n".join(str(parser.get_error(index)) for index in range(parser.num_errors)))
    config = builder.create_builder_config()
    images = network.get_input(0)
    if -1 in tuple(images.shape):
        shapes = builder.create_optimization_profile()
        small, large = (
            tuple(wanted if side == -1 else side for side, wanted in zip(images.shape, map(int, sizes.split(","))))  # noqa: B905
            for sizes in profile
        )
        shapes.set_shape(images.name, small, large, large)
        config.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, config)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    facts = {
        "plan_bytes": plan.nbytes,
        "input": images.dtype.name,
        "outputs": {tensor.name: [tensor.dtype.name, len(tensor.shape)] for tensor in outputs},
        "quantize_layers": sum(layer.type == trt.LayerType.QUANTIZE for layer in layers),
        "layer_types": sorted({layer.get_output(0).dtype.name for layer in layers}),
    }
    print(json.dumps(facts))


main(*sys.argv[1:])
