"""The shape of the detector that a run trains: it stays, or it shrinks while it learns.

A training run from settings to `best.pt`: read this file to know what `hkd-train` does.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from hkd_det.datasets import Sample
from hkd_det.datasets.base import read_unlabeled
from hkd_det.datasets.catalog import load_dataset
from hkd_det.distill.cdd.cost_model import ChannelCostModel
from hkd_det.distill.cdd.pruner import ChannelPruner, PruningSchedule, prepare_student
from hkd_det.distill.distiller import DistillationLoss, Distiller
from hkd_det.distill.gradients import SumBalancer
from hkd_det.distill.mokd import build_balancer
from hkd_det.errors import DataError
from hkd_det.files import file_sha256, write_text
from hkd_det.metrics.citypersons import SETUPS, evaluate_detections
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import (
    DetectorCheckpoint,
    load_training_state,
    save_detector_checkpoint,
    save_training_state,
)
from hkd_det.models.detector import freeze_batch_norm
from hkd_det.models.zoo import build_student, count_params_and_flops, load_teacher
from hkd_det.ops.losses import sum_losses
from hkd_det.train.blockwise import prepare_blockwise_student
from hkd_det.train.config import TrainConfig, compute_lr_factor, distill_weight_at, no_aug_start_epoch
from hkd_det.train.dataset import EpochPlan, build_dataloader, iterate_batches
from hkd_det.train.distributed import DistributedContext, init_distributed
from hkd_det.train.engine import EpochRecord, ModelEma, evaluate_miss_rate, write_history


class TrainHook(Protocol):
    """What is done to the detector's shape between backward passes and steps."""

    @property
    def target_reached(self) -> bool:
        """Whether the detector has the shape that was asked for."""

    def before_step(self, step: int) -> None:
        """Before a step, counted over the whole run."""

    def after_backward(self, step: int) -> dict[str, float]:
        """After the backward pass of the same step; returns figures to log."""

    def after_step(self) -> None:
        """After the optimizer's step."""

    def deployable_model(self, detector: BaseDetector) -> BaseDetector:
        """The plain network of the detector or its moving average, as it is judged and saved."""

    def summary(self) -> str:
        """What has become of the shape, to go behind the run's result."""


class NoOpHook:
    """The shape it began with."""

    target_reached = True

    def before_step(self, _step: int) -> None:
        """Nothing."""

    def after_backward(self, _step: int) -> dict[str, float]:
        """Nothing."""
        return {}

    def after_step(self) -> None:
        """Nothing."""

    def deployable_model(self, detector: BaseDetector) -> BaseDetector:
        """The detector itself."""
        return detector

    def summary(self) -> str:
        """Nothing."""
        return ""


def prepare_pruning(detector: BaseDetector, config: TrainConfig) -> ChannelCostModel | None:
    """Put in place, before training, what a student needs to shrink; None where it is not to."""
    settings = config.distill.cdd
    return prepare_student(detector, settings, config.imgsz_hw, config.model) if settings else None


def build_train_hook(
    config: TrainConfig,
    cost_model: ChannelCostModel | None,
    distillation_loss: DistillationLoss | None,
    steps_per_epoch: int,
    dist_context: DistributedContext,
) -> TrainHook:
    """The run's; `ledger` from `prepare`, `steps` an epoch."""
    settings = config.distill.cdd
    if settings is None or cost_model is None or distillation_loss is None or distillation_loss.cdd is None:
        return NoOpHook()
    taught = no_aug_start_epoch(config.epochs, config.no_aug_ratio) / config.epochs
    course = PruningSchedule.from_config(settings, config.epochs * steps_per_epoch, taught)
    return ChannelPruner(distillation_loss.cdd, cost_model, settings, course, dist_context.all_gather)


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
    with init_distributed(config.device) as processes:
        training, validation = load_dataset(config.data, "train"), load_dataset(config.data, "val")
        check_annotations(config, training, validation)
        unlabelled = read_unlabeled([Path(folder) for folder in config.unlabeled])
        init = Path(config.weights) if config.weights else None
        if config.distill.blockwise:
            init = prepare_blockwise_student(config, config.distill.blockwise, processes, training, validation, resume)
        run = Trainer(config, processes, training, validation, unlabelled, init)
        if resume:
            run.load_checkpoint()
        return run.fit()


class Trainer:
    """The state of a run between two epochs, and how it moves from one to the next; `init` is where it starts."""

    def __init__(
        self,
        config: TrainConfig,
        dist_context: DistributedContext,
        train_samples: Sequence[Sample],
        val_samples: Sequence[Sample],
        unlabeled_samples: Sequence[Sample] = (),
        weights: Path | None = None,
    ) -> None:
        if config.batch % dist_context.world_size or config.unlabeled_batch % dist_context.world_size:
            beside = f" and {config.unlabeled_batch} unlabelled pictures" if unlabeled_samples else ""
            raise DataError(
                f"--batch {config.batch}{beside} can't be shared evenly by {dist_context.world_size} processes"
            )
        self.config, self.dist_context, self.val_samples = config, dist_context, val_samples
        torch.manual_seed(config.seed)
        detector = build_student(config.model, config.backbone, config.pretrained, weights)
        if config.freeze_bn:
            freeze_batch_norm(detector)
        ledger = prepare_pruning(detector, config)
        detector.to(dist_context.device).to(memory_format=torch.channels_last)
        self.ema = ModelEma(detector, config.ema_decay)
        distiller = _build_distiller(config, detector, dist_context.device)
        self.teacher_sha256 = file_sha256(Path(config.teacher)) if config.teacher else ""
        self.distiller = Distiller(detector, distiller, dist_context.reduce_mean).to(dist_context.device)
        self.distiller = self.distiller.to(memory_format=torch.channels_last)
        self.balancer = build_balancer(config.distill.mokd, self.distiller, detector, dist_context.all_reduce_mean)
        self.optimizer = _build_optimizer(self.distiller, config)
        self.epoch_plan = EpochPlan(
            len(train_samples),
            config.batch,
            config.imgsz_hw,
            config.multi_scale,
            config.mosaic,
            config.seed,
            len(unlabeled_samples),
            config.unlabeled_batch,
        )
        self.loader, self.sampler = build_dataloader(
            [*train_samples, *unlabeled_samples],
            self.epoch_plan,
            dist_context.rank,
            dist_context.world_size,
            config.workers,
            config.cache_mib,
        )
        self.hook: TrainHook = build_train_hook(
            config, ledger, distiller, self.epoch_plan.steps_per_epoch, dist_context
        )
        self.history: list[EpochRecord] = []

    def fit(self) -> TrainResult:
        """Run the epochs that are left."""
        if self.dist_context.is_main_process:
            self._log_model_summary()
        learner: nn.Module = self.distiller
        if self.dist_context.world_size > 1 and isinstance(
            self.balancer, SumBalancer
        ):  # others average gradients themselves
            learner = DistributedDataParallel(
                self.distiller, find_unused_parameters=self.distiller.distillation_loss is not None
            )
        steps = self.config.epochs * self.epoch_plan.steps_per_epoch
        done = len(self.history) * self.epoch_plan.steps_per_epoch
        with tqdm(total=steps, initial=done, unit="step", disable=not self.dist_context.is_main_process) as bar:
            for epoch in range(len(self.history), self.config.epochs):
                record = self._run_epoch(learner, epoch, bar)
                if self.dist_context.is_main_process:
                    bar.write(record.log_line(self.config.epochs, self.config.setup))
        best = min((record for record in self.history if record.meets_target), key=lambda record: record.miss_rate)
        result = TrainResult(self.config.save_path / "best.pt", best.miss_rate, self.history)
        if self.dist_context.is_main_process:
            figure = f"MR^-2 {self.config.setup} {100 * result.miss_rate:.2f} %"
            tqdm.write(f"best: {result.best}  {figure}{self.hook.summary()}")
        return result

    def load_checkpoint(self) -> None:
        """Take up the state that the last finished epoch left in the run's folder."""
        path = self.config.save_path / "last.pt"
        state = load_training_state(path)
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
            self.distiller.load_state_dict(state["distiller"])
            self.ema.module.load_state_dict(state["ema"])
            self.ema.num_updates = state["ema_updates"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.balancer.load_state_dict(state["balancer"])
            self.history = [EpochRecord(**record) for record in state["history"]]
        except (KeyError, TypeError, RuntimeError) as error:  # what is missing, what is new, other shapes
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            raise DataError(
                f"{path}: does not fit this run ({what}); it was written by another version of hkd-det, or --weights or "
                "--teacher is another detector by now: start the run again"
            ) from error

    def _run_epoch(self, distiller: nn.Module, epoch: int, bar: "tqdm[NoReturn]") -> EpochRecord:
        config, started = self.config, time.monotonic()
        self.sampler.epoch = epoch
        torch.manual_seed(_derive_seed(config.seed, epoch, self.dist_context.rank))
        self.sampler.no_aug = epoch >= no_aug_start_epoch(config.epochs, config.no_aug_ratio)
        strength = distill_weight_at(epoch, config.epochs, config.no_aug_ratio)
        bar.set_description(f"epoch {epoch + 1}/{config.epochs}")
        losses, figures = self.train_one_epoch(distiller, epoch, strength, bar)
        pictures_per_s = self.epoch_plan.steps_per_epoch * config.batch / (time.monotonic() - started)
        deployed = self.hook.deployable_model(self.ema.module)
        rate = (
            evaluate_miss_rate(config, self.val_samples, deployed)
            if self.dist_context.is_main_process
            else float("nan")
        )
        record = EpochRecord(epoch + 1, losses, rate, pictures_per_s, figures, self.hook.target_reached)
        self.history.append(record)
        if self.dist_context.is_main_process:
            self._save_checkpoint(record, deployed)
        return record

    def train_one_epoch(
        self, distiller: nn.Module, epoch: int, distill_weight: float, bar: "tqdm[NoReturn]"
    ) -> tuple[dict[str, float], dict[str, float]]:
        """One epoch's steps; the means of the loss terms, and of what the arbiter told."""
        config, device = self.config, self.dist_context.device
        self.distiller.train()
        if config.freeze_bn:
            freeze_batch_norm(self.distiller.student)
        sums: dict[str, float] = {}
        figures: dict[str, float] = {}
        for index, (pictures, truth) in enumerate(iterate_batches(self.loader)):
            step = epoch * self.epoch_plan.steps_per_epoch + index
            self._set_learning_rate(step)
            self.hook.before_step(step)
            inputs = pictures.to(device, memory_format=torch.channels_last, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                task, taught = distiller(inputs, truth.to(device), distill_weight)
            terms = task | taught
            loss = sum_losses(terms)
            if not torch.isfinite(loss):
                raise DataError(
                    f"the loss is {loss.item()} at epoch {epoch + 1}, step {index + 1}; lower --set lr={config.lr}"
                )
            self.optimizer.zero_grad(set_to_none=True)
            told = self.balancer.backward(sum_losses(task), sum_losses(taught) if taught else None, distill_weight)
            told |= self.hook.after_backward(step)
            nn.utils.clip_grad_norm_(self.distiller.parameters(), config.clip_grad_norm)
            self.optimizer.step()
            self.hook.after_step()
            self.ema.update(self.distiller.student)
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + float(term.detach())
            for name, value in told.items():
                figures[name] = figures.get(name, 0.0) + value
            bar.update()
            bar.set_postfix({name: f"{value / (index + 1):.2f}" for name, value in sums.items()}, refresh=False)
        of_terms, told_of = (
            {name: value / self.epoch_plan.steps_per_epoch for name, value in totals.items()}
            for totals in (sums, figures)
        )
        return of_terms, told_of

    def _set_learning_rate(self, step: int) -> None:
        steps = self.config.epochs * self.epoch_plan.steps_per_epoch
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * compute_lr_factor(step, steps, self.config.warmup_ratio)

    def _save_checkpoint(self, record: EpochRecord, detector: BaseDetector) -> None:
        """Best first, then last: a kill between the two repeats this epoch and writes the same best again."""
        config = self.config
        rivals = [past.miss_rate for past in self.history if past.meets_target]
        if record.meets_target and record.miss_rate <= min(rivals):
            best = DetectorCheckpoint.from_detector(
                detector, config.model, config.as_dict(), record.epoch, record.miss_rate
            )
            save_detector_checkpoint(config.save_path / "best.pt", best)
        state = {
            "config": config.as_dict(),
            "distiller": self.distiller.state_dict(),
            "ema": self.ema.module.state_dict(),
            "ema_updates": self.ema.num_updates,
            "optimizer": self.optimizer.state_dict(),
            "balancer": self.balancer.state_dict(),
            "history": [past.as_dict() for past in self.history],
            "teacher_sha256": self.teacher_sha256,
        }
        save_training_state(config.save_path / "last.pt", state)
        write_history(config.save_path / "results.csv", self.history)

    def _log_model_summary(self) -> None:
        config = self.config
        write_text(config.save_path / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))
        weight = count_params_and_flops(self.hook.deployable_model(self.distiller.student), config.imgsz_hw)
        unlabelled = f" and {self.epoch_plan.num_unlabeled} without labels" if self.epoch_plan.num_unlabeled else ""
        tqdm.write(
            f"{config.model}: {weight.num_params / 1e6:.2f} M parameters, {weight.flops / 1e9:.2f} GFLOPs at "
            f"{config.imgsz_hw[1]}x{config.imgsz_hw[0]}; {self.epoch_plan.num_images} pictures to train{unlabelled}, "
            f"{len(self.val_samples)} to validate; {self.dist_context.world_size} x {self.dist_context.device}"
        )


def check_annotations(config: TrainConfig, train_samples: Sequence[Sample], val_samples: Sequence[Sample]) -> None:
    """Find out now, not after an epoch, that there is nobody to learn from or to be judged by."""
    if all(sample.ground_truth.ignore.all() for sample in train_samples):
        raise DataError(f"--data {config.data}: nobody to find in the train split, only ignore regions")
    setup = SETUPS[config.setup]
    if evaluate_detections(val_samples, [], [setup])[setup.name].num_gt == 0:
        raise DataError(
            f"--data {config.data}: nobody in the val split counts in the setup {setup.name} (at least "
            f"{setup.height_px[0]:g} px tall, visibility from {setup.visible_ratio[0]:g}); --set setup=All takes smaller "
            "people"
        )


def _build_distiller(config: TrainConfig, student: BaseDetector, device: torch.device) -> DistillationLoss | None:
    methods = config.distill.online_methods
    if not methods.names:
        return None
    teacher_config = Path(config.teacher_config) if config.teacher_config else None
    return DistillationLoss(student, load_teacher(Path(config.teacher), device, teacher_config), methods)


def _derive_seed(seed: int, epoch: int, rank: int) -> int:
    """For what chance decides in an epoch's steps (samples, noise): a resumed run decides as an unbroken one."""
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])


def _build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on convolutions only, not on normalisation and biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.lr,
    )
