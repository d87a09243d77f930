"""Context of a run: its processes and device, checks of the data, and the values that the distillation methods use.

Training runs in one process or, under torchrun, in several.
"""

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from hkd_det.datasets import Sample
from hkd_det.datasets.base import DatasetError, log_notices
from hkd_det.datasets.catalog import find_common_images
from hkd_det.distill import load_method
from hkd_det.distill.base import RunContext
from hkd_det.distill.distiller import Distiller, build_methods
from hkd_det.errors import DataError, UnavailableError, UsageError
from hkd_det.metrics.citypersons import SETUPS, evaluate_detections
from hkd_det.models.zoo import load_detector
from hkd_det.train.config import TrainConfig, get_last_phase_start
from hkd_det.train.dataset import EpochPlan, build_dataloader, iterate_batches
from hkd_det.train.engine import evaluate

T = TypeVar("T")


@dataclass(frozen=True)
class DistributedContext:
    """The rank and device of this process, with the collective operations that training uses.

    Attributes:
        rank: Index of this process, from 0.
        world_size: Number of processes.
        device: Device that this process trains on.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def reduce_mean(self, total: Tensor) -> Tensor:
        """Sum a normalization term over all processes, clamp it to at least 1, and divide by the world size.

        Gradients are averaged over processes. A loss that is divided by the returned value is therefore divided by the
        global sum.

        Args:
            total (Tensor): The term of this process, any shape.

        Returns:
            Tensor of the same shape, without gradient.
        """
        global_total = total.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(global_total)
        return global_total.clamp(min=1.0) / self.world_size

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors in place by their means over all processes, in one all-reduce.

        Args:
            tensors: Tensors of the same dtype and device, with the same shapes in all processes.
        """
        if self.world_size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        means = torch.split(flat / self.world_size, [tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view_as(tensor))

    def all_gather(self, value: T) -> list[T]:
        """Collect one picklable value from every process.

        Args:
            value: The value of this process. Tensors inside it may be on any device.

        Returns:
            The values ordered by rank. Tensors stay on the device of the process that passed them.
        """
        if self.world_size == 1:
            return [value]
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def init_distributed(device: str) -> Iterator[DistributedContext]:
    """Join the process group of torchrun, if there is one, for the time of the context.

    Args:
        device: "auto" (CUDA if available), "cpu", "cuda" or "cuda:N".

    Yields:
        The context of this process; world size 1 without torchrun.

    Raises:
        UsageError: `device` is not a device name.
        UnavailableError: The CUDA device does not exist.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch_device = resolve_device(device)
    if world_size == 1:
        yield DistributedContext(0, 1, torch_device)
        return
    shared_store = next(iter(rendezvous("env://")))[0]
    # torchrun's store keeps the addresses of earlier process groups. A unique prefix prevents that they are reused.
    group_name = f"group {shared_store.add(f'number of groups of rank {rank}', 1)}"
    store = dist.PrefixStore(group_name, shared_store)  # type: ignore[attr-defined]  # missing in the stubs
    backend = "nccl" if torch_device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield DistributedContext(rank, world_size, torch_device)
        dist.barrier()  # keep the group alive until every process has finished communicating
    finally:
        dist.destroy_process_group()


def resolve_device(name: str) -> torch.device:
    """Return the device of this process and make it the current CUDA device.

    Args:
        name: "auto" (CUDA if available), "cpu", "cuda" (index `LOCAL_RANK`) or "cuda:N".

    Returns:
        The device; a CUDA device has an index.

    Raises:
        UsageError: `name` is not a device name.
        UnavailableError: The CUDA device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UnavailableError(f"--device {name}: torch finds no CUDA device. Train with --device cpu.")
        device = torch.device(
            "cuda", device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        )
        num_devices = torch.cuda.device_count()
        if device.index >= num_devices:
            raise UnavailableError(
                f"--device {name}: CUDA device {device.index} does not exist. Use cuda:0 to cuda:{num_devices - 1}."
            )
        torch.cuda.set_device(device)
    return device


def check_annotations(config: TrainConfig, train_samples: Sequence[Sample], val_samples: Sequence[Sample]) -> None:
    """Check before training that both splits contain persons, and log images that belong to both.

    Args:
        config: Configuration with the evaluation setup.
        train_samples: Training split.
        val_samples: Validation split.

    Raises:
        DataError: If the training split has only ignore regions, or no validation box belongs to the setup.
    """
    if all(sample.ground_truth.ignore.all() for sample in train_samples):
        command = f"hkd-train --data {shlex.quote(config.data)} --check"
        raise DataError(f"--data {config.data}: the train split contains no person. Run {command}.")
    if common := find_common_images(val_samples, train_samples):
        message = (
            f"--data {config.data}: {len(common)} of {len(val_samples)} validation images are also training images, so "
            "the miss rate is too good. Use other images as val."
        )
        log_notices([DatasetError(message, "same_images", is_error=False)])
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
    """Return the values of the run that the distillation methods use.

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
        context: Values of the run that the methods use.

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
