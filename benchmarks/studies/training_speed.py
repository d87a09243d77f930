"""Where the time of training goes: shares of the parts of a step, and of loading and validation, for each model.

    python benchmarks/studies/training_speed.py --data DATA.yaml [--models A,B] [--images 32] [--rounds 3]

Each model trains with the defaults of `hkd-train` on images of the split `train` (loading in the same process, image
cache filled), and then detects people in the same images as in a validation. One CPU thread runs and its CPU time is
measured, so that other programs have little effect. On a GPU the wall time between two synchronizations is measured.
A part contains no other part: `losses` is the time of the losses without the assignment of anchor points.

The last column is the share of convolutions, forward and backward, in the time of all operators of a training step, by
torch.profiler. Writes results/training_speed.md.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from hkd_bench.host import read_host_fields
from hkd_det.datasets import Sample
from hkd_det.datasets.catalog import load_dataset
from hkd_det.distill.base import RunContext
from hkd_det.files import write_text
from hkd_det.letterbox import format_imgsz, parse_imgsz
from hkd_det.models.criterion import TaskAlignedAssigner
from hkd_det.train import engine
from hkd_det.train.config import TrainConfig
from hkd_det.train.context import DistributedContext, make_epoch_plan
from hkd_det.train.trainer import Trainer

RESULT = Path(__file__).parents[1] / "results" / "training_speed.md"
MODELS = "mini-student,mini-teacher,student-r18,yolox-nano-hswish"
PARTS = ("loading", "forward", "assignment", "losses", "backward", "clipping", "optimizer", "EMA", "other")
LARGE_SHARE = 0.1  # of a step; a larger part that is no convolution is marked


class PartTimer:
    """Adds up the time of parts of a program. Time in a part that another part calls counts for the inner one only.

    Args:
        read_s: Clock in seconds.

    Attributes:
        seconds: Part -> seconds.
    """

    def __init__(self, read_s: Callable[[], float]) -> None:
        self._read_s = read_s
        self._stack: list[str] = []
        self._since_s = 0.0
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count the time of the block for a part.

        Args:
            part: Name of the part.
        """
        self._count()
        self._stack.append(part)
        try:
            yield
        finally:
            self._count()
            self._stack.pop()

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function with the time of its calls counted.

        Args:
            part: Name of the part.
            function: The function.
        """

        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.measure(part):
                return function(*args, **kwargs)

        return measured

    def wrap_iterator(self, part: str, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """Return a function that iterates, with the time of each item counted.

        Args:
            part: Name of the part.
            function: Returns an iterator.
        """

        def measured(*args: Any) -> Iterator[Any]:
            items = function(*args)
            while True:
                with self.measure(part):
                    item = next(items, None)
                if item is None:
                    return
                yield item

        return measured

    def _count(self) -> None:
        now_s = self._read_s()
        if self._stack:
            part = self._stack[-1]
            self.seconds[part] = self.seconds.get(part, 0.0) + now_s - self._since_s
        self._since_s = now_s


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all models, print the table and write the result page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset with a split train")
    parser.add_argument("--models", default=MODELS, help="model names (default: %(default)s)")
    parser.add_argument("--imgsz", type=parse_imgsz, default=(320, 320), help="input size (default: 320x320)")
    parser.add_argument("--images", type=int, default=32, help="number of images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--result", type=Path, default=RESULT, help="file of the result page")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    device, samples = torch.device(arguments.device), load_dataset(arguments.data, "train")[: arguments.images]
    header = ["model", "ms per image", *PARTS, "validation, ms per image", "convolutions"]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for model in arguments.models.split(","):
        lines.append(measure(model, samples, arguments.imgsz, arguments.rounds, device))
        print(lines[-1], flush=True)
    host = next(field.value for field in read_host_fields() if field.name == "CPU")
    clock = "one thread, CPU time" if device.type == "cpu" else torch.cuda.get_device_name(device)
    precision = "bf16" if engine.uses_bf16("auto", device) else "fp32"
    text = (
        "# Training speed\n\nShares of the parts of a training step. **Bold**: above "
        f"{LARGE_SHARE:.0%}; convolutions are a part of forward and backward.\n\n```bash\n"
        f"python benchmarks/studies/training_speed.py --data DATA.yaml --imgsz {format_imgsz(arguments.imgsz)} "
        f"--images {arguments.images} --rounds {arguments.rounds}\n```\n\n{host}, {clock}, torch {torch.__version__}, "
        f"{precision}. Medians of {arguments.rounds} rounds of {len(samples)} images.\n\n"
    )
    write_text(arguments.result, text + "\n".join(lines) + "\n")


def measure(model: str, samples: Sequence[Sample], imgsz_hw: tuple[int, int], rounds: int, device: torch.device) -> str:
    """Return the row of a model.

    Args:
        model: Model name.
        samples: Training images.
        imgsz_hw: Input height and width, pixels.
        rounds: Number of epochs that are measured.
        device: Device that trains.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            "measured", model, folder, imgsz_hw, device=str(device), setup="All", pretrained=False, workers=0
        )
        plan, dist_context = make_epoch_plan(config, len(samples), 0), DistributedContext(0, 1, device)
        trainer = Trainer(config, plan, RunContext(), dist_context, samples, samples)
    trainer.run_epoch_steps(0)  # fills the image cache and selects kernels
    results = []
    for _ in tqdm(range(rounds), desc=model):
        timer = PartTimer(time.process_time if device.type == "cpu" else read_gpu_clock)
        with patch_parts(trainer, timer), timer.measure("other"):
            trainer.run_epoch_steps(0)
        trainer.ema.module.eval()
        with timer.measure("validation"):
            engine.predict_dataset(trainer.ema.module, samples, imgsz_hw)
        results.append(timer.seconds)
    totals_s = [sum(seconds[part] for part in PARTS) for seconds in results]
    ms_per_image = 1e3 / (plan.steps_per_epoch * config.batch)
    shares = [
        median(seconds[part] / total_s for seconds, total_s in zip(results, totals_s, strict=True)) for part in PARTS
    ]
    cells = [f"**{share:.1%}**" if share > LARGE_SHARE else f"{share:.1%}" for share in shares]
    validation_ms = 1e3 * median(seconds["validation"] for seconds in results) / len(samples)
    step_ms = f"{median(totals_s) * ms_per_image:.0f}"
    return f"| {' | '.join([model, step_ms, *cells, f'{validation_ms:.0f}', f'{measure_convolutions(trainer):.0%}'])} |"


@contextmanager
def patch_parts(trainer: Trainer, timer: PartTimer) -> Iterator[None]:
    """Let the functions that a training step calls count their time.

    Args:
        trainer: The trainer.
        timer: Receives the times.
    """
    distiller: Any = trainer.distiller
    targets = [
        (distiller.student, "forward", "forward"),
        (distiller, "forward", "losses"),
        (TaskAlignedAssigner, "__call__", "assignment"),
        (trainer.balancer, "backward", "backward"),
        (nn.utils, "clip_grad_norm_", "clipping"),
        (trainer.optimizer, "step", "optimizer"),
        (trainer.ema, "update", "EMA"),
    ]
    loading = timer.wrap_iterator("loading", engine.iterate_batches)
    with ExitStack() as stack:
        stack.enter_context(patch.object(engine, "iterate_batches", loading))
        for owner, name, part in targets:
            stack.enter_context(patch.object(owner, name, timer.wrap(part, getattr(owner, name))))
        timer.seconds = dict.fromkeys(PARTS, 0.0)
        yield


def measure_convolutions(trainer: Trainer) -> float:
    """Return the share of convolutions in the time of all operators of an epoch.

    Args:
        trainer: The trainer.
    """
    is_gpu = trainer.dist_context.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]) as profiler:
        trainer.run_epoch_steps(0)
    name = "self_device_time_total" if is_gpu else "self_cpu_time_total"
    times = {event.key: float(getattr(event, name)) for event in profiler.key_averages()}
    return sum(value for key, value in times.items() if "convolution" in key.lower()) / sum(times.values())


def read_gpu_clock() -> float:
    """Return the wall time in seconds after all work of the GPU."""
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
