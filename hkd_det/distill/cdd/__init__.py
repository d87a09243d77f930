"""Capacity-dynamic distillation (CDD, Xie et al. 2023): the student loses channels during training."""
