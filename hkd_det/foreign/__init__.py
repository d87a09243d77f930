"""Detectors that others made, as ONNX files: described in a few lines, run without torch."""
