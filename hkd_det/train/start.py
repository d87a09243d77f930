"""The part of `hkd-train` that needs torch: from flags to a new or resumed run, and the list of feature layers.

`--batch auto` is the largest batch whose training step fits into the GPU memory.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hkd_det.console import log_line, log_stage
from hkd_det.datasets.catalog import load_dataset
from hkd_det.distill import METHODS, load_method, override_method
from hkd_det.errors import HkdError, UsageError
from hkd_det.letterbox import STRIDE, parse_imgsz
from hkd_det.models.base import BaseDetector, Targets
from hkd_det.models.checkpoint import load_training_state
from hkd_det.models.feature_layers import format_feature_layers, list_feature_layers
from hkd_det.models.zoo import build_model, get_spec, load_detector, read_model_name
from hkd_det.ops.losses import sum_losses
from hkd_det.train.baseline import compare_with_baseline, format_comparison, make_baseline_config
from hkd_det.train.config import FINETUNE_LR, TrainConfig
from hkd_det.train.context import init_distributed, make_epoch_plan, make_run_context
from hkd_det.train.engine import uses_bf16
from hkd_det.train.run import handle_interrupts
from hkd_det.train.settings import AUTO_BATCH, find_resumed_state, make_required_error
from hkd_det.train.trainer import Trainer, train

MEMORY_RATIO = 0.7  # of the free memory: fragmentation, validation and images with many persons need the rest
MAX_BATCH = 256
NUM_BOXES = 32  # per image


def start_training(arguments: argparse.Namespace, settings: dict[str, Any]) -> int:
    """Train as the flags of `hkd-train` request.

    Args:
        arguments: Parsed flags.
        settings: Result of `merge_settings`; empty for a resumed run.

    Returns:
        Exit code.
    """
    if arguments.resume:
        config = _load_resumed_config(Path(arguments.resume))
    else:
        config = _build_new_config(arguments, settings)
    baseline = make_baseline_config(config) if arguments.baseline else None
    before = _read_mtime_ns(config.save_path / "last.pt")
    try:
        with handle_interrupts():
            train(config, resume=bool(arguments.resume))
            if baseline:
                train(baseline, resume=bool(arguments.resume) and _is_started(baseline))
                if os.environ.get("RANK", "0") == "0":
                    print(format_comparison(compare_with_baseline(config)))
    except (KeyboardInterrupt, HkdError, OSError) as error:
        # With --exist-ok, last.pt belongs to the earlier run until this one has finished an epoch.
        is_interrupted = isinstance(error, KeyboardInterrupt)
        is_changed = _read_mtime_ns(config.save_path / "last.pt") != before
        if is_changed or (arguments.resume and is_interrupted):
            command = f"hkd-train --resume {shlex.quote(str(config.save_dir))}{' --baseline' if baseline else ''}"
            print(f"hkd-train: the finished epochs are saved. Continue with: {command}", file=sys.stderr)
        elif is_interrupted and any((config.save_path / name).is_dir() for name in config.distill):
            print("hkd-train: the prepared student is saved so far. Continue with the same command.", file=sys.stderr)
        raise
    return 0


def print_feature_layers(arguments: argparse.Namespace) -> int:
    """Print the feature layers of each detector that the flags name, with the size of their outputs.

    Args:
        arguments: Parsed flags.

    Returns:
        Exit code.

    Raises:
        UsageError: If no detector is named.
    """
    detectors: dict[str, BaseDetector] = {}
    if arguments.weights:
        detectors[f"--weights {arguments.weights}"] = load_detector(Path(arguments.weights))
    elif arguments.model:
        detectors[f"--model {arguments.model}"] = build_model(arguments.model, arguments.backbone or "")
    if arguments.teacher:
        detectors[f"--teacher {arguments.teacher}"] = load_detector(Path(arguments.teacher))
    if not detectors:
        raise UsageError("--list-layers: requires a detector. Add --model, --weights or --teacher.")
    imgsz_hw = parse_imgsz(arguments.imgsz) if arguments.imgsz else TrainConfig.imgsz_hw
    for name, detector in detectors.items():
        table = format_feature_layers(list_feature_layers(detector), imgsz_hw)
        print(f"{name}, features at {imgsz_hw[1]}x{imgsz_hw[0]}:\n{table}")
    return 0


def _read_mtime_ns(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _is_started(baseline: TrainConfig) -> bool:
    """Return whether the directory holds a run of these settings, not an earlier one that --exist-ok replaces."""
    path = baseline.save_path / "last.pt"
    if not path.exists():
        return False
    saved = load_training_state(path)["config"]
    return TrainConfig.from_dict({**saved, "save_dir": baseline.save_dir}) == baseline


def _build_new_config(arguments: argparse.Namespace, settings: dict[str, Any]) -> TrainConfig:
    config = resolve_settings(arguments, settings)
    if not _get_initial_checkpoint(config.as_dict()):
        get_spec(config.model)
    directories = [config.save_path]
    if arguments.baseline:
        directories.append(make_baseline_config(config).save_path)
    for directory in directories:
        if (directory / "last.pt").exists() and not arguments.exist_ok:
            raise UsageError(
                f"{directory}: already contains a run. Continue it with --resume {config.save_path}, choose another "
                "--name, or replace it with --exist-ok."
            )
    return config


def resolve_settings(arguments: argparse.Namespace, settings: dict[str, Any]) -> TrainConfig:
    """Complete settings with what checkpoints and methods determine.

    Args:
        arguments: Parsed flags.
        settings: Result of `merge_settings`.

    Returns:
        The configuration of the run.

    Raises:
        HkdError: A file or a combination of settings is invalid.
    """
    for assignment in arguments.set:
        if assignment.startswith("distill."):
            settings["distill"] = override_method(settings["distill"], assignment)
    sources = _get_student_sources(settings)
    if "teacher" in sources and not settings.get("model"):
        settings.setdefault("weights", settings.get("teacher", ""))
    if checkpoint := _get_initial_checkpoint(settings):
        model = read_model_name(Path(checkpoint), settings.get("model") or "")
        if settings.setdefault("model", model) != model:
            raise UsageError(f"--model {settings['model']}: {checkpoint} is a {model}. Omit --model to use it.")
        if "lr" not in settings:
            settings["lr"] = FINETUNE_LR
            if os.environ.get("RANK", "0") == "0":
                log_line(
                    f"lr={FINETUNE_LR:g}, because the student starts from {checkpoint}. Set another one with --set lr=."
                )
    # A student that starts from the teacher needs no --model.
    for flag in ("teacher" if sources - {"config"} else "model", "model"):
        if not settings.get(flag):
            raise make_required_error(flag)
    settings["save_dir"] = _choose_save_dir(arguments, settings)
    if settings.get("batch") == AUTO_BATCH:
        settings["batch"] = find_batch(TrainConfig.from_dict({**settings, "batch": 1}, arguments.recipe))
    return TrainConfig.from_dict(settings, arguments.recipe)


def _get_student_sources(settings: dict[str, Any]) -> set[str]:
    """Return `DistillMethod.student_source` of the methods in use; unknown names are reported later."""
    methods = [name for name, value in settings["distill"].items() if value is not None and name in METHODS]
    return {load_method(name).student_source for name in methods}


def _get_initial_checkpoint(settings: dict[str, Any]) -> str:
    """Return the checkpoint that gives the architecture of the student, or an empty string."""
    return str(settings.get("teacher" if "prepared" in _get_student_sources(settings) else "weights") or "")


def _choose_save_dir(arguments: argparse.Namespace, settings: dict[str, Any]) -> str:
    if not (arguments.name or arguments.project) and "save_dir" in settings:
        return str(settings["save_dir"])
    name = arguments.name or "-".join([str(settings["model"]), *map(str, settings["distill"])])
    return str(Path(arguments.project or "runs/train") / name)


def _load_resumed_config(save_path: Path) -> TrainConfig:
    path = find_resumed_state(save_path)
    return TrainConfig.from_dict({**load_training_state(path)["config"], "save_dir": str(path.parent)})


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
