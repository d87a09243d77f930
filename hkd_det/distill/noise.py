"""Noisy teacher (Sau and Balasubramanian 2016): a teacher that errs a little, differently each time.

Two forms: a term of its own, in which the student regresses the noisy logits (`noisy_logits.py`), as published; or
noise on what another method learns from.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hkd_det.errors import UsageError
from hkd_det.losses.soft_score import CERTAIN
from hkd_det.models.output import Output
from hkd_det.models.prediction import Branch, Found, RegionAnswer, TwoStage


@dataclass(frozen=True)
class Noise:
    """z' = (1 + xi) z, xi ~ N(0, sigma^2), for a picture with probability alpha.

    form: "l2", the published term, alone or beside other methods; or "targets": what another method sees is noisy.
    weight: of the l2 term. foreground: share of that term's weight that lies on people, 0..1.
    each: one xi for every logit (None of the paper's text settles it), or one for a whole picture ("sample").
    features: form targets only: the same on the tapped maps, with this sigma; 0 leaves them as they are.
    """

    form: Literal["l2", "targets"] = "l2"
    weight: float = 0.1
    foreground: float = 0.5
    alpha: float = 0.5
    sigma: float = 0.3
    each: Literal["logit", "sample"] = "logit"
    features: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.sigma < 0 or self.features < 0:
            raise UsageError("noise: alpha is a probability, 0..1; sigma and features are not negative")
        if not 0 <= self.foreground <= 1 or self.weight < 0:
            raise UsageError("noise: foreground is a share, 0..1; weight is not negative")
        if self.features and self.form == "l2":
            raise UsageError("noise.features: the form l2 compares logits alone; noisy maps need noise.form=targets")
        if self.form == "targets" and (self.weight, self.foreground) != (Noise.weight, Noise.foreground):
            raise UsageError("noise: weight and foreground are the form l2's; form=targets has no term of its own")


class NoisyTeacher:
    """Perturbs what a teacher says and shows; whoever learns from it sees the perturbed form."""

    def __init__(self, noise: Noise) -> None:
        self.noise = noise

    def output(self, output: Output) -> Output:
        """Noisy score logits of a dense teacher, noisy scores of a black box.

        A two-stage teacher's output stays as it is: its logit level is in `regions`, and in `found`.
        """
        if isinstance(output, TwoStage):
            return output
        if isinstance(output, Found):
            return self.found(output)
        one = self._branch(output.one) if output.one else None
        return replace(output, many=self._branch(output.many), one=one)

    def found(self, found: Found) -> Found:
        """Finished detections whose scores' logits are perturbed."""
        logits = (scores.logit(eps=CERTAIN)[None] for scores in found.scores)
        return replace(found, scores=tuple(self._noisy(one, self.noise.sigma)[0].sigmoid() for one in logits))

    def regions(self, answer: RegionAnswer) -> RegionAnswer:
        """A two-stage teacher's logit level, region by region: there a sample is a region, not a picture."""
        pooled = self._noisy(answer.pooled, self.noise.features) if self.noise.features else answer.pooled
        return replace(answer, pooled=pooled, embedding=self.logits(answer.embedding))

    def maps(self, maps: list[Tensor]) -> list[Tensor]:
        """The tapped maps [B, C, H, W]."""
        return [self._noisy(level, self.noise.features) for level in maps] if self.noise.features else maps

    def logits(self, logits: Tensor) -> Tensor:
        """Logits [B, ...], the first axis counting samples: pictures, or regions of two-stage detectors."""
        return self._noisy(logits, self.noise.sigma)

    def _branch(self, branch: Branch) -> Branch:
        return replace(branch, logits=self.logits(branch.logits))

    def _noisy(self, values: Tensor, sigma: float) -> Tensor:
        """[B, ...]: each sample tosses its own coin."""
        rest = [1] * (values.ndim - 1)
        shape = values.shape if self.noise.each == "logit" else (len(values), *rest)
        factor = 1 + sigma * torch.randn(shape, device=values.device, dtype=values.dtype)
        chosen = torch.rand(len(values), *rest, device=values.device) < self.noise.alpha
        return torch.where(chosen, factor * values, values)
