"""Capacity-dynamic distillation (CDD, Xie et al., CVPR 2023, arXiv 2303.09230): channel pruning during training."""
