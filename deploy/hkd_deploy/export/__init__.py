"""Export of trained detectors: ONNX, verification, OpenVINO directory, and the command hkd-export."""
