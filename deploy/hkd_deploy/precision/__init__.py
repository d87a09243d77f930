"""Smaller numbers for an exported file: float16, bfloat16, INT8, and whether that was worth it. onnx, but no torch."""
