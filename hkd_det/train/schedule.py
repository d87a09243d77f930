"""Learning rate and distillation strength over a run."""

import math


def learning_rate_factor(step: int, steps: int, warmup: float, floor: float = 0.02) -> float:
    """Factor on the rate at a step of 0 .. steps - 1: linear rise, then half a cosine down to `floor`."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    progress = (step - rising) / max(1, steps - rising)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def distillation_strength(epoch: int, epochs: int, finale: float) -> float:
    """Factor on the distillation terms in epoch 0 .. epochs - 1: half a cosine from 1, 0 in the finale."""
    taught = plain_from(epochs, finale)
    if epoch >= taught:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * epoch / max(1, taught)))


def plain_from(epochs: int, finale: float) -> int:
    """The first epoch of the finale, in which views are plain and nobody teaches."""
    return epochs - round(epochs * finale)
