"""Reduced precision for exported files: float16, bfloat16 and INT8, with an accuracy and latency report. No torch."""
