"""MoKD (Hayder et al. 2025): task and distillation as two objectives; what weights their gradients are given.

The gradients that are compared are those of log losses, grad L / (L + eps), whose lengths don't depend on what the
losses are measured in. `../shared/methods.md`, section 3, says what is known of the source.

The length of the step. Whatever the rule, the weighted sum is brought to the length of the task's own gradient: the
log's scale means nothing to a clipped norm, and Adam's second moments would not fit the finale, where the task's
gradient comes as it is. Only where the two nearly cancel the step becomes shorter, down to nothing: there is little
that both gain from, and stretching it would be stretching noise.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from hkd_det.errors import UsageError


@dataclass(frozen=True)
class MoKDConfig:
    """How the two gradients become one step.

    rule: "bisector" of their directions; "min-norm", the shortest convex combination, which serves both equally, and
    so mostly the one with the shorter gradient; "amortised", weights learnt from the losses alone. at: what gradients
    are compared on, all shared "parameters" or the "feature" maps at the taps (the amortised rule compares none). eps:
    keeps the log's gradient finite near a loss of 0. rate, decay: of the amortised rule's logits.
    """

    solver: Literal["bisector", "min-norm", "amortised"] = "bisector"
    gradient_level: Literal["parameters", "feature"] = "parameters"
    eps: float = 1e-3
    lr: float = 0.025
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.eps <= 0 or self.lr < 0 or self.weight_decay < 0:
            raise UsageError("mokd: eps is positive, rate and decay are not negative")
        if self.solver == "amortised" and self.gradient_level == "feature":
            raise UsageError("mokd: the amortised rule compares no gradients: leave distill.mokd.at out")
        if self.solver != "amortised" and (self.lr, self.weight_decay) != (MoKDConfig.lr, MoKDConfig.weight_decay):
            raise UsageError(f"mokd: rate and decay are the amortised rule's; {self.solver} learns no shares")


@dataclass(frozen=True)
class GramMatrix:
    """Inner products of two gradients g: <g_task, g_task>, <g_task, g_taught>, <g_taught, g_taught>."""

    det_det: float
    det_distill: float
    distill_distill: float

    @property
    def cosine(self) -> float:
        """Of the angle between them, -1 where they are opposed; 0 if one is nothing."""
        return (
            self.det_distill / math.sqrt(self.det_det * self.distill_distill)
            if self.det_det > 0 < self.distill_distill
            else 0.0
        )

    def scale(self, det_factor: float, distill_factor: float) -> "GramMatrix":
        """Of the gradients times these factors."""
        return GramMatrix(
            self.det_det * det_factor**2,
            self.det_distill * det_factor * distill_factor,
            self.distill_distill * distill_factor**2,
        )

    def norm(self, det_weight: float) -> float:
        """Of share x g_task + (1 - share) x g_taught."""
        rest = 1 - det_weight
        squared = (
            det_weight**2 * self.det_det + 2 * det_weight * rest * self.det_distill + rest**2 * self.distill_distill
        )
        return math.sqrt(max(0.0, squared))


def min_norm_weight(gram: GramMatrix) -> float:
    """The task's weight, 0..1, in the shortest convex combination of both gradients.

    pi = (g22 - g12) / (g11 + g22 - 2 g12), clipped to [0, 1]: inside, the combination has equal inner products with
    both (MGDA: Desideri 2012). 0.5 for two equal gradients, where every weight gives the same.
    """
    apart = gram.det_det + gram.distill_distill - 2 * gram.det_distill
    if apart <= 0:
        return 0.5
    return min(1.0, max(0.0, (gram.distill_distill - gram.det_distill) / apart))


def bisector_weight(gram: GramMatrix) -> float:
    """The task's weight at which the convex combination halves the angle between both gradients.

    Each has the other's length as its weight: |g2| / (|g1| + |g2|).
    """
    task, taught = math.sqrt(gram.det_det), math.sqrt(gram.distill_distill)
    return taught / (task + taught)


@dataclass(frozen=True)
class LossWeights:
    """What the two losses are weighted with, for what both reach.

    share: the task's weight, 0..1, among the gradients of log losses. gram: theirs. task, taught: the same as weights
    of the losses themselves, the length of the step included.
    """

    det_weight: float
    gram: GramMatrix
    det_loss_scale: float
    distill_loss_scale: float

    def blend(self, distill_weight: float) -> "LossWeights":
        """For a teacher's loss that is scaled by `strength`, 0..1: the rest of the step is the task's gradient alone.

        The scale itself would change nothing: log losses don't hear it.
        """
        return replace(self, det_loss_scale=1 - distill_weight + distill_weight * self.det_loss_scale)

    @property
    def metrics(self) -> dict[str, float]:
        """To log: the angle's cosine (conflict), log10 of the lengths' ratio, task to taught (dominance), the share."""
        ratio = (
            0.5 * math.log10(self.gram.det_det / self.gram.distill_distill)
            if self.gram.det_det > 0 < self.gram.distill_distill
            else 0.0
        )
        return {"mokd_cosine": self.gram.cosine, "mokd_dominance": ratio, "mokd_share": self.det_weight}


def solve_loss_weights(config: MoKDConfig, gram: GramMatrix, det_loss: float, distill_loss: float) -> LossWeights:
    """The weights of two losses, whose values are `task` and `taught`, from the Gram matrix of their gradients.

    A gradient of nothing is in nobody's way: the losses are summed as they are.
    """
    by_task, by_taught = 1 / (det_loss + config.eps), 1 / (distill_loss + config.eps)
    logs = gram.scale(by_task, by_taught)
    if not (logs.det_det > 0 < logs.distill_distill):
        return LossWeights(0.5, logs, 1.0, 1.0)
    share = (min_norm_weight if config.solver == "min-norm" else bisector_weight)(logs)
    own, other = math.sqrt(logs.det_det), math.sqrt(logs.distill_distill)
    # The bisector is this long at 120 degrees; both rules' combinations are longer wherever the two don't disagree.
    least = own * other / (own + other)
    stretch = math.sqrt(gram.det_det) / max(logs.norm(share), least)
    return LossWeights(share, logs, stretch * share * by_task, stretch * (1 - share) * by_taught)
