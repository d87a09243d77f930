"""Speed of the data loader compared with the training step, in images per second: alone and together.

    python benchmarks/studies/data_loading.py --data DATA.yaml --citypersons DIR [--rounds 3] [--images 96]

Every case trains with the defaults of `hkd-train`: batch 16, bf16, 50 % mosaics, sizes varied by 25 %. A round first
measures the training step on the batches of one epoch in memory. For each number of workers it then measures the loader
alone, and step and loader together, on the same cores. Each is measured with an empty image cache (first) and with a
full one (later). The files are in the cache of the operating system, and the workers are running. Ratios are taken
within a round, because the speed of the machine drifts. The table gives their median and range.

Another process slows down a step on two cores by more than its own time, because the threads of the step wait for each
other. A measurement during which other programs used more than a tenth of a core is therefore repeated, up to MAX_TRIES
times. The table gives the highest use by other programs among the measurements that count.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from hkd_bench.host import read_host_fields
from hkd_det.datasets import Sample
from hkd_det.datasets.catalog import load_dataset
from hkd_det.datasets.citypersons import read_citypersons
from hkd_det.distill.base import RunContext
from hkd_det.errors import HkdError
from hkd_det.train.config import TrainConfig
from hkd_det.train.context import DistributedContext, make_epoch_plan
from hkd_det.train.dataset import Batch, DistributedBatchSampler, TrainDataset, build_dataloader, iterate_batches
from hkd_det.train.trainer import Trainer

WORKERS = (0, 1, 2)
MAX_OTHER_CORES, MAX_TRIES = 0.1, 5
Loader = tuple[DataLoader[Batch | HkdError], DistributedBatchSampler]


@dataclass(frozen=True)
class Rate:
    """A speed.

    Attributes:
        images_per_s: Images per second.
        other_cores: Cores used by other programs during the measurement.
    """

    images_per_s: float
    other_cores: float


@dataclass(frozen=True)
class Case:
    """A student, its input size and its training images.

    Attributes:
        data: "photographs" (split `train` of --data) or "full-size PNG" (CityPersons).
        model: Model name of the student.
        imgsz_hw: Input height and width, pixels.
    """

    data: str
    model: str
    imgsz_hw: tuple[int, int]

    @property
    def name(self) -> str:
        """Name in the result."""
        return f"{self.data}, {self.model} {self.imgsz_hw[1]}x{self.imgsz_hw[0]}"


CASES = [
    Case(data, model, imgsz_hw)
    for data in ("photographs", "full-size PNG")
    for model, imgsz_hw in (("mini-student", (512, 640)), ("student-r18", (512, 640)), ("mini-student", (256, 320)))
]


def main() -> None:
    """Measure and print all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data YAML with the split train")
    parser.add_argument("--citypersons", type=Path, required=True, help="CityPersons directory with full-size PNGs")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--images", type=int, default=96, help="multiple of the batch of 16 (default: %(default)s)")
    parser.add_argument("--only", default="", help="measure only cases whose name contains this text")
    arguments = parser.parse_args()
    for field in read_host_fields():
        print(f"{field.name}: {field.value or field.reason}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    for case in CASES:
        if arguments.only in case.name:
            samples = load_samples(case.data, arguments.data, arguments.citypersons, arguments.images)
            measure(case, samples, arguments.rounds)


def measure(case: Case, samples: Sequence[Sample], rounds: int) -> None:
    """Measure and print one case.

    Args:
        case: The case.
        samples: Training images.
        rounds: Number of rounds.
    """
    num_images = len(samples)
    read_files(samples)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig("measured", case.model, folder, case.imgsz_hw, device="cpu", setup="All")
        plan, dist_context = make_epoch_plan(config, len(samples), 0), DistributedContext(0, 1, torch.device("cpu"))
        trainer = Trainer(config, plan, RunContext(), dist_context, samples, samples)
    loaders = {workers: build_dataloader(samples, plan, 0, 1, workers, config.cache_mib) for workers in WORKERS}
    in_memory = list(iterate_first_epoch(loaders[0]))
    train_steps(trainer, in_memory)  # fills torch's caches of compiled operations, once per size
    for loader in loaders.values():
        consume(iterate_first_epoch(loader))  # starts the workers
    rates: dict[str, list[Rate]] = {}
    for _ in tqdm(range(rounds), desc=case.name):
        rates.setdefault("step", []).append(measure_rate(num_images, lambda: train_steps(trainer, in_memory)))
        for workers, loader in loaders.items():
            for name, work in (("loader", consume), ("both", partial(train_steps, trainer))):
                row = f"{name}, {workers} workers"
                run = partial(run_epoch, work, loader)
                first = measure_rate(num_images, run, before=partial(clear_cache, loader))
                later = measure_rate(num_images, run)
                rates.setdefault(f"{row}, first", []).append(first)
                rates.setdefault(f"{row}, later", []).append(later)
    print_table(case, rates)


def load_samples(kind: str, data: Path, citypersons: Path, count: int) -> list[Sample]:
    """Return training images; full-size PNGs are repeated if there are fewer.

    Args:
        kind: "photographs" or "full-size PNG".
        data: Data YAML.
        citypersons: CityPersons directory.
        count: Number of images.
    """
    if kind == "photographs":
        samples = load_dataset(str(data), "train")
        return [samples[index] for index in np.random.default_rng(0).permutation(len(samples))[:count]]
    samples = [
        sample for split in ("train", "val") for sample in read_citypersons(citypersons, split, skip_missing=True)
    ]
    return [samples[index % len(samples)] for index in range(count)]


def read_files(samples: Sequence[Sample]) -> None:
    """Load the files into the cache of the operating system, so that decoding is measured and not the disk.

    Args:
        samples: The images.
    """
    for sample in samples:
        sample.path.read_bytes()


def iterate_first_epoch(loader: Loader) -> Iterator[Batch]:
    """Return the batches of the first epoch; they are the same every time.

    Args:
        loader: Loader and sampler.
    """
    data_loader, sampler = loader
    sampler.epoch = 0
    return iterate_batches(data_loader)


def clear_cache(loader: Loader) -> None:
    """Empty the image cache of a loader.

    Args:
        loader: Loader and sampler.
    """
    dataset = loader[0].dataset
    assert isinstance(dataset, TrainDataset)
    dataset.images.cache.clear()


def train_steps(trainer: Trainer, batches: Iterable[Batch]) -> None:
    """Run one epoch of training steps on given batches.

    Args:
        trainer: The trainer.
        batches: The batches.
    """
    trainer.loader = _FixedBatches(batches, trainer.plan.steps_per_epoch)  # type: ignore[assignment]  # only iterated
    trainer.run_epoch_steps(0)


class _FixedBatches:
    def __init__(self, batches: Iterable[Batch], num_batches: int) -> None:
        self.batches, self.num_batches = batches, num_batches

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def run_epoch(work: Callable[[Iterable[Batch]], None], loader: Loader) -> None:
    """Call a function on the batches of one epoch.

    Args:
        work: The function.
        loader: Loader and sampler.
    """
    work(iterate_first_epoch(loader))


def consume(batches: Iterable[Batch]) -> None:
    """Iterate over batches without using them.

    Args:
        batches: The batches.
    """
    for _ in batches:
        pass


def measure_rate(num_images: int, work: Callable[[], None], before: Callable[[], None] = lambda: None) -> Rate:
    """Measure up to MAX_TRIES times and return the rate with the least use of the machine by other programs.

    Args:
        num_images: Images that `work` processes.
        work: The function to measure.
        before: Called before each try.
    """
    tries: list[Rate] = []
    while len(tries) < MAX_TRIES and not (tries and tries[-1].other_cores <= MAX_OTHER_CORES):
        before()
        own_start, system_start, start_time = read_own_cpu_s(), read_system_cpu_s(), time.perf_counter()
        work()
        elapsed_s = time.perf_counter() - start_time
        other_s = (read_system_cpu_s() - system_start) - (read_own_cpu_s() - own_start)
        tries.append(Rate(num_images / elapsed_s, max(0.0, other_s) / elapsed_s))
    return min(tries, key=lambda rate: rate.other_cores)


def read_own_cpu_s() -> float:
    """Return the CPU time of this process and its workers."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (own, *own.children()))


def read_system_cpu_s() -> float:
    """Return the CPU time of all processes of the machine."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system


def print_table(case: Case, rates: dict[str, list[Rate]]) -> None:
    """Print the Markdown table of a case.

    Args:
        case: The case.
        rates: Rates of every round by row.
    """
    print(f"\n### {case.name}\n\n| | images/s | ratio to the step, median | minimum | maximum | other cores |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, row in rates.items():
        ratios = [rate.images_per_s / step.images_per_s for rate, step in zip(row, rates["step"], strict=True)]
        speed, other = median(rate.images_per_s for rate in row), max(rate.other_cores for rate in row)
        print(f"| {name} | {speed:.1f} | {median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} | {other:.2f} |")
    print(flush=True)


if __name__ == "__main__":
    main()
