"""Time of a training step with each solver of MoKD, compared with the plain sum of both losses.

    python benchmarks/studies/gradient_balancing_cost.py [--rounds 15]

One process and one thread train one student on one batch. A round takes one training step with every solver, in random
order, from the forward passes to the optimizer step. Ratios to the plain sum are taken within a round, because the
speed of the machine drifts. CPU time is measured, so that other programs have no effect. Writes
results/gradient_balancing_cost.md.
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

RESULT = Path(__file__).parents[1] / "results" / "gradient_balancing_cost.md"
BATCH, IMGSZ_HW, NUM_GT = 16, (160, 224), 3
SOLVERS: dict[str, MoKDConfig | None] = {
    "plain sum": None,
    "min-norm, parameters": MoKDConfig("min-norm"),
    "min-norm, feature": MoKDConfig("min-norm", gradient_level="feature"),
    "bisector, parameters": MoKDConfig("bisector"),
    "bisector, feature": MoKDConfig("bisector", gradient_level="feature"),
    "amortized": MoKDConfig("amortized"),
}


def main() -> None:
    """Measure all solvers and write the result page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    num_rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    steps = make_steps(*set_up())
    for step in steps.values():
        step()  # fills torch's caches
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    rng = random.Random(0)
    for _ in tqdm(range(num_rounds)):
        for name in rng.sample(list(steps), len(steps)):
            start_time = time.process_time()
            steps[name]()
            seconds[name].append(time.process_time() - start_time)
    page = format_page(seconds, num_rounds)
    write_text(RESULT, page)
    print(page)


def set_up() -> tuple[Distiller, torch.Tensor, Targets]:
    """Build mini-student and mini-teacher with random weights, and a batch of noise with random boxes.

    Returns:
        The distiller, images (uint8 Tensor[B, 3, H, W]) and targets.
    """
    torch.manual_seed(0)
    student = build_model("mini-student").to(memory_format=torch.channels_last)
    teacher = build_model("mini-teacher").to(memory_format=torch.channels_last)
    distiller = Distiller(student, teacher, build_methods({"hkd": HKDConfig()}, student, teacher)).train()
    images = torch.randint(0, 255, (BATCH, 3, *IMGSZ_HW), dtype=torch.uint8).to(memory_format=torch.channels_last)
    corners = torch.rand(BATCH, NUM_GT, 2) * torch.tensor([170.0, 80.0])
    boxes = torch.cat([corners, corners + torch.tensor([30.0, 75.0])], -1)
    valid = torch.ones(BATCH, NUM_GT, dtype=torch.bool)
    return distiller, images, Targets(boxes, valid, ~valid)


def make_steps(distiller: Distiller, images: torch.Tensor, targets: Targets) -> dict[str, Callable[[], None]]:
    """Return a training step per solver. All train the same student with learning rate 0.

    Args:
        distiller: Student, teacher and HKD.
        images (uint8 Tensor[B, 3, H, W]): The batch.
        targets: Its targets.
    """
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=0.0)

    def train_step(balancer: GradientBalancer) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            det_losses, distill_losses = distiller(images, targets, 1.0)
        optimizer.zero_grad(set_to_none=True)
        balancer.backward(sum_losses(det_losses), sum_losses(distill_losses), 1.0)
        nn.utils.clip_grad_norm_(distiller.parameters(), 10.0)
        optimizer.step()

    def make_step(config: MoKDConfig | None) -> Callable[[], None]:
        balancer: GradientBalancer = SumBalancer()
        if config is not None:
            method = MoKD(config, distiller.student, None)
            balancer = method.balancer(list(distiller.parameters()), lambda _tensors: None)
        return lambda: train_step(balancer)

    return {name: make_step(config) for name, config in SOLVERS.items()}


def format_page(seconds: dict[str, list[float]], num_rounds: int) -> str:
    """Return the Markdown page.

    Args:
        seconds: Seconds of every round by solver.
        num_rounds: Number of rounds.
    """
    host = {field.name: field.value for field in read_host_fields() if field.value}
    lines = [
        "# Cost of gradient balancing",
        "",
        "Time of one training step with each solver of MoKD, compared with the plain sum of detection and distillation "
        "loss.",
        "",
        f"```bash\npython benchmarks/studies/gradient_balancing_cost.py --rounds {num_rounds}\n```",
        "",
        f"mini-student with mini-teacher (HKD), batch {BATCH} at {IMGSZ_HW[1]}x{IMGSZ_HW[0]}, bf16, "
        f"torch {torch.__version__}, one thread; CPU time.",
        "",
        *(f"- {name}: {value}" for name, value in host.items()),
        "",
        "| solver, gradients | ms per step, median | ratio to the plain sum, median | quartiles of the ratio |",
        "| --- | --- | --- | --- |",
    ]
    for name, times in seconds.items():
        ratios = [time_s / plain_s for time_s, plain_s in zip(times, seconds["plain sum"], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        lines.append(f"| {name} | {1000 * median(times):.0f} | {median(ratios):.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
