"""Training of detectors, alone or with distillation. Requires torch."""
