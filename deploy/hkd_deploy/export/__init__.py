"""From a trained detector to a file a device can run. Needs torch and onnx."""
