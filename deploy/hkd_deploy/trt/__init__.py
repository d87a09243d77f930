"""Building of TensorRT engines from ONNX files, on the device that runs them."""
