"""TensorRT: an engine from an ONNX file, on the device that runs it. Imports tensorrt only where it is used."""
