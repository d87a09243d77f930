"""A training run from settings to `best.pt`: read this file to know what `hkd-train` does."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from hkd_det.datasets import Sample
from hkd_det.datasets.catalogue import open_data
from hkd_det.datasets.unlabelled import read_unlabelled
from hkd_det.distill.arbiter import Together
from hkd_det.distill.distiller import Distiller
from hkd_det.distill.mokd import arbiter_of
from hkd_det.errors import DataError
from hkd_det.files import sha256_of, write_text
from hkd_det.losses.detection import total
from hkd_det.metrics.citypersons import SETUPS, evaluate
from hkd_det.metrics.tables import DetectionTable, TruthTable
from hkd_det.models.detector import freeze_norms
from hkd_det.models.family import PersonDetector
from hkd_det.models.sizes import cost
from hkd_det.train.average import MovingAverage
from hkd_det.train.blockwise import assemble
from hkd_det.train.checkpoint import DetectorCheckpoint, read_state, write_detector, write_state
from hkd_det.train.config import TrainConfig
from hkd_det.train.history import EpochRecord, write_history
from hkd_det.train.learner import Learner
from hkd_det.train.loader import Epochs, batches, open_loader
from hkd_det.train.processes import Processes, joined_processes
from hkd_det.train.schedule import distillation_strength, learning_rate_factor, plain_from
from hkd_det.train.shape import Shape, prepare, shape_of
from hkd_det.train.student import build_student
from hkd_det.train.teachers import teacher_of
from hkd_det.train.validate import miss_rate


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves: the best checkpoint, its validation miss rate (fraction), and every epoch's figures."""

    best: Path
    miss_rate: float
    history: list[EpochRecord]


def train(config: TrainConfig, resume: bool = False) -> TrainResult:
    """Train as `config` says, in `config.run_dir`; with `resume`, go on after the last finished epoch there.

    Raises HkdError for whatever the user can put right. Ctrl-C or a kill loses the unfinished epoch only.
    """
    with joined_processes(config.device) as processes:
        training, validation = open_data(config.data, "train"), open_data(config.data, "val")
        check_people(config, training, validation)
        unlabelled = read_unlabelled([Path(folder) for folder in config.unlabelled])
        init = Path(config.init) if config.init else None
        if config.distill.blockwise:
            init = assemble(config, config.distill.blockwise, processes, training, validation, resume)
        run = Run(config, processes, training, validation, unlabelled, init)
        if resume:
            run.restore()
        return run.finish()


class Run:
    """The state of a run between two epochs, and how it moves from one to the next; `init` is where it starts."""

    def __init__(
        self,
        config: TrainConfig,
        processes: Processes,
        training: Sequence[Sample],
        validation: Sequence[Sample],
        unlabelled: Sequence[Sample] = (),
        init: Path | None = None,
    ) -> None:
        if config.batch % processes.count or config.unlabelled_a_step % processes.count:
            beside = f" and {config.unlabelled_a_step} unlabelled pictures" if unlabelled else ""
            raise DataError(f"--batch {config.batch}{beside} can't be shared evenly by {processes.count} processes")
        self.config, self.processes, self.validation = config, processes, validation
        torch.manual_seed(config.seed)
        detector = build_student(config, init)
        if config.freeze_norm:
            freeze_norms(detector)
        ledger = prepare(detector, config)
        detector.to(processes.device).to(memory_format=torch.channels_last)
        self.average = MovingAverage(detector, config.ema_decay)
        distiller = _distiller(config, detector, processes.device)
        self.teacher_sha256 = sha256_of(Path(config.teacher)) if config.teacher else ""
        self.learner = Learner(detector, distiller, processes.norm_of).to(processes.device)
        self.learner = self.learner.to(memory_format=torch.channels_last)
        self.arbiter = arbiter_of(config.distill.mokd, self.learner, detector, processes.average)
        self.optimizer = _optimizer(self.learner, config)
        self.epochs = Epochs(
            len(training),
            config.batch,
            config.imgsz_hw,
            config.multi_scale,
            config.mosaic,
            config.seed,
            len(unlabelled),
            config.unlabelled_a_step,
        )
        self.loader, self.sampler = open_loader(
            [*training, *unlabelled], self.epochs, processes.rank, processes.count, config.workers, config.cache_mib
        )
        self.shape: Shape = shape_of(config, ledger, distiller, self.epochs.steps, processes)
        self.history: list[EpochRecord] = []

    def finish(self) -> TrainResult:
        """Run the epochs that are left."""
        if self.processes.leads:
            self._say_what_is_trained()
        learner: nn.Module = self.learner
        if self.processes.count > 1 and isinstance(self.arbiter, Together):  # others average gradients themselves
            learner = DistributedDataParallel(self.learner, find_unused_parameters=self.learner.distiller is not None)
        steps = self.config.epochs * self.epochs.steps
        done = len(self.history) * self.epochs.steps
        with tqdm(total=steps, initial=done, unit="step", disable=not self.processes.leads) as bar:
            for epoch in range(len(self.history), self.config.epochs):
                record = self._epoch(learner, epoch, bar)
                if self.processes.leads:
                    bar.write(record.line(self.config.epochs, self.config.setup))
        best = min((record for record in self.history if record.eligible), key=lambda record: record.miss_rate)
        result = TrainResult(self.config.run_dir / "best.pt", best.miss_rate, self.history)
        if self.processes.leads:
            figure = f"MR^-2 {self.config.setup} {100 * result.miss_rate:.2f} %"
            tqdm.write(f"best: {result.best}  {figure}{self.shape.told()}")
        return result

    def restore(self) -> None:
        """Take up the state that the last finished epoch left in the run's folder."""
        path = self.config.run_dir / "last.pt"
        state = read_state(path)
        saved = TrainConfig.from_dict(state["config"])
        if saved.model != self.config.model:
            raise DataError(f"{path}: belongs to a run of {saved.model}, not {self.config.model}")
        if saved.distill != self.config.distill:
            raise DataError(f"{path}: belongs to a run with other settings under distill; its config.yaml has them")
        if state.get("teacher_sha256", self.teacher_sha256) != self.teacher_sha256:
            raise DataError(
                f"{path}: its teacher was another file than {self.config.teacher} is now; put that back or start again"
            )
        try:
            self.learner.load_state_dict(state["learner"])
            self.average.average.load_state_dict(state["average"])
            self.average.steps = state["average_steps"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.arbiter.restore(state["arbiter"])
            self.history = [EpochRecord(**record) for record in state["history"]]
        except (KeyError, TypeError, RuntimeError) as error:  # what is missing, what is new, other shapes
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            raise DataError(
                f"{path}: does not fit this run ({what}); it was written by another version of hkd-det, or --init or "
                "--teacher is another detector by now: start the run again"
            ) from error

    def _epoch(self, learner: nn.Module, epoch: int, bar: "tqdm[NoReturn]") -> EpochRecord:
        config, started = self.config, time.monotonic()
        self.sampler.epoch = epoch
        torch.manual_seed(_seed_of(config.seed, epoch, self.processes.rank))
        self.sampler.plain = epoch >= plain_from(config.epochs, config.finale)
        strength = distillation_strength(epoch, config.epochs, config.finale)
        bar.set_description(f"epoch {epoch + 1}/{config.epochs}")
        losses, figures = self._steps(learner, epoch, strength, bar)
        pictures_per_s = self.epochs.steps * config.batch / (time.monotonic() - started)
        deployed = self.shape.deployed(self.average.average)
        rate = miss_rate(config, self.validation, deployed) if self.processes.leads else float("nan")
        record = EpochRecord(epoch + 1, losses, rate, pictures_per_s, figures, self.shape.met)
        self.history.append(record)
        if self.processes.leads:
            self._save(record, deployed)
        return record

    def _steps(
        self, learner: nn.Module, epoch: int, strength: float, bar: "tqdm[NoReturn]"
    ) -> tuple[dict[str, float], dict[str, float]]:
        """One epoch's steps; the means of the loss terms, and of what the arbiter told."""
        config, device = self.config, self.processes.device
        self.learner.train()
        if config.freeze_norm:
            freeze_norms(self.learner.detector)
        sums: dict[str, float] = {}
        figures: dict[str, float] = {}
        for index, (pictures, truth) in enumerate(batches(self.loader)):
            step = epoch * self.epochs.steps + index
            self._set_rate(step)
            self.shape.before_forward(step)
            inputs = pictures.to(device, memory_format=torch.channels_last, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                task, taught = learner(inputs, truth.to(device), strength)
            terms = task | taught
            loss = total(terms)
            if not torch.isfinite(loss):
                raise DataError(
                    f"the loss is {loss.item()} at epoch {epoch + 1}, step {index + 1}; lower --set lr={config.lr}"
                )
            self.optimizer.zero_grad(set_to_none=True)
            told = self.arbiter.backward(total(task), total(taught) if taught else None, strength)
            told |= self.shape.after_backward(step)
            nn.utils.clip_grad_norm_(self.learner.parameters(), config.clip_norm)
            self.optimizer.step()
            self.shape.after_step()
            self.average.update(self.learner.detector)
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + float(term.detach())
            for name, value in told.items():
                figures[name] = figures.get(name, 0.0) + value
            bar.update()
            bar.set_postfix({name: f"{value / (index + 1):.2f}" for name, value in sums.items()}, refresh=False)
        of_terms, told_of = (
            {name: value / self.epochs.steps for name, value in totals.items()} for totals in (sums, figures)
        )
        return of_terms, told_of

    def _set_rate(self, step: int) -> None:
        steps = self.config.epochs * self.epochs.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * learning_rate_factor(step, steps, self.config.warmup)

    def _save(self, record: EpochRecord, detector: PersonDetector) -> None:
        """Best first, then last: a kill between the two repeats this epoch and writes the same best again."""
        config = self.config
        rivals = [past.miss_rate for past in self.history if past.eligible]
        if record.eligible and record.miss_rate <= min(rivals):
            best = DetectorCheckpoint.of(detector, config.model, config.as_dict(), record.epoch, record.miss_rate)
            write_detector(config.run_dir / "best.pt", best)
        state = {
            "config": config.as_dict(),
            "learner": self.learner.state_dict(),
            "average": self.average.average.state_dict(),
            "average_steps": self.average.steps,
            "optimizer": self.optimizer.state_dict(),
            "arbiter": self.arbiter.state(),
            "history": [past.as_dict() for past in self.history],
            "teacher_sha256": self.teacher_sha256,
        }
        write_state(config.run_dir / "last.pt", state)
        write_history(config.run_dir / "results.csv", self.history)

    def _say_what_is_trained(self) -> None:
        config = self.config
        write_text(config.run_dir / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))
        weight = cost(self.shape.deployed(self.learner.detector), config.imgsz_hw)
        unlabelled = f" and {self.epochs.unlabelled} without labels" if self.epochs.unlabelled else ""
        tqdm.write(
            f"{config.model}: {weight.parameters / 1e6:.2f} M parameters, {weight.flops / 1e9:.2f} GFLOPs at "
            f"{config.imgsz_hw[1]}x{config.imgsz_hw[0]}; {self.epochs.pictures} pictures to train{unlabelled}, "
            f"{len(self.validation)} to validate; {self.processes.count} x {self.processes.device}"
        )


def check_people(config: TrainConfig, training: Sequence[Sample], validation: Sequence[Sample]) -> None:
    """Find out now, not after an epoch, that there is nobody to learn from or to be judged by."""
    if all(sample.truth.ignore.all() for sample in training):
        raise DataError(f"--data {config.data}: nobody to find in the train split, only ignore regions")
    setup, truth = SETUPS[config.setup], TruthTable.of([sample.truth for sample in validation])
    if evaluate(truth, DetectionTable.of([]), [setup])[setup.name].people == 0:
        raise DataError(
            f"--data {config.data}: nobody in the val split counts in the setup {setup.name} (at least "
            f"{setup.height_px[0]:g} px tall, visibility from {setup.visibility[0]:g}); --set setup=All takes smaller "
            "people"
        )


def _distiller(config: TrainConfig, student: PersonDetector, device: torch.device) -> Distiller | None:
    methods = config.distill.in_training
    return Distiller(student, teacher_of(config, device), methods) if methods.names else None


def _seed_of(seed: int, epoch: int, rank: int) -> int:
    """For what chance decides in an epoch's steps (samples, noise): a resumed run decides as an unbroken one."""
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])


def _optimizer(learner: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on convolutions only, not on normalisation and biases."""
    parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.lr,
    )
