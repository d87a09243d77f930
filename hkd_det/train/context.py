"""Preparation of a run: checks of the data, and what the distillation methods see of the run."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path

from torch import Tensor

from hkd_det.datasets import Sample
from hkd_det.distill import load_method
from hkd_det.distill.base import RunContext
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.errors import DataError
from hkd_det.metrics.citypersons import SETUPS, evaluate_detections
from hkd_det.models.zoo import load_detector
from hkd_det.train.config import TrainConfig, get_last_phase_start
from hkd_det.train.dataset import EpochPlan, build_dataloader, iterate_batches
from hkd_det.train.distributed import DistributedContext
from hkd_det.train.engine import evaluate


def check_annotations(config: TrainConfig, train_samples: Sequence[Sample], val_samples: Sequence[Sample]) -> None:
    """Check before training that both splits contain persons.

    Args:
        config: Configuration with the evaluation setup.
        train_samples: Training split.
        val_samples: Validation split.

    Raises:
        DataError: If the training split has only ignore regions, or no validation box belongs to the setup.
    """
    if all(sample.ground_truth.ignore.all() for sample in train_samples):
        raise DataError(f"--data {config.data}: the train split contains no person. Check it with hkd-train --check.")
    setup = SETUPS[config.setup]
    if evaluate_detections(val_samples, [], [setup])[setup.name].num_gt == 0:
        raise DataError(
            f"--data {config.data}: the val split has no person in setup {setup.name} (height from "
            f"{setup.height_px[0]:g} px, visible ratio from {setup.visible_ratio[0]:g}). Use --set setup=All for "
            "smaller persons."
        )


def make_epoch_plan(config: TrainConfig, num_images: int, num_unlabeled: int) -> EpochPlan:
    """Return the plan of the epochs.

    Args:
        config: Configuration of the run.
        num_images: Number of labeled training images.
        num_unlabeled: Number of unlabeled training images.

    Returns:
        The plan.
    """
    return EpochPlan(
        num_images,
        config.batch,
        config.imgsz_hw,
        config.multi_scale,
        config.mosaic,
        config.seed,
        num_unlabeled,
        config.unlabeled_batch,
    )


def make_run_context(
    config: TrainConfig,
    plan: EpochPlan,
    dist_context: DistributedContext,
    train_samples: Sequence[Sample],
    val_samples: Sequence[Sample],
    resume: bool,
) -> RunContext:
    """Return the run as the distillation methods see it.

    Args:
        config: Configuration of the run.
        plan: Plan of the epochs.
        dist_context: Processes of the run.
        train_samples: Labeled training images.
        val_samples: Validation images.
        resume: Whether the run continues an earlier one.

    Returns:
        The context.
    """

    def iterate_images(num_images: int) -> Iterator[Tensor]:
        batch = min(config.batch, num_images)
        image_plan = EpochPlan(len(train_samples), batch, config.imgsz_hw, 0.0, config.mosaic, config.seed)
        loader, sampler = build_dataloader(train_samples, image_plan, 0, 1, config.workers, config.cache_mib)
        while True:
            for images, _ in iterate_batches(loader):
                yield images
            sampler.epoch += 1

    return RunContext(
        model=config.model,
        teacher=Path(config.teacher),
        save_dir=config.save_path,
        imgsz_hw=config.imgsz_hw,
        total_steps=config.epochs * plan.steps_per_epoch,
        distill_ratio=get_last_phase_start(config.epochs, config.no_distill_ratio) / config.epochs,
        seed=config.seed,
        device=config.device,
        torch_device=dist_context.device,
        world_size=dist_context.world_size,
        resume=resume,
        setup=config.setup,
        settings=config.as_dict(),
        fingerprint={
            "data": config.data,
            "imgsz_hw": list(config.imgsz_hw),
            "mosaic": config.mosaic,
            "images_batch": config.batch,  # the sampled images depend on it
            "seed": config.seed,
        },
        all_gather=dist_context.all_gather,
        iterate_images=iterate_images,
        evaluate=lambda detector: evaluate(detector, val_samples, config).miss_rate,
    )


def resolve_initial_weights(config: TrainConfig, context: RunContext) -> Path | None:
    """Let a method make the student from the teacher.

    Args:
        config: Configuration of the run.
        context: The run as the methods see it.

    Returns:
        Checkpoint of the initial student, or None for a new one.
    """
    weights = Path(config.weights) if config.weights else None
    for name, method_config in config.distill.items():
        method = load_method(name)
        if method.student_source == "prepared":
            if not (context.resume or context.world_size > 1):
                _check_online_methods(config, context)
            weights = method.prepare_student(method_config, context) or weights
    return weights


def _check_online_methods(config: TrainConfig, context: RunContext) -> None:
    """Build the methods of the training once, so that a wrong setting is reported before the student is made."""
    if config.online_methods:
        teacher = load_detector(context.teacher).to(context.torch_device).requires_grad_(False)
        student = deepcopy(teacher)
        methods = build_methods(config.online_methods, student, teacher, context.teacher)
        for method in methods:
            method.setup(context)
        Distiller(student, teacher, methods).close()
