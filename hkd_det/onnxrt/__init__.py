"""Detectors in ONNX files, run with ONNX Runtime and without torch."""
