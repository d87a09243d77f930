"""What a distilled step costs: against the student's step and the teacher's forward pass, each measured alone.

    python benchmarks/studies/distillation_cost.py [--rounds 15] [--only NAME] [--compile]    -> distillation_cost.md

A round measures, one after the other on the same batch: the student's step (forward, loss, backward, optimiser), the
teacher's forward pass as the distiller runs it (no gradients, bf16, channels last), and the step distilled by HKD, or
by CDD where a model is its own teacher. The ratio, third over the sum of the others, is that of one round, since the
machine's speed drifts; the table gives the median and the range. Weights are random; every picture holds three people,
and the teacher finds three, so that six regions a picture are compared. On the CPU one thread works and its own
processor time is what counts, which other programs hardly change. On a GPU it is the time on the wall, from idle to
idle.

CDD is measured where it costs most: while channels are chosen, galleries full (24,000 vectors a layer). It compares
people in every `look_every`-th step: a round takes all three as many times, and their means. The student's step is that
of the model without compactors. Before its galleries are full, and once its target is met, a step costs less; in short
runs, which compare more often, more.

`--compile` prints instead what `torch.compile` makes of the student's step and of the teacher's forward pass, and how
long it takes to.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor, nn

from hkd_bench.host import read_host_fields
from hkd_det.distill.base import RunContext
from hkd_det.distill.cdd.config import CDDConfig
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.distill.hkd import HKDConfig
from hkd_det.files import write_text
from hkd_det.letterbox import format_imgsz
from hkd_det.models.base import BaseDetector, Targets
from hkd_det.models.zoo import DEFAULT_TEACHER, build_model
from hkd_det.ops.losses import sum_losses

RESULT = Path(__file__).parent / "../results/distillation_cost.md"
ALLOWED = 1.10  # what a distilled step may cost, of student and teacher alone
PEOPLE = 3
COURSE, CHOOSING = 4000, 704  # steps of CDD's run, and the first measured: channels are chosen from 667 to 2667


@dataclass(frozen=True)
class Case:
    """A pair of models, its input size and its batch. Who has no teacher of its own is taught by itself, by CDD."""

    student: str
    imgsz_hw: tuple[int, int]
    batch: int

    @property
    def name(self) -> str:
        """As the table shows it."""
        by = "itself, cdd" if self.shrinks else self.teacher
        return f"{self.student} by {by}, {format_imgsz(self.imgsz_hw)}, batch {self.batch}"

    @property
    def teacher(self) -> str:
        """Its size's name."""
        return DEFAULT_TEACHER.get(self.student, self.student)

    @property
    def shrinks(self) -> bool:
        """Whether the method is CDD."""
        return self.teacher == self.student


CPU = [Case("mini-student", (160, 224), 16), Case("student-r18", (160, 224), 8), Case("mini-teacher", (160, 224), 16)]
CUDA = [Case(student, (512, 640), 32) for student in ("mini-student", "student-r18", "mini-teacher")]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="a student's name")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    lines = [
        f"| pair | device | student's step, ms | teacher's forward, ms | distilled, ms | ratio (allowed {ALLOWED}) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for device in devices:
        for case in CPU if device.type == "cpu" else CUDA:
            if arguments.only not in ("", case.student):
                continue
            if arguments.compile:
                print_compiled(case, device, arguments.rounds)
            else:
                lines.append(row(case, device, measure(case, device, arguments.rounds)))
                print(lines[-1], flush=True)
    if arguments.compile:
        return
    cpu = next(fact.value for fact in read_host_fields() if fact.name == "CPU")
    write_text(
        arguments.result,
        "# What a distilled step costs\n\n`python benchmarks/studies/distillation_cost.py`; its head says how. "
        f"Median of {arguments.rounds} rounds, ratios with their range. {cpu}, torch {torch.__version__}.\n\n"
        + "\n".join(lines)
        + "\n",
    )


def measure(case: Case, device: torch.device, rounds: int) -> list[tuple[float, ...]]:
    """Seconds of the student's step, the teacher's forward pass and the distilled step, a round each."""
    torch.manual_seed(0)
    pictures, truth = batch_of(case, device)
    teacher = placed(build_model(case.teacher), device)
    alone = Distiller(placed(build_model(case.student), device))
    student = placed(build_model(case.student), device)
    if case.shrinks:
        taught = shrinking(student, teacher, case, device)
    else:
        methods = {"hkd": HKDConfig(region_min_score=0.0, max_regions=PEOPLE)}
        taught = Distiller(student, teacher, build_methods(methods, student, teacher)).to(device)
    timed = timer(device)
    steps = (step_of(alone, pictures, truth), forward_of(teacher, pictures), step_of(taught, pictures, truth))
    for step in steps:  # memory is laid out, kernels are chosen
        step()
        step()
    times = taught.methods[0].pruner.schedule.compare_interval if case.shrinks else 1  # type: ignore[union-attr]
    return [
        tuple(mean(part) for part in zip(*([timed(step) for step in steps] for _ in range(times)), strict=True))
        for _ in range(rounds)
    ]


def shrinking(student: BaseDetector, teacher: BaseDetector, case: Case, device: torch.device) -> Distiller:
    """A student that begins as its teacher and sheds channels, its galleries full."""
    settings = CDDConfig()
    student.load_state_dict(teacher.state_dict())
    (method,) = build_methods({"cdd": settings}, student, teacher)
    method.setup(RunContext(case.student, imgsz_hw=case.imgsz_hw, total_steps=COURSE))
    distiller = Distiller(placed(student, device), teacher, [method]).to(device)
    for site, evidence in zip(method.losses.sites, method.losses.importance, strict=True):  # type: ignore[arg-type,union-attr]
        evidence.queue.add(torch.rand(settings.queue_size, len(site.compactor.masked), device=device))  # type: ignore[operator,union-attr]
    return distiller


def print_compiled(case: Case, device: torch.device, rounds: int) -> None:
    """Both parts as they are and compiled, in turns: medians, and the wall's seconds until the compiled is ready."""
    pictures, truth = batch_of(case, device)
    students = [Distiller(placed(build_model(case.student), device)) for _ in range(2)]
    teachers = [placed(build_model(case.teacher), device).eval().requires_grad_(False) for _ in range(2)]
    students[1].student.compile()
    teachers[1].compile()
    timed = timer(device)
    for what, plain, compiled in (
        ("student's step", *(step_of(learner, pictures, truth) for learner in students)),
        ("teacher's forward", *(forward_of(teacher, pictures) for teacher in teachers)),
    ):
        started = time.perf_counter()
        compiled()
        ready_s = time.perf_counter() - started
        for call in (plain, compiled):
            call()
        turns = [(timed(plain), timed(compiled)) for _ in range(rounds)]
        before, after = (1000 * median(times) for times in zip(*turns, strict=True))
        print(f"{case.name}, {what}: {before:.1f} ms, compiled {after:.1f} ms, after {ready_s:.0f} s", flush=True)


def row(case: Case, device: torch.device, seconds: list[tuple[float, ...]]) -> str:
    """The case as a line of the table."""
    ratios = [distilled / (student + teacher) for student, teacher, distilled in seconds]
    figures = " | ".join(f"{1000 * median(times):.1f}" for times in zip(*seconds, strict=True))
    spread = f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    return f"| {case.name} | {device.type} | {figures} | {spread} |"


def batch_of(case: Case, device: torch.device) -> tuple[Tensor, Targets]:
    """Pictures of noise and people a quarter to three quarters of their height."""
    height, width = case.imgsz_hw
    pictures = torch.randint(0, 256, (case.batch, 3, height, width), dtype=torch.uint8, device=device)
    tall = (0.25 + 0.5 * torch.rand(case.batch, PEOPLE, device=device)) * height
    wide = 0.41 * tall
    left = torch.rand(case.batch, PEOPLE, device=device) * (width - wide)
    top = torch.rand(case.batch, PEOPLE, device=device) * (height - tall)
    real = torch.ones(case.batch, PEOPLE, dtype=torch.bool, device=device)
    boxes = torch.stack([left, top, left + wide, top + tall], -1)
    return pictures.to(memory_format=torch.channels_last), Targets(boxes, real, ~real)


def placed(detector: BaseDetector, device: torch.device) -> BaseDetector:
    """On the device, as a run puts it there."""
    return detector.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def step_of(learner: Distiller, pictures: Tensor, truth: Targets) -> Callable[[], None]:
    """One step as a run makes it, at full strength where there is a teacher."""
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-4)
    learner.train()
    numbers = count(CHOOSING)

    def step() -> None:
        number = next(numbers)
        learner.before_step(number)
        with torch.autocast(pictures.device.type, torch.bfloat16):
            task, taught = learner(pictures, truth, 1.0)
        optimizer.zero_grad(set_to_none=True)
        sum_losses(task | taught).backward()
        learner.after_backward(number)
        nn.utils.clip_grad_norm_(learner.parameters(), 10.0)
        optimizer.step()
        learner.after_step()

    return step


def forward_of(teacher: nn.Module, pictures: Tensor) -> Callable[[], None]:
    """The teacher's part alone."""

    def forward() -> None:
        with torch.no_grad(), torch.autocast(pictures.device.type, torch.bfloat16):
            teacher(pictures)

    return forward


def timer(device: torch.device) -> Callable[[Callable[[], None]], float]:
    """Seconds of a call: on the CPU this process's own, on a GPU the wall's."""

    def on_cpu(call: Callable[[], None]) -> float:
        started = time.process_time()
        call()
        return time.process_time() - started

    def on_gpu(call: Callable[[], None]) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    return on_cpu if device.type == "cpu" else on_gpu


if __name__ == "__main__":
    main()
