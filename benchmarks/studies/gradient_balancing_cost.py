"""What an arbitrated step costs: each rule against the plain sum of both losses.

    python benchmarks/studies/arbitration_cost.py [--rounds 15]     writes results/arbitration_cost.md

One process, one thread, one student, one batch: each round takes one training step by every rule, in an order drawn
anew, from the forward passes to the optimiser's step. The table gives medians of a rule's time as a multiple of the
plain sum's in the same round, so that a machine whose speed drifts does not decide; it is the processor's time, so that
other programs do not either.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import nn
from tqdm import tqdm

from hkd_bench.host import read_host_fields
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.distill.gradients import GradientBalancer, SumBalancer
from hkd_det.distill.hkd import HKDConfig
from hkd_det.distill.mokd import MoKD, MoKDConfig
from hkd_det.files import write_text
from hkd_det.models.base import Targets
from hkd_det.models.zoo import build_model
from hkd_det.ops.losses import sum_losses

HERE = Path(__file__).parent
RESULT = HERE / "../results/arbitration_cost.md"
BATCH, IMGSZ_HW, PEOPLE = 16, (160, 224), 3
RULES: dict[str, MoKDConfig | None] = {
    "plain sum": None,
    "min-norm, parameters": MoKDConfig("min-norm"),
    "min-norm, feature": MoKDConfig("min-norm", gradient_level="feature"),
    "bisector, parameters": MoKDConfig("bisector"),
    "bisector, feature": MoKDConfig("bisector", gradient_level="feature"),
    "amortised": MoKDConfig("amortised"),
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    steps = steps_of(*setup())
    for step in steps.values():
        step()  # fills torch's caches
    taken_s: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for _ in tqdm(range(rounds)):
        for name in order.sample(list(steps), len(steps)):
            started = time.process_time()
            steps[name]()
            taken_s[name].append(time.process_time() - started)
    text = report(taken_s, rounds)
    write_text(RESULT, text)
    print(text)


def setup() -> tuple[Distiller, torch.Tensor, Targets]:
    """mini-student under mini-teacher, fresh weights, and one batch of noise with people in it."""
    torch.manual_seed(0)
    student = build_model("mini-student").to(memory_format=torch.channels_last)
    teacher = build_model("mini-teacher").to(memory_format=torch.channels_last)
    learner = Distiller(student, teacher, build_methods({"hkd": HKDConfig()}, student, teacher)).train()
    pictures = torch.randint(0, 255, (BATCH, 3, *IMGSZ_HW), dtype=torch.uint8).to(memory_format=torch.channels_last)
    corners = torch.rand(BATCH, PEOPLE, 2) * torch.tensor([170.0, 80.0])
    boxes = torch.cat([corners, corners + torch.tensor([30.0, 75.0])], -1)
    flags = torch.ones(BATCH, PEOPLE, dtype=torch.bool)
    return learner, pictures, Targets(boxes, flags, ~flags)


def steps_of(learner: Distiller, pictures: torch.Tensor, truth: Targets) -> dict[str, Callable[[], None]]:
    """A training step by each rule; all learn on the same student, at a rate of nothing."""
    optimizer = torch.optim.AdamW(learner.parameters(), lr=0.0)

    def step(arbiter: GradientBalancer) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            task, taught = learner(pictures, truth, 1.0)
        optimizer.zero_grad(set_to_none=True)
        arbiter.backward(sum_losses(task), sum_losses(taught), 1.0)
        nn.utils.clip_grad_norm_(learner.parameters(), 10.0)
        optimizer.step()

    def made(settings: MoKDConfig | None) -> Callable[[], None]:
        parameters, method = list(learner.parameters()), MoKD(settings, learner.student, None) if settings else None
        arbiter = method.balancer(parameters, lambda _tensors: None) if method else SumBalancer()
        return lambda: step(arbiter)

    return {name: made(settings) for name, settings in RULES.items()}


def report(taken_s: dict[str, list[float]], rounds: int) -> str:
    """The result as Markdown."""
    facts = {fact.name: fact.value for fact in read_host_fields() if fact.value}
    lines = [
        "# What an arbitrated step costs",
        "",
        f"`python benchmarks/studies/arbitration_cost.py --rounds {rounds}`: mini-student under mini-teacher (HKD), "
        f"batch {BATCH} at {IMGSZ_HW[1]}x{IMGSZ_HW[0]}, bf16, torch {torch.__version__}, "
        "one thread; processor time.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        "| rule | ms a step, median | of the plain sum, median | middle half |",
        "| --- | --- | --- | --- |",
    ]
    for name, times in taken_s.items():
        ratios = [mine / plain for mine, plain in zip(times, taken_s["plain sum"], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        lines.append(f"| {name} | {1000 * median(times):.0f} | {median(ratios):.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
