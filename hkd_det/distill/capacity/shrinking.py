"""Shrinking: which channels a capacity-dynamic student sheds, when, and how they fade."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hkd_det.distill.capacity.compactor import can_shed, compact
from hkd_det.distill.capacity.evidence import Seen
from hkd_det.distill.capacity.folding import folded
from hkd_det.distill.capacity.lasso import faded, lasso, reset_gradient
from hkd_det.distill.capacity.ledger import Ledger, deployed_layers
from hkd_det.distill.capacity.settings import CapacityDynamic
from hkd_det.distill.capacity.terms import CapacityTerms
from hkd_det.errors import UsageError
from hkd_det.models.family import PersonDetector
from hkd_det.models.sizes import Cost

Everyones = Callable[[list[tuple[Tensor, Tensor]]], list[list[tuple[Tensor, Tensor]]]]
"""One process's vectors to those of all processes, the same in each."""
LOOKS = 32  # comparisons at least, of which channels are chosen by; fewer if there are fewer steps


@dataclass(frozen=True)
class Course:
    """The schedule in shares of all steps: no masking before `start`, all masked at `end`, all faded at `gone`.

    every: steps from one comparison to the next: the settings', fewer where a short run would choose by less than
    `LOOKS` of them.
    """

    steps: int
    start: float
    end: float
    gone: float
    every: int = 1

    @classmethod
    def of(cls, settings: CapacityDynamic, steps: int, taught: float) -> "Course":
        """Of a run whose teacher teaches for a share `taught` of its steps; UsageError if that is too short."""
        end = settings.masked_by * taught
        if settings.warmup >= end:
            raise UsageError(
                f"distill.cdd: the teacher teaches for {100 * taught:.0f} % of this run, too short for channels to be "
                f"chosen after warmup={settings.warmup:.2f}; a smaller finale, or more epochs"
            )
        every = min(settings.look_every, max(1, int((end - settings.warmup) * steps) // LOOKS))
        return cls(steps, settings.warmup, end, min(1.0, end + settings.fade), every)

    def surplus(self, progress: float) -> float:
        """1 .. 0: the part of what is to be shed that may still be there."""
        return 1 - min(1.0, max(0.0, (progress - self.start) / (self.end - self.start)))

    def compares(self, step: int) -> bool:
        """Whether step 0 .. steps - 1 is one of comparison, if anything is left to choose: a resumed run's, too."""
        return step % self.every == 0 or (step + 1) / self.steps >= self.end


def begin(detector: PersonDetector, settings: CapacityDynamic, imgsz_hw: tuple[int, int], name: str) -> Ledger:
    """Put compactors into the detector, in place; UsageError if its layers hold too little for the target."""
    layers = deployed_layers(detector, can_shed(detector), imgsz_hw)
    if not layers:
        raise UsageError(f"--distill cdd: {name} has no layer inside a block whose channels could be taken out")
    ledger = Ledger(detector, layers, imgsz_hw)
    least = ledger.cost([min(width, settings.least) for width in ledger.widths])
    for what in ("flops", "parameters"):
        asked, held = getattr(settings, f"keep_{what}"), getattr(least, what) / getattr(ledger.start, what)
        if held > asked:
            raise UsageError(
                f"distill.cdd.keep_{what}={asked:g}: the channels inside {name}'s blocks hold too little, at least "
                f"{held:.3f} of its {what} stay; ask for more than that"
            )
    compact(detector, layers)
    return ledger


class Shrinking:
    """Steers the student's compactors between the backward pass and the optimizer's step, and after it.

    All that it remembers lies in the compactors and in `terms`, so that it is saved with them.
    """

    def __init__(
        self, terms: CapacityTerms, ledger: Ledger, settings: CapacityDynamic, course: Course, everyones: Everyones
    ) -> None:
        self.terms, self.ledger, self.settings, self.course = terms, ledger, settings, course
        self.compactors = [site.compactor for site in terms.sites]
        self._everyones = everyones
        self._before: list[Tensor] = []
        self._progress = 0.0

    @property
    def cost(self) -> Cost:
        """Of the student without its masked channels."""
        return self.ledger.cost([int((~compactor.masked).sum()) for compactor in self.compactors])

    @property
    def met(self) -> bool:
        """Whether the target is reached and all that is masked has faded, so that folding changes nothing."""
        return self._within(0.0) and all(compactor.gone for compactor in self.compactors)

    def before_forward(self, step: int) -> None:
        """Say whether the lesson of step 0 .. steps - 1 is to show what channels are chosen by."""
        self.terms.looks = self.course.compares(step) and not self._within(0.0)

    @torch.no_grad()
    def after_backward(self, step: int) -> dict[str, float]:
        """Choose channels, if this step shows them, and reset gradients; the lasso's value comes back."""
        self._progress = (step + 1) / self.course.steps
        if self.terms.looks:
            unanimous = self._look()
            surplus = self.course.surplus(self._progress)
            if self._progress > self.course.start and not self._within(surplus):
                self._mask(unanimous, surplus)
        for compactor in self.compactors:
            gradient = compactor.weight.grad
            if gradient is not None:
                rows = compactor.rows
                reset = reset_gradient(gradient.flatten(1), rows, compactor.masked, self.settings.lasso)
                gradient.copy_(reset.view_as(gradient))
        self._before = [compactor.rows.clone() for compactor in self.compactors]
        total = torch.stack([lasso(rows) for rows in self._before]).sum()
        return {"cdd_lasso": self.settings.lasso * float(total)}

    @torch.no_grad()
    def after_step(self) -> None:
        """Put masked rows where the lasso alone takes them, whatever the optimizer remembers of earlier gradients."""
        force = 1 / max(1.0, self.settings.fade * self.course.steps)
        if self._progress >= self.course.gone:
            force = float("inf")
        for compactor, before in zip(self.compactors, self._before, strict=True):
            masked = compactor.masked[:, None]
            rows = torch.where(masked, faded(before, force), compactor.rows)
            compactor.weight.copy_(rows.view_as(compactor.weight))

    def deployed(self, detector: PersonDetector) -> PersonDetector:
        """The plain network that the student, or its moving average, has become."""
        return folded(detector)

    def told(self) -> str:
        """What was shed, in a line."""
        before, after = self.ledger.start, self.cost
        return (
            f"; shed: {before.parameters / 1e6:.2f} M to {after.parameters / 1e6:.2f} M parameters, "
            f"{before.flops / 1e9:.2f} to {after.flops / 1e9:.2f} GFLOPs ({100 * after.flops / before.flops:.1f} %)"
        )

    def _look(self) -> list[Tensor]:
        """For each layer [C] bool, what all people of the batch agree on; each process looks at everybody's people."""
        batches = self._everyones([(seen.teacher, seen.student) for seen in self.terms.seen])
        unanimous = []
        for layer, compactor in enumerate(self.compactors):
            parts = [batch[layer] for batch in batches if batch]
            agreed = torch.zeros_like(compactor.masked)
            if parts:
                device = agreed.device
                teacher, student = (torch.cat([part[who].to(device) for part in parts]) for who in (0, 1))
                agreed = self.terms.weigh(layer, Seen(teacher, student))
            unanimous.append(agreed)
        return unanimous

    def _mask(self, unanimous: list[Tensor], surplus: float) -> None:
        """Mask until the course is kept: first those that all agree on, then those of least relative response."""
        masks = [compactor.masked.cpu() for compactor in self.compactors]
        widths = [int((~mask).sum()) for mask in masks]
        for layer, channel in self._order(unanimous):
            if self._keeps(self.ledger.cost(widths), surplus):
                break
            if widths[layer] > self.settings.least:
                masks[layer][channel] = True
                widths[layer] -= 1
        for compactor, mask in zip(self.compactors, masks, strict=True):
            compactor.masked.copy_(mask)

    def _order(self, unanimous: list[Tensor]) -> list[tuple[int, int]]:
        """Layer and channel of all that are not masked, in the order in which they may go."""
        ranked = []
        for layer, (compactor, agreed) in enumerate(zip(self.compactors, unanimous, strict=True)):
            # As lists at once: number by number, a GPU would be waited for thousands of times a step.
            columns = (values.tolist() for values in (compactor.masked, agreed, self.terms.relative(layer)))
            ranked += [
                (not unneeded, response, layer, channel)
                for channel, (masked, unneeded, response) in enumerate(zip(*columns, strict=True))
                if not masked
            ]
        return [(layer, channel) for _, _, layer, channel in sorted(ranked)]

    def _within(self, surplus: float) -> bool:
        return self._keeps(self.cost, surplus)

    def _keeps(self, cost: Cost, surplus: float) -> bool:
        """Whether a cost is down to the target and the given part of what was above it."""
        start, settings = self.ledger.start, self.settings
        return all(
            now <= (keep + (1 - keep) * surplus) * whole
            for now, keep, whole in (
                (cost.flops, settings.keep_flops, start.flops),
                (cost.parameters, settings.keep_parameters, start.parameters),
            )
        )
