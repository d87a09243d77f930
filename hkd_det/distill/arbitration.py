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
class Arbitration:
    """How the two gradients become one step.

    rule: "bisector" of their directions; "min-norm", the shortest convex combination, which serves both equally, and
    so mostly the one with the shorter gradient; "amortised", weights learnt from the losses alone. at: what gradients
    are compared on, all shared "parameters" or the "feature" maps at the taps (the amortised rule compares none). eps:
    keeps the log's gradient finite near a loss of 0. rate, decay: of the amortised rule's logits.
    """

    rule: Literal["bisector", "min-norm", "amortised"] = "bisector"
    at: Literal["parameters", "feature"] = "parameters"
    eps: float = 1e-3
    rate: float = 0.025
    decay: float = 0.01

    def __post_init__(self) -> None:
        if self.eps <= 0 or self.rate < 0 or self.decay < 0:
            raise UsageError("mokd: eps is positive, rate and decay are not negative")
        if self.rule == "amortised" and self.at == "feature":
            raise UsageError("mokd: the amortised rule compares no gradients: leave distill.mokd.at out")
        if self.rule != "amortised" and (self.rate, self.decay) != (Arbitration.rate, Arbitration.decay):
            raise UsageError(f"mokd: rate and decay are the amortised rule's; {self.rule} learns no shares")


@dataclass(frozen=True)
class Gram:
    """Inner products of two gradients g: <g_task, g_task>, <g_task, g_taught>, <g_taught, g_taught>."""

    task: float
    both: float
    taught: float

    @property
    def cosine(self) -> float:
        """Of the angle between them, -1 where they are opposed; 0 if one is nothing."""
        return self.both / math.sqrt(self.task * self.taught) if self.task > 0 < self.taught else 0.0

    def scaled(self, task: float, taught: float) -> "Gram":
        """Of the gradients times these factors."""
        return Gram(self.task * task**2, self.both * task * taught, self.taught * taught**2)

    def length(self, share: float) -> float:
        """Of share x g_task + (1 - share) x g_taught."""
        rest = 1 - share
        squared = share**2 * self.task + 2 * share * rest * self.both + rest**2 * self.taught
        return math.sqrt(max(0.0, squared))


def min_norm_share(gram: Gram) -> float:
    """The task's weight, 0..1, in the shortest convex combination of both gradients.

    pi = (g22 - g12) / (g11 + g22 - 2 g12), clipped to [0, 1]: inside, the combination has equal inner products with
    both (MGDA: Desideri 2012). 0.5 for two equal gradients, where every weight gives the same.
    """
    apart = gram.task + gram.taught - 2 * gram.both
    if apart <= 0:
        return 0.5
    return min(1.0, max(0.0, (gram.taught - gram.both) / apart))


def bisector_share(gram: Gram) -> float:
    """The task's weight at which the convex combination halves the angle between both gradients.

    Each has the other's length as its weight: |g2| / (|g1| + |g2|).
    """
    task, taught = math.sqrt(gram.task), math.sqrt(gram.taught)
    return taught / (task + taught)


@dataclass(frozen=True)
class Verdict:
    """What the two losses are weighted with, for what both reach.

    share: the task's weight, 0..1, among the gradients of log losses. gram: theirs. task, taught: the same as weights
    of the losses themselves, the length of the step included.
    """

    share: float
    gram: Gram
    task: float
    taught: float

    def faded(self, strength: float) -> "Verdict":
        """For a teacher's loss that is scaled by `strength`, 0..1: the rest of the step is the task's gradient alone.

        The scale itself would change nothing: log losses don't hear it.
        """
        return replace(self, task=1 - strength + strength * self.task)

    @property
    def figures(self) -> dict[str, float]:
        """To log: the angle's cosine (conflict), log10 of the lengths' ratio, task to taught (dominance), the share."""
        ratio = 0.5 * math.log10(self.gram.task / self.gram.taught) if self.gram.task > 0 < self.gram.taught else 0.0
        return {"mokd_cosine": self.gram.cosine, "mokd_dominance": ratio, "mokd_share": self.share}


def judge(settings: Arbitration, gram: Gram, task: float, taught: float) -> Verdict:
    """The weights of two losses, whose values are `task` and `taught`, from the Gram matrix of their gradients.

    A gradient of nothing is in nobody's way: the losses are summed as they are.
    """
    by_task, by_taught = 1 / (task + settings.eps), 1 / (taught + settings.eps)
    logs = gram.scaled(by_task, by_taught)
    if not (logs.task > 0 < logs.taught):
        return Verdict(0.5, logs, 1.0, 1.0)
    share = (min_norm_share if settings.rule == "min-norm" else bisector_share)(logs)
    own, other = math.sqrt(logs.task), math.sqrt(logs.taught)
    # The bisector is this long at 120 degrees; both rules' combinations are longer wherever the two don't disagree.
    least = own * other / (own + other)
    stretch = math.sqrt(gram.task) / max(logs.length(share), least)
    return Verdict(share, logs, stretch * share * by_task, stretch * (1 - share) * by_taught)
