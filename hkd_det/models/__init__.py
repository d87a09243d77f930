"""Detectors: the common interface, the model families, checkpoints and the zoo. Needs torch."""
