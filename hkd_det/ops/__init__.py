"""Tensor operations that do not depend on a model: boxes, suppression, RoI pooling, losses and hooks."""
