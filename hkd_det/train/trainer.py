"""A training run: builds its objects, loops over the epochs, saves and resumes."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hkd_det.console import Progress, log_line, log_stage
from hkd_det.datasets import Sample
from hkd_det.datasets.catalog import load_dataset
from hkd_det.datasets.image_files import read_unlabeled
from hkd_det.distill import load_method
from hkd_det.distill.base import RunContext
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.distill.gradients import SumBalancer
from hkd_det.errors import DataError
from hkd_det.files import file_sha256, write_text
from hkd_det.metrics.citypersons import SETUPS
from hkd_det.metrics.coco import evaluate_average_precision
from hkd_det.models.detector import freeze_batch_norm
from hkd_det.models.zoo import build_student, count_params_and_flops, load_teacher
from hkd_det.train.config import TrainConfig, compute_lr_factor, get_last_phase_start
from hkd_det.train.context import (
    DistributedContext,
    check_annotations,
    init_distributed,
    make_epoch_plan,
    make_run_context,
    resolve_initial_weights,
)
from hkd_det.train.dataset import EpochPlan, build_dataloader
from hkd_det.train.engine import ModelEma, evaluate, train_one_epoch, uses_bf16
from hkd_det.train.history import (
    EpochHook,
    EpochRecord,
    RunResults,
    draw_val_errors,
    find_best_record,
    find_warning,
    format_interval_and_gain,
    is_patience_exhausted,
    open_tensorboard,
    plot_history,
)
from hkd_det.train.probe import choose_method_configs
from hkd_det.train.run import explain_run_errors, load_epoch, lock_run, save_epoch

PLOT_INTERVAL_S = 60.0


@dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
        best: Checkpoint of the best epoch.
        miss_rate: Its validation MR^-2 in the setup of the run, fraction.
        history: Records of all epochs.
    """

    best: Path
    miss_rate: float
    history: list[EpochRecord]


def train(config: TrainConfig, resume: bool = False, on_epoch: EpochHook | None = None) -> TrainResult:
    """Train a detector. An interruption loses the unfinished epoch only.

    Args:
        config: Configuration of the run. All files go to `config.save_dir`.
        resume: Whether to continue after the last finished epoch in that directory.
        on_epoch: Called with the record of each epoch, in the main process. Experiment trackers log
            `record.as_scalars()`.

    Returns:
        The result of the run.

    Raises:
        HkdError: For errors that the user can correct.
    """
    with init_distributed(config.device) as dist_context, explain_run_errors(config.batch, config.workers):
        is_main = dist_context.is_main_process
        log_stage(f"read the dataset {config.data}")
        train_samples, val_samples = load_dataset(config.data, "train"), load_dataset(config.data, "val")
        check_annotations(config, train_samples, val_samples)
        unlabeled_samples = read_unlabeled([Path(directory) for directory in config.unlabeled])
        plan = make_epoch_plan(config, len(train_samples), len(unlabeled_samples))
        with lock_run(config.save_path, is_main):
            config = choose_method_configs(config, Trainer, dist_context, train_samples, unlabeled_samples, resume)
            context = make_run_context(config, plan, dist_context, train_samples, val_samples, resume)
            weights = resolve_initial_weights(config, context)
            trainer = Trainer(
                config, plan, context, dist_context, [*train_samples, *unlabeled_samples], val_samples, weights
            )
            if resume:
                load_epoch(trainer, config.save_path / "last.pt")
            hooks = [on_epoch] if on_epoch else []
            if config.tensorboard and is_main:
                hooks.append(open_tensorboard(config.save_path / "tensorboard", len(trainer.history)))
            return trainer.fit(hooks)


class Trainer:
    """State of a run between two epochs.

    Args:
        config: Configuration of the run.
        plan: Batches of the epochs.
        context: The run as the distillation methods see it.
        dist_context: Processes of the run.
        samples: Training images: the labeled ones, then the unlabeled ones.
        val_samples: Validation images.
        weights: Checkpoint of the initial student, or None for a new one.

    Raises:
        DataError: If the batch cannot be divided between the processes.
    """

    def __init__(
        self,
        config: TrainConfig,
        plan: EpochPlan,
        context: RunContext,
        dist_context: DistributedContext,
        samples: Sequence[Sample],
        val_samples: Sequence[Sample],
        weights: Path | None = None,
    ) -> None:
        if config.batch % dist_context.world_size or config.unlabeled_batch % dist_context.world_size:
            unlabeled = f" and {config.unlabeled_batch} unlabeled images" if config.unlabeled_batch else ""
            raise DataError(
                f"--batch {config.batch}{unlabeled}: not divisible by {dist_context.world_size} processes. "
                "Use multiples of the number of processes."
            )
        self.config, self.plan, self.dist_context, self.val_samples = config, plan, dist_context, val_samples
        torch.manual_seed(config.seed)
        student = build_student(config.model, config.backbone, config.pretrained, weights, context.iterate_images)
        if config.freeze_bn:
            freeze_batch_norm(student)
        teacher: Any = None
        methods = []
        if config.online_methods:
            teacher_config = Path(config.teacher_config) if config.teacher_config else None
            teacher = load_teacher(Path(config.teacher), dist_context.device, teacher_config)
            methods = build_methods(config.online_methods, student, teacher, Path(config.teacher))
            for method in methods:
                method.setup(context)
        student.to(dist_context.device).to(memory_format=torch.channels_last)
        self.ema = ModelEma(student, config.ema_decay)
        self.distiller = Distiller(student, teacher, methods, dist_context.reduce_mean)
        self.distiller = self.distiller.to(dist_context.device).to(memory_format=torch.channels_last)
        self.balancer = self.distiller.build_balancer(dist_context.all_reduce_mean)
        groups = param_groups_weight_decay(
            self.distiller, config.weight_decay, no_weight_decay_list=self.distiller.no_weight_decay()
        )
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr)
        self.loader, self.sampler = build_dataloader(
            samples, plan, dist_context.rank, dist_context.world_size, config.workers, config.cache_mib
        )
        self.teacher_sha256 = file_sha256(Path(config.teacher)) if config.teacher else ""
        self.history: list[EpochRecord] = []
        self.results = RunResults()
        self._plot_s = -math.inf  # monotonic clock

    def fit(self, hooks: Sequence[EpochHook] = ()) -> TrainResult:
        """Train the remaining epochs.

        Args:
            hooks: Called with the record of each epoch in the main process.

        Returns:
            The result of the run.
        """
        config, is_main = self.config, self.dist_context.is_main_process
        if is_main:
            self._log_model_summary()
            self._measure_initial_weights()
        module: nn.Module = self.distiller
        # Other balancers average gradients over processes themselves.
        if self.dist_context.world_size > 1 and isinstance(self.balancer, SumBalancer):
            module = DistributedDataParallel(module, find_unused_parameters=len(self.distiller.methods) > 0)
        steps, done = config.epochs * self.plan.steps_per_epoch, len(self.history) * self.plan.steps_per_epoch
        start_s, first = time.monotonic(), len(self.history)
        with Progress(steps, "train", "step", done, is_main, keep=True) as progress:
            for epoch in range(first, config.epochs):
                # Only the main process knows the miss rates, so it decides.
                if self.dist_context.all_gather(is_patience_exhausted(self.history, config.patience))[0]:
                    break
                record = self._run_epoch(module, epoch, progress)
                if is_main:
                    mean_s = (time.monotonic() - start_s) / (epoch + 1 - first)
                    log_line(record.log_line(config.epochs, config.setup, mean_s * (config.epochs - epoch - 1)))
                    for hook in hooks:
                        hook(record)
        if is_main:
            self._log_result()
        return TrainResult(config.save_path / "best.pt", find_best_record(self.history).miss_rate, self.history)

    def _measure_initial_weights(self) -> None:
        """Measure the miss rate before training, if the weights come from a checkpoint of a finished detector."""
        sources = {load_method(name).student_source for name in self.config.distill}
        if self.config.weights and sources <= {"config"} and not self.history:
            log_stage("evaluate the initial weights")
            self.results.initial = evaluate(self.ema.module, self.val_samples, self.config).result
            log_line(f"initial weights: MR^-2 {self.config.setup} {100 * self.results.initial.value:.2f} %")

    def _log_result(self) -> None:
        config, best, num_epochs = self.config, find_best_record(self.history), len(self.history)
        plot_history(config.save_path / "results.png", self.history, config.setup)
        if num_epochs < config.epochs:
            log_line(f"stopped after {num_epochs} epochs: {config.patience} epochs without a lower miss rate")
        log_line(
            f"best: {config.save_path / 'best.pt'}  epoch {best.epoch}  {best.format_accuracy(config.setup)}"
            f"{self.distiller.summary()}"
        )
        if interval := format_interval_and_gain(self.results):
            log_line(f"MR^-2 {config.setup} of best.pt: {interval}")
        if warning := find_warning(self.history, self.results):
            log_line(f"warning: {config.save_dir}: {warning}")

    def _run_epoch(self, module: nn.Module, epoch: int, progress: Progress) -> EpochRecord:
        config, is_main, start_s = self.config, self.dist_context.is_main_process, time.monotonic()
        self.start_epoch(epoch)
        progress.set_label(f"epoch {epoch + 1}/{config.epochs}")
        losses, metrics = self.run_epoch_steps(epoch, module, progress)
        images_per_s = self.plan.steps_per_epoch * config.batch / (time.monotonic() - start_s)
        record = EpochRecord(epoch + 1, losses, math.nan, images_per_s, metrics, self.distiller.target_reached)
        if is_main:
            self._finish_epoch(record, start_s)
        else:
            self.history.append(record)
        return self.history[-1]

    def start_epoch(self, epoch: int) -> None:
        """Set the random seeds and the augmentations of an epoch.

        Args:
            epoch: Index of the epoch, from 0.
        """
        config = self.config
        self.sampler.epoch = epoch
        torch.manual_seed(_derive_seed(config.seed, epoch, self.dist_context.rank))
        self.sampler.no_aug = epoch >= get_last_phase_start(config.epochs, config.no_aug_ratio)
        self.sampler.no_unlabeled = epoch >= get_last_phase_start(config.epochs, config.no_distill_ratio)

    def _finish_epoch(self, record: EpochRecord, start_s: float) -> None:
        """Evaluate an epoch and save its files."""
        config, directory = self.config, self.config.save_path
        deployable = self.distiller.deployable_model(self.ema.module)
        result = evaluate(deployable, self.val_samples, config)
        precision = evaluate_average_precision(self.val_samples, result.detections)
        past_s = self.history[-1].time_s if self.history else 0.0
        record = replace(
            record,
            miss_rate=result.miss_rate,
            ap=precision["AP"],
            ap50=precision["AP50"],
            recall=result.operating_point.recall,
            threshold=result.operating_point.threshold,
            lr=self.optimizer.param_groups[0]["lr"],
            time_s=past_s + time.monotonic() - start_s,
        )
        self.history.append(record)
        self.results.add(result.result, record.meets_target and find_best_record(self.history) is record)
        if save_epoch(self, record, deployable):
            setup = SETUPS[config.setup]
            draw_val_errors(directory / "val_errors.jpg", self.val_samples, result.detections, record.threshold, setup)
        if time.monotonic() - self._plot_s >= PLOT_INTERVAL_S:
            self._plot_s = time.monotonic()
            plot_history(directory / "results.png", self.history, config.setup)

    def run_epoch_steps(
        self, epoch: int, module: nn.Module | None = None, progress: Progress | None = None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Run the training steps of an epoch; see `train_one_epoch`.

        Args:
            epoch: Index of the epoch, from 0.
            module: DDP wrapper of the distiller, or None to use the distiller itself.
            progress: Progress of the run, one unit per step.

        Returns:
            Mean losses and mean metrics.
        """
        self.distiller.train()
        if self.config.freeze_bn:
            freeze_batch_norm(self.distiller.student)
        return train_one_epoch(
            module or self.distiller,
            self.loader,
            self.optimizer,
            self.balancer,
            self.ema,
            self._compute_lr,
            self.distiller,
            self.dist_context.device,
            epoch,
            self.config,
            progress,
        )

    def _compute_lr(self, step: int) -> float:
        total_steps = self.config.epochs * self.plan.steps_per_epoch
        return self.config.lr * compute_lr_factor(step, total_steps, self.config.warmup_ratio)

    def _log_model_summary(self) -> None:
        config = self.config
        write_text(config.save_path / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))
        complexity = count_params_and_flops(self.distiller.deployable_model(self.distiller.student), config.imgsz_hw)
        unlabeled = f" and {self.plan.num_unlabeled} unlabeled" if self.plan.num_unlabeled else ""
        device = self.dist_context.device
        precision = "bf16" if uses_bf16(config.precision, device) else "fp32"
        log_line(
            f"{config.model}: {complexity.num_params / 1e6:.2f} M parameters, {complexity.flops / 1e9:.2f} GFLOPs at "
            f"{config.imgsz_hw[1]}x{config.imgsz_hw[0]}; {self.plan.num_images} training images{unlabeled}, "
            f"{len(self.val_samples)} validation images; {self.dist_context.world_size} x {device}, {precision}"
        )


def _derive_seed(seed: int, epoch: int, rank: int) -> int:
    """Return the seed of an epoch, so that a resumed run samples like an uninterrupted one."""
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])
