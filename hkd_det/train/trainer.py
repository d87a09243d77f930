"""A training run: builds its objects, loops over the epochs, saves and resumes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from hkd_det.datasets import Sample
from hkd_det.datasets.catalog import load_dataset
from hkd_det.datasets.image_files import read_unlabeled
from hkd_det.distill.base import RunContext
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.distill.gradients import SumBalancer
from hkd_det.errors import DataError
from hkd_det.files import file_sha256, write_text
from hkd_det.models.base import BaseDetector
from hkd_det.models.batch_norm import freeze_batch_norm
from hkd_det.models.checkpoint import (
    DetectorCheckpoint,
    load_training_state,
    save_detector_checkpoint,
    save_training_state,
)
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
from hkd_det.train.engine import EpochRecord, ModelEma, evaluate, train_one_epoch, write_history


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


def train(config: TrainConfig, resume: bool = False) -> TrainResult:
    """Train a detector. An interruption loses the unfinished epoch only.

    Args:
        config: Configuration of the run. All files go to `config.save_dir`.
        resume: Whether to continue after the last finished epoch in that directory.

    Returns:
        The result of the run.

    Raises:
        HkdError: For errors that the user can correct.
    """
    with init_distributed(config.device) as dist_context:
        train_samples, val_samples = load_dataset(config.data, "train"), load_dataset(config.data, "val")
        check_annotations(config, train_samples, val_samples)
        unlabeled_samples = read_unlabeled([Path(directory) for directory in config.unlabeled])
        plan = make_epoch_plan(config, len(train_samples), len(unlabeled_samples))
        context = make_run_context(config, plan, dist_context, train_samples, val_samples, resume)
        weights = resolve_initial_weights(config, context)
        trainer = Trainer(
            config, plan, context, dist_context, [*train_samples, *unlabeled_samples], val_samples, weights
        )
        if resume:
            trainer.load_checkpoint()
        return trainer.fit()


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
        teacher, methods = None, []
        if config.online_methods:
            teacher = _load_teacher(config, dist_context.device)
            methods = build_methods(config.online_methods, student, teacher, Path(config.teacher))
            for method in methods:
                method.setup(context)
        student.to(dist_context.device).to(memory_format=torch.channels_last)
        self.ema = ModelEma(student, config.ema_decay)
        self.distiller = Distiller(student, teacher, methods, dist_context.reduce_mean)
        self.distiller = self.distiller.to(dist_context.device).to(memory_format=torch.channels_last)
        self.balancer = self.distiller.build_balancer(dist_context.all_reduce_mean)
        self.optimizer = torch.optim.AdamW(param_groups_weight_decay(self.distiller, config.weight_decay), lr=config.lr)
        self.loader, self.sampler = build_dataloader(
            samples, plan, dist_context.rank, dist_context.world_size, config.workers, config.cache_mib
        )
        self.teacher_sha256 = file_sha256(Path(config.teacher)) if config.teacher else ""
        self.history: list[EpochRecord] = []

    def fit(self) -> TrainResult:
        """Train the remaining epochs and return the result of the run."""
        config, is_main = self.config, self.dist_context.is_main_process
        if is_main:
            self._log_model_summary()
        module: nn.Module = self.distiller
        # Other balancers average gradients over processes themselves.
        if self.dist_context.world_size > 1 and isinstance(self.balancer, SumBalancer):
            module = DistributedDataParallel(module, find_unused_parameters=len(self.distiller.methods) > 0)
        steps, done = config.epochs * self.plan.steps_per_epoch, len(self.history) * self.plan.steps_per_epoch
        progress: tqdm[Any]
        with tqdm(total=steps, initial=done, unit="step", disable=not is_main) as progress:
            for epoch in range(len(self.history), config.epochs):
                record = self._run_epoch(module, epoch, progress)
                if is_main:
                    progress.write(record.log_line(config.epochs, config.setup))
        best = min((record for record in self.history if record.meets_target), key=lambda record: record.miss_rate)
        result = TrainResult(config.save_path / "best.pt", best.miss_rate, self.history)
        if is_main:
            rate = f"MR^-2 {config.setup} {100 * result.miss_rate:.2f} %"
            tqdm.write(f"best: {result.best}  {rate}{self.distiller.summary()}")
        return result

    def load_checkpoint(self) -> None:
        """Restore the state after the last finished epoch from `last.pt`.

        Raises:
            DataError: If the file belongs to another run.
        """
        path = self.config.save_path / "last.pt"
        state = load_training_state(path)
        saved = TrainConfig.from_dict(state["config"])
        if saved.model != self.config.model:
            raise DataError(f"{path}: expected a run of {self.config.model}, got {saved.model}. Start a new run.")
        if saved.distill != self.config.distill:
            raise DataError(
                f"{path}: the run has other settings under distill. Use those in its config.yaml, or start a new run."
            )
        if state.get("teacher_sha256", self.teacher_sha256) != self.teacher_sha256:
            raise DataError(
                f"{path}: the teacher {self.config.teacher} has changed since. Restore that file, or start a new run."
            )
        try:
            self.distiller.load_state_dict(state["distiller"])
            self.ema.module.load_state_dict(state["ema"])
            self.ema.num_updates = state["ema_updates"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.balancer.load_state_dict(state["balancer"])
            self.history = [EpochRecord(**record) for record in state["history"]]
        except (KeyError, TypeError, RuntimeError) as error:  # missing keys, unknown keys, other shapes
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            raise DataError(
                f"{path}: does not fit this run ({reason}). Another version of hkd-det wrote it, or --weights or "
                "--teacher has changed. Start a new run."
            ) from error

    def _run_epoch(self, module: nn.Module, epoch: int, progress: "tqdm[Any]") -> EpochRecord:
        config, is_main, start = self.config, self.dist_context.is_main_process, time.monotonic()
        self.sampler.epoch = epoch
        torch.manual_seed(_derive_seed(config.seed, epoch, self.dist_context.rank))
        self.sampler.no_aug = epoch >= get_last_phase_start(config.epochs, config.no_aug_ratio)
        self.sampler.no_unlabeled = epoch >= get_last_phase_start(config.epochs, config.no_distill_ratio)
        progress.set_description(f"epoch {epoch + 1}/{config.epochs}")
        losses, metrics = self.run_epoch_steps(epoch, module, progress)
        images_per_s = self.plan.steps_per_epoch * config.batch / (time.monotonic() - start)
        deployable = self.distiller.deployable_model(self.ema.module)
        miss_rate = evaluate(deployable, self.val_samples, config).miss_rate if is_main else float("nan")
        record = EpochRecord(epoch + 1, losses, miss_rate, images_per_s, metrics, self.distiller.target_reached)
        self.history.append(record)
        if is_main:
            self._save_checkpoint(record, deployable)
        return record

    def run_epoch_steps(
        self, epoch: int, module: nn.Module | None = None, progress: "tqdm[Any] | None" = None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Run the training steps of an epoch; see `train_one_epoch`.

        Args:
            epoch: Index of the epoch, from 0.
            module: DDP wrapper of the distiller, or None to use the distiller itself.
            progress: Progress bar, one unit per step.

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

    def _save_checkpoint(self, record: EpochRecord, detector: BaseDetector) -> None:
        """Save the best checkpoint first, then the last: a kill between them repeats the epoch with the same best."""
        config = self.config
        eligible = [past.miss_rate for past in self.history if past.meets_target]
        if record.meets_target and record.miss_rate <= min(eligible):
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
        complexity = count_params_and_flops(self.distiller.deployable_model(self.distiller.student), config.imgsz_hw)
        unlabeled = f" and {self.plan.num_unlabeled} unlabeled" if self.plan.num_unlabeled else ""
        tqdm.write(
            f"{config.model}: {complexity.num_params / 1e6:.2f} M parameters, {complexity.flops / 1e9:.2f} GFLOPs at "
            f"{config.imgsz_hw[1]}x{config.imgsz_hw[0]}; {self.plan.num_images} training images{unlabeled}, "
            f"{len(self.val_samples)} validation images; {self.dist_context.world_size} x {self.dist_context.device}"
        )


def _load_teacher(config: TrainConfig, device: torch.device) -> Any:
    teacher_config = Path(config.teacher_config) if config.teacher_config else None
    return load_teacher(Path(config.teacher), device, teacher_config)


def _derive_seed(seed: int, epoch: int, rank: int) -> int:
    """Return the seed of an epoch, so that a resumed run samples like an uninterrupted one."""
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])
