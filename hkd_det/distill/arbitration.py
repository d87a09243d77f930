"""MoKD (Hayder et al. 2025): task and distillation as two objectives whose gradients are arbitrated each step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arbitration:
    """How the two gradients become one step."""

    rule: str = "min-norm"
