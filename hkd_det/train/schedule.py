"""Learning rate and distillation strength over a run."""

import math


def compute_lr_factor(step: int, total_steps: int, warmup_ratio: float, min_factor: float = 0.02) -> float:
    """Factor on the rate at a step of 0 .. steps - 1: linear rise, then half a cosine down to `floor`."""
    rising = max(1, round(total_steps * warmup_ratio))
    if step < rising:
        return (step + 1) / rising
    progress = (step - rising) / max(1, total_steps - rising)
    return min_factor + (1 - min_factor) * 0.5 * (1 + math.cos(math.pi * progress))


def distill_weight_at(epoch: int, epochs: int, no_aug_ratio: float) -> float:
    """Factor on the distillation terms in epoch 0 .. epochs - 1: half a cosine from 1, 0 in the finale."""
    taught = no_aug_start_epoch(epochs, no_aug_ratio)
    if epoch >= taught:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * epoch / max(1, taught)))


def no_aug_start_epoch(epochs: int, no_aug_ratio: float) -> int:
    """The first epoch of the finale, in which views are plain and nobody teaches."""
    return epochs - round(epochs * no_aug_ratio)
