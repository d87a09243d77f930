"""The block stage of a run with `--distill blockwise`: from a teacher to `blockwise/assembled.pt`, then fine-tuned."""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hkd_det.datasets import Sample
from hkd_det.distill.blockwise.activations import create_npy
from hkd_det.distill.blockwise.blocks import StateDict, assemble, find_replaceable_convs
from hkd_det.distill.blockwise.config import BlockwiseConfig
from hkd_det.distill.blockwise.method import (
    AssemblyResult,
    BlockwiseStage,
    read_blocks,
    train_blocks,
    write_blockwise_report,
)
from hkd_det.distill.distiller import DistillationLoss
from hkd_det.errors import DataError, UsageError
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import DetectorCheckpoint, save_detector_checkpoint, weights_sha256
from hkd_det.models.zoo import count_params_and_flops, load_detector
from hkd_det.train.config import TrainConfig
from hkd_det.train.dataset import EpochPlan, build_dataloader, iterate_batches
from hkd_det.train.distributed import DistributedContext
from hkd_det.train.engine import evaluate_miss_rate


def prepare_blockwise_student(
    config: TrainConfig,
    blockwise_config: BlockwiseConfig,
    dist_context: DistributedContext,
    train_samples: Sequence[Sample],
    val_samples: Sequence[Sample],
    resume: bool,
) -> Path:
    """The checkpoint of the teacher with its blocks replaced; learns what of it is not there yet.

    With `resume` one that is there is taken as it is. `blockwise/report.json` beside it tells how it came about.
    """
    path = config.save_path / "blockwise" / "assembled.pt"
    if resume and path.exists():
        return path
    if dist_context.world_size > 1:
        raise UsageError(
            "blocks are learnt by workers of their own, not under torchrun: start without it "
            "(distill.blockwise.workers), then fine-tune under torchrun with --weights blockwise/assembled.pt"
        )
    teacher = load_detector(Path(config.teacher)).to(dist_context.device).requires_grad_(False)
    if config.distill.online_methods.names:  # what can't be is said now, not when the blocks are learnt
        DistillationLoss(deepcopy(teacher), teacher, config.distill.online_methods).close()
    layers = find_replaceable_convs(teacher, config.imgsz_hw, blockwise_config.parts, blockwise_config.min_channels)
    tqdm.write(f"blockwise: {len(layers)} blocks, from {layers[0].name} to {layers[-1].name}")
    stage = BlockwiseStage(
        path.parent,
        partial(load_detector, Path(config.teacher).resolve()),
        partial(_write_images, config, blockwise_config.num_images, train_samples),
        blockwise_config,
        _make_fingerprint(config, teacher),
        config.seed,
        config.device,
    )
    course = train_blocks(stage, teacher, layers)
    blocks = read_blocks(path.parent, layers)
    student, result = _assemble_student(config, blockwise_config, teacher, blocks, val_samples)
    save_detector_checkpoint(
        path, DetectorCheckpoint.from_detector(student, config.model, config.as_dict(), 0, result.miss_rate)
    )
    write_blockwise_report(path.with_name("report.json"), course, blockwise_config.scheduler, result)
    tqdm.write(_format_assembly(config, result, len(layers)))
    return path


def _make_fingerprint(config: TrainConfig, teacher: BaseDetector) -> dict[str, object]:
    """What fixes the blocks beside the method's own settings; a stage with another identity starts over."""
    return {
        "teacher": weights_sha256(teacher.state_dict()),
        "data": config.data,
        "imgsz_hw": list(config.imgsz_hw),
        "mosaic": config.mosaic,
        "images_batch": config.batch,  # which views are drawn depends on it
        "seed": config.seed,
    }


def _write_images(config: TrainConfig, num_images: int, samples: Sequence[Sample], path: Path) -> None:
    """Write `count` training views, all of the run's size: [count, 3, H, W] uint8 RGB."""
    epochs = EpochPlan(len(samples), min(config.batch, num_images), config.imgsz_hw, 0.0, config.mosaic, config.seed)
    loader, sampler = build_dataloader(samples, epochs, 0, 1, config.workers, config.cache_mib)
    with (
        create_npy(path, (num_images, 3, *config.imgsz_hw), np.uint8) as views,
        tqdm(total=num_images, desc="views") as bar,
    ):
        drawn = 0
        while drawn < num_images:
            for pictures, _ in iterate_batches(loader):
                taken = pictures[: num_images - drawn].numpy()
                views[drawn : drawn + len(taken)] = taken
                drawn += len(taken)
                bar.update(len(taken))
                if drawn == num_images:
                    break
            sampler.epoch += 1


def _assemble_student(
    config: TrainConfig,
    blockwise_config: BlockwiseConfig,
    teacher: BaseDetector,
    blocks: dict[str, StateDict],
    val_samples: Sequence[Sample],
) -> tuple[BaseDetector, AssemblyResult]:
    """The network of those blocks that stay within the limit, and how it compares with the teacher."""
    judged = partial(evaluate_miss_rate, config, val_samples)
    best = judged(teacher)
    alone = (
        {layer: judged(assemble(teacher, {layer: blocks[layer]})) for layer in blocks}
        if blockwise_config.evaluate_blocks
        else {}
    )
    taken = [layer for layer in blocks if alone.get(layer, best) - best <= blockwise_config.max_mr_increase]
    if not taken:
        raise DataError(
            f"distill.blockwise.max_mr_increase={blockwise_config.max_mr_increase}: every block alone raises the miss rate by more, "
            f"{100 * (min(alone.values()) - best):.2f} points at least; raise it, or learn longer"
        )
    student = assemble(teacher, {layer: blocks[layer] for layer in taken})
    before, after = count_params_and_flops(teacher, config.imgsz_hw), count_params_and_flops(student, config.imgsz_hw)
    return student, AssemblyResult(
        best,
        judged(student),
        alone,
        [layer for layer in blocks if layer not in taken],
        (before.num_params, after.num_params),
        (before.flops, after.flops),
    )


def _format_assembly(config: TrainConfig, result: AssemblyResult, num_blocks: int) -> str:
    (parameters, parameters_now), (flops, flops_now) = result.parameters, result.flops
    return (
        f"assembled: {num_blocks - len(result.excluded_layers)} of {num_blocks} blocks, parameters {parameters / 1e6:.2f} M to "
        f"{parameters_now / 1e6:.2f} M, {flops / 1e9:.2f} to {flops_now / 1e9:.2f} GFLOPs, MR^-2 {config.setup} "
        f"{100 * result.teacher_miss_rate:.2f} % to {100 * result.miss_rate:.2f} % before fine-tuning"
    )
