"""Loading against learning: pictures a second of the loader alone, of the training step alone, and of both together.

    python benchmarks/studies/loading.py [--rounds 3] [--pictures 96] [--only NAME]     results: loading.md

Every case trains as `hkd-train` does by default (batch 16, bf16, half of the views mosaics, sizes varied by 25 %). A
round measures, one after the other on the same cores: the step on one epoch's batches, already in memory; then, for
every number of workers, the loader on the same epoch when nothing has been packed yet (first) and when all has
(later), and the epoch with the loader beside the step. The files are in the system's cache, the workers have been
started. The ratios are those of one round, since the machine's speed drifts; the table gives median and range.

A step on two cores suffers far more from a third process than its share: its threads wait for each other. So a
measurement in which other programs took more than a tenth of a core is made again, up to TRIES times; the table tells
how much they took in the worst of those that count.
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
from hkd_det.errors import HkdError
from hkd_det.train.config import TrainConfig
from hkd_det.train.dataset import Batch, DistributedBatchSampler, TrainDataset, build_dataloader, iterate_batches
from hkd_det.train.distributed import DistributedContext
from hkd_det.train.trainer import Trainer

HERE = Path(__file__).parent
CITYPERSONS = HERE / "../../../shared/data/citypersons"
WORKERS = (0, 1, 2)
QUIET, TRIES = 0.1, 5
Opened = tuple[DataLoader[Batch | HkdError], DistributedBatchSampler]


@dataclass(frozen=True)
class Rate:
    """A speed, and how many cores other programs took meanwhile."""

    pictures_per_s: float
    others: float


@dataclass(frozen=True)
class Case:
    """A student, its input size and the pictures it learns from."""

    data: str
    model: str
    imgsz_hw: tuple[int, int]

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"{self.data}, {self.model} {self.imgsz_hw[1]}x{self.imgsz_hw[0]}"


CASES = [
    Case(data, model, imgsz_hw)
    for data in ("photographs", "full-size PNG")
    for model, imgsz_hw in (("mini-student", (512, 640)), ("student-r18", (512, 640)), ("mini-student", (256, 320)))
]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=96, help="a multiple of the batch of 16")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    arguments = parser.parse_args()
    for fact in read_host_fields():
        print(f"{fact.name}: {fact.value or fact.reason}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    for case in CASES:
        if arguments.only in case.name:
            measure(case, arguments.rounds, arguments.pictures)


def measure(case: Case, rounds: int, pictures: int) -> None:
    """One case's rounds, printed."""
    samples = samples_of(case.data, pictures)
    warm_files(samples)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig("measured", case.model, folder, case.imgsz_hw, device="cpu", setup="All")
        run = Trainer(config, DistributedContext(0, 1, torch.device("cpu")), samples, samples)
    loaders = {
        workers: build_dataloader(samples, run.epoch_plan, 0, 1, workers, config.cache_mib) for workers in WORKERS
    }
    in_memory = list(epoch_of(loaders[0]))
    steps(run, in_memory)  # fills torch's caches of compiled operations, once per size
    for opened in loaders.values():
        exhaust(epoch_of(opened))  # starts the workers
    found: dict[str, list[Rate]] = {}
    for _ in tqdm(range(rounds), desc=case.name):
        found.setdefault("step", []).append(rate(pictures, lambda: steps(run, in_memory)))
        for workers, opened in loaders.items():
            for what, work in (("loader", exhaust), ("both", partial(steps, run))):
                row = f"{what}, {workers} workers"
                first = rate(pictures, partial(over_an_epoch, work, opened), before=partial(forget, opened))
                later = rate(pictures, partial(over_an_epoch, work, opened))
                found.setdefault(f"{row}, first", []).append(first)
                found.setdefault(f"{row}, later", []).append(later)
    report(case, found)


def samples_of(data: str, count: int) -> list[Sample]:
    """`count` training pictures; there are five full-size PNGs only, so those repeat, each a picture of its own."""
    if data == "photographs":
        samples = load_dataset(str(HERE / "real_data.yaml"), "train")
        return [samples[index] for index in np.random.default_rng(0).permutation(len(samples))[:count]]
    five = [sample for split in ("train", "val") for sample in read_citypersons(CITYPERSONS, split, skip_missing=True)]
    return [five[index % len(five)] for index in range(count)]


def warm_files(samples: Sequence[Sample]) -> None:
    """Into the system's file cache: what is measured is decoding, not the disk."""
    for sample in samples:
        sample.path.read_bytes()


def epoch_of(opened: Opened) -> Iterator[Batch]:
    """The first epoch's batches: the same draws every time."""
    loader, sampler = opened
    sampler.epoch = 0
    return iterate_batches(loader)


def forget(opened: Opened) -> None:
    """Remove what the loader has packed."""
    views = opened[0].dataset
    assert isinstance(views, TrainDataset)
    views.images.cache.clear()


def steps(run: Trainer, given: Iterable[Batch]) -> None:
    """One epoch of training steps, made by the run itself."""
    run.loader = _Given(given)  # type: ignore[assignment]
    with tqdm(disable=True) as bar:
        run.train_one_epoch(run.distiller, 0, 0.0, bar)


class _Given:
    def __init__(self, given: Iterable[Batch]) -> None:
        self.given = given

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.given)


def over_an_epoch(work: Callable[[Iterable[Batch]], None], opened: Opened) -> None:
    """Do `work` with the loader's batches."""
    work(epoch_of(opened))


def exhaust(given: Iterable[Batch]) -> None:
    """Take every batch and do nothing with it."""
    for _ in given:
        pass


def rate(pictures: int, work: Callable[[], None], before: Callable[[], None] = lambda: None) -> Rate:
    """Pictures a second of `work`, of the quietest of up to TRIES times."""
    tried: list[Rate] = []
    while len(tried) < TRIES and not (tried and tried[-1].others <= QUIET):
        before()
        taken, busy, started = own_s(), busy_s(), time.perf_counter()
        work()
        elapsed_s = time.perf_counter() - started
        others = max(0.0, (busy_s() - busy) - (own_s() - taken)) / elapsed_s
        tried.append(Rate(pictures / elapsed_s, others))
    return min(tried, key=lambda one: one.others)


def own_s() -> float:
    """Processor time of this process and its workers."""
    own = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in (own, *own.children()))


def busy_s() -> float:
    """Processor time of everything on the machine."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system


def report(case: Case, found: dict[str, list[Rate]]) -> None:
    """The case's table, in Markdown."""
    print(f"\n### {case.name}\n\n| | pictures/s | of the step | from | to | cores others took |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, rates in found.items():
        ratios = [one.pictures_per_s / step.pictures_per_s for one, step in zip(rates, found["step"], strict=True)]
        speed, others = median(one.pictures_per_s for one in rates), max(one.others for one in rates)
        print(f"| {name} | {speed:.1f} | {median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} | {others:.2f} |")
    print(flush=True)


if __name__ == "__main__":
    main()
