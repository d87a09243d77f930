"""`--batch auto`: the largest batch whose training step fits into the GPU memory."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from hkd_det.console import log_line, log_stage
from hkd_det.datasets.catalog import load_dataset
from hkd_det.distill import load_method
from hkd_det.errors import UsageError
from hkd_det.letterbox import STRIDE
from hkd_det.models.base import Targets
from hkd_det.ops.losses import sum_losses
from hkd_det.train.config import TrainConfig
from hkd_det.train.context import init_distributed, make_epoch_plan, make_run_context
from hkd_det.train.engine import uses_bf16
from hkd_det.train.trainer import Trainer

MEMORY_RATIO = 0.7  # of the free memory: fragmentation, validation and images with many persons need the rest
MAX_BATCH = 256
NUM_BOXES = 32  # per image


def find_batch(config: TrainConfig) -> int:
    """Measure the memory of training steps with growing batches and choose the batch size.

    Args:
        config: Configuration of the run; its `batch` has no effect.

    Returns:
        Images per step.

    Raises:
        UsageError: The device is no GPU, several processes run, or the student is made in a stage before training.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--batch auto: measures one process. Run it once without torchrun, then set the total number.")
    for name in config.distill:
        if load_method(name).student_source == "prepared":
            raise UsageError(f"--batch auto: --distill {name} makes the student in a stage before. Set a number.")
    with init_distributed(config.device) as dist_context:
        device = dist_context.device
        if device.type != "cuda":
            raise UsageError(f"--batch auto: measures the memory of a GPU, and the device is {device}. Set a number.")
        log_stage("measure the memory of training steps")
        config = replace(config, batch=1, workers=0)
        train_samples, val_samples = load_dataset(config.data, "train"), load_dataset(config.data, "val")
        plan = make_epoch_plan(config, len(train_samples), 0)
        context = make_run_context(config, plan, dist_context, train_samples, val_samples, resume=False)
        trainer = Trainer(config, plan, context, dist_context, train_samples, val_samples, _get_weights(config))
        free_bytes, _ = torch.cuda.mem_get_info(device)
        budget_bytes = int(MEMORY_RATIO * (free_bytes + torch.cuda.memory_reserved(device)))
        batch = choose_batch(partial(_measure_step, trainer), budget_bytes)
        trainer.distiller.close()
        del trainer
        torch.cuda.empty_cache()
    log_line(
        f"--batch auto: {batch} images per step, {MEMORY_RATIO:.0%} of {free_bytes / 2**30:.1f} GiB of free memory"
    )
    return batch


def choose_batch(measure: Callable[[int], int], budget_bytes: int, max_batch: int = MAX_BATCH) -> int:
    """Double the batch while it fits, then interpolate and measure the result.

    Args:
        measure: Returns the peak memory of a step with a batch size, bytes. It may raise `torch.OutOfMemoryError`.
        budget_bytes: Memory that a step may use.
        max_batch: Largest batch to choose.

    Returns:
        Batch size, 1 to `max_batch`.

    Raises:
        UsageError: One image does not fit.
    """
    sizes: dict[int, int] = {}
    batch, limit = 1, max_batch + 1  # limit: the smallest batch that does not fit
    while batch < limit:
        used_bytes = _measure_or_none(measure, batch)
        if used_bytes is None or used_bytes > budget_bytes:
            limit = batch
        else:
            sizes[batch] = used_bytes
            batch *= 2
    if not sizes:
        raise UsageError("--batch auto: a step with one image exceeds the free GPU memory. Use a smaller --imgsz.")
    largest = max(sizes)
    if len(sizes) == 1 or limit <= largest + 1:
        return largest
    bytes_per_image = max(1.0, (sizes[largest] - sizes[largest // 2]) / (largest - largest // 2))
    estimate = min(limit - 1, largest + int((budget_bytes - sizes[largest]) / bytes_per_image))
    used_bytes = _measure_or_none(measure, estimate)
    return estimate if used_bytes is not None and used_bytes <= budget_bytes else largest


def _measure_or_none(measure: Callable[[int], int], batch: int) -> int | None:
    try:
        return measure(batch)
    except torch.OutOfMemoryError:
        return None


def _measure_step(trainer: Trainer, batch: int) -> int:
    """Run one training step on random images of the largest size and return its peak memory in bytes."""
    config, device = trainer.config, trainer.dist_context.device
    num_images = batch + replace(config, batch=batch).unlabeled_batch
    height, width = (-(-int(side * (1 + config.multi_scale)) // STRIDE) * STRIDE for side in config.imgsz_hw)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    images = torch.randint(0, 256, (num_images, 3, height, width), dtype=torch.uint8, device=device)
    boxes = torch.tensor([0.25 * width, 0.25 * height, 0.5 * width, 0.75 * height], device=device)
    shape = (num_images, NUM_BOXES)
    targets = Targets(
        boxes.expand(*shape, 4).contiguous(),
        torch.ones(shape, dtype=torch.bool, device=device),
        torch.zeros(shape, dtype=torch.bool, device=device),
    )
    trainer.distiller.train()
    with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config.precision, device)):
        det_losses, distill_losses = trainer.distiller(
            images.contiguous(memory_format=torch.channels_last), targets, 1.0
        )
    trainer.optimizer.zero_grad(set_to_none=True)
    losses = det_losses | distill_losses
    det_loss = sum_losses(det_losses) if det_losses else torch.zeros_like(sum_losses(losses))
    trainer.balancer.backward(det_loss, sum_losses(distill_losses) if distill_losses else None, 1.0)
    trainer.optimizer.step()
    return torch.cuda.max_memory_reserved(device)


def _get_weights(config: TrainConfig) -> Path | None:
    return Path(config.weights) if config.weights else None
