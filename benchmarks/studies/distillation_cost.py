"""Time of a distilled training step, compared with the student's step plus the teacher's forward pass.

    python benchmarks/studies/distillation_cost.py [--rounds 15] [--only NAME] [--compile]

A round measures three parts in sequence on the same batch:

1. the student's step (forward, loss, backward, optimizer),
2. the teacher's forward pass (no gradients, bf16, channels last),
3. the step distilled with HKD, or with CDD for a model that is its own teacher.

The ratio of the third to the sum of the others is taken within a round, because the speed of the machine drifts. The
table gives its median and range. Weights are random. Every image contains three
persons, and the teacher detects three, so six regions per image are compared. On the CPU one thread runs and its CPU
time is measured, so that other programs have little effect. On a GPU the wall time between two synchronizations is
measured.

CDD is measured in the phase that costs most: channels are being selected and the feature queues are full (24,000
vectors per layer). It compares channels every `compare_interval` steps, so a round takes the mean of that many steps.
The student's step is that of the model without compactors. A step costs less before the queues are full and after the
target is met. It costs more in short runs, which compare more often.

--compile prints the effect and the compile time of `torch.compile` for the student's step and the teacher's forward
pass instead. Writes results/distillation_cost.md.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from hkd_bench.host import read_host_fields
from hkd_det.distill.base import RunContext
from hkd_det.distill.cdd.losses import CDDConfig
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.distill.hkd import HKDConfig
from hkd_det.files import write_text
from hkd_det.letterbox import format_imgsz
from hkd_det.models.base import BaseDetector, Targets
from hkd_det.models.zoo import DEFAULT_TEACHER, build_model
from hkd_det.ops.losses import sum_losses

RESULT = Path(__file__).parents[1] / "results" / "distillation_cost.md"
MAX_RATIO = 1.10  # limit of a distilled step relative to the sum of its parts
NUM_GT = 3
# Steps of the CDD run, and the first measured step: channels are selected from step 667 to 2667.
CDD_STEPS, CDD_FIRST_STEP = 4000, 704


@dataclass(frozen=True)
class Case:
    """A student with its default teacher, or with itself as teacher (CDD).

    Attributes:
        student: Model name of the student.
        imgsz_hw: Input height and width, pixels.
        batch: Batch size.
    """

    student: str
    imgsz_hw: tuple[int, int]
    batch: int

    @property
    def name(self) -> str:
        """Name in the table."""
        teacher = "itself, CDD" if self.is_cdd else self.teacher
        return f"{self.student} with {teacher}, {format_imgsz(self.imgsz_hw)}, batch {self.batch}"

    @property
    def teacher(self) -> str:
        """Model name of the teacher."""
        return DEFAULT_TEACHER.get(self.student, self.student)

    @property
    def is_cdd(self) -> bool:
        """Whether the method is CDD."""
        return self.teacher == self.student


CPU = [Case("mini-student", (160, 224), 16), Case("student-r18", (160, 224), 8), Case("mini-teacher", (160, 224), 16)]
CUDA = [Case(student, (512, 640), 32) for student in ("mini-student", "student-r18", "mini-teacher")]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all cases, print them and write the result page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--only", default="", help="model name of one student")
    parser.add_argument("--compile", action="store_true", help="print the effect of torch.compile instead")
    parser.add_argument("--result", type=Path, default=RESULT, help="file of the result page")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    lines = [
        "| models | device | student step, ms | teacher forward, ms | distilled step, ms "
        f"| ratio (limit {MAX_RATIO}) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for device in devices:
        for case in CPU if device.type == "cpu" else CUDA:
            if arguments.only not in ("", case.student):
                continue
            if arguments.compile:
                print_compiled(case, device, arguments.rounds)
            else:
                lines.append(format_row(case, device, measure(case, device, arguments.rounds)))
                print(lines[-1], flush=True)
    if arguments.compile:
        return
    cpu = next(field.value for field in read_host_fields() if field.name == "CPU")
    introduction = (
        "# Cost of a distilled training step\n\nTime of a distilled step compared with the sum of the student's step "
        "and the teacher's forward pass.\n\n```bash\npython benchmarks/studies/distillation_cost.py\n```\n\n"
        f"{cpu}, one thread, torch {torch.__version__}. Median of {arguments.rounds} rounds, with the range of "
        "the ratio."
    )
    write_text(arguments.result, introduction + "\n\n" + "\n".join(lines) + "\n")


def measure(case: Case, device: torch.device, rounds: int) -> list[tuple[float, ...]]:
    """Measure the student's step, the teacher's forward pass and the distilled step.

    Args:
        case: The models.
        device: Device to run on.
        rounds: Number of rounds.

    Returns:
        Seconds of the three parts, one tuple per round.
    """
    torch.manual_seed(0)
    images, targets = make_batch(case, device)
    teacher = prepare_model(build_model(case.teacher), device)
    baseline = Distiller(prepare_model(build_model(case.student), device))
    student = prepare_model(build_model(case.student), device)
    num_steps = 1
    if case.is_cdd:
        distiller, num_steps = build_cdd(student, teacher, case, device)
    else:
        methods = {"hkd": HKDConfig(region_min_score=0.0, max_regions=NUM_GT)}
        distiller = Distiller(student, teacher, build_methods(methods, student, teacher)).to(device)
    timer = make_timer(device)
    parts = (
        make_step(baseline, images, targets),
        make_forward(teacher, images),
        make_step(distiller, images, targets),
    )
    for part in parts:  # allocates memory and selects kernels
        part()
        part()
    return [
        tuple(
            mean(seconds) for seconds in zip(*([timer(part) for part in parts] for _ in range(num_steps)), strict=True)
        )
        for _ in range(rounds)
    ]


def build_cdd(student: BaseDetector, teacher: BaseDetector, case: Case, device: torch.device) -> tuple[Distiller, int]:
    """Build a CDD student that starts as its teacher, with full feature queues.

    Args:
        student: The student.
        teacher: The teacher.
        case: The models.
        device: Device to run on.

    Returns:
        The distiller, and the number of steps from one comparison to the next.
    """
    config = CDDConfig()
    student.load_state_dict(teacher.state_dict())
    methods = build_methods({"cdd": config}, student, teacher)
    method: Any = methods[0]
    method.setup(RunContext(case.student, imgsz_hw=case.imgsz_hw, total_steps=CDD_STEPS))
    distiller = Distiller(prepare_model(student, device), teacher, methods).to(device)
    for site, importance in zip(method.losses.sites, method.losses.importance, strict=True):
        importance.queue.add(torch.rand(config.queue_size, len(site.compactor.masked), device=device))
    return distiller, method.pruner.schedule.compare_interval


def print_compiled(case: Case, device: torch.device, rounds: int) -> None:
    """Print the medians of eager and compiled parts, measured alternately, and the compile time.

    Args:
        case: The models.
        device: Device to run on.
        rounds: Number of rounds.
    """
    images, targets = make_batch(case, device)
    students = [Distiller(prepare_model(build_model(case.student), device)) for _ in range(2)]
    teachers = [prepare_model(build_model(case.teacher), device).eval().requires_grad_(False) for _ in range(2)]
    students[1].student.compile()
    teachers[1].compile()
    timer = make_timer(device)
    for name, eager, compiled in (
        ("student step", *(make_step(distiller, images, targets) for distiller in students)),
        ("teacher forward", *(make_forward(teacher, images) for teacher in teachers)),
    ):
        start_time = time.perf_counter()
        compiled()
        compile_s = time.perf_counter() - start_time
        for part in (eager, compiled):
            part()
        seconds = [(timer(eager), timer(compiled)) for _ in range(rounds)]
        before, after = (1000 * median(times) for times in zip(*seconds, strict=True))
        print(f"{case.name}, {name}: {before:.1f} ms, compiled {after:.1f} ms, after {compile_s:.0f} s", flush=True)


def format_row(case: Case, device: torch.device, seconds: list[tuple[float, ...]]) -> str:
    """Return the row of a case in the table.

    Args:
        case: The models.
        device: Device of the measurement.
        seconds: Result of `measure`.
    """
    ratios = [distilled / (student + teacher) for student, teacher, distilled in seconds]
    medians = " | ".join(f"{1000 * median(times):.1f}" for times in zip(*seconds, strict=True))
    ratio = f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    return f"| {case.name} | {device.type} | {medians} | {ratio} |"


def make_batch(case: Case, device: torch.device) -> tuple[Tensor, Targets]:
    """Return images of noise, and boxes of a quarter to three quarters of the image height.

    Args:
        case: Size and batch.
        device: Device of the tensors.
    """
    height, width = case.imgsz_hw
    images = torch.randint(0, 256, (case.batch, 3, height, width), dtype=torch.uint8, device=device)
    box_height = (0.25 + 0.5 * torch.rand(case.batch, NUM_GT, device=device)) * height
    box_width = 0.41 * box_height
    left = torch.rand(case.batch, NUM_GT, device=device) * (width - box_width)
    top = torch.rand(case.batch, NUM_GT, device=device) * (height - box_height)
    valid = torch.ones(case.batch, NUM_GT, dtype=torch.bool, device=device)
    boxes = torch.stack([left, top, left + box_width, top + box_height], -1)
    return images.to(memory_format=torch.channels_last), Targets(boxes, valid, ~valid)


def prepare_model(detector: BaseDetector, device: torch.device) -> BaseDetector:
    """Move a detector to the device in channels-last format, as the trainer does.

    Args:
        detector: The detector.
        device: Device to run on.
    """
    return detector.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs


def make_step(distiller: Distiller, images: Tensor, targets: Targets) -> Callable[[], None]:
    """Return a training step with full distillation weight.

    Args:
        distiller: The student, with or without teacher.
        images (uint8 Tensor[B, 3, H, W]): The batch.
        targets: Its targets.
    """
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-4)
    distiller.train()
    step_numbers = count(CDD_FIRST_STEP)

    def train_step() -> None:
        step = next(step_numbers)
        distiller.before_step(step)
        with torch.autocast(images.device.type, torch.bfloat16):
            det_losses, distill_losses = distiller(images, targets, 1.0)
        optimizer.zero_grad(set_to_none=True)
        sum_losses(det_losses | distill_losses).backward()
        distiller.after_backward(step)
        nn.utils.clip_grad_norm_(distiller.parameters(), 10.0)
        optimizer.step()
        distiller.after_step()

    return train_step


def make_forward(teacher: nn.Module, images: Tensor) -> Callable[[], None]:
    """Return the teacher's forward pass.

    Args:
        teacher: The teacher.
        images (uint8 Tensor[B, 3, H, W]): The batch.
    """

    def forward() -> None:
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
            teacher(images)

    return forward


def make_timer(device: torch.device) -> Callable[[Callable[[], None]], float]:
    """Return a function that measures the seconds of a call: CPU time of the process, or wall time on a GPU.

    Args:
        device: Device of the measured code.
    """

    def measure_cpu(call: Callable[[], None]) -> float:
        start_time = time.process_time()
        call()
        return time.process_time() - start_time

    def measure_gpu(call: Callable[[], None]) -> float:
        torch.cuda.synchronize()
        start_time = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start_time

    return measure_cpu if device.type == "cpu" else measure_gpu


if __name__ == "__main__":
    main()
