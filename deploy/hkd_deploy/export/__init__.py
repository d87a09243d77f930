"""Export of trained detectors: ONNX, verification, OpenVINO folder, and the command hkd-export."""
